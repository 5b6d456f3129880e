// What the FFI files of the noise ops share: leaves from buffers and attributes. Python has checked
// its arguments already; everything is checked again here, because what comes from XLA decides
// which memory is written.
#ifndef JPK_FFI_NOISE_H_
#define JPK_FFI_NOISE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "huge_pages.h"
#include "noise.h"
#include "xla/ffi/api/ffi.h"

namespace jpk {

inline bool float_type(xla::ffi::DataType from, FloatType& to) {
  switch (from) {
    case xla::ffi::DataType::F16:
      return to = FloatType::kFloat16, true;
    case xla::ffi::DataType::BF16:
      return to = FloatType::kBFloat16, true;
    case xla::ffi::DataType::F32:
      return to = FloatType::kFloat32, true;
    case xla::ffi::DataType::F64:
      return to = FloatType::kFloat64, true;
    default:
      return false;
  }
}

inline bool read_doubles(const xla::ffi::AnyBuffer& buffer, std::vector<double>& to) {
  const size_t n = buffer.element_count();
  if (buffer.element_type() == xla::ffi::DataType::F32) {
    const float* p = buffer.typed_data<float>();
    to.assign(p, p + n);
  } else if (buffer.element_type() == xla::ffi::DataType::F64) {
    const double* p = buffer.typed_data<double>();
    to.assign(p, p + n);
  } else {
    return false;
  }
  return true;
}

// Attributes of a call, by name. The first that is missing or of another type is remembered.
class Attributes {
 public:
  explicit Attributes(const xla::ffi::Dictionary& dictionary) : dictionary_(dictionary) {}

  template <typename T>
  T get(std::string_view name) {
    auto value = dictionary_.get<T>(name);
    if (value.has_value()) return *value;
    if (wrong_.empty()) wrong_ = "needs an attribute " + std::string(name) + " of the right type";
    return T{};
  }
  const std::string& wrong() const { return wrong_; }

 private:
  const xla::ffi::Dictionary& dictionary_;
  std::string wrong_;
};

// What says which elements of the leaves are here; each of `run` and `axis_count` has an entry for
// every leaf.
struct Shards {
  using Numbers = xla::ffi::Span<const int64_t>;

  explicit Shards(Attributes& attributes)
      : run(attributes.get<Numbers>("run")),
        axis_count(attributes.get<Numbers>("axis_count")),
        axes(attributes.get<Numbers>("axes")) {}

  // Sets the shards of the leaves, whose sizes are known. base is [leaves, 2], the words of the
  // index of the first element; axes are [count, stride, ..], axis_count of them for each leaf.
  // Gives what is wrong, or nothing.
  template <typename Leaf>
  std::string set(const xla::ffi::Buffer<xla::ffi::U32>& base, std::vector<Leaf>& leaves) const {
    if (base.element_count() != 2 * leaves.size() || run.size() != leaves.size() ||
        axis_count.size() != leaves.size()) {
      return "base, run and axis_count must be of every leaf";
    }
    size_t next = 0;
    for (size_t l = 0; l < leaves.size(); ++l) {
      Shard& shard = leaves[l].shard;
      shard.base = uint64_t{base.typed_data()[2 * l]} << 32 | base.typed_data()[2 * l + 1];
      shard.run = run[l];
      if (run[l] < 1 || run[l] > leaves[l].size) return "a run must be of 1 to size elements";
      int64_t runs = leaves[l].size / run[l];
      if (runs * run[l] != leaves[l].size) return "a shard must be of whole runs";
      if (axis_count[l] < 0) return "axis_count must not be negative";
      for (int64_t k = 0; k < axis_count[l]; ++k, next += 2) {
        if (next + 1 >= axes.size()) return "axes must have a count and a stride each";
        if (axes[next] < 1 || runs % axes[next] || axes[next + 1] < 1) {
          return "axes must count the runs of a shard, and have strides";
        }
        runs /= axes[next];
        shard.axes.push_back({axes[next], axes[next + 1]});
      }
      if (runs != 1) return "axes must count the runs of a shard, and have strides";
    }
    return next == axes.size() ? "" : "there are more axes than leaves have";
  }

  Numbers run, axis_count, axes;
};

// Sets the ring of a leaf, in the memory of the operand or to be copied from there; false if they
// are not alike.
template <typename Leaf>
bool set_ring(const xla::ffi::AnyBuffer& from, xla::ffi::AnyBuffer& to, int64_t rows, Leaf& leaf) {
  if (to.element_type() != from.element_type() || to.element_count() != from.element_count()) {
    return false;
  }
  leaf.ring = to.untyped_data();
  if (leaf.ring == from.untyped_data()) return true;
  leaf.copy = {from.untyped_data(), rows, static_cast<int64_t>(from.size_bytes()) / rows};
  prefer_huge_pages(leaf.ring, to.size_bytes());
  return true;
}

// The leaves of a call: the gradient and the ring of each in args, the output and the ring in rets,
// either in the memory of the operand or elsewhere. Without rows there are no rings. Gives what is
// wrong, or nothing.
inline std::string make_leaves(int64_t rows, const xla::ffi::Buffer<xla::ffi::U32>& base,
                               const xla::ffi::RemainingArgs& args,
                               const xla::ffi::RemainingRets& rets, Attributes& attributes,
                               std::vector<Leaf>& leaves) {
  using xla::ffi::AnyBuffer;
  const auto index = attributes.get<Shards::Numbers>("leaf_index");
  const auto first_tile = attributes.get<Shards::Numbers>("first_tile");
  const auto noise_bits = attributes.get<Shards::Numbers>("noise_bits");
  const auto ring_bits = attributes.get<Shards::Numbers>("ring_bits");
  const Shards shards(attributes);
  if (!attributes.wrong().empty()) return attributes.wrong();
  const size_t count = index.size(), per_leaf = rows ? 2 : 1;
  if (first_tile.size() != count || noise_bits.size() != count || ring_bits.size() != count ||
      args.size() != per_leaf * count || rets.size() != per_leaf * count) {
    return "operands, results and attributes disagree on the number of leaves";
  }
  leaves.resize(count);
  for (size_t l = 0; l < count; ++l) {
    const std::string name = "leaf " + std::to_string(index[l]);
    auto grad = args.get<AnyBuffer>(per_leaf * l);
    auto out = rets.get<AnyBuffer>(per_leaf * l);
    if (grad.has_error() || out.has_error()) return name + " has no gradient or no output";

    Leaf& leaf = leaves[l];
    leaf.size = static_cast<int64_t>(grad->element_count());
    leaf.grad = grad->untyped_data();
    leaf.out = (*out)->untyped_data();
    leaf.ring = nullptr;
    leaf.index = static_cast<uint32_t>(index[l]);
    leaf.first_tile = first_tile[l];
    leaf.noise_type = noise_bits[l] == 64 ? FloatType::kFloat64 : FloatType::kFloat32;
    leaf.ring_type = ring_bits[l] == 64 ? FloatType::kFloat64 : FloatType::kFloat32;
    if (!float_type(grad->element_type(), leaf.grad_type) || first_tile[l] < 0 ||
        first_tile[l] > INT64_MAX / 2 || index[l] < 0 || index[l] > int64_t{UINT32_MAX} ||
        (noise_bits[l] != 32 && noise_bits[l] != 64) || ring_bits[l] < noise_bits[l] ||
        (ring_bits[l] != 32 && ring_bits[l] != 64)) {
      return name + " has an unsupported gradient type or attribute";
    }
    if ((*out)->element_type() != grad->element_type() ||
        (*out)->element_count() != grad->element_count()) {
      return name + " has an output unlike its gradient";
    }
    prefer_huge_pages(leaf.out, (*out)->size_bytes());
    if (rows == 0) continue;

    auto ring = args.get<AnyBuffer>(2 * l + 1);
    auto ring_out = rets.get<AnyBuffer>(2 * l + 1);
    if (ring.has_error() || ring_out.has_error()) return name + " has no ring";
    FloatType ring_type;
    if (!float_type(ring->element_type(), ring_type) || ring_type != leaf.ring_type ||
        static_cast<int64_t>(ring->element_count()) != rows * leaf.size) {
      return name + " needs a ring of shape [rows, ...] and the type it is said to have";
    }
    if (!set_ring(*ring, **ring_out, rows, leaf)) return name + " needs a ring like the one before";
  }
  return shards.set(base, leaves);
}

}  // namespace jpk

#endif  // JPK_FFI_NOISE_H_
