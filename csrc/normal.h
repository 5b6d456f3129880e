// Standard normal samples, the stream of jax.random.normal: bits -> uniform on (-1, 1) -> erf_inv.
//
// erf_inv is the polynomial of M. Giles, "Approximating the erfinv function" (GPU Computing Gems,
// 2011), which XLA uses too, in w = -log(1 - u^2). The central branch covers all but 0.34 % (float)
// or 0.10 % (double) of the samples and is all that the vector loop computes; the tails are redone
// one by one.
#ifndef JPK_NORMAL_H_
#define JPK_NORMAL_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.h"
#include "threefry.h"

namespace jpk {

// Samples are made in blocks of this many, a constant, so that the loops over a block vectorize
// whole.
inline constexpr int kBlock = 128;

// Spelled as a fold, not a loop: compilers leave long loops rolled, and a rolled loop over the
// coefficients keeps the loop over the elements from vectorizing.
template <typename T, size_t N, size_t... I>
JPK_INLINE T horner_fold(const T (&coef)[N], T x, std::index_sequence<I...>) {
  T p = coef[0];
  ((p = p * x + coef[I + 1]), ...);
  return p;
}

template <typename T, size_t N>
JPK_INLINE T horner(const T (&coef)[N], T x) {
  return horner_fold(coef, x, std::make_index_sequence<N - 1>());
}

// Each Gaussian<T> says how one element is made: uniform() from its bits, or from the two words
// that threefry gives it, central() = erf_inv(u) * sqrt(2) for w < kCentral, any() for every u.
//
// XLA rounds u^2 before it takes log(1 - u^2), which in the tails costs up to 6e-6 (float) of
// relative accuracy, unless jax_accurate_erf_inv is set. any() does as it is told, so that the
// stream stays the same; in the center the difference is below a tenth of that and is left out.
template <typename T>
struct Gaussian;

template <>
struct Gaussian<float> {
  static constexpr float kCentral = 5.0f;

  static JPK_INLINE float uniform(uint32_t x0, uint32_t x1) { return uniform(x0 ^ x1); }

  static JPK_INLINE float uniform(uint32_t bits) {
    const float unit = bit_cast<float>((bits >> 9) | 0x3F800000u) - 1.0f;
    const float lowest = -0x1.fffffep-1f;
    const float u = unit * 2.0f + lowest;
    return u < lowest ? lowest : u;
  }

  // -log(1 - u^2), absolute error below 2e-7: log(1 + f) = f * Q(f) with Q a minimax polynomial on
  // [sqrt(1/2) - 1, sqrt(2) - 1].
  static JPK_INLINE float minus_log(float u) {
    const float q[] = {-0.0989535074f, 0.161262479f, -0.172782061f, 0.199133479f,
                       -0.249689070f,  0.333346060f, -0.500003751f, 0.999999968f};
    const int32_t bits = bit_cast<int32_t>((1.0f - u) * (1.0f + u));
    const int32_t exponent = (bits - 0x3F3504F3) >> 23;
    const float f = bit_cast<float>(bits - exponent * 0x00800000) - 1.0f;
    return -0.693147181f * static_cast<float>(exponent) - f * horner(q, f);
  }

  static JPK_INLINE float central(float u, float w) {
    const float p[] = {2.81022636e-08f,  3.43273939e-07f, -3.5233877e-06f,
                       -4.39150654e-06f, 0.00021858087f,  -0.00125372503f,
                       -0.00417768164f,  0.246640727f,    1.50140941f};
    return horner(p, w - 2.5f) * u * 1.41421356f;
  }

  static JPK_INLINE float any(float u, bool accurate) {
    const float p[] = {-0.000200214257f, 0.000100950558f, 0.00134934322f,
                       -0.00367342844f,  0.00573950773f,  -0.0076224613f,
                       0.00943887047f,   1.00167406f,     2.83297682f};
    const float w = accurate ? -std::log((1.0f - u) * (1.0f + u)) : -std::log1p(-(u * u));
    if (w < kCentral) return central(u, w);
    return horner(p, std::sqrt(w) - 3.0f) * u * 1.41421356f;
  }
};

template <>
struct Gaussian<double> {
  static constexpr double kCentral = 6.25;

  static JPK_INLINE double uniform(uint32_t x0, uint32_t x1) {
    return uniform(static_cast<uint64_t>(x0) << 32 | x1);
  }

  static JPK_INLINE double uniform(uint64_t bits) {
    const double unit = bit_cast<double>((bits >> 12) | 0x3FF0000000000000u) - 1.0;
    const double lowest = -0x1.fffffffffffffp-1;
    const double u = unit * 2.0 + lowest;
    return u < lowest ? lowest : u;
  }

  // -log(1 - u^2) by the series of 2 atanh(s), s = f / (2 + f), |s| < 0.1716.
  static JPK_INLINE double minus_log(double u) {
    const double q[] = {2.0 / 23, 2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13,
                        2.0 / 11, 2.0 / 9,  2.0 / 7,  2.0 / 5,  2.0 / 3,  2.0};
    const int64_t bits = bit_cast<int64_t>((1.0 - u) * (1.0 + u));
    // The exponent, by a 32-bit shift: AVX2 has no arithmetic shift of 64-bit lanes.
    const int32_t exponent = static_cast<int32_t>((bits - 0x3FE6A09E667F3BCD) >> 32) >> 20;
    const uint64_t scaling = static_cast<uint64_t>(exponent) << 52;
    const double f = bit_cast<double>(static_cast<uint64_t>(bits) - scaling) - 1.0;
    const double s = f / (2.0 + f);
    return -0.693147180559945309 * static_cast<double>(exponent) - s * horner(q, s * s);
  }

  static JPK_INLINE double central(double u, double w) {
    const double p[] = {
        -3.6444120640178196996e-21, -1.685059138182016589e-19,  1.2858480715256400167e-18,
        1.115787767802518096e-17,   -1.333171662854620906e-16,  2.0972767875968561637e-17,
        6.6376381343583238325e-15,  -4.0545662729752068639e-14, -8.1519341976054721522e-14,
        2.6335093153082322977e-12,  -1.2975133253453532498e-11, -5.4154120542946279317e-11,
        1.051212273321532285e-09,   -4.1126339803469836976e-09, -2.9070369957882005086e-08,
        4.2347877827932403518e-07,  -1.3654692000834678645e-06, -1.3882523362786468719e-05,
        0.0001867342080340571352,   -0.00074070253416626697512, -0.0060336708714301490533,
        0.24015818242558961693,     1.6536545626831027356};
    return horner(p, w - 3.125) * u * 1.4142135623730951;
  }

  static JPK_INLINE double any(double u, bool accurate) {
    const double p[] = {
        2.2137376921775787049e-09, 9.0756561938885390979e-08, -2.7517406297064545428e-07,
        1.8239629214389227755e-08, 1.5027403968909827627e-06, -4.013867526981545969e-06,
        2.9234449089955446044e-06, 1.2475304481671778723e-05, -4.7318229009055733981e-05,
        6.8284851459573175448e-05, 2.4031110387097893999e-05, -0.0003550375203628474796,
        0.00095328937973738049703, -0.0016882755560235047313, 0.0024914420961078508066,
        -0.0037512085075692412107, 0.005370914553590063617,   1.0052589676941592334,
        3.0838856104922207635};
    const double q[] = {
        -2.7109920616438573243e-11, -2.5556418169965252055e-10, 1.5076572693500548083e-09,
        -3.7894654401267369937e-09, 7.6157012080783393804e-09,  -1.4960026627149240478e-08,
        2.9147953450901080826e-08,  -6.7711997758452339498e-08, 2.2900482228026654717e-07,
        -9.9298272942317002539e-07, 4.5260625972231537039e-06,  -1.9681778105531670567e-05,
        7.5995277030017761139e-05,  -0.00021503011930044477347, -0.00013871931833623122026,
        1.0103004648645343977,      4.8499064014085844221};
    const double w = accurate ? -std::log((1.0 - u) * (1.0 + u)) : -std::log1p(-(u * u));
    if (w < kCentral) return central(u, w);
    const double root = std::sqrt(w);
    return (w < 16.0 ? horner(p, root - 3.25) : horner(q, root - 5.0)) * u * 1.4142135623730951;
  }
};

// u[i] of the counter hi[i] * 2^32 + lo[i] under a threefry key, 0 <= i < kBlock.
template <typename T>
JPK_INLINE void uniform_block(Key key, const uint32_t* hi, const uint32_t* lo, T* __restrict u) {
  for (int i = 0; i < kBlock; ++i) {
    uint32_t x0 = hi[i], x1 = lo[i];
    threefry2x32(key, x0, x1);
    u[i] = Gaussian<T>::uniform(x0, x1);
  }
}

// out[i] = sqrt(2) erf_inv(u[i]), 0 <= i < kBlock.
template <typename T>
JPK_INLINE void normal_of_uniforms(const T* u, bool accurate, T* __restrict out) {
  uint8_t in_tail[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const T w = Gaussian<T>::minus_log(u[i]);
    in_tail[i] = w >= Gaussian<T>::kCentral;
    out[i] = Gaussian<T>::central(u[i], w);
  }
  for (int group = 0; group < kBlock; group += 8) {
    uint64_t tails;  // eight flags at a time: nearly all of these words are zero
    std::memcpy(&tails, in_tail + group, sizeof tails);
    if (tails == 0) continue;
    for (int i = group; i < group + 8; ++i) {
      if (in_tail[i]) out[i] = Gaussian<T>::any(u[i], accurate);
    }
  }
}

// out[i] = normal(key, counter hi[i] * 2^32 + lo[i]), 0 <= i < kBlock.
template <typename T>
JPK_INLINE void normal_block(Key key, const uint32_t* hi, const uint32_t* lo, bool accurate,
                             T* __restrict out) {
  T u[kBlock];
  uniform_block(key, hi, lo, u);
  normal_of_uniforms(u, accurate, out);
}

}  // namespace jpk

#endif  // JPK_NORMAL_H_
