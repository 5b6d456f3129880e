// What the kernels of noise ops share: leaves, samples of some of their elements, and adding them.
#ifndef JPK_NOISE_H_
#define JPK_NOISE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "float_types.h"
#include "normal.h"
#include "parallel_for.h"
#include "simd.h"
#include "streams.h"
#include "visits.h"

namespace jpk {

// The ring of a step that has to leave the memory of the ring before alone: it is copied first.
struct RingCopy {
  const void* from = nullptr;  // null for a step in place
  int64_t rows = 0;
  int64_t row_bytes = 0;
};

struct Leaf {
  const void* grad;    // [size]
  void* out;           // [size], may be grad
  void* ring;          // [buffers + slots, size], null if there are no rows
  int64_t size;        // of the elements that are here
  int64_t first_tile;  // tiles of the leaves before this one
  uint32_t index;      // position among the leaves of the tree
  FloatType grad_type;
  FloatType noise_type;  // kFloat32 or kFloat64: the type that is sampled
  FloatType ring_type;   // kFloat32 or kFloat64, at least as wide as noise_type: the type of terms
  Shard shard{};         // which elements are here; all of them, unless it says otherwise
  RingCopy copy{};

  int64_t parts() const { return shard.parts(size); }
};

// What a key takes of Scratch, of any stream.
inline constexpr int64_t kKeyNumbers = sizeof(chacha20::Key) / sizeof(double);
static_assert(sizeof(Key) <= sizeof(chacha20::Key));

// Memory of one worker, aligned for vectors; it holds numbers of any floating type, or keys.
class Scratch {
 public:
  explicit Scratch(int64_t numbers)
      : memory_(::operator new(static_cast<size_t>(numbers) * sizeof(double), kAlignment)) {}
  template <typename X>
  X* as() {
    return static_cast<X*>(memory_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<void, Free> memory_;
};

// x = weight * samples of the elements under key j of a stream, for normal_of_uniforms' accurate.
template <typename Z, typename X, typename Stream>
JPK_INLINE void sample(Stream& stream, int64_t j, bool accurate, X weight, X* __restrict x) {
  Z u[kBlock], z[kBlock];
  stream.uniforms(j, u);
  normal_of_uniforms(u, accurate, z);
  for (int i = 0; i < kBlock; ++i) x[i] = weight * static_cast<X>(z[i]);
}

// x = sum_j weights[j] * samples under key j. Samples without weight are not made.
template <typename Z, typename X, typename Stream>
JPK_INLINE void weighted_samples(Stream& stream, bool accurate, const X* weights, int64_t samples,
                                 X* __restrict x) {
  std::fill(x, x + kBlock, X(0));
  for (int64_t j = 0; j < samples; ++j) {
    if (weights[j] == 0) continue;
    X z[kBlock];
    sample<Z, X>(stream, j, accurate, weights[j], z);
    for (int i = 0; i < kBlock; ++i) x[i] += z[i];
  }
}

// Calls add(gradient, output, i) for the elements of a span. Compilers do not vectorize a loop
// whose output may lie anywhere in its input, and do vectorize either of these.
template <typename G, typename Leaf, typename Add>
JPK_INLINE void for_each_gradient(const Leaf& leaf, const Span& span, const Add& add) {
  G* __restrict out = static_cast<G*>(leaf.out) + span.here;
  if (leaf.grad == leaf.out) {
    for (int64_t i = 0; i < span.count; ++i) add(out[i], out[i], i);
    return;
  }
  const G* __restrict grad = static_cast<const G*>(leaf.grad) + span.here;
  for (int64_t i = 0; i < span.count; ++i) add(grad[i], out[i], i);
}

// out = grad + scale * x, added in the wider of the two types and rounded to the gradient's.
template <typename X, typename G>
JPK_INLINE void emit(const Leaf& leaf, const Span& span, X scale, const X* __restrict x) {
  for_each_gradient<G>(leaf, span, [&](G grad, G& out, int64_t i) __attribute__((always_inline)) {
    narrow(widen(grad) + scale * x[i], out);
  });
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

// Copies what is here of parts [begin, end) of a ring.
template <typename Leaf>
void copy_ring(const Leaf& leaf, int64_t begin, int64_t end) {
  const auto [from, rows, row_bytes] = leaf.copy;
  if (from == nullptr || leaf.size == 0) return;
  const int64_t bytes = row_bytes / leaf.size;  // of an element
  const int64_t first = bytes * leaf.shard.part(begin, leaf.size);
  const int64_t last = bytes * leaf.shard.part(end, leaf.size);
  for (int64_t at = first; at < first + rows * row_bytes; at += row_bytes) {
    std::memcpy(static_cast<char*>(leaf.ring) + at, static_cast<const char*>(from) + at,
                static_cast<size_t>(last - first));
  }
}

// Shares the parts of all leaves out over `workers` threads of the pool. Calls
// body(leaf, first part, end, scratch) with scratch made by make() for each worker, before any
// thread starts. The ring of these parts has been copied then, where it is a copy.
template <typename Pool, typename Leaf, typename Make, typename Body>
void for_each_part(Pool& pool, int64_t workers, const std::vector<Leaf>& leaves, const Make& make,
                   const Body& body) {
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

  std::vector<decltype(make())> scratch;
  for (int64_t i = 0; i < workers; ++i) scratch.push_back(make());

  parallel_for(pool, (parts + chunk - 1) / chunk, workers, [&](int64_t i, int64_t worker) {
    int64_t part = i * chunk;
    const int64_t end = std::min(part + chunk, parts);
    size_t l =
        static_cast<size_t>(std::upper_bound(first.begin(), first.end(), part) - first.begin()) - 1;
    for (; part < end; ++l) {
      const int64_t stop = std::min(end, first[l + 1]);
      if (part < stop) {
        copy_ring(leaves[l], part - first[l], stop - first[l]);
        body(leaves[l], part - first[l], stop - first[l], scratch[static_cast<size_t>(worker)]);
      }
      part = std::max(part, stop);
    }
  });
}

}  // namespace jpk

#endif  // JPK_NOISE_H_
