// Function multiversioning: one body, compiled once per instruction set, picked by the loader.
#ifndef JPK_SIMD_H_
#define JPK_SIMD_H_

#include <cstring>

// It would let compilers drop NaN, by which noise that is not valid is seen, and take subnormal
// numbers for 0 in the whole process.
#ifdef __FAST_MATH__
#error "build without -ffast-math (look for it in CXXFLAGS): noise relies on NaN and infinities"
#endif

// JPK_TARGET_CLONES marks the outermost function of a hot loop; whatever it calls inside the loop
// is JPK_INLINE, so that the callee is compiled with the clone's instruction set. Tests and
// sanitizer builds define JPK_TARGET_CLONES themselves, to pin one variant or none (the loader
// resolves clones before a sanitizer's runtime is up).
#ifndef JPK_TARGET_CLONES
#if defined(__clang__)
#define JPK_KNOWS_LEVELS (__clang_major__ >= 18)
#else
#define JPK_KNOWS_LEVELS (__GNUC__ >= 12)
#endif
#if defined(__x86_64__) && defined(__gnu_linux__) && JPK_KNOWS_LEVELS
#define JPK_HAS_LEVELS
#define JPK_TARGET_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__gnu_linux__)
#define JPK_HAS_FEATURES
#define JPK_TARGET_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define JPK_TARGET_CLONES
#endif
#endif

#define JPK_INLINE inline __attribute__((always_inline))

namespace jpk {

template <typename To, typename From>
JPK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace jpk

#endif  // JPK_SIMD_H_
