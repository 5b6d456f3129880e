// The element types of gradients, and their conversions to and from the type that noise is added
// in.
#ifndef JPK_FLOAT_TYPES_H_
#define JPK_FLOAT_TYPES_H_

#include <cstdint>

#include "simd.h"

namespace jpk {

enum class FloatType { kFloat16, kBFloat16, kFloat32, kFloat64 };

// Storage of the two 16-bit formats. Conversions are integer arithmetic, so that they vectorize on
// every target and do not depend on the flush-to-zero mode that XLA's threads run in.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

JPK_INLINE float widen(float x) { return x; }
JPK_INLINE double widen(double x) { return x; }

JPK_INLINE float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

JPK_INLINE float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  const uint32_t shifted = magnitude << 13;
  const uint32_t normal = shifted + (112u << 23);
  const uint32_t special = shifted | 0x7F800000u;
  const uint32_t subnormal =
      bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return bit_cast<float>(sign | (magnitude < 0x7C00u ? finite : special));
}

// Rounds to nearest, ties to even; overflow gives infinity, as a conversion in XLA does.
JPK_INLINE void narrow(float x, float& to) { to = x; }
JPK_INLINE void narrow(double x, double& to) { to = x; }
JPK_INLINE void narrow(double x, float& to) { to = static_cast<float>(x); }

JPK_INLINE void narrow(float x, BFloat16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}

JPK_INLINE void narrow(float x, Float16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2, whose last place is the smallest subnormal, rounds a small magnitude to a multiple
  // of it.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude < 0x47800000u ? half : 0x7C00u;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  to.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// float64 noise on a 16-bit gradient goes through float32; within 2^-25 of a tie that may be one
// unit off a direct rounding.
JPK_INLINE void narrow(double x, BFloat16& to) { narrow(static_cast<float>(x), to); }
JPK_INLINE void narrow(double x, Float16& to) { narrow(static_cast<float>(x), to); }

}  // namespace jpk

#endif  // JPK_FLOAT_TYPES_H_
