// One step of correlated noise for many leaves: sample, correlate, add to the gradients.
//
// A leaf may keep a ring of S terms to come. A visit to a tile then makes the terms of S steps
// (`advance` by S), or, in the first S steps of a run, of one step, or only reads one slot. Which
// of them is a function of the step and the tile's position in the tree (visits.h);
// ops/correlated_noise/_schedule.py states it for all implementations, and they must agree: it is
// the meaning of the state that they share.
#ifndef JPK_CORRELATED_NOISE_H_
#define JPK_CORRELATED_NOISE_H_

#include <algorithm>
#include <cstdint>
#include <variant>
#include <vector>

#include "noise.h"

namespace jpk {

// Rows are added up in groups, one load and store of x for several multiply-adds; they are padded
// with rows of zeros to a multiple of the smaller group.
inline constexpr int64_t kGroup = 4;

JPK_INLINE int64_t padded(int64_t rows) { return (rows + kGroup - 1) / kGroup * kGroup; }

// How x is made of the samples z.
enum class Filter {
  kRecurrence,      // sum_l c_l x_{t-l} = z_t; the coefficients may differ from row to row
  kMovingAverage,   // x_t = sum_l w_l z_{t-l}
  kBuffers,         // x_t = z_t + w.u_t, u_{t+1} = decay u_t + z_t
  kInverseBuffers,  // x_t = z_t - w.u_t, u_{t+1} = decay u_t + x_t
};

// Keys of one stream.
using Keys = std::variant<const Key*, const chacha20::Key*>;

// What every leaf shares at step t.
struct Step {
  Filter filter;
  int64_t t;
  int64_t slots;    // S: how many terms a visit makes, if it is not 0
  int64_t buffers;  // of a BLT: the rows of the ring that come before the slots
  int64_t behind;   // how many samples before z_t there are in x_t
  int64_t now;      // t mod S: the slot of x_t
  // Of steps t - behind .. t + max(S, 1) - 1: a leaf's key is split(key of the step, leaf).
  Keys keys;
  // kRecurrence: see set_recurrence. kMovingAverage: of z_{t-behind} .. z_t, and zeros up to
  // padded(behind + 1). Buffers: the decays, then the weights of the buffers in x_t.
  std::vector<double> weights;
  std::vector<double> input_weight;  // of z in x; kRecurrence may have one for every step
  bool by_row;                       // kRecurrence: the coefficients differ from row to row
  double output_scale;               // of x_t in what is added to the gradients
  bool accurate;                     // see Gaussian::any

  int64_t most_steps() const { return std::max<int64_t>(slots, 1); }
  int64_t samples() const { return behind + most_steps(); }  // that a visit may make
  int64_t slot(int64_t ahead) const {
    return now + ahead < slots ? now + ahead : now + ahead - slots;
  }
  // Rows of a block that an advance works in.
  int64_t block_rows() const {
    if (filter == Filter::kRecurrence) return padded(slots);
    if (filter == Filter::kMovingAverage && slots) return samples() + kGroup;
    return buffers;
  }
};

inline Step make_step(Filter filter, int64_t t, int64_t slots, Keys keys, double output_scale,
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
    // [2 S + kGroup]: weights[S + m - s] is the weight of slot m in the new x of slot s.
    step.weights.assign(static_cast<size_t>(2 * slots + kGroup), 0.0);
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

// weights is [behind + 1], in the order of time. Samples before step 0 have no part in x.
inline void set_moving_average(Step& step, const double* weights, int64_t behind) {
  step.behind = behind;
  step.weights.assign(weights, weights + behind + 1);
  if (step.slots == 0) {
    const int64_t never = std::clamp<int64_t>(behind - step.t, 0, behind);
    std::fill_n(step.weights.begin(), never, 0.0);
  }
  step.weights.resize(static_cast<size_t>(padded(behind + 1)), 0.0);
}

// parameters is [2, buffers]: the decays and the output scales.
inline void set_buffers(Step& step, const double* parameters, int64_t buffers) {
  step.buffers = buffers;
  step.weights.assign(parameters, parameters + 2 * buffers);
  if (step.filter == Filter::kInverseBuffers) {
    for (int64_t i = 0; i < buffers; ++i) step.weights[buffers + i] *= -1;
  }
}

// What one worker needs, made before any thread starts.
struct Workspace {
  explicit Workspace(const Step& step)
      : keys(step.samples() * kKeyNumbers),
        block_rows(step.block_rows()),
        scratch(block_rows * kBlock + static_cast<int64_t>(step.weights.size())) {}
  template <typename X>
  X* block() {  // [block_rows, kBlock]
    return scratch.as<X>();
  }
  template <typename X>
  X* weights() {  // Step::weights
    return scratch.as<X>() + block_rows * kBlock;
  }

  Scratch keys;  // those of the leaf, like Step::keys
  int64_t block_rows;
  Scratch scratch;
};

// Some elements of a leaf that make terms, and what they need for it.
template <typename Z, typename X, typename Stream>
struct Block {
  const Step& step;
  const Leaf& leaf;
  const X* weights;
  X* rows;  // [Step::block_rows(), kBlock]
  Stream stream;
  const Visit* visit;

  JPK_INLINE void begin(const Visit* of) {
    visit = of;
    stream.begin(*visit);
  }

  // weight * the samples of step t + ahead, or of key j if samples of the past come first.
  JPK_INLINE void sample(int64_t key, X weight, X* __restrict x) {
    jpk::sample<Z, X>(stream, key, step.accurate, weight, x);
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

// The same over any number of rows that is a multiple of kGroup.
template <typename X>
JPK_INLINE void accumulate(int64_t rows, const X* weight, const X* history, X* __restrict x) {
  int64_t m = 0;
  for (; m + 2 * kGroup <= rows; m += 2 * kGroup) {
    accumulate_group<2 * kGroup>(weight + m, history + m * kBlock, x);
  }
  for (; m < rows; m += kGroup) accumulate_group<kGroup>(weight + m, history + m * kBlock, x);
}

// Makes x_t .. x_{t+steps-1}, steps being S or 1, in the ring's slots; without slots, x_t in x.
// So do the two functions that follow.
template <typename Z, typename X, typename Stream>
JPK_INLINE void advance_recurrence(Block<Z, X, Stream>& at, int64_t steps, X* __restrict x) {
  const Step& step = at.step;
  const int64_t slots = step.slots;
  if (slots == 0) {
    return at.sample(0, static_cast<X>(step.input_weight[0]), x);
  }
  // A single step of a run's first S reads the slots that have been written.
  const int64_t rows = steps == slots ? slots : std::min(step.t, slots);
  for (int64_t m = 0; m < rows; ++m) at.load(m, at.rows + m * kBlock);
  std::fill(at.rows + rows * kBlock, at.rows + padded(rows) * kBlock, X(0));
  for (int64_t ahead = 0; ahead < steps; ++ahead) {
    const int64_t slot = step.slot(ahead);
    const X* weights = step.by_row ? at.weights + ahead * padded(slots) : at.weights + slots - slot;
    at.sample(ahead, static_cast<X>(step.input_weight[step.by_row ? ahead : 0]), x);
    accumulate<X>(padded(rows), weights, at.rows, x);
    if (steps == slots) std::copy_n(x, kBlock, at.rows + slot * kBlock);
  }
  if (steps != slots) return at.store(step.now, x);
  for (int64_t m = 0; m < slots; ++m) at.store(m, at.rows + m * kBlock);
}

template <typename Z, typename X, typename Stream>
JPK_INLINE void advance_moving_average(Block<Z, X, Stream>& at, int64_t steps, X* __restrict x) {
  const Step& step = at.step;
  const int64_t samples = step.behind + steps;
  if (step.slots == 0) {
    return weighted_samples<Z, X>(at.stream, step.accurate, at.weights, samples, x);
  }
  for (int64_t j = 0; j < samples; ++j) {
    X* z = at.rows + j * kBlock;
    if (step.t - step.behind + j < 0) {
      std::fill(z, z + kBlock, X(0));  // nothing came before step 0
    } else {
      at.sample(j, X(1), z);
    }
  }
  std::fill(at.rows + samples * kBlock, at.rows + (samples + kGroup) * kBlock, X(0));
  for (int64_t ahead = 0; ahead < steps; ++ahead) {
    std::fill(x, x + kBlock, X(0));
    accumulate<X>(padded(step.behind + 1), at.weights, at.rows + ahead * kBlock, x);
    at.store(step.slot(ahead), x);
  }
}

template <typename Z, typename X, typename Stream>
JPK_INLINE void advance_buffers(Block<Z, X, Stream>& at, int64_t steps, X* __restrict x) {
  const Step& step = at.step;
  const int64_t buffers = step.buffers;
  const X *decay = at.weights, *weight = at.weights + buffers;
  for (int64_t m = 0; m < buffers; ++m) at.load(m, at.rows + m * kBlock);
  for (int64_t ahead = 0; ahead < steps; ++ahead) {
    X z[kBlock];
    at.sample(ahead, X(1), z);
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

template <typename Z, typename X, typename Stream>
JPK_INLINE void advance(Block<Z, X, Stream>& at, int64_t steps, X* x) {
  switch (at.step.filter) {
    case Filter::kRecurrence:
      return advance_recurrence(at, steps, x);
    case Filter::kMovingAverage:
      return advance_moving_average(at, steps, x);
    case Filter::kBuffers:
    case Filter::kInverseBuffers:
      return advance_buffers(at, steps, x);
  }
}

// One step of parts [begin, end) of one leaf, sampled as Z, kept as X.
template <typename Z, typename X, typename Stream>
JPK_INLINE void step_parts(const typename Stream::Key* keys, const Step& step, const Leaf& leaf,
                           int64_t begin, int64_t end, Workspace& workspace) {
  const X scale = static_cast<X>(step.output_scale);
  X* weights = workspace.weights<X>();
  for (size_t i = 0; i < step.weights.size(); ++i) weights[i] = static_cast<X>(step.weights[i]);
  auto* of_leaf = workspace.keys.as<typename Stream::Key>();
  bool keyed = false;  // most visits make no terms, and need no keys
  Block<Z, X, Stream> at{
      step, leaf, weights, workspace.block<X>(), Stream(of_leaf, step.samples()), nullptr};
  X x[kBlock];

  const X* ring_now = static_cast<const X*>(leaf.ring) + (step.buffers + step.now) * leaf.size;
  Span later{0, 0, 0};  // what of the ring is still to be emitted: a tile at once
  Visits visits(leaf.shard, leaf.first_tile, step.slots, step.t, leaf.shard.part(begin, leaf.size),
                leaf.shard.part(end, leaf.size));
  while (const Visit* visit = visits.next()) {
    if (visit->terms) {
      for (int64_t j = 0; !keyed && j < step.samples(); ++j) {
        of_leaf[j] = Stream::split(keys[j], leaf.index);
      }
      keyed = true;
      at.begin(visit);
      advance(at, visit->terms, x);
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

template <typename Z, typename X>
JPK_INLINE void step_parts(const Step& step, const Leaf& leaf, int64_t begin, int64_t end,
                           Workspace& workspace) {
  if (const auto* keys = std::get_if<const chacha20::Key*>(&step.keys)) {
    return step_parts<Z, X, ChaCha20Stream<Z>>(*keys, step, leaf, begin, end, workspace);
  }
  const Key* keys = std::get<const Key*>(step.keys);
  step_parts<Z, X, ThreefryStream<Z>>(keys, step, leaf, begin, end, workspace);
}

JPK_TARGET_CLONES static void step_parts_f32_f32(const Step& step, const Leaf& leaf, int64_t begin,
                                                 int64_t end, Workspace& workspace) {
  step_parts<float, float>(step, leaf, begin, end, workspace);
}

JPK_TARGET_CLONES static void step_parts_f32_f64(const Step& step, const Leaf& leaf, int64_t begin,
                                                 int64_t end, Workspace& workspace) {
  step_parts<float, double>(step, leaf, begin, end, workspace);
}

JPK_TARGET_CLONES static void step_parts_f64_f64(const Step& step, const Leaf& leaf, int64_t begin,
                                                 int64_t end, Workspace& workspace) {
  step_parts<double, double>(step, leaf, begin, end, workspace);
}

inline void step_parts(const Step& step, const Leaf& leaf, int64_t begin, int64_t end,
                       Workspace& workspace) {
  if (leaf.noise_type == FloatType::kFloat64)
    return step_parts_f64_f64(step, leaf, begin, end, workspace);
  if (leaf.ring_type == FloatType::kFloat64)
    return step_parts_f32_f64(step, leaf, begin, end, workspace);
  return step_parts_f32_f32(step, leaf, begin, end, workspace);
}

// The step on all leaves, shared out over `workers` threads of the pool.
template <typename Pool>
void correlated_noise(Pool& pool, int64_t workers, const Step& step,
                      const std::vector<Leaf>& leaves) {
  for_each_part(
      pool, workers, leaves, [&] { return Workspace(step); },
      [&](const Leaf& leaf, int64_t begin, int64_t end, Workspace& workspace) {
        step_parts(step, leaf, begin, end, workspace);
      });
}

}  // namespace jpk

#endif  // JPK_CORRELATED_NOISE_H_
