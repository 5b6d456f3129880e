// XLA binding of grid_sums.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "ffi_grid.h"
#include "grid_sums.h"
#include "registry.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;

// Operands: step, negative if it is not valid, keys, weights and base, then those of
// make_grid_leaves. weights is
// [behind + 1, 2], the low and the high word of doubles: JAX has none outside of its x64 mode.
ffi::Error run_grid_sums(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> t, ffi::Buffer<ffi::U32> keys,
                         ffi::Buffer<ffi::U32> weights, ffi::Buffer<ffi::U32> base,
                         ffi::RemainingArgs args, ffi::RemainingRets rets,
                         ffi::Dictionary dictionary) {
  return guarded("grid_sums", [&]() -> std::string {
    Attributes attributes(dictionary);
    GridSums step{};
    step.slots = attributes.get<int64_t>("slots");
    step.stddev = attributes.get<double>("stddev");
    if (!attributes.wrong().empty()) return attributes.wrong();
    if (t.element_count() != 1) return "step must be one integer";
    if (step.slots < 0 || step.slots > kMostGridSlots) return "slots must be >= 0 and in bounds";
    if (!(step.stddev > 0 && step.stddev <= 0x1p60)) return "stddev must be positive and in bounds";
    const auto shape = weights.dimensions();
    if (shape.size() != 2 || shape[0] < 1 || shape[1] != 2) return "weights must be [samples, 2]";
    step.t = std::max(t.typed_data()[0], 0);
    step.now = step.slots ? step.t % step.slots : 0;
    step.behind = shape[0] - 1;
    for (int64_t j = 0; j < shape[0]; ++j) {
      const uint32_t* words = weights.typed_data() + 2 * j;
      const double weight = bit_cast<double>(uint64_t{words[1]} << 32 | words[0]);
      if (!(std::fabs(weight) < 0x1p64)) return "weights must be finite and in bounds";
      step.weights.push_back(weight);
    }
    step.keys = chacha20_keys(keys, step.samples());
    if (!step.keys) return "keys must be of 8 words, one for each of the samples";
    std::vector<GridLeaf> leaves;
    std::string wrong = make_grid_leaves(step.slots, base, args, rets, attributes, leaves);
    if (!wrong.empty()) return wrong;
    if (t.typed_data()[0] < 0) {
      grid_nothing(pool, pool.num_threads(), leaves);
    } else {
      grid_sums(pool, pool.num_threads(), step, leaves);
    }
    return "";
  });
}

}  // namespace
}  // namespace jpk

JPK_HANDLER(jpk_grid_sums, jpk::run_grid_sums,
            xla::ffi::Ffi::Bind()
                .Ctx<xla::ffi::ThreadPool>()
                .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // step
                .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // keys
                .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // weights
                .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // base
                .RemainingArgs()
                .RemainingRets()
                .Attrs());
