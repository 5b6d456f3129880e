// Noise of one row of a dense matrix for many leaves: a weighted sum of samples, made in registers.
#ifndef JPK_DENSE_NOISE_H_
#define JPK_DENSE_NOISE_H_

#include <cstdint>
#include <variant>
#include <vector>

#include "noise.h"

namespace jpk {

// What every leaf shares.
struct Row {
  std::variant<Key, chacha20::Key> key;  // sample j of a leaf: fold_in(split(key, leaf), j)
  std::vector<double> weights;           // of the samples
  bool accurate;                         // see Gaussian::any

  int64_t samples() const { return static_cast<int64_t>(weights.size()); }
};

// What one worker needs, made before any thread starts.
struct RowWorkspace {
  explicit RowWorkspace(const Row& row)
      : keys(row.samples() * kKeyNumbers), scratch(row.samples()) {}

  Scratch keys;     // those of the leaf's samples
  Scratch scratch;  // the weights
};

// Parts [begin, end) of one leaf, sampled as Z, added up as X.
template <typename Z, typename X, typename Stream>
JPK_INLINE void row_parts(const typename Stream::Key& key, const Row& row, const Leaf& leaf,
                          int64_t begin, int64_t end, RowWorkspace& workspace) {
  const int64_t samples = row.samples();
  const typename Stream::Key of_leaf = Stream::split(key, leaf.index);
  auto* keys = workspace.keys.as<typename Stream::Key>();
  X* weights = workspace.scratch.as<X>();
  for (int64_t j = 0; j < samples; ++j) {
    weights[j] = static_cast<X>(row.weights[j]);
    keys[j] = Stream::fold_in(of_leaf, static_cast<uint32_t>(j));
  }
  Stream stream(keys, samples);
  X x[kBlock];
  Visits visits(leaf.shard, leaf.first_tile, 0, 0, leaf.shard.part(begin, leaf.size),
                leaf.shard.part(end, leaf.size));
  while (const Visit* visit = visits.next()) {
    stream.begin(*visit);
    weighted_samples<Z, X>(stream, row.accurate, weights, samples, x);
    const X* from = x;
    for (int64_t s = 0; s < visit->spans; ++s) {
      emit<X>(leaf, visit->span[s], X(1), from);
      from += visit->span[s].count;
    }
  }
}

template <typename Z, typename X>
JPK_INLINE void row_parts(const Row& row, const Leaf& leaf, int64_t begin, int64_t end,
                          RowWorkspace& workspace) {
  if (const auto* key = std::get_if<chacha20::Key>(&row.key)) {
    return row_parts<Z, X, ChaCha20Stream<Z>>(*key, row, leaf, begin, end, workspace);
  }
  const Key& key = std::get<Key>(row.key);
  row_parts<Z, X, ThreefryStream<Z>>(key, row, leaf, begin, end, workspace);
}

JPK_TARGET_CLONES static void row_parts_f32_f32(const Row& row, const Leaf& leaf, int64_t begin,
                                                int64_t end, RowWorkspace& workspace) {
  row_parts<float, float>(row, leaf, begin, end, workspace);
}

JPK_TARGET_CLONES static void row_parts_f32_f64(const Row& row, const Leaf& leaf, int64_t begin,
                                                int64_t end, RowWorkspace& workspace) {
  row_parts<float, double>(row, leaf, begin, end, workspace);
}

JPK_TARGET_CLONES static void row_parts_f64_f64(const Row& row, const Leaf& leaf, int64_t begin,
                                                int64_t end, RowWorkspace& workspace) {
  row_parts<double, double>(row, leaf, begin, end, workspace);
}

// The row on all leaves, shared out over `workers` threads of the pool.
template <typename Pool>
void dense_noise(Pool& pool, int64_t workers, const Row& row, const std::vector<Leaf>& leaves) {
  for_each_part(
      pool, workers, leaves, [&] { return RowWorkspace(row); },
      [&](const Leaf& leaf, int64_t begin, int64_t end, RowWorkspace& workspace) {
        if (leaf.noise_type == FloatType::kFloat64)
          return row_parts_f64_f64(row, leaf, begin, end, workspace);
        if (leaf.ring_type == FloatType::kFloat64)
          return row_parts_f32_f64(row, leaf, begin, end, workspace);
        return row_parts_f32_f32(row, leaf, begin, end, workspace);
      });
}

}  // namespace jpk

#endif  // JPK_DENSE_NOISE_H_
