// One step of correlated noise for many leaves: sample, correlate, add to the gradients.
//
// With S = b - 1 slots of history, a visit to a tile either runs its recurrence S steps ahead
// (`refresh`), or, in the first S steps of a run, one step (`warm_up`), or only reads one slot.
// Which of them is a function of the step and the tile's position in the tree; ops/_lookahead.py
// states it for all implementations, and they must agree: it is the meaning of the state that they
// share.
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

namespace jpk {

inline constexpr int64_t kTile = 1024;
static_assert(kTile % kBlock == 0);

// Rows are added up in groups, one load and store of x for several multiply-adds; history is padded
// with rows of zeros to a multiple of the smaller group.
inline constexpr int64_t kRows = 4;

JPK_INLINE int64_t padded(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

struct Leaf {
  const void* grad;  // [size]
  void* out;         // [size]
  void* ring;        // [slots, size], null if there are no slots
  int64_t size;
  int64_t first_tile;  // tiles of the leaves before this one
  uint32_t index;      // position among the leaves of the tree
  FloatType grad_type;
  FloatType noise_type;  // kFloat32 or kFloat64: what is sampled
  FloatType ring_type;   // kFloat32 or kFloat64, at least as wide as noise_type

  int64_t tiles() const { return (size + kTile - 1) / kTile; }
};

// What every leaf shares at step t.
struct Step {
  int64_t slots;       // S
  int64_t time;        // min(t, S): how many terms of the past there are
  int64_t now;         // t mod S: the slot of x_t
  const Key* subkeys;  // [max(S, 1)] by slot: the keys of steps t .. t + S - 1
  // [2 S + kRows]: past[S + m - s] is the weight of slot m in the new x of slot s
  std::vector<double> past;
  double input_weight;  // of z_t in x_t
  double output_scale;  // of x_t in what is added to the gradients
  bool accurate;        // see Gaussian::any
};

inline Step make_step(int64_t t, const Key* subkeys, const double* coef, int64_t bands,
                      double output_scale, bool accurate) {
  const int64_t slots = bands - 1;
  Step step{slots,
            std::min(t, slots),
            slots ? t % slots : 0,
            subkeys,
            std::vector<double>(2 * slots + kRows),
            1.0 / coef[0],
            output_scale,
            accurate};
  for (int64_t lag = 1; lag <= slots; ++lag) {
    step.past[slots - lag] = -coef[lag] / coef[0];
    if (lag < slots) step.past[2 * slots - lag] = -coef[lag] / coef[0];
  }
  if (slots) step.past[slots] = step.past[0];  // x_{t-S} lies where x_t goes
  return step;
}

// Buffers of one worker, made before any thread starts.
class Scratch {
 public:
  explicit Scratch(int64_t slots)
      : slots_(slots), keys_(static_cast<size_t>(slots)), bytes_(allocate(slots)) {}
  Key* keys() { return keys_.data(); }  // [slots]: the leaf's keys
  template <typename X>
  X* weights() {  // [2 slots + kRows]: Step::past
    return reinterpret_cast<X*>(bytes_.get()) + padded(slots_) * kBlock;
  }
  template <typename X>
  X* history() {  // [padded(slots), kBlock]: the ring of one block of elements
    return reinterpret_cast<X*>(bytes_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  static void* allocate(int64_t slots) {
    return ::operator new(
        static_cast<size_t>(padded(slots) * kBlock + 2 * slots + kRows) * sizeof(double),
        kAlignment);
  }
  int64_t slots_;
  std::vector<Key> keys_;
  std::unique_ptr<void, Free> bytes_;
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

// Copies elements [first, first + count) of the ring's first rows to history, and pads it with
// zeros.
template <typename X>
JPK_INLINE void gather(const Leaf& leaf, int64_t first, int64_t count, int64_t rows, X* history) {
  const X* ring = static_cast<const X*>(leaf.ring) + first;
  for (int64_t m = 0; m < rows; ++m) {
    std::copy_n(ring + m * leaf.size, count, history + m * kBlock);
    std::fill(history + m * kBlock + count, history + (m + 1) * kBlock, X(0));
  }
  std::fill(history + rows * kBlock, history + padded(rows) * kBlock, X(0));
}

// x[i] = input_weight * normal(key, first + i).
template <typename Z, typename X>
JPK_INLINE void sample(const Step& step, Key key, int64_t first, X* __restrict x) {
  Z z[kBlock];
  normal_block<Z>(key, static_cast<uint64_t>(first), step.accurate, z);
  const X weight = static_cast<X>(step.input_weight);
  for (int i = 0; i < kBlock; ++i) x[i] = weight * static_cast<X>(z[i]);
}

// Overwrites elements [first, first + count) of all slots with x_t .. x_{t+S-1}; count <= kBlock.
template <typename Z, typename X>
JPK_INLINE void refresh(const Step& step, const Leaf& leaf, int64_t first, int64_t count,
                        const Key* keys, const X* weights, X* history) {
  const int64_t slots = step.slots;
  gather(leaf, first, count, slots, history);
  for (int64_t ahead = 0; ahead < slots; ++ahead) {
    const int64_t slot = step.now + ahead < slots ? step.now + ahead : step.now + ahead - slots;
    X x[kBlock];
    sample<Z, X>(step, keys[slot], first, x);
    accumulate<X>(padded(slots), weights + slots - slot, history, x);
    std::copy_n(x, kBlock, history + slot * kBlock);
  }
  X* ring = static_cast<X*>(leaf.ring) + first;
  for (int64_t m = 0; m < slots; ++m) {
    std::copy_n(history + m * kBlock, count, ring + m * leaf.size);
  }
}

// Writes x_t of elements [first, first + count) to its slot, from the t < S terms before it.
template <typename Z, typename X>
JPK_INLINE void warm_up(const Step& step, const Leaf& leaf, int64_t first, int64_t count, Key key,
                        const X* weights, X* history) {
  gather(leaf, first, count, step.time, history);
  X x[kBlock];
  sample<Z, X>(step, key, first, x);
  accumulate<X>(padded(step.time), weights + step.slots - step.now, history, x);
  std::copy_n(x, count, static_cast<X*>(leaf.ring) + step.now * leaf.size + first);
}

// out = grad + scale * x, added in the wider of the two types and rounded to the gradient's.
template <typename X, typename G>
JPK_INLINE void emit(const Leaf& leaf, int64_t first, int64_t count, X scale,
                     const X* __restrict x) {
  const G* __restrict grad = static_cast<const G*>(leaf.grad) + first;
  G* out = static_cast<G*>(leaf.out) + first;
  for (int64_t i = 0; i < count; ++i) narrow(widen(grad[i]) + scale * x[i], out[i]);
}

template <typename X>
JPK_INLINE void emit(const Leaf& leaf, int64_t first, int64_t count, X scale, const X* x) {
  switch (leaf.grad_type) {
    case FloatType::kFloat16:
      return emit<X, Float16>(leaf, first, count, scale, x);
    case FloatType::kBFloat16:
      return emit<X, BFloat16>(leaf, first, count, scale, x);
    case FloatType::kFloat32:
      return emit<X, float>(leaf, first, count, scale, x);
    case FloatType::kFloat64:
      return emit<X, double>(leaf, first, count, scale, x);
  }
}

// One step of tiles [begin, end) of one leaf, sampled as Z, kept as X.
template <typename Z, typename X>
JPK_INLINE void step_tiles(const Step& step, const Leaf& leaf, int64_t begin, int64_t end,
                           Scratch& scratch) {
  const int64_t slots = step.slots;
  const X scale = static_cast<X>(step.output_scale);
  const Key key_now = split(step.subkeys[step.now], leaf.index);

  if (slots == 0) {
    const int64_t stop = std::min(end * kTile, leaf.size);
    for (int64_t first = begin * kTile; first < stop; first += kBlock) {
      X x[kBlock];
      sample<Z, X>(step, key_now, first, x);
      emit<X>(leaf, first, std::min<int64_t>(kBlock, stop - first), scale, x);
    }
    return;
  }

  Key* keys = scratch.keys();
  X *weights = scratch.weights<X>(), *history = scratch.history<X>();
  for (size_t i = 0; i < step.past.size(); ++i) weights[i] = static_cast<X>(step.past[i]);
  const X* ring_now = static_cast<const X*>(leaf.ring) + step.now * leaf.size;

  bool have_keys = false;
  int64_t phase = (begin + leaf.first_tile) % slots;
  for (int64_t tile = begin; tile < end; ++tile, phase = phase + 1 == slots ? 0 : phase + 1) {
    const int64_t start = tile * kTile, stop = std::min(start + kTile, leaf.size);
    if (phase == step.now) {
      if (!have_keys) {
        for (int64_t s = 0; s < slots; ++s) keys[s] = split(step.subkeys[s], leaf.index);
        have_keys = true;
      }
      for (int64_t first = start; first < stop; first += kBlock) {
        refresh<Z, X>(step, leaf, first, std::min<int64_t>(kBlock, stop - first), keys, weights,
                      history);
      }
    } else if (step.time < phase) {
      for (int64_t first = start; first < stop; first += kBlock) {
        warm_up<Z, X>(step, leaf, first, std::min<int64_t>(kBlock, stop - first), key_now, weights,
                      history);
      }
    }
    emit<X>(leaf, start, stop - start, scale, ring_now + start);
  }
}

JPK_TARGET_CLONES static void step_tiles_f32_f32(const Step& step, const Leaf& leaf, int64_t begin,
                                                 int64_t end, Scratch& scratch) {
  step_tiles<float, float>(step, leaf, begin, end, scratch);
}

JPK_TARGET_CLONES static void step_tiles_f32_f64(const Step& step, const Leaf& leaf, int64_t begin,
                                                 int64_t end, Scratch& scratch) {
  step_tiles<float, double>(step, leaf, begin, end, scratch);
}

JPK_TARGET_CLONES static void step_tiles_f64_f64(const Step& step, const Leaf& leaf, int64_t begin,
                                                 int64_t end, Scratch& scratch) {
  step_tiles<double, double>(step, leaf, begin, end, scratch);
}

inline void step_tiles(const Step& step, const Leaf& leaf, int64_t begin, int64_t end,
                       Scratch& scratch) {
  if (leaf.noise_type == FloatType::kFloat64)
    return step_tiles_f64_f64(step, leaf, begin, end, scratch);
  if (leaf.ring_type == FloatType::kFloat64)
    return step_tiles_f32_f64(step, leaf, begin, end, scratch);
  return step_tiles_f32_f32(step, leaf, begin, end, scratch);
}

// The step on all leaves, shared out over `workers` threads of the pool.
template <typename Pool>
void correlated_noise(Pool& pool, int64_t workers, const Step& step,
                      const std::vector<Leaf>& leaves) {
  std::vector<int64_t> first(1, 0);  // first[l] is the number of tiles in leaves before l
  for (const Leaf& leaf : leaves) first.push_back(first.back() + leaf.tiles());
  const int64_t tiles = first.back();
  if (tiles == 0) return;

  // Few enough elements that waking a thread costs more than it helps.
  constexpr int64_t kTilesPerWorker = 8;
  workers = std::clamp<int64_t>(tiles / kTilesPerWorker, 1, std::max<int64_t>(workers, 1));
  // Long enough runs of tiles to stream, short enough to balance.
  const int64_t chunk = std::clamp<int64_t>(tiles / (8 * workers), 1, 64);

  std::vector<Scratch> scratch;
  for (int64_t i = 0; i < workers; ++i) scratch.emplace_back(step.slots);

  parallel_for(pool, (tiles + chunk - 1) / chunk, workers, [&](int64_t i, int64_t worker) {
    int64_t tile = i * chunk;
    const int64_t end = std::min(tile + chunk, tiles);
    size_t l =
        static_cast<size_t>(std::upper_bound(first.begin(), first.end(), tile) - first.begin()) - 1;
    for (; tile < end; ++l) {
      const int64_t stop = std::min(end, first[l + 1]);
      if (tile < stop)
        step_tiles(step, leaves[l], tile - first[l], stop - first[l], scratch[worker]);
      tile = std::max(tile, stop);
    }
  });
}

}  // namespace jpk

#endif  // JPK_CORRELATED_NOISE_H_
