// XLA binding of correlated_noise.h. Python has checked its arguments already; everything is
// checked again here, because what comes from XLA decides which memory is written.
#include <cmath>
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "correlated_noise.h"
#include "handlers.h"
#include "huge_pages.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;

// So that sizes computed from it do not overflow.
constexpr int64_t kMostSlots = int64_t{1} << 30;

ffi::Error invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("correlated_noise: " + what);
}

bool float_type(ffi::DataType from, FloatType& to) {
  switch (from) {
    case ffi::DataType::F16:
      return to = FloatType::kFloat16, true;
    case ffi::DataType::BF16:
      return to = FloatType::kBFloat16, true;
    case ffi::DataType::F32:
      return to = FloatType::kFloat32, true;
    case ffi::DataType::F64:
      return to = FloatType::kFloat64, true;
    default:
      return false;
  }
}

bool read_doubles(const ffi::AnyBuffer& buffer, std::vector<double>& to) {
  const size_t n = buffer.element_count();
  if (buffer.element_type() == ffi::DataType::F32) {
    const float* p = buffer.typed_data<float>();
    to.assign(p, p + n);
  } else if (buffer.element_type() == ffi::DataType::F64) {
    const double* p = buffer.typed_data<double>();
    to.assign(p, p + n);
  } else {
    return false;
  }
  return true;
}

// What the coefficients are, [rows, columns], says the filter:
//   "recurrence"       [1 or max(S, 1), S + 1], see set_recurrence
//   "moving_average", "row"   [1, behind + 1], see set_moving_average
//   "buffers", "inverse_buffers"   [2, buffers], see set_buffers
// Gives what is wrong, or nothing.
std::string set_filter(std::string_view filter, int64_t slots, const ffi::AnyBuffer& coef_buffer,
                       Step& step) {
  std::vector<double> coef;
  if (!read_doubles(coef_buffer, coef) || coef_buffer.dimensions().size() != 2 || coef.empty()) {
    return "coef must be float32 or float64, of two dimensions and not empty";
  }
  const int64_t rows = coef_buffer.dimensions()[0], columns = coef_buffer.dimensions()[1];
  if (filter == "recurrence") {
    if (columns != slots + 1 || (rows != 1 && rows != std::max<int64_t>(slots, 1))) {
      return "a recurrence needs coef of shape [1 or max(b - 1, 1), b]";
    }
    for (int64_t row = 0; row < rows; ++row) {
      const double c_0 = coef[static_cast<size_t>(row * columns)];
      if (c_0 == 0.0 || !std::isfinite(c_0)) return "c_0 must be finite and not 0";
    }
    step.filter = Filter::kRecurrence;
    set_recurrence(step, coef.data(), rows);
  } else if (filter == "moving_average" || filter == "row") {
    if (rows != 1 || (filter == "row" && slots)) return "a moving average needs coef of one row";
    step.filter = filter == "row" ? Filter::kRow : Filter::kMovingAverage;
    set_moving_average(step, coef.data(), columns - 1);
  } else if (filter == "buffers" || filter == "inverse_buffers") {
    if (rows != 2) return "buffers need coef of two rows";
    step.filter = filter == "buffers" ? Filter::kBuffers : Filter::kInverseBuffers;
    set_buffers(step, coef.data(), columns);
  } else {
    return "there is no filter " + std::string(filter);
  }
  return "";
}

// What is here of every leaf. base is [leaves, 2], the words of the index of the first element;
// axes are [count, stride, ..], axis_count of them for each leaf. Gives what is wrong, or nothing.
std::string set_shards(const ffi::Buffer<ffi::U32>& base, ffi::Span<const int64_t> run,
                       ffi::Span<const int64_t> axis_count, ffi::Span<const int64_t> axes,
                       std::vector<Leaf>& leaves) {
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

// Operands: step, keys, coef, output_scale, base, then (gradient, ring) of every leaf; results:
// (output, ring) of every leaf, the ring in the operand's memory. Without rows there are no rings.
ffi::Error step_impl(ffi::ThreadPool& pool, ffi::Buffer<ffi::S32>& t, ffi::Buffer<ffi::U32>& keys,
                     ffi::AnyBuffer& coef, ffi::AnyBuffer& scale_buffer,
                     ffi::Buffer<ffi::U32>& base, ffi::RemainingArgs& args,
                     ffi::RemainingRets& rets, std::string_view filter, int64_t slots,
                     ffi::Span<const int64_t> leaf_index, ffi::Span<const int64_t> first_tile,
                     ffi::Span<const int64_t> run, ffi::Span<const int64_t> axis_count,
                     ffi::Span<const int64_t> axes, ffi::Span<const int64_t> noise_bits,
                     ffi::Span<const int64_t> ring_bits, bool accurate) {
  std::vector<double> scale;
  if (!read_doubles(scale_buffer, scale) || scale.size() != 1) {
    return invalid("output_scale must be a float32 or float64 scalar");
  }
  if (t.element_count() != 1 || t.typed_data()[0] < 0)
    return invalid("step must be one integer >= 0");
  if (slots < 0 || slots > kMostSlots) return invalid("slots must be >= 0 and in bounds");
  if (keys.dimensions().size() != 2 || keys.dimensions()[1] != 2) {
    return invalid("keys must have shape [.., 2]");
  }
  Step step = make_step(Filter::kRecurrence, t.typed_data()[0], slots,
                        reinterpret_cast<const Key*>(keys.typed_data()), scale[0], accurate);
  if (const std::string wrong = set_filter(filter, slots, coef, step); !wrong.empty()) {
    return invalid(wrong);
  }
  if (keys.dimensions()[0] != step.key_count()) {
    return invalid("keys must be one for each of the steps that are sampled");
  }

  const int64_t rows = step.hidden + slots;
  const size_t leaves = leaf_index.size(), per_leaf = rows ? 2 : 1;
  if (first_tile.size() != leaves || noise_bits.size() != leaves || ring_bits.size() != leaves ||
      args.size() != per_leaf * leaves || rets.size() != per_leaf * leaves) {
    return invalid("operands, results and attributes disagree on the number of leaves");
  }

  std::vector<Leaf> list(leaves);
  for (size_t l = 0; l < leaves; ++l) {
    const std::string name = "leaf " + std::to_string(leaf_index[l]);
    auto grad = args.get<ffi::AnyBuffer>(per_leaf * l);
    auto out = rets.get<ffi::AnyBuffer>(per_leaf * l);
    if (grad.has_error()) return grad.error();
    if (out.has_error()) return out.error();

    Leaf& leaf = list[l];
    leaf.size = static_cast<int64_t>(grad->element_count());
    leaf.grad = grad->untyped_data();
    leaf.out = (*out)->untyped_data();
    leaf.ring = nullptr;
    leaf.index = static_cast<uint32_t>(leaf_index[l]);
    leaf.first_tile = first_tile[l];
    leaf.noise_type = noise_bits[l] == 64 ? FloatType::kFloat64 : FloatType::kFloat32;
    leaf.ring_type = ring_bits[l] == 64 ? FloatType::kFloat64 : FloatType::kFloat32;
    if (!float_type(grad->element_type(), leaf.grad_type) || first_tile[l] < 0 ||
        first_tile[l] > INT64_MAX / 2 || leaf_index[l] < 0 || leaf_index[l] > int64_t{UINT32_MAX} ||
        (noise_bits[l] != 32 && noise_bits[l] != 64) || ring_bits[l] < noise_bits[l] ||
        (ring_bits[l] != 32 && ring_bits[l] != 64)) {
      return invalid(name + " has an unsupported gradient type or attribute");
    }
    if ((*out)->element_type() != grad->element_type() ||
        (*out)->element_count() != grad->element_count()) {
      return invalid(name + " has an output unlike its gradient");
    }
    prefer_huge_pages(leaf.out, (*out)->size_bytes());
    if (rows == 0) continue;

    auto ring = args.get<ffi::AnyBuffer>(2 * l + 1);
    auto ring_out = rets.get<ffi::AnyBuffer>(2 * l + 1);
    if (ring.has_error()) return ring.error();
    if (ring_out.has_error()) return ring_out.error();
    leaf.ring = ring->untyped_data();
    FloatType ring_type;
    if (!float_type(ring->element_type(), ring_type) || ring_type != leaf.ring_type ||
        static_cast<int64_t>(ring->element_count()) != rows * leaf.size) {
      return invalid(name + " needs a ring of shape [rows, ...] and the type it is said to have");
    }
    if ((*ring_out)->untyped_data() != leaf.ring && leaf.size) {
      return ffi::Error::Internal("correlated_noise: the ring of " + name +
                                  " was not updated in place");
    }
  }

  if (const std::string wrong = set_shards(base, run, axis_count, axes, list); !wrong.empty()) {
    return invalid(wrong);
  }
  correlated_noise(pool, pool.num_threads(), step, list);
  return ffi::Error::Success();
}

ffi::Error step(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> t, ffi::Buffer<ffi::U32> keys,
                ffi::AnyBuffer coef, ffi::AnyBuffer output_scale, ffi::Buffer<ffi::U32> base,
                ffi::RemainingArgs args, ffi::RemainingRets rets, std::string_view filter,
                int64_t slots, ffi::Span<const int64_t> leaf_index,
                ffi::Span<const int64_t> first_tile, ffi::Span<const int64_t> run,
                ffi::Span<const int64_t> axis_count, ffi::Span<const int64_t> axes,
                ffi::Span<const int64_t> noise_bits, ffi::Span<const int64_t> ring_bits,
                bool accurate) {
  try {
    return step_impl(pool, t, keys, coef, output_scale, base, args, rets, filter, slots, leaf_index,
                     first_tile, run, axis_count, axes, noise_bits, ring_bits, accurate);
  } catch (const std::exception& error) {  // out of memory, at worst
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      std::string("correlated_noise: ") + error.what());
  }
}

}  // namespace
}  // namespace jpk

XLA_FFI_DEFINE_HANDLER_SYMBOL(jpk_correlated_noise, jpk::step,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // step
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // coef
                                  .Arg<xla::ffi::AnyBuffer>()              // output_scale
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // base
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("filter")
                                  .Attr<int64_t>("slots")
                                  .Attr<xla::ffi::Span<const int64_t>>("leaf_index")
                                  .Attr<xla::ffi::Span<const int64_t>>("first_tile")
                                  .Attr<xla::ffi::Span<const int64_t>>("run")
                                  .Attr<xla::ffi::Span<const int64_t>>("axis_count")
                                  .Attr<xla::ffi::Span<const int64_t>>("axes")
                                  .Attr<xla::ffi::Span<const int64_t>>("noise_bits")
                                  .Attr<xla::ffi::Span<const int64_t>>("ring_bits")
                                  .Attr<bool>("accurate"));
