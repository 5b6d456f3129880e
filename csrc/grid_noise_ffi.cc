// XLA binding of grid_noise.h.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "ffi_grid.h"
#include "grid_noise.h"
#include "registry.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;

// Operands: step, negative if it is not valid, keys, coef and base, then those of make_grid_leaves.
// coef is [1 or max(S, 1), S + 1], see set_grid_recurrence.
ffi::Error run_grid_noise(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> t, ffi::Buffer<ffi::U32> keys,
                          ffi::Buffer<ffi::S32> coef, ffi::Buffer<ffi::U32> base,
                          ffi::RemainingArgs args, ffi::RemainingRets rets,
                          ffi::Dictionary dictionary) {
  return guarded("grid_noise", [&]() -> std::string {
    Attributes attributes(dictionary);
    const int64_t slots = attributes.get<int64_t>("slots");
    const double scale = attributes.get<double>("scale");
    const auto spacing = attributes.get<Shards::Numbers>("spacing");
    const bool in_doubles = attributes.get<bool>("in_doubles");
    if (!attributes.wrong().empty()) return attributes.wrong();
    if (t.element_count() != 1) return "step must be one integer";
    if (slots < 0 || slots > kMostGridSlots) return "slots must be >= 0 and in bounds";
    if (!(scale >= 0x1p-3 && scale <= 0x1p42)) return "scale must be between 2^-3 and 2^42";
    GridStep step{};
    if (spacing.size() != std::size(step.rounding.spacing.limb)) return "spacing must be 5 words";
    step.t = std::max(t.typed_data()[0], 0);
    step.slots = slots;
    step.now = slots ? step.t % slots : 0;
    step.rounding.scale = scale;
    std::memcpy(step.rounding.spacing.limb, spacing.begin(), sizeof step.rounding.spacing.limb);
    step.in_doubles = in_doubles;
    const auto shape = coef.dimensions();
    if (shape.size() != 2 || shape[1] != slots + 1 ||
        (shape[0] != 1 && shape[0] != step.most_steps())) {
      return "coef must be [1 or max(b - 1, 1), b]";
    }
    for (int64_t row = 0; row < shape[0]; ++row) {
      if (coef.typed_data()[row * shape[1]] == 0) return "c_0 must not be 0";
    }
    set_grid_recurrence(step, coef.typed_data(), shape[0]);
    step.keys = chacha20_keys(keys, step.most_steps());
    if (!step.keys) return "keys must be of 8 words, one for each of the steps that are sampled";
    std::vector<GridLeaf> leaves;
    std::string wrong = make_grid_leaves(slots, base, args, rets, attributes, leaves);
    if (!wrong.empty()) return wrong;
    if (t.typed_data()[0] < 0) {
      grid_nothing(pool, pool.num_threads(), leaves);
    } else {
      grid_noise(pool, pool.num_threads(), step, leaves);
    }
    return "";
  });
}

}  // namespace
}  // namespace jpk

JPK_HANDLER(jpk_grid_noise, jpk::run_grid_noise,
            xla::ffi::Ffi::Bind()
                .Ctx<xla::ffi::ThreadPool>()
                .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // step
                .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // keys
                .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // coef
                .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // base
                .RemainingArgs()
                .RemainingRets()
                .Attrs());
