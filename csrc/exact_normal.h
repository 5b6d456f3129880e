// Rounded normal samples: R(s |z|) with a sign, for z exactly normal and R(y) = floor(y + 1/2).
//
// A sample is a function of 64 bits, its sign and the first 63 of a uniform V on (0, 1) with
// 2 Q(|z|) = V, and of 128 more bits of V if these do not settle it. |z| comes from polynomials in
// float64 with proven bounds (tools/gaussian_table.py). Where the bound leaves more than one
// integer, V is compared with 2 Q at the boundaries between them, in fixed point of 192 bits after
// the point. ops/grid_noise/_jax_normal.py is the same in plain JAX; results agree because they are
// correctly rounded, whatever the rounding of the arithmetic.
#ifndef JPK_EXACT_NORMAL_H_
#define JPK_EXACT_NORMAL_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "gaussian_table.h"
#include "normal.h"
#include "simd.h"

namespace jpk {

// -- Fixed point ------------------------------------------------------------------------------

// limb[0] + limb[1] 2^64 + .., all times 2^-192: 128 bits before the point and 192 after it.
struct Fixed {
  uint64_t limb[5];

  bool zero() const { return !(limb[0] | limb[1] | limb[2] | limb[3] | limb[4]); }
};

__extension__ typedef unsigned __int128 Wide;

inline Fixed add(const Fixed& a, const Fixed& b) {
  Fixed sum;
  Wide carry = 0;
  for (int i = 0; i < 5; ++i) {
    carry += Wide{a.limb[i]} + b.limb[i];
    sum.limb[i] = static_cast<uint64_t>(carry);
    carry >>= 64;
  }
  return sum;
}

// Rounded down, but for less than two units in the last place.
inline Fixed multiply(const Fixed& a, const Fixed& b) {
  uint64_t product[10] = {};
  for (int i = 0; i < 5; ++i) {
    if (a.limb[i] == 0) continue;
    Wide carry = 0;
    for (int j = 0; j < 5; ++j) {
      carry += Wide{a.limb[i]} * b.limb[j] + product[i + j];
      product[i + j] = static_cast<uint64_t>(carry);
      carry >>= 64;
    }
    product[i + 5] = static_cast<uint64_t>(carry);
  }
  Fixed result;
  std::copy_n(product + 3, 5, result.limb);
  return result;
}

inline Fixed multiply(const Fixed& a, uint64_t factor) {
  Fixed result;
  Wide carry = 0;
  for (int i = 0; i < 5; ++i) {
    carry += Wide{a.limb[i]} * factor;
    result.limb[i] = static_cast<uint64_t>(carry);
    carry >>= 64;
  }
  return result;
}

inline Fixed divide(const Fixed& a, uint64_t divisor) {
  Fixed result;
  Wide rest = 0;
  for (int i = 4; i >= 0; --i) {
    rest = rest << 64 | a.limb[i];
    result.limb[i] = static_cast<uint64_t>(rest / divisor);
    rest %= divisor;
  }
  return result;
}

// a - b, for a >= b.
inline Fixed subtract(const Fixed& a, const Fixed& b) {
  Fixed difference;
  uint64_t borrow = 0;
  for (int i = 0; i < 5; ++i) {
    const Wide from = Wide{a.limb[i]}, less = Wide{b.limb[i]} + borrow;
    difference.limb[i] = static_cast<uint64_t>(from - less);
    borrow = from < less;
  }
  return difference;
}

// Of a double >= 0 below 2^128; its digits beyond the 192nd after the point are left out.
inline Fixed fixed(double x) {
  Fixed result = {{0, 0, 0, 0, 0}};
  int exponent;
  const uint64_t mantissa = static_cast<uint64_t>(std::frexp(x, &exponent) * 0x1p53);
  const int place = 192 + exponent - 53;
  if (place <= -64) return result;
  const Wide shifted = place < 0 ? Wide{mantissa} >> -place : Wide{mantissa} << place % 64;
  const int limb = std::max(place, 0) / 64;
  result.limb[limb] = static_cast<uint64_t>(shifted);
  if (limb < 4) result.limb[limb + 1] = static_cast<uint64_t>(shifted >> 64);
  return result;
}

inline bool less(const Fixed& a, const Fixed& b) {
  for (int i = 4; i >= 0; --i) {
    if (a.limb[i] != b.limb[i]) return a.limb[i] < b.limb[i];
  }
  return false;
}

// -- What samples are rounded to --------------------------------------------------------------

// Samples further out than this many standard deviations, less than 2^-125 of them, are cut off.
inline constexpr double kFurthest = 13.0;

struct Rounding {
  double scale;   // s, between 2^-3 and 2^42
  Fixed spacing;  // 1 / (2 s): half of the distance between integers, in standard deviations

  int64_t most() const { return static_cast<int64_t>(kFurthest * scale); }
};

inline constexpr Fixed kOne = {{0, 0, 0, 1, 0}};

// e^w and sum_j y^(2 j) / (2 j + 1)!! for w = y^2 / 2. With them
// erf(y / sqrt 2) e^w = sqrt(2 / pi) y sum (Abramowitz and Stegun 7.1.6). All terms are positive;
// each loses less than three units of the 192nd bit, and what is lost grows no faster than e^w.
struct Series {
  explicit Series(const Fixed& y) {
    const Fixed y_squared = multiply(y, y), w = divide(y_squared, 2);
    exponential = sum = kOne;
    Fixed p = kOne, q = kOne;
    for (uint64_t j = 1; !p.zero(); ++j) {
      p = divide(multiply(w, p), j);
      q = divide(multiply(y_squared, q), 2 * j + 1);
      exponential = add(exponential, p);
      sum = add(sum, q);
    }
  }

  Fixed exponential, sum;
};

// Whether s |z| >= m - 1/2, for m >= 1, given 1 - V. With y = (m - 1/2) / s this is
// 1 - V >= erf(y / sqrt 2), or that times e^w. The comparison is right unless the two sides are
// closer than 2^-145.
inline bool reaches(const Rounding& rounding, int64_t m, const Fixed& one_minus_v) {
  constexpr Fixed kRootTwoOverPi = {
      {0xA7053E60A24E0DB1u, 0x7E59E2805D5C717Fu, 0xCC42299EA1B28468u, 0u, 0u}};
  const Fixed y = multiply(rounding.spacing, static_cast<uint64_t>(2 * m - 1));
  const Series series(y);
  return !less(multiply(one_minus_v, series.exponential),
               multiply(multiply(kRootTwoOverPi, y), series.sum));
}

// |z|, near y, given 1 - V, by two steps of Newton's method of the second order. With
// d = (1 - V - erf(y / sqrt 2)) e^w sqrt(pi / 2), |z| is y + d + y d^2 / 2 up to the third order.
// Where |z| is at most 8, it is wrong by less than 2^-130, and by less than 2^-60 up to kFurthest.
inline Fixed refined(Fixed y, const Fixed& one_minus_v) {
  constexpr Fixed kRootPiOverTwo = {
      {0x8CF9F5320B0005A8u, 0x7CA41FAE722CEE2Fu, 0x40D931FF62705965u, 1u, 0u}};
  for (int repeat = 0; repeat < 2; ++repeat) {
    const Series series(y);
    const Fixed left = multiply(multiply(kRootPiOverTwo, one_minus_v), series.exponential);
    const Fixed right = multiply(y, series.sum);
    const bool below = less(left, right);
    const Fixed d = below ? subtract(right, left) : subtract(left, right);
    const Fixed second = divide(multiply(y, multiply(d, d)), 2);
    const Fixed first = !below ? add(y, d) : less(y, d) ? Fixed{{0, 0, 0, 0, 0}} : subtract(y, d);
    y = add(first, second);
  }
  return y;
}

// -- Estimates --------------------------------------------------------------------------------

// -log(V (2 - V)) by the series of 2 atanh(s), s = f / (2 + f), |s| < 0.1716.
JPK_INLINE double minus_log_of_tail(double v) {
  const double q[] = {2.0 / 23, 2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13,
                      2.0 / 11, 2.0 / 9,  2.0 / 7,  2.0 / 5,  2.0 / 3,  2.0};
  const int64_t bits = bit_cast<int64_t>(v * (2.0 - v));
  // The exponent, by a 32-bit shift: AVX2 has no arithmetic shift of 64-bit lanes.
  const int32_t exponent = static_cast<int32_t>((bits - 0x3FE6A09E667F3BCD) >> 32) >> 20;
  const uint64_t scaling = static_cast<uint64_t>(exponent) << 52;
  const double f = bit_cast<double>(static_cast<uint64_t>(bits) - scaling) - 1.0;
  const double s = f / (2.0 + f);
  return -0.693147180559945309 * static_cast<double>(exponent) - s * horner(q, s * s);
}

// Of |z|, and by how much it may be wrong.
struct Estimate {
  double z, error;
};

inline Estimate estimate(double v) {
  namespace table = gaussian_table;
  const double w = minus_log_of_tail(v), root = std::sqrt(w);
  if (w < 5.0) {
    const double z = (1.0 - v) * horner(table::kCentral, w - 2.5);
    return {z, table::kCentralBound * (1.0 + z)};
  }
  if (w < 16.0) return {(1.0 - v) * horner(table::kMiddle, root - 3.0), table::kMiddleBound};
  return {(1.0 - v) * horner(table::kFar, std::min(root, 9.5) - 6.5), table::kFarBound};
}

// How far s z may be off, beyond the error of z, by the rounding of products and sums.
inline constexpr double kOfProduct = 0x1p-51;

inline int64_t rounded(double y) { return static_cast<int64_t>(std::floor(y + 0.5)); }

// The uniform V of a sample by all of its bits.
struct Uniform {
  // Of 63 bits, above a sign, and 128 more, the first one highest. They leave V an interval of
  // 2^-191; its middle is no boundary.
  Uniform(uint64_t bits, uint64_t more, uint64_t still_more) {
    const uint64_t high = (bits & ~uint64_t{1}) | more >> 63;
    const uint64_t middle = more << 1 | still_more >> 63, low = still_more << 1 | 1;
    one_minus_v = {{~low + 1, ~middle, ~high, 0, 0}};  // low is not 0
    v = static_cast<double>(high) * 0x1p-64 + static_cast<double>(middle) * 0x1p-128 +
        static_cast<double>(low) * 0x1p-192;
  }

  // |z| itself, see refined.
  Fixed absolute_normal() const;

  Fixed one_minus_v;
  double v;
};

// The least V that estimates are made of; beyond lies less than kFurthest.
inline constexpr double kLeast = 0x1p-126;

inline Fixed Uniform::absolute_normal() const {
  return v < kLeast ? fixed(kFurthest) : refined(fixed(estimate(v).z), one_minus_v);
}

// The sample by all of its bits.
inline int64_t settle(const Rounding& rounding, uint64_t bits, uint64_t more, uint64_t still_more) {
  const Uniform uniform(bits, more, still_more);
  const Estimate of = estimate(std::max(uniform.v, kLeast));
  const double y = of.z * rounding.scale, error = of.error * rounding.scale + kOfProduct * y + 1e-9;
  const int64_t most = rounding.most();
  int64_t least = std::clamp<int64_t>(rounded(y - error), 0, most), last = rounded(y + error);
  last = uniform.v < kLeast ? most : std::clamp<int64_t>(last, 0, most);
  while (least < last) {
    const int64_t m = least + (last - least + 1) / 2;
    if (reaches(rounding, m, uniform.one_minus_v)) {
      least = m;
    } else {
      last = m - 1;
    }
  }
  return bits & 1 ? -least : least;
}

// -- Blocks -----------------------------------------------------------------------------------

// V as far as 64 bits tell: the middle of the interval that they leave.
JPK_INLINE double tail_of_words(uint32_t hi, uint32_t lo) {
  return static_cast<double>(hi) * 0x1p-32 + static_cast<double>(lo | 1) * 0x1p-64;
}

// Samples of kBlock elements by 64 bits each, as doubles, all of them integers, and whether they
// are unsure. This and normal_estimates are functions of their own, as loops in larger ones are not
// sure to be vectorized.
JPK_TARGET_CLONES static void rounded_estimates(double scale, const uint32_t* hi,
                                                const uint32_t* lo, double* __restrict out,
                                                uint8_t* __restrict unsure) {
  namespace table = gaussian_table;
  // A sample is certain if s z is this far from half an integer.
  const double certain = 0.5 - scale * table::kCentralBound;
  const double slope = table::kCentralBound + kOfProduct;
  constexpr double kInteger = 0x1.8p52;  // added, it rounds to an integer
  for (int i = 0; i < kBlock; ++i) {
    const double v = tail_of_words(hi[i], lo[i]);
    const double w = minus_log_of_tail(v);
    const double y = (1.0 - v) * horner(table::kCentral, w - 2.5) * scale;
    const double integer = (y + kInteger) - kInteger;
    unsure[i] = !(std::fabs(y - integer) <= certain - slope * y) | !(w < 5.0);
    out[i] = lo[i] & 1 ? -integer : integer;
  }
}

// The sample of one element that is unsure; more(words) gives four further words, the first one
// highest.
template <typename More>
double rounded_normal(const Rounding& rounding, uint32_t hi, uint32_t lo, const More& more) {
  const double v = tail_of_words(hi, lo);
  const Estimate of = estimate(v);
  const double y = of.z * rounding.scale, integer = std::floor(y + 0.5);
  // 64 bits leave V open by 2^-64 to either side, and z V <= 2 phi(z).
  const double error = (of.error + 0x1p-64 / (of.z * v)) * rounding.scale + kOfProduct * y;
  if (of.z > 2.0 && of.z < 5.5 && std::fabs(y - integer) <= 0.5 - error) {
    return lo & 1 ? -integer : integer;
  }
  uint32_t words[4];
  more(words);
  const auto pair = [](uint32_t high, uint32_t low) { return uint64_t{high} << 32 | low; };
  return static_cast<double>(
      settle(rounding, pair(hi, lo), pair(words[0], words[1]), pair(words[2], words[3])));
}

// Samples of kBlock elements. more(i, words) gives the further words of element i.
template <typename More>
void rounded_normal_block(const Rounding& rounding, const uint32_t* hi, const uint32_t* lo,
                          const More& more, double* out) {
  uint8_t unsure[kBlock];
  rounded_estimates(rounding.scale, hi, lo, out, unsure);
  for (int group = 0; group < kBlock; group += 8) {
    uint64_t flags;  // eight at a time: nearly all of these words are zero
    std::memcpy(&flags, unsure + group, sizeof flags);
    if (flags == 0) continue;
    for (int i = group; i < group + 8; ++i) {
      if (!unsure[i]) continue;
      out[i] = rounded_normal(rounding, hi[i], lo[i], [&](uint32_t* words) { more(i, words); });
    }
  }
}

// Samples z of kBlock elements by 64 bits each, how far they may be off, and whether they are
// outside of the center, where neither is right.
JPK_TARGET_CLONES static void central_estimates(const uint32_t* hi, const uint32_t* lo,
                                                double* __restrict z, double* __restrict error,
                                                uint8_t* __restrict outside) {
  namespace table = gaussian_table;
  for (int i = 0; i < kBlock; ++i) {
    const double v = tail_of_words(hi[i], lo[i]);
    const double w = minus_log_of_tail(v), size = (1.0 - v) * horner(table::kCentral, w - 2.5);
    outside[i] = !(w < 5.0);
    error[i] = table::kCentralBound * (1.0 + size);
    z[i] = lo[i] & 1 ? -size : size;
  }
}

// The same of all of them.
inline void normal_estimates(const uint32_t* hi, const uint32_t* lo, double* z, double* error) {
  uint8_t outside[kBlock];
  central_estimates(hi, lo, z, error, outside);
  for (int i = 0; i < kBlock; ++i) {
    if (!outside[i]) continue;
    const double v = tail_of_words(hi[i], lo[i]);
    const Estimate of = estimate(std::max(v, 0x1p-62));
    z[i] = lo[i] & 1 ? -of.z : of.z;
    // 64 bits leave V open by 2^-64 to either side; where they leave nothing, z is anything.
    error[i] = v < 0x1p-40 ? kFurthest : of.error + 0x1p-64 / (of.z * v);
  }
}

}  // namespace jpk

#endif  // JPK_EXACT_NORMAL_H_
