// What samples of the privacy loss have in common, whatever the sampling: their numbers, and the
// hockey-stick sums that they add up to. See privacy_loss_sums.h.
#ifndef JPK_PRIVACY_LOSS_H_
#define JPK_PRIVACY_LOSS_H_

#include <cstdint>
#include <vector>

#include "elementary.h"
#include "normal.h"
#include "simd.h"
#include "threefry.h"

namespace jpk {
namespace privacy_loss {

inline constexpr int kLanes = 32;              // samples that are made together
inline constexpr int kRows = kBlock / kLanes;  // rows of lanes that normal_block makes at once
inline constexpr double kNever = -1e200;       // the logarithm of a probability of zero

using Row = double[kLanes];

// What is asked for.
struct Targets {
  const double* sigmas;
  const double* margins;  // what is added to the losses of each sigma, to round them up
  int64_t sigma_count;
  const double* epsilons;
  int64_t epsilon_count;
  double least_epsilon;
};

// What one target has collected in every lane: the value is X = (1 - e^(epsilon - loss))_+.
struct Cell {
  Row sum, count, maximum;
};

enum Sign { kPositive, kNegative };  // example taken part or not: y ~ P or y ~ Q

// Cells [sign, sigma, epsilon] of one strand.
struct Tally {
  explicit Tally(const Targets& targets)
      : targets(targets),
        cells(static_cast<size_t>(2 * targets.sigma_count * targets.epsilon_count)) {}

  // Adds the losses of one block.
  JPK_INLINE void add(Sign sign, int64_t sigma, const double* loss) {
    int reached = 0;
    for (int l = 0; l < kLanes; ++l) reached |= !(loss[l] <= targets.least_epsilon);
    if (!reached) return;
    Cell* row = cells.data() + (sign * targets.sigma_count + sigma) * targets.epsilon_count;
    for (int64_t e = 0; e < targets.epsilon_count; ++e) {
      Cell& cell = row[e];
      const double epsilon = targets.epsilons[e];
      for (int l = 0; l < kLanes; ++l) {
        const double excess = 1.0 - exp_lane(epsilon - loss[l]);
        const double x = excess <= 0.0 ? 0.0 : excess;  // NaN stays NaN
        cell.sum[l] += x;
        cell.count[l] += x != 0.0 ? 1.0 : 0.0;
        cell.maximum[l] = x > cell.maximum[l] ? x : cell.maximum[l];
      }
    }
  }

  Targets targets;
  std::vector<Cell> cells;
};

// A uniform number of [0, 1), a multiple of 2^-52.
JPK_INLINE double unit(Key key, uint64_t counter) {
  uint32_t x0 = static_cast<uint32_t>(counter >> 32), x1 = static_cast<uint32_t>(counter);
  threefry2x32(key, x0, x1);
  const uint64_t bits = static_cast<uint64_t>(x0) << 32 | x1;
  return bit_cast<double>((bits >> 12) | 0x3FF0000000000000u) - 1.0;
}

// rows[i][l] = normal number first + i of sample sample + l, of which each has `stride`; kRows
// rows.
JPK_INLINE void normal_rows(Key key, uint64_t sample, uint64_t stride, uint64_t first, Row* rows) {
  uint32_t hi[kBlock], lo[kBlock];
  for (int i = 0; i < kRows; ++i) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t counter = (sample + static_cast<uint64_t>(l)) * stride + first + i;
      hi[i * kLanes + l] = static_cast<uint32_t>(counter >> 32);
      lo[i * kLanes + l] = static_cast<uint32_t>(counter);
    }
  }
  normal_block<double>(key, hi, lo, true, rows[0]);
}

// No normal number that normal.h makes is larger.
inline constexpr double kLargestNormal = 8.3;

}  // namespace privacy_loss
}  // namespace jpk

#endif  // JPK_PRIVACY_LOSS_H_
