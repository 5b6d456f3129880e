// Which clone of the kernels the loader picked on this machine.
#ifndef JPK_SIMD_TARGET_H_
#define JPK_SIMD_TARGET_H_

#include "simd.h"

namespace jpk {

inline const char* simd_target() {
#if defined(JPK_HAS_LEVELS)
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2, FMA)";
  return "x86-64 (SSE2)";
#elif defined(JPK_HAS_FEATURES)
  if (__builtin_cpu_supports("avx512f")) return "AVX-512F";
  if (__builtin_cpu_supports("avx2")) return "AVX2";
  return "x86-64 (SSE2)";
#else
  return "the compiler's default";
#endif
}

}  // namespace jpk

#endif  // JPK_SIMD_TARGET_H_
