// One step of exact noise whose terms are sums of samples, rounded correctly:
//     x_t = R(stddev sum_j w_j z_{t-behind+j}),   R(y) = floor(y + 1/2),
// for any real weights: the rows of a banded inverse, or of a dense noising matrix.
//
// float64 gives the sum with a bound on its error. Where the bound leaves more than one integer,
// the z are refined to more than 128 bits by all bits of their elements (exact_normal.h).
#ifndef JPK_GRID_SUMS_H_
#define JPK_GRID_SUMS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "grid_noise.h"

namespace jpk {

// What every leaf shares at step t.
struct GridSums {
  int64_t t;
  int64_t slots;   // S: how many terms a visit makes, if it is not 0
  int64_t behind;  // how many samples before z_t there are in x_t
  int64_t now;     // t mod S
  // Of steps t - behind .. t + max(S, 1) - 1.
  const chacha20::Key* keys;
  std::vector<double> weights;  // of z_{t-behind} .. z_t
  double stddev;

  int64_t most_steps() const { return std::max<int64_t>(slots, 1); }
  int64_t samples() const { return behind + most_steps(); }
  int64_t never() const { return std::clamp<int64_t>(behind - t, 0, behind); }  // before step 0
  int64_t slot(int64_t ahead) const {
    return now + ahead < slots ? now + ahead : now + ahead - slots;
  }
};

// What one worker needs, made before any thread starts.
struct GridSumsWorkspace {
  explicit GridSumsWorkspace(const GridSums& step)
      : keys(static_cast<size_t>(step.samples())),
        inputs(keys.size()),
        kept(step.slots ? step.samples() : 1),
        scratch(2 * kept * kBlock) {}
  double* z(int64_t sample) { return scratch.as<double>() + 2 * (sample % kept) * kBlock; }
  double* error(int64_t sample) { return z(sample) + kBlock; }

  std::vector<chacha20::Key> keys;
  std::vector<chacha20::Input> inputs;
  int64_t kept;  // samples of a block at a time: all, or one
  Scratch scratch;
};

// The first 64 bits of an element by itself.
inline uint64_t bits_of(const chacha20::Key& key, uint64_t index) {
  using Layout = chacha20::Layout<64>;
  chacha20::Input input;
  input.set_key(key, 0, 1);
  input.set_domain(chacha20::Domain::kGrid), input.set_blocks(Layout::block(index), 0, 1);
  uint32_t words[chacha20::kWords][chacha20::kLanes];
  chacha20::blocks<1>(input, words);
  const int word = Layout::word(index);
  return uint64_t{words[word + chacha20::kWords / 2][0]} << 32 | words[word][0];
}

// x_{t+ahead} of one element by all bits of its samples.
inline int64_t settle_sum(const GridSums& step, const chacha20::Key* keys, int64_t ahead,
                          uint64_t index) {
  Fixed above = {{0, 0, 0, 0, 0}}, below = above;
  const Fixed stddev = fixed(step.stddev);
  for (int64_t j = std::max(step.never() - ahead, int64_t{0}); j <= step.behind; ++j) {
    const double weight = step.weights[static_cast<size_t>(j)];
    if (weight == 0) continue;
    const chacha20::Key& key = keys[ahead + j];
    const uint64_t bits = bits_of(key, index);
    uint32_t more[4];
    more_bits(key, index, more);
    const Uniform uniform(bits, uint64_t{more[0]} << 32 | more[1],
                          uint64_t{more[2]} << 32 | more[3]);
    const Fixed scale = multiply(fixed(std::fabs(weight)), stddev);
    const Fixed term = multiply(scale, uniform.absolute_normal());
    Fixed& side = (weight < 0) != ((bits & 1) != 0) ? below : above;
    side = add(side, term);
  }
  above = add(above, divide(kOne, 2));
  const bool negative = less(above, below);
  const Fixed size = negative ? subtract(below, above) : subtract(above, below);
  const int64_t whole = static_cast<int64_t>(size.limb[3]);
  return negative ? -whole - ((size.limb[0] | size.limb[1] | size.limb[2]) != 0) : whole;
}

// x_{t+ahead} of a visit, samples that have not been made yet being made.
JPK_INLINE void sum_up(const GridSums& step, GridSumsWorkspace& workspace, const Visit& visit,
                       int64_t ahead, double* __restrict x) {
  double size[kBlock] = {}, error[kBlock] = {};
  std::fill(x, x + kBlock, 0.0);
  for (int64_t j = std::max(step.never() - ahead, int64_t{0}); j <= step.behind; ++j) {
    const double weight = step.weights[static_cast<size_t>(j)] * step.stddev;
    const int64_t sample = ahead + j;
    double *z = workspace.z(sample), *error_of_z = workspace.error(sample);
    // With slots the first sum makes all of its samples, and each later one makes its last.
    if (step.slots == 0 ? weight != 0 : ahead == 0 || j == step.behind) {
      const GridBits bits(visit, workspace.inputs[static_cast<size_t>(sample)]);
      normal_estimates(bits.high(), bits.low(), z, error_of_z);
    }
    if (weight == 0) continue;
    const double absolute = std::fabs(weight);
    for (int i = 0; i < kBlock; ++i) {
      x[i] += weight * z[i];
      size[i] += absolute * std::fabs(z[i]);
      error[i] += absolute * error_of_z[i];
    }
  }
  // The weights, their products and the sums are rounded; 2^-51 for each is more than that.
  const double rounding = static_cast<double>(step.behind + 4) * 0x1p-51;
  uint8_t unsure[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const double integer = (x[i] + 0x1.8p52) - 0x1.8p52;
    const double wrong = 1.0625 * (error[i] + rounding * size[i]);
    unsure[i] = !(std::fabs(x[i] - integer) <= 0.5 - wrong);
    x[i] = integer;
  }
  for (int64_t i = 0; i < visit.count; ++i) {
    if (!unsure[i]) continue;
    x[i] = static_cast<double>(settle_sum(step, workspace.keys.data(), ahead, index_of(visit, i)));
  }
}

// One step of parts [begin, end) of one leaf, kept as R.
template <typename R>
JPK_INLINE void grid_sums_parts(const GridSums& step, const GridLeaf& leaf, int64_t begin,
                                int64_t end, GridSumsWorkspace& workspace) {
  double x[kBlock];
  Visits visits(leaf.shard, leaf.first_tile, step.slots, step.t, leaf.shard.part(begin, leaf.size),
                leaf.shard.part(end, leaf.size));
  bool keyed = false;
  emit_visits<R>(step, leaf, visits, x, [&](const Visit& visit) __attribute__((always_inline)) {
    if (!keyed) set_keys(step.keys, leaf.index, workspace.keys, workspace.inputs);
    keyed = true;
    for (int64_t ahead = 0; ahead < visit.terms; ++ahead) {
      sum_up(step, workspace, visit, ahead, x);
      if (step.slots) store_row<R>(leaf, visit, step.slot(ahead), x);
    }
  });
}

JPK_TARGET_CLONES static void grid_sums_s32(const GridSums& step, const GridLeaf& leaf,
                                            int64_t begin, int64_t end,
                                            GridSumsWorkspace& workspace) {
  grid_sums_parts<int32_t>(step, leaf, begin, end, workspace);
}

JPK_TARGET_CLONES static void grid_sums_s64(const GridSums& step, const GridLeaf& leaf,
                                            int64_t begin, int64_t end,
                                            GridSumsWorkspace& workspace) {
  grid_sums_parts<int64_t>(step, leaf, begin, end, workspace);
}

// The step on all leaves, shared out over `workers` threads of the pool.
template <typename Pool>
void grid_sums(Pool& pool, int64_t workers, const GridSums& step,
               const std::vector<GridLeaf>& leaves) {
  for_each_part(
      pool, workers, leaves, [&] { return GridSumsWorkspace(step); },
      [&](const GridLeaf& leaf, int64_t begin, int64_t end, GridSumsWorkspace& workspace) {
        (leaf.wide_ring ? grid_sums_s64 : grid_sums_s32)(step, leaf, begin, end, workspace);
      });
}

}  // namespace jpk

#endif  // JPK_GRID_SUMS_H_
