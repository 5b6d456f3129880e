// Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC'11), keyed and counted as jax.random does it with jax_threefry_partitionable.
#ifndef JPK_THREEFRY_H_
#define JPK_THREEFRY_H_

#include <cstdint>

#include "simd.h"

namespace jpk {

struct Key {
  uint32_t k0, k1;
};

JPK_INLINE uint32_t rotate_left(uint32_t x, int d) { return (x << d) | (x >> (32 - d)); }

// Encrypts the counter (x0, x1) in place.
JPK_INLINE void threefry2x32(Key key, uint32_t& x0, uint32_t& x1) {
  const uint32_t k0 = key.k0, k1 = key.k1, k2 = k0 ^ k1 ^ 0x1BD11BDAu;
  auto round = [&](int rotation) {
    x0 += x1;
    x1 = rotate_left(x1, rotation) ^ x0;
  };
  auto four = [&](int a, int b, int c, int d) { round(a), round(b), round(c), round(d); };
  x0 += k0, x1 += k1;
  four(13, 15, 26, 6), x0 += k1, x1 += k2 + 1;
  four(17, 29, 16, 24), x0 += k2, x1 += k0 + 2;
  four(13, 15, 26, 6), x0 += k0, x1 += k1 + 3;
  four(17, 29, 16, 24), x0 += k1, x1 += k2 + 4;
  four(13, 15, 26, 6), x0 += k2, x1 += k0 + 5;
}

// The i-th key of jax.random.split(key, ...), which does not depend on how many keys are split off.
JPK_INLINE Key split(Key key, uint32_t i) {
  uint32_t x0 = 0, x1 = i;
  threefry2x32(key, x0, x1);
  return {x0, x1};
}

}  // namespace jpk

#endif  // JPK_THREEFRY_H_
