// One step of exact correlated noise for many leaves of integers.
//
// Samples n are rounded normals (exact_normal.h), and terms x the integers
//     x_t = R((n_t - sum_l c_l x_{t-l}) / c_0),   R(y) = floor(y + 1/2),
// for integers c, the strategy's coefficients in units of 2^-k. Sums are made in double, which is
// exact below 2^51, or in int64. Which elements make terms at a step is the schedule of
// correlated_noise.h, which this file resembles.
#ifndef JPK_GRID_NOISE_H_
#define JPK_GRID_NOISE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "chacha20.h"
#include "correlated_noise.h"
#include "exact_normal.h"
#include "noise.h"

namespace jpk {

// A leaf of integers.
struct GridLeaf {
  const void* grad;    // [size]
  void* out;           // [size], may be grad
  void* ring;          // [slots, size], null without slots
  int64_t size;        // of the elements that are here
  int64_t first_tile;  // tiles of the leaves before this one
  uint32_t index;      // position among the leaves of the tree
  bool wide_grad;      // int64, not int32
  bool wide_ring;      // the same of the ring
  Shard shard{};       // which elements are here
  RingCopy copy{};

  int64_t parts() const { return shard.parts(size); }
};

// What every leaf shares at step t.
struct GridStep {
  int64_t t;
  int64_t slots;  // S: how many terms a visit makes, if it is not 0
  int64_t now;    // t mod S: the slot of x_t
  // Of steps t .. t + max(S, 1) - 1: a leaf's key is child(key of the step, kSplit, leaf).
  const chacha20::Key* keys;
  Rounding rounding;
  bool in_doubles;  // all sums are below 2^51
  bool by_row;      // the coefficients differ from row to row
  // As Step::weights, but integers; a row has the sign that makes its divisor positive.
  std::vector<int64_t> weights;
  std::vector<int64_t> divisor, sign;  // one, or one for each step

  int64_t most_steps() const { return std::max<int64_t>(slots, 1); }
  int64_t slot(int64_t ahead) const {
    return now + ahead < slots ? now + ahead : now + ahead - slots;
  }
  size_t row(int64_t ahead) const { return static_cast<size_t>(by_row ? ahead : 0); }
};

// coef is [rows, S + 1], c_0 not 0: one row for all steps, or one for each of t .. t + S - 1.
inline void set_grid_recurrence(GridStep& step, const int32_t* coef, int64_t rows) {
  const int64_t slots = step.slots, bands = slots + 1, stride = padded(slots);
  step.by_row = rows > 1;
  step.divisor.resize(static_cast<size_t>(rows)), step.sign.resize(static_cast<size_t>(rows));
  step.weights.assign(static_cast<size_t>(step.by_row ? slots * stride : 2 * slots + kGroup), 0);
  for (int64_t ahead = 0; ahead < rows; ++ahead) {
    const int32_t* row = coef + ahead * bands;
    const int64_t sign = row[0] < 0 ? -1 : 1;
    step.sign[static_cast<size_t>(ahead)] = sign;
    step.divisor[static_cast<size_t>(ahead)] = sign * row[0];
    for (int64_t lag = 1; lag <= slots; ++lag) {
      const int64_t weight = -sign * row[lag];
      if (step.by_row) {
        const int64_t from = step.slot((ahead - lag + slots) % slots);
        step.weights[static_cast<size_t>(ahead * stride + from)] = weight;
        continue;
      }
      // weights[S + m - s] is the weight of slot m in the new x of slot s.
      step.weights[static_cast<size_t>(slots - lag)] = weight;
      if (lag < slots) step.weights[static_cast<size_t>(2 * slots - lag)] = weight;
      if (lag == slots) step.weights[static_cast<size_t>(slots)] = weight;
    }
  }
}

// What one worker needs, made before any thread starts.
struct GridWorkspace {
  explicit GridWorkspace(const GridStep& step)
      : keys(static_cast<size_t>(step.most_steps())),
        inputs(keys.size()),
        rows(padded(step.slots)),
        scratch(rows * kBlock + static_cast<int64_t>(step.weights.size())) {}
  template <typename X>
  X* block() {  // [rows, kBlock]
    return scratch.as<X>();
  }
  template <typename X>
  X* weights() {
    return scratch.as<X>() + rows * kBlock;
  }

  std::vector<chacha20::Key> keys;      // those of the leaf, like GridStep::keys
  std::vector<chacha20::Input> inputs;  // and what their blocks have in common
  int64_t rows;
  Scratch scratch;
};

// The keys of a leaf, of those of steps, and what the inputs of their blocks have in common.
inline void set_keys(const chacha20::Key* of_steps, uint32_t leaf, std::vector<chacha20::Key>& keys,
                     std::vector<chacha20::Input>& inputs) {
  for (size_t j = 0; j < keys.size(); ++j) {
    keys[j] = chacha20::child(of_steps[j], chacha20::Domain::kSplit, leaf);
    inputs[j].set_key(keys[j]);
    inputs[j].set_domain(chacha20::Domain::kGrid);
  }
}

// The 64 bits of the elements of a visit. Those that are not there get the bits of z = 0, which is
// certain for every scale: nobody may ask for their further bits, as they have no index.
class GridBits {
 public:
  GridBits(const Visit& visit, chacha20::Input& input) {
    using Layout = chacha20::Layout<64>;
    static_assert(Layout::kBlocks == chacha20::kLanes && Layout::kGroup == kBlock);
    int64_t done = 0;
    for (int64_t s = 0; s < visit.spans; ++s) {
      uint64_t index = visit.span[s].index;
      for (int64_t left = visit.span[s].count; left > 0;) {
        const int64_t from = static_cast<int64_t>(index % Layout::kGroup);
        const int64_t count = std::min<int64_t>(left, Layout::kGroup - from);
        input.set_blocks(Layout::first_block(index / Layout::kGroup));
        chacha20::all_blocks(input, words_);
        if (count == kBlock) return;  // a whole group, in its place
        std::copy_n(low() + from, count, low_ + done);
        std::copy_n(high() + from, count, high_ + done);
        done += count, left -= count, index += static_cast<uint64_t>(count);
      }
    }
    std::fill(low_ + done, low_ + kBlock, ~0u), std::fill(high_ + done, high_ + kBlock, ~0u);
    std::copy_n(low_, kBlock, &words_[0][0]);
    std::copy_n(high_, kBlock, &words_[chacha20::kWords / 2][0]);
  }

  const uint32_t* low() const { return &words_[0][0]; }
  const uint32_t* high() const { return &words_[chacha20::kWords / 2][0]; }

 private:
  uint32_t words_[chacha20::kWords][chacha20::kLanes];
  uint32_t low_[kBlock], high_[kBlock];
};

// The index in the leaf of an element of a visit.
inline uint64_t index_of(const Visit& visit, int64_t place) {
  const Span* span = visit.span;
  while (place >= span->count) place -= span++->count;
  return span->index + static_cast<uint64_t>(place);
}

// The further bits of an element: the first words of a block of its own.
inline void more_bits(const chacha20::Key& key, uint64_t index, uint32_t* words) {
  chacha20::Input input;
  input.set_key(key, 0, 1);
  input.set_domain(chacha20::Domain::kGridExtension), input.set_blocks(index, 0, 1);
  uint32_t block[chacha20::kWords][chacha20::kLanes];
  chacha20::blocks<1>(input, block);
  for (int w = 0; w < 4; ++w) words[w] = block[w][0];
}

// Writes a row of a ring.
template <typename R, typename X>
JPK_INLINE void store_row(const GridLeaf& leaf, const Visit& visit, int64_t row,
                          const X* __restrict from) {
  R* to = static_cast<R*>(leaf.ring) + row * leaf.size;
  if (visit.span[0].count == kBlock) {
    R* const begin = to + visit.span[0].here;
    for (int i = 0; i < kBlock; ++i) begin[i] = static_cast<R>(from[i]);
    return;
  }
  for (int64_t s = 0; s < visit.spans; ++s) {
    const Span& span = visit.span[s];
    for (int64_t i = 0; i < span.count; ++i) to[span.here + i] = static_cast<R>(from[i]);
    from += span.count;
  }
}

// Some elements of a leaf that make terms.
template <typename X, typename R>
struct GridBlock {
  const GridStep& step;
  const GridLeaf& leaf;
  GridWorkspace& workspace;
  const X* weights;
  X* rows;  // [padded(S), kBlock]
  const Visit* visit;

  // The rounded samples of step t + ahead, with the sign of the step's row.
  JPK_INLINE void sample(int64_t ahead, X* __restrict x) const {
    const size_t key = static_cast<size_t>(ahead);
    const GridBits bits(*visit, workspace.inputs[key]);
    const auto more = [&](int i, uint32_t* words) {
      more_bits(workspace.keys[key], index_of(*visit, i), words);
    };
    const bool negative = step.sign[step.row(ahead)] < 0;
    if constexpr (std::is_same_v<X, double>) {
      rounded_normal_block(step.rounding, bits.high(), bits.low(), more, x);
      if (!negative) return;
      for (int i = 0; i < kBlock; ++i) x[i] = -x[i];
    } else {
      double n[kBlock];
      rounded_normal_block(step.rounding, bits.high(), bits.low(), more, n);
      for (int i = 0; i < kBlock; ++i) x[i] = static_cast<X>(negative ? -n[i] : n[i]);
    }
  }

  JPK_INLINE void load(int64_t row, X* __restrict to) const {
    const R* from = static_cast<const R*>(leaf.ring) + row * leaf.size;
    if (visit->span[0].count == kBlock) {
      const R* const begin = from + visit->span[0].here;
      for (int i = 0; i < kBlock; ++i) to[i] = static_cast<X>(begin[i]);
      return;
    }
    X* const end = to + kBlock;
    for (int64_t s = 0; s < visit->spans; ++s) {
      to = std::copy_n(from + visit->span[s].here, visit->span[s].count, to);
    }
    std::fill(to, end, X(0));
  }

  JPK_INLINE void store(int64_t row, const X* from) const { store_row<R>(leaf, *visit, row, from); }
};

// x = R(x / divisor), for a positive divisor.
JPK_INLINE void divide_rounding(int64_t divisor, double* __restrict x) {
  if (divisor == 1) return;
  const double d = static_cast<double>(divisor), half = 0.5 * d, inverse = 1.0 / d;
  for (int i = 0; i < kBlock; ++i) {
    const double a = x[i] + half;  // exact, as is the rest
    const double q = std::floor(a * inverse), rest = a - q * d;
    // The quotient as computed is off by one at most.
    x[i] = q + (rest >= d ? 1.0 : 0.0) - (rest < 0.0 ? 1.0 : 0.0);
  }
}

JPK_INLINE void divide_rounding(int64_t divisor, int64_t* __restrict x) {
  if (divisor == 1) return;
  for (int i = 0; i < kBlock; ++i) {
    // floor((x + floor(d / 2)) / d), which is R(x / d) also for an odd d
    const int64_t a = x[i] + divisor / 2, q = a / divisor;
    x[i] = q - (q * divisor > a);
  }
}

// Makes x_t .. x_{t+steps-1}, steps being S or 1, in the ring's slots; without slots, x_t in x.
template <typename X, typename R>
JPK_INLINE void grid_advance(const GridBlock<X, R>& at, int64_t steps, X* __restrict x) {
  const GridStep& step = at.step;
  const int64_t slots = step.slots;
  if (slots == 0) {
    at.sample(0, x);
    return divide_rounding(step.divisor[0], x);
  }
  // A single step of a run's first S reads the slots that have been written.
  const int64_t rows = steps == slots ? slots : std::min(step.t, slots);
  for (int64_t m = 0; m < rows; ++m) at.load(m, at.rows + m * kBlock);
  std::fill(at.rows + rows * kBlock, at.rows + padded(rows) * kBlock, X(0));
  for (int64_t ahead = 0; ahead < steps; ++ahead) {
    const int64_t slot = step.slot(ahead);
    const X* weights = step.by_row ? at.weights + ahead * padded(slots) : at.weights + slots - slot;
    at.sample(ahead, x);
    accumulate<X>(padded(rows), weights, at.rows, x);
    divide_rounding(step.divisor[step.row(ahead)], x);
    if (steps == slots) std::copy_n(x, kBlock, at.rows + slot * kBlock);
  }
  if (steps != slots) return at.store(step.now, x);
  for (int64_t m = 0; m < slots; ++m) at.store(m, at.rows + m * kBlock);
}

// out = grad + x. Sums that are too large for their type wrap around.
template <typename G, typename X>
JPK_INLINE void grid_add(const GridLeaf& leaf, const Span& span, const X* __restrict x) {
  using U = std::make_unsigned_t<G>;
  for_each_gradient<G>(leaf, span, [&](G grad, G& out, int64_t i) __attribute__((always_inline)) {
    const U noise = static_cast<U>(static_cast<G>(x[i]));
    out = static_cast<G>(static_cast<U>(grad) + noise);
  });
}

template <typename X>
JPK_INLINE void grid_emit(const GridLeaf& leaf, const Span& span, const X* x) {
  leaf.wide_grad ? grid_add<int64_t>(leaf, span, x) : grid_add<int32_t>(leaf, span, x);
}

// Calls advance(visit), which has to be inlined, as a function of its own would be compiled for
// another instruction set, for the visits that make terms. Adds x_t of all elements, which stand in
// the slot of the step, or in x without slots.
template <typename R, typename Step, typename X, typename Advance>
JPK_INLINE void emit_visits(const Step& step, const GridLeaf& leaf, Visits& visits, const X* x,
                            const Advance& advance) {
  const R* ring_now = static_cast<const R*>(leaf.ring) + step.now * leaf.size;
  Span later{0, 0, 0};  // what of the ring is still to be emitted: a tile at once
  while (const Visit* visit = visits.next()) {
    if (visit->terms) advance(*visit);
    const X* from = x;
    for (int64_t s = 0; s < visit->spans; ++s) {
      const Span& span = visit->span[s];
      if (step.slots == 0) {
        grid_emit(leaf, span, from);
        from += span.count;
      } else if (span.here == later.here + later.count && later.count < kTile) {
        later.count += span.count;
      } else {
        grid_emit(leaf, later, ring_now + later.here);
        later = span;
      }
    }
  }
  if (later.count) grid_emit(leaf, later, ring_now + later.here);
}

// One step of parts [begin, end) of one leaf, summed up as X, kept as R.
template <typename X, typename R>
JPK_INLINE void grid_parts(const GridStep& step, const GridLeaf& leaf, int64_t begin, int64_t end,
                           GridWorkspace& workspace) {
  X* weights = workspace.weights<X>();
  for (size_t i = 0; i < step.weights.size(); ++i) weights[i] = static_cast<X>(step.weights[i]);
  GridBlock<X, R> at{step, leaf, workspace, weights, workspace.block<X>(), nullptr};
  X x[kBlock];

  Visits visits(leaf.shard, leaf.first_tile, step.slots, step.t, leaf.shard.part(begin, leaf.size),
                leaf.shard.part(end, leaf.size));
  bool keyed = false;  // most visits make no terms, and need no keys
  emit_visits<R>(step, leaf, visits, x, [&](const Visit& visit) __attribute__((always_inline)) {
    if (!keyed) set_keys(step.keys, leaf.index, workspace.keys, workspace.inputs);
    keyed = true;
    at.visit = &visit;
    grid_advance(at, visit.terms, x);
  });
}

JPK_TARGET_CLONES static void grid_parts_f64_s32(const GridStep& step, const GridLeaf& leaf,
                                                 int64_t begin, int64_t end,
                                                 GridWorkspace& workspace) {
  grid_parts<double, int32_t>(step, leaf, begin, end, workspace);
}

JPK_TARGET_CLONES static void grid_parts_f64_s64(const GridStep& step, const GridLeaf& leaf,
                                                 int64_t begin, int64_t end,
                                                 GridWorkspace& workspace) {
  grid_parts<double, int64_t>(step, leaf, begin, end, workspace);
}

JPK_TARGET_CLONES static void grid_parts_s64_s32(const GridStep& step, const GridLeaf& leaf,
                                                 int64_t begin, int64_t end,
                                                 GridWorkspace& workspace) {
  grid_parts<int64_t, int32_t>(step, leaf, begin, end, workspace);
}

JPK_TARGET_CLONES static void grid_parts_s64_s64(const GridStep& step, const GridLeaf& leaf,
                                                 int64_t begin, int64_t end,
                                                 GridWorkspace& workspace) {
  grid_parts<int64_t, int64_t>(step, leaf, begin, end, workspace);
}

// A step that is not valid: outputs are the least integers, which are seen as no noise would not
// be, and rings stay as they are.
template <typename Pool>
void grid_nothing(Pool& pool, int64_t workers, const std::vector<GridLeaf>& leaves) {
  for_each_part(
      pool, workers, leaves, [] { return 0; },
      [](const GridLeaf& leaf, int64_t begin, int64_t end, int) {
        const int64_t first = leaf.shard.part(begin, leaf.size);
        const int64_t count = leaf.shard.part(end, leaf.size) - first;
        const auto fill = [&](auto* out) {
          std::fill_n(out + first, count, std::numeric_limits<std::decay_t<decltype(*out)>>::min());
        };
        leaf.wide_grad ? fill(static_cast<int64_t*>(leaf.out))
                       : fill(static_cast<int32_t*>(leaf.out));
      });
}

// The step on all leaves, shared out over `workers` threads of the pool.
template <typename Pool>
void grid_noise(Pool& pool, int64_t workers, const GridStep& step,
                const std::vector<GridLeaf>& leaves) {
  for_each_part(
      pool, workers, leaves, [&] { return GridWorkspace(step); },
      [&](const GridLeaf& leaf, int64_t begin, int64_t end, GridWorkspace& workspace) {
        const auto parts = step.in_doubles
                               ? (leaf.wide_ring ? grid_parts_f64_s64 : grid_parts_f64_s32)
                               : (leaf.wide_ring ? grid_parts_s64_s64 : grid_parts_s64_s32);
        parts(step, leaf, begin, end, workspace);
      });
}

}  // namespace jpk

#endif  // JPK_GRID_NOISE_H_
