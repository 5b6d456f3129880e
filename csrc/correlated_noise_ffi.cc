// XLA binding of correlated_noise.h. Python has checked its arguments already; everything is
// checked again here, because what comes from XLA decides which memory is written.
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "correlated_noise.h"
#include "handlers.h"
#include "huge_pages.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;

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

// Operands: step, subkeys, coef, output_scale, then (gradient, ring) of every leaf; results:
// (output, ring) of every leaf, the ring in the operand's memory. Without slots there are no rings.
ffi::Error step_impl(ffi::ThreadPool& pool, ffi::Buffer<ffi::S32>& t,
                     ffi::Buffer<ffi::U32>& subkeys, ffi::AnyBuffer& coef_buffer,
                     ffi::AnyBuffer& scale_buffer, ffi::RemainingArgs& args,
                     ffi::RemainingRets& rets, ffi::Span<const int64_t> leaf_index,
                     ffi::Span<const int64_t> first_tile, ffi::Span<const int64_t> noise_bits,
                     bool accurate) {
  std::vector<double> coef, scale;
  if (!read_doubles(coef_buffer, coef) || coef.empty() || coef[0] == 0.0) {
    return invalid("coef must be float32 or float64 with c_0 != 0");
  }
  if (!read_doubles(scale_buffer, scale) || scale.size() != 1) {
    return invalid("output_scale must be a float32 or float64 scalar");
  }
  const int64_t bands = static_cast<int64_t>(coef.size()), slots = bands - 1;
  if (t.element_count() != 1 || t.typed_data()[0] < 0)
    return invalid("step must be one integer >= 0");
  if (static_cast<int64_t>(subkeys.element_count()) != 2 * std::max<int64_t>(slots, 1)) {
    return invalid("subkeys must have shape [max(b - 1, 1), 2]");
  }

  const size_t leaves = leaf_index.size(), per_leaf = slots ? 2 : 1;
  if (first_tile.size() != leaves || noise_bits.size() != leaves ||
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
    leaf.ring_type = leaf.noise_type;
    if (!float_type(grad->element_type(), leaf.grad_type) || first_tile[l] < 0 ||
        first_tile[l] > INT64_MAX / 2 || leaf_index[l] < 0 || leaf_index[l] > int64_t{UINT32_MAX} ||
        (noise_bits[l] != 32 && noise_bits[l] != 64)) {
      return invalid(name + " has an unsupported gradient type or attribute");
    }
    if ((*out)->element_type() != grad->element_type() ||
        (*out)->element_count() != grad->element_count()) {
      return invalid(name + " has an output unlike its gradient");
    }
    prefer_huge_pages(leaf.out, (*out)->size_bytes());
    if (slots == 0) continue;

    auto ring = args.get<ffi::AnyBuffer>(2 * l + 1);
    auto ring_out = rets.get<ffi::AnyBuffer>(2 * l + 1);
    if (ring.has_error()) return ring.error();
    if (ring_out.has_error()) return ring_out.error();
    leaf.ring = ring->untyped_data();
    if (!float_type(ring->element_type(), leaf.ring_type) || leaf.ring_type < leaf.noise_type ||
        static_cast<int64_t>(ring->element_count()) != slots * leaf.size) {
      return invalid(name +
                     " needs a ring of shape [b - 1, ...] and a type no narrower than its noise");
    }
    if ((*ring_out)->untyped_data() != leaf.ring && leaf.size) {
      return ffi::Error::Internal("correlated_noise: the ring of " + name +
                                  " was not updated in place");
    }
  }

  const Step step = make_step(t.typed_data()[0], reinterpret_cast<const Key*>(subkeys.typed_data()),
                              coef.data(), bands, scale[0], accurate);
  correlated_noise(pool, pool.num_threads(), step, list);
  return ffi::Error::Success();
}

ffi::Error step(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> t, ffi::Buffer<ffi::U32> subkeys,
                ffi::AnyBuffer coef, ffi::AnyBuffer output_scale, ffi::RemainingArgs args,
                ffi::RemainingRets rets, ffi::Span<const int64_t> leaf_index,
                ffi::Span<const int64_t> first_tile, ffi::Span<const int64_t> noise_bits,
                bool accurate) {
  try {
    return step_impl(pool, t, subkeys, coef, output_scale, args, rets, leaf_index, first_tile,
                     noise_bits, accurate);
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
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // subkeys
                                  .Arg<xla::ffi::AnyBuffer>()              // coef
                                  .Arg<xla::ffi::AnyBuffer>()              // output_scale
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const int64_t>>("leaf_index")
                                  .Attr<xla::ffi::Span<const int64_t>>("first_tile")
                                  .Attr<xla::ffi::Span<const int64_t>>("noise_bits")
                                  .Attr<bool>("accurate"));
