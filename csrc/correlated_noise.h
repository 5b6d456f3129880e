// One step of correlated noise for many leaves: sample, correlate, add to the gradients.
//
// A leaf may keep a ring of S terms to come. A visit to a tile then makes the terms of S steps
// (`advance` by S), or, in the first S steps of a run, of one step, or only reads one slot. Which
// of them is a function of the step and the tile's position in the tree (visits.h);
// ops/correlated_noise/_schedule.py states it for all implementations, and they must agree: it is the meaning of
// the state that they share.
#ifndef JPK_CORRELATED_NOISE_H_
#define JPK_CORRELATED_NOISE_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "float_types.h"
#include "normal.h"
#include "parallel_for.h"
#include "simd.h"
#include "threefry.h"
#include "visits.h"

namespace jpk {

// Rows are added up in groups, one load and store of x for several multiply-adds; they are padded
// with rows of zeros to a multiple of the smaller group.
inline constexpr int64_t kRows = 4;

JPK_INLINE int64_t padded(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

struct Leaf {
  const void* grad;    // [size]
  void* out;           // [size]
  void* ring;          // [hidden + slots, size], null if there are no rows
  int64_t size;        // of what is here
  int64_t first_tile;  // tiles of the leaves before this one
  uint32_t index;      // position among the leaves of the tree
  FloatType grad_type;
  FloatType noise_type;  // kFloat32 or kFloat64: what is sampled
  FloatType ring_type;   // kFloat32 or kFloat64, at least as wide as noise_type: what is computed
  Shard shard{};         // which elements are here; all of them, unless it says otherwise

  int64_t parts() const { return shard.parts(size); }
};

// How x is made of the samples z.
enum class Filter {
  kRecurrence,      // sum_l c_l x_{t-l} = z_t; the coefficients may differ from row to row
  kMovingAverage,   // x_t = sum_l w_l z_{t-l}
  kRow,             // x = sum_j w_j z_j, of samples with keys of their own; no slots
  kBuffers,         // x_t = z_t + w.u_t, u_{t+1} = decay u_t + z_t
  kInverseBuffers,  // x_t = z_t - w.u_t, u_{t+1} = decay u_t + x_t
};

// What every leaf shares at step t.
struct Step {
  Filter filter;
  int64_t t;
  int64_t slots;   // S: how many terms a visit makes, if it is not 0
  int64_t hidden;  // rows of the ring that come before the slots: the buffers
  int64_t behind;  // how many samples before z_t there are in x_t
  int64_t now;     // t mod S: the slot of x_t
  // Of steps t - behind .. t + max(S, 1) - 1: a leaf's key is split(key of the step, leaf). kRow
  // has one, and the key of a leaf's sample j is split(split(key, leaf), j).
  const Key* keys;
  // kRecurrence: see set_recurrence. kMovingAverage: of z_{t-behind} .. z_t, and zeros up to
  // padded(behind + 1). Buffers: the decays, then the weights of the buffers in x_t.
  std::vector<double> weights;
  std::vector<double> input_weight;  // of z in x; kRecurrence may have one for every step
  bool by_row;                       // kRecurrence: the coefficients differ from row to row
  double output_scale;               // of x_t in what is added to the gradients
  bool accurate;                     // see Gaussian::any

  int64_t most_steps() const { return std::max<int64_t>(slots, 1); }
  int64_t samples() const { return behind + most_steps(); }  // that a visit may make
  int64_t key_count() const { return filter == Filter::kRow ? 1 : samples(); }
  int64_t slot(int64_t ahead) const {
    return now + ahead < slots ? now + ahead : now + ahead - slots;
  }
  // Rows of a block that an advance works in.
  int64_t block_rows() const {
    if (filter == Filter::kRecurrence) return padded(slots);
    if (filter == Filter::kMovingAverage && slots) return samples() + kRows;
    return hidden;
  }
};

inline Step make_step(Filter filter, int64_t t, int64_t slots, const Key* keys, double output_scale,
                      bool accurate) {
  Step step{};
  step.filter = filter;
  step.t = t;
  step.slots = slots;
  step.now = slots ? t % slots : 0;
  step.keys = keys;
  step.input_weight = {1.0};
  step.output_scale = output_scale;
  step.accurate = accurate;
  return step;
}

// coef is [rows, S + 1]: one row for all steps, or one for each of t .. t + max(S, 1) - 1.
inline void set_recurrence(Step& step, const double* coef, int64_t rows) {
  const int64_t slots = step.slots, bands = slots + 1;
  step.by_row = rows > 1;
  step.input_weight.resize(static_cast<size_t>(rows));
  if (!step.by_row) {
    // [2 S + kRows]: weights[S + m - s] is the weight of slot m in the new x of slot s.
    step.weights.assign(static_cast<size_t>(2 * slots + kRows), 0.0);
    step.input_weight[0] = 1.0 / coef[0];
    for (int64_t lag = 1; lag <= slots; ++lag) {
      step.weights[slots - lag] = -coef[lag] / coef[0];
      if (lag < slots) step.weights[2 * slots - lag] = -coef[lag] / coef[0];
    }
    if (slots) step.weights[slots] = step.weights[0];  // x_{t-S} lies where x_t goes
    return;
  }
  // [S, padded(S)]: the weight of every slot in the new x of a step.
  const int64_t stride = padded(slots);
  step.weights.assign(static_cast<size_t>(slots * stride), 0.0);
  for (int64_t ahead = 0; ahead < rows; ++ahead) {
    const double* row = coef + ahead * bands;
    step.input_weight[ahead] = 1.0 / row[0];
    for (int64_t lag = 1; lag <= slots; ++lag) {
      const int64_t from = step.slot((ahead - lag + slots) % slots);
      step.weights[ahead * stride + from] = -row[lag] / row[0];
    }
  }
}

// weights is [behind + 1], in the order of time.
inline void set_moving_average(Step& step, const double* weights, int64_t behind) {
  step.behind = behind;
  step.weights.assign(weights, weights + behind + 1);
  step.weights.resize(static_cast<size_t>(padded(behind + 1)), 0.0);
}

// parameters is [2, buffers]: the decays and the output scales.
inline void set_buffers(Step& step, const double* parameters, int64_t buffers) {
  step.hidden = buffers;
  step.weights.assign(parameters, parameters + 2 * buffers);
  if (step.filter == Filter::kInverseBuffers) {
    for (int64_t i = 0; i < buffers; ++i) step.weights[buffers + i] *= -1;
  }
}

// Buffers of one worker, made before any thread starts.
class Scratch {
 public:
  explicit Scratch(const Step& step)
      : block_rows_(step.block_rows()),
        keys_(static_cast<size_t>(step.samples())),
        bytes_(allocate(block_rows_ * kBlock + static_cast<int64_t>(step.weights.size()))) {}
  Key* keys() { return keys_.data(); }  // the leaf's keys, like Step::keys
  template <typename X>
  X* block() {  // [Step::block_rows(), kBlock]
    return reinterpret_cast<X*>(bytes_.get());
  }
  template <typename X>
  X* weights() {  // Step::weights
    return reinterpret_cast<X*>(bytes_.get()) + block_rows_ * kBlock;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  static void* allocate(int64_t numbers) {
    return ::operator new(static_cast<size_t>(numbers) * sizeof(double), kAlignment);
  }
  int64_t block_rows_;
  std::vector<Key> keys_;
  std::unique_ptr<void, Free> bytes_;
};

// Some elements of a leaf that make terms, and what they need for it.
template <typename X>
struct Block {
  const Step& step;
  const Leaf& leaf;
  const Key* keys;
  const X* weights;
  X* rows;  // [Step::block_rows(), kBlock]
  const Visit* visit;
  uint32_t hi[kBlock], lo[kBlock];  // the elements' indices in the leaf

  JPK_INLINE void begin(const Visit* of) {
    visit = of;
    uint32_t *h = hi, *l = lo;
    for (int64_t s = 0; s < visit->spans; ++s) {
      const Span& span = visit->span[s];
      const uint32_t high = static_cast<uint32_t>(span.index >> 32);
      const uint32_t low = static_cast<uint32_t>(span.index);
      for (int64_t i = 0; i < span.count; ++i) {
        l[i] = low + static_cast<uint32_t>(i);
        h[i] = high + (l[i] < low);
      }
      h += span.count, l += span.count;
    }
    std::fill(h, hi + kBlock, 0u), std::fill(l, lo + kBlock, 0u);
  }

  // Copies a row of the ring, and pads it with zeros.
  JPK_INLINE void load(int64_t row, X* __restrict to) const {
    const X* from = static_cast<const X*>(leaf.ring) + row * leaf.size;
    if (visit->span[0].count == kBlock) {
      std::copy_n(from + visit->span[0].here, kBlock, to);
      return;
    }
    X* const end = to + kBlock;
    for (int64_t s = 0; s < visit->spans; ++s) {
      to = std::copy_n(from + visit->span[s].here, visit->span[s].count, to);
    }
    std::fill(to, end, X(0));
  }

  JPK_INLINE void store(int64_t row, const X* __restrict from) const {
    X* to = static_cast<X*>(leaf.ring) + row * leaf.size;
    if (visit->span[0].count == kBlock) {
      std::copy_n(from, kBlock, to + visit->span[0].here);
      return;
    }
    for (int64_t s = 0; s < visit->spans; ++s) {
      std::copy_n(from, visit->span[s].count, to + visit->span[s].here);
      from += visit->span[s].count;
    }
  }
};

// x[i] += sum_m weight[m] * history[m * kBlock + i], 0 <= i < kBlock, over N rows.
template <int64_t N, typename X>
JPK_INLINE void accumulate_group(const X* weight, const X* history, X* __restrict x) {
  for (int i = 0; i < kBlock; ++i) {
    X sum = x[i];
    for (int64_t m = 0; m < N; ++m) sum += weight[m] * history[m * kBlock + i];
    x[i] = sum;
  }
}

// The same over any number of rows that is a multiple of kRows.
template <typename X>
JPK_INLINE void accumulate(int64_t rows, const X* weight, const X* history, X* __restrict x) {
  int64_t m = 0;
  for (; m + 2 * kRows <= rows; m += 2 * kRows) {
    accumulate_group<2 * kRows>(weight + m, history + m * kBlock, x);
  }
  for (; m < rows; m += kRows) accumulate_group<kRows>(weight + m, history + m * kBlock, x);
}

// x = weight * samples of the elements.
template <typename Z, typename X>
JPK_INLINE void sample(const Block<X>& at, Key key, X weight, X* __restrict x) {
  Z z[kBlock];
  normal_block<Z>(key, at.hi, at.lo, at.step.accurate, z);
  for (int i = 0; i < kBlock; ++i) x[i] = weight * static_cast<X>(z[i]);
}

// Makes x_t .. x_{t+steps-1}, steps being S or 1, in the ring's slots; without slots, x_t in x.
// So do the two functions that follow.
template <typename Z, typename X>
JPK_INLINE void advance_recurrence(const Block<X>& at, int64_t steps, X* __restrict x) {
  const Step& step = at.step;
  const int64_t slots = step.slots;
  if (slots == 0) {
    return sample<Z, X>(at, at.keys[0], static_cast<X>(step.input_weight[0]), x);
  }
  // A single step of a run's first S reads the slots that have been written.
  const int64_t rows = steps == slots ? slots : std::min(step.t, slots);
  for (int64_t m = 0; m < rows; ++m) at.load(m, at.rows + m * kBlock);
  std::fill(at.rows + rows * kBlock, at.rows + padded(rows) * kBlock, X(0));
  for (int64_t ahead = 0; ahead < steps; ++ahead) {
    const int64_t slot = step.slot(ahead);
    const X* weights = step.by_row ? at.weights + ahead * padded(slots) : at.weights + slots - slot;
    sample<Z, X>(at, at.keys[ahead], static_cast<X>(step.input_weight[step.by_row ? ahead : 0]), x);
    accumulate<X>(padded(rows), weights, at.rows, x);
    if (steps == slots) std::copy_n(x, kBlock, at.rows + slot * kBlock);
  }
  if (steps != slots) return at.store(step.now, x);
  for (int64_t m = 0; m < slots; ++m) at.store(m, at.rows + m * kBlock);
}

template <typename Z, typename X>
JPK_INLINE void advance_moving_average(const Block<X>& at, int64_t steps, X* __restrict x) {
  const Step& step = at.step;
  const int64_t samples = step.behind + steps;
  if (step.slots == 0) {
    std::fill(x, x + kBlock, X(0));
    for (int64_t j = 0; j < samples; ++j) {
      const bool happened = step.filter == Filter::kRow || step.t - step.behind + j >= 0;
      if (at.weights[j] == 0 || !happened) continue;
      X z[kBlock];
      sample<Z, X>(at, at.keys[j], at.weights[j], z);
      for (int i = 0; i < kBlock; ++i) x[i] += z[i];
    }
    return;
  }
  for (int64_t j = 0; j < samples; ++j) {
    X* z = at.rows + j * kBlock;
    if (step.t - step.behind + j < 0) {
      std::fill(z, z + kBlock, X(0));  // nothing came before step 0
    } else {
      sample<Z, X>(at, at.keys[j], X(1), z);
    }
  }
  std::fill(at.rows + samples * kBlock, at.rows + (samples + kRows) * kBlock, X(0));
  for (int64_t ahead = 0; ahead < steps; ++ahead) {
    std::fill(x, x + kBlock, X(0));
    accumulate<X>(padded(step.behind + 1), at.weights, at.rows + ahead * kBlock, x);
    at.store(step.slot(ahead), x);
  }
}

template <typename Z, typename X>
JPK_INLINE void advance_buffers(const Block<X>& at, int64_t steps, X* __restrict x) {
  const Step& step = at.step;
  const int64_t buffers = step.hidden;
  const X *decay = at.weights, *weight = at.weights + buffers;
  for (int64_t m = 0; m < buffers; ++m) at.load(m, at.rows + m * kBlock);
  for (int64_t ahead = 0; ahead < steps; ++ahead) {
    X z[kBlock];
    sample<Z, X>(at, at.keys[ahead], X(1), z);
    std::copy_n(z, kBlock, x);
    for (int64_t m = 0; m < buffers; ++m) {
      const X* u = at.rows + m * kBlock;
      for (int i = 0; i < kBlock; ++i) x[i] += weight[m] * u[i];
    }
    const X* input = step.filter == Filter::kInverseBuffers ? x : z;
    for (int64_t m = 0; m < buffers; ++m) {
      X* u = at.rows + m * kBlock;
      for (int i = 0; i < kBlock; ++i) u[i] = decay[m] * u[i] + input[i];
    }
    if (step.slots) at.store(buffers + step.slot(ahead), x);
  }
  for (int64_t m = 0; m < buffers; ++m) at.store(m, at.rows + m * kBlock);
}

template <typename Z, typename X>
JPK_INLINE void advance(const Block<X>& at, int64_t steps, X* x) {
  switch (at.step.filter) {
    case Filter::kRecurrence:
      return advance_recurrence<Z, X>(at, steps, x);
    case Filter::kMovingAverage:
    case Filter::kRow:
      return advance_moving_average<Z, X>(at, steps, x);
    case Filter::kBuffers:
    case Filter::kInverseBuffers:
      return advance_buffers<Z, X>(at, steps, x);
  }
}

// out = grad + scale * x, added in the wider of the two types and rounded to the gradient's.
template <typename X, typename G>
JPK_INLINE void emit(const Leaf& leaf, const Span& span, X scale, const X* __restrict x) {
  const G* __restrict grad = static_cast<const G*>(leaf.grad) + span.here;
  G* out = static_cast<G*>(leaf.out) + span.here;
  for (int64_t i = 0; i < span.count; ++i) narrow(widen(grad[i]) + scale * x[i], out[i]);
}

template <typename X>
JPK_INLINE void emit(const Leaf& leaf, const Span& span, X scale, const X* x) {
  switch (leaf.grad_type) {
    case FloatType::kFloat16:
      return emit<X, Float16>(leaf, span, scale, x);
    case FloatType::kBFloat16:
      return emit<X, BFloat16>(leaf, span, scale, x);
    case FloatType::kFloat32:
      return emit<X, float>(leaf, span, scale, x);
    case FloatType::kFloat64:
      return emit<X, double>(leaf, span, scale, x);
  }
}

inline void leaf_keys(const Step& step, uint32_t leaf, Key* keys) {
  for (int64_t j = 0; j < step.samples(); ++j) {
    keys[j] = step.filter == Filter::kRow
                  ? split(split(step.keys[0], leaf), static_cast<uint32_t>(j))
                  : split(step.keys[j], leaf);
  }
}

// One step of parts [begin, end) of one leaf, sampled as Z, kept as X.
template <typename Z, typename X>
JPK_INLINE void step_parts(const Step& step, const Leaf& leaf, int64_t begin, int64_t end,
                           Scratch& scratch) {
  const X scale = static_cast<X>(step.output_scale);
  X* weights = scratch.weights<X>();
  for (size_t i = 0; i < step.weights.size(); ++i) weights[i] = static_cast<X>(step.weights[i]);
  leaf_keys(step, leaf.index, scratch.keys());
  Block<X> at{step, leaf, scratch.keys(), weights, scratch.block<X>(), nullptr, {}, {}};
  X x[kBlock];

  const X* ring_now = static_cast<const X*>(leaf.ring) + (step.hidden + step.now) * leaf.size;
  Span later{0, 0, 0};  // what of the ring is still to be emitted: a tile at once
  Visits visits(leaf.shard, leaf.first_tile, step.slots, step.t, leaf.shard.part(begin, leaf.size),
                leaf.shard.part(end, leaf.size));
  while (const Visit* visit = visits.next()) {
    if (visit->terms) {
      at.begin(visit);
      advance<Z, X>(at, visit->terms, x);
    }
    const X* from = x;
    for (int64_t s = 0; s < visit->spans; ++s) {
      const Span& span = visit->span[s];
      if (step.slots == 0) {
        emit<X>(leaf, span, scale, from);
        from += span.count;
      } else if (span.here == later.here + later.count && later.count < kTile) {
        later.count += span.count;
      } else {
        emit<X>(leaf, later, scale, ring_now + later.here);
        later = span;
      }
    }
  }
  if (later.count) emit<X>(leaf, later, scale, ring_now + later.here);
}

JPK_TARGET_CLONES static void step_parts_f32_f32(const Step& step, const Leaf& leaf, int64_t begin,
                                                 int64_t end, Scratch& scratch) {
  step_parts<float, float>(step, leaf, begin, end, scratch);
}

JPK_TARGET_CLONES static void step_parts_f32_f64(const Step& step, const Leaf& leaf, int64_t begin,
                                                 int64_t end, Scratch& scratch) {
  step_parts<float, double>(step, leaf, begin, end, scratch);
}

JPK_TARGET_CLONES static void step_parts_f64_f64(const Step& step, const Leaf& leaf, int64_t begin,
                                                 int64_t end, Scratch& scratch) {
  step_parts<double, double>(step, leaf, begin, end, scratch);
}

inline void step_parts(const Step& step, const Leaf& leaf, int64_t begin, int64_t end,
                       Scratch& scratch) {
  if (leaf.noise_type == FloatType::kFloat64)
    return step_parts_f64_f64(step, leaf, begin, end, scratch);
  if (leaf.ring_type == FloatType::kFloat64)
    return step_parts_f32_f64(step, leaf, begin, end, scratch);
  return step_parts_f32_f32(step, leaf, begin, end, scratch);
}

// The step on all leaves, shared out over `workers` threads of the pool.
template <typename Pool>
void correlated_noise(Pool& pool, int64_t workers, const Step& step,
                      const std::vector<Leaf>& leaves) {
  std::vector<int64_t> first(1, 0);  // first[l] is the number of parts of leaves before l
  for (const Leaf& leaf : leaves) first.push_back(first.back() + leaf.parts());
  const int64_t parts = first.back();
  if (parts == 0) return;

  // Few enough elements that waking a thread costs more than it helps.
  constexpr int64_t kPartsPerWorker = 8;
  workers = std::clamp<int64_t>(parts / kPartsPerWorker, 1, std::max<int64_t>(workers, 1));
  // Long enough runs of parts to stream and to leave few blocks that are not full, short enough to
  // balance.
  const int64_t chunk = std::clamp<int64_t>(parts / (8 * workers), 1, 256);

  std::vector<Scratch> scratch;
  for (int64_t i = 0; i < workers; ++i) scratch.emplace_back(step);

  parallel_for(pool, (parts + chunk - 1) / chunk, workers, [&](int64_t i, int64_t worker) {
    int64_t part = i * chunk;
    const int64_t end = std::min(part + chunk, parts);
    size_t l =
        static_cast<size_t>(std::upper_bound(first.begin(), first.end(), part) - first.begin()) - 1;
    for (; part < end; ++l) {
      const int64_t stop = std::min(end, first[l + 1]);
      if (part < stop)
        step_parts(step, leaves[l], part - first[l], stop - first[l], scratch[worker]);
      part = std::max(part, stop);
    }
  });
}

}  // namespace jpk

#endif  // JPK_CORRELATED_NOISE_H_
