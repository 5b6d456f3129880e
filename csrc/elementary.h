// exp and log of one double, as straight-line code that a loop over lanes vectorizes.
#ifndef JPK_ELEMENTARY_H_
#define JPK_ELEMENTARY_H_

#include <cstdint>

#include "normal.h"
#include "simd.h"

namespace jpk {

// e^x with a relative error below 2^-50 for |x| <= 708; beyond, x is taken for the nearest of
// these. NaN gives NaN. The Taylor polynomial of degree 12 leaves out 0.35^13 / 13! < 2^-52.
JPK_INLINE double exp_lane(double x) {
  const double taylor[] = {1.0 / 479001600,
                           1.0 / 39916800,
                           1.0 / 3628800,
                           1.0 / 362880,
                           1.0 / 40320,
                           1.0 / 5040,
                           1.0 / 720,
                           1.0 / 120,
                           1.0 / 24,
                           1.0 / 6,
                           0.5,
                           1.0,
                           1.0};
  x = x < -708.0 ? -708.0 : x;
  x = x > 708.0 ? 708.0 : x;
  // Adding 1.5 * 2^52 rounds to an integer, which then stands in the low bits.
  const double shifted = x * 1.4426950408889634 + 0x1.8p52;
  const double k = shifted - 0x1.8p52;
  const double r = (x - k * 0x1.62e42fefa3800p-1) - k * 0x1.ef35793c76730p-45;
  return horner(taylor, r) * bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023) << 52);
}

// The logarithm of a normal x > 0, with an absolute error below 2^-51 * max(1, |log x|). NaN gives
// NaN. The series of 2 atanh(s), s = f / (2 + f), |s| < 0.1716, as in normal.h.
JPK_INLINE double log_lane(double x) {
  const double q[] = {2.0 / 23, 2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13,
                      2.0 / 11, 2.0 / 9,  2.0 / 7,  2.0 / 5,  2.0 / 3,  2.0};
  const int64_t bits = bit_cast<int64_t>(x);
  const int32_t exponent = static_cast<int32_t>((bits - 0x3FE6A09E667F3BCD) >> 32) >> 20;
  const uint64_t scaling = static_cast<uint64_t>(exponent) << 52;
  const double f = bit_cast<double>(static_cast<uint64_t>(bits) - scaling) - 1.0;
  const double s = f / (2.0 + f);
  const double result = 0.693147180559945309 * static_cast<double>(exponent) + s * horner(q, s * s);
  return x == x ? result : x;
}

// log(e^a + e^b), for finite a and b.
JPK_INLINE double log_add_exp_lane(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high + log_lane(1.0 + exp_lane(low - high));
}

}  // namespace jpk

#endif  // JPK_ELEMENTARY_H_
