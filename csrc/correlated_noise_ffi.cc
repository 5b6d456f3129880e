// XLA binding of correlated_noise.h.
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "correlated_noise.h"
#include "ffi_noise.h"
#include "ffi_reals.h"
#include "registry.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;

// So that sizes computed from it do not overflow.
constexpr int64_t kMostSlots = int64_t{1} << 30;

// What the coefficients are, [rows, columns], says the filter:
//   "recurrence"       [1 or max(S, 1), S + 1], see set_recurrence
//   "moving_average"   [1, behind + 1], see set_moving_average
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
  } else if (filter == "moving_average") {
    if (rows != 1) return "a moving average needs coef of one row";
    step.filter = Filter::kMovingAverage;
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

// Operands: step, keys, coef, output_scale and base, then those of make_leaves.
ffi::Error run_correlated_noise(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> t,
                                ffi::Buffer<ffi::U32> keys, ffi::AnyBuffer coef,
                                ffi::AnyBuffer output_scale, ffi::Buffer<ffi::U32> base,
                                ffi::RemainingArgs args, ffi::RemainingRets rets,
                                ffi::Dictionary dictionary) {
  return guarded("correlated_noise", [&]() -> std::string {
    Attributes attributes(dictionary);
    const int64_t slots = attributes.get<int64_t>("slots");
    const auto filter = attributes.get<std::string_view>("filter");
    const bool accurate = attributes.get<bool>("accurate");
    if (!attributes.wrong().empty()) return attributes.wrong();
    std::vector<double> scale;
    if (!read_doubles(output_scale, scale) || scale.size() != 1) {
      return "output_scale must be a float32 or float64 scalar";
    }
    if (t.element_count() != 1 || t.typed_data()[0] < 0) return "step must be one integer >= 0";
    if (slots < 0 || slots > kMostSlots) return "slots must be >= 0 and in bounds";
    const int64_t words = keys.dimensions().size() == 2 ? keys.dimensions()[1] : 0;
    if (words != 2 && words != 8) {
      return "keys must have shape [.., 2] for threefry2x32 or [.., 8] for chacha20";
    }
    Keys of_steps = reinterpret_cast<const Key*>(keys.typed_data());
    if (words == 8) of_steps = reinterpret_cast<const chacha20::Key*>(keys.typed_data());
    Step step =
        make_step(Filter::kRecurrence, t.typed_data()[0], slots, of_steps, scale[0], accurate);
    if (std::string wrong = set_filter(filter, slots, coef, step); !wrong.empty()) return wrong;
    if (keys.dimensions()[0] != step.samples()) {
      return "keys must be one for each of the steps that are sampled";
    }
    std::vector<Leaf> leaves;
    const int64_t rows = step.buffers + slots;
    std::string wrong = make_leaves(rows, base, args, rets, attributes, leaves);
    if (wrong.empty()) correlated_noise(pool, pool.num_threads(), step, leaves);
    return wrong;
  });
}

}  // namespace
}  // namespace jpk

JPK_HANDLER(jpk_correlated_noise, jpk::run_correlated_noise,
            xla::ffi::Ffi::Bind()
                .Ctx<xla::ffi::ThreadPool>()
                .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // step
                .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // keys
                .Arg<xla::ffi::AnyBuffer>()              // coef
                .Arg<xla::ffi::AnyBuffer>()              // output_scale
                .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // base
                .RemainingArgs()
                .RemainingRets()
                .Attrs());
