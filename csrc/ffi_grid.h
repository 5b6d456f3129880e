// What the FFI files of exact noise share: leaves of integers from buffers and attributes, and
// keys.
#ifndef JPK_FFI_GRID_H_
#define JPK_FFI_GRID_H_

#include <cstdint>
#include <string>
#include <vector>

#include "ffi_noise.h"
#include "ffi_reals.h"
#include "grid_noise.h"

namespace jpk {

// So that sizes computed from it do not overflow.
inline constexpr int64_t kMostGridSlots = int64_t{1} << 30;

inline bool integer_type(xla::ffi::DataType type, bool& wide) {
  wide = type == xla::ffi::DataType::S64;
  return wide || type == xla::ffi::DataType::S32;
}

// The leaves of a call, as make_leaves. Gives what is wrong, or nothing.
inline std::string make_grid_leaves(int64_t rows, const xla::ffi::Buffer<xla::ffi::U32>& base,
                                    const xla::ffi::RemainingArgs& args,
                                    const xla::ffi::RemainingRets& rets, Attributes& attributes,
                                    std::vector<GridLeaf>& leaves) {
  const auto index = attributes.get<Shards::Numbers>("leaf_index");
  const auto first_tile = attributes.get<Shards::Numbers>("first_tile");
  const Shards shards(attributes);
  if (!attributes.wrong().empty()) return attributes.wrong();
  const size_t count = index.size(), per_leaf = rows ? 2 : 1;
  if (first_tile.size() != count || args.size() != per_leaf * count ||
      rets.size() != per_leaf * count) {
    return "operands, results and attributes disagree on the number of leaves";
  }
  leaves.resize(count);
  for (size_t l = 0; l < count; ++l) {
    const std::string name = "leaf " + std::to_string(index[l]);
    auto grad = args.get<xla::ffi::AnyBuffer>(per_leaf * l);
    auto out = rets.get<xla::ffi::AnyBuffer>(per_leaf * l);
    if (grad.has_error() || out.has_error()) return name + " has no gradient or no output";

    GridLeaf& leaf = leaves[l];
    leaf.size = elements(*grad);
    leaf.grad = grad->untyped_data();
    leaf.out = (*out)->untyped_data();
    leaf.ring = nullptr;
    leaf.wide_ring = false;
    leaf.index = static_cast<uint32_t>(index[l]);
    leaf.first_tile = first_tile[l];
    if (!integer_type(grad->element_type(), leaf.wide_grad) || first_tile[l] < 0 ||
        first_tile[l] > INT64_MAX / 2 || index[l] < 0 || index[l] > int64_t{UINT32_MAX}) {
      return name + " has an unsupported gradient type or attribute";
    }
    if ((*out)->element_type() != grad->element_type() || elements(**out) != leaf.size) {
      return name + " has an output unlike its gradient";
    }
    prefer_huge_pages(leaf.out, (*out)->size_bytes());
    if (rows == 0) continue;

    auto ring = args.get<xla::ffi::AnyBuffer>(2 * l + 1);
    auto ring_out = rets.get<xla::ffi::AnyBuffer>(2 * l + 1);
    if (ring.has_error() || ring_out.has_error()) return name + " has no ring";
    if (!integer_type(ring->element_type(), leaf.wide_ring) ||
        elements(*ring) != rows * leaf.size) {
      return name + " needs a ring of shape [rows, ...] of int32 or int64";
    }
    if (!set_ring(*ring, **ring_out, rows, leaf)) return name + " needs a ring like the one before";
  }
  return shards.set(base, leaves);
}

// Keys of chacha20, `count` of them; null if they are not.
inline const chacha20::Key* chacha20_keys(const xla::ffi::Buffer<xla::ffi::U32>& keys,
                                          int64_t count) {
  static_assert(sizeof(chacha20::Key) == 8 * sizeof(uint32_t));
  const auto shape = keys.dimensions();
  if (shape.size() != 2 || shape[0] != count || shape[1] != 8) return nullptr;
  return reinterpret_cast<const chacha20::Key*>(keys.typed_data());
}

}  // namespace jpk

#endif  // JPK_FFI_GRID_H_
