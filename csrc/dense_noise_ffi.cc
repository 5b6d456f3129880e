// XLA binding of dense_noise.h.
#include <cstdint>
#include <string>
#include <vector>

#include "dense_noise.h"
#include "ffi_noise.h"
#include "ffi_reals.h"
#include "registry.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;

// Operands: key, row and base, then those of make_leaves, without rings.
ffi::Error run_dense_noise(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> key, ffi::AnyBuffer weights,
                           ffi::Buffer<ffi::U32> base, ffi::RemainingArgs args,
                           ffi::RemainingRets rets, ffi::Dictionary dictionary) {
  return guarded("dense_noise", [&]() -> std::string {
    Attributes attributes(dictionary);
    Row row;
    row.accurate = attributes.get<bool>("accurate");
    if (!attributes.wrong().empty()) return attributes.wrong();
    if (key.element_count() == 8) {
      row.key = *reinterpret_cast<const chacha20::Key*>(key.typed_data());
    } else if (key.element_count() == 2) {
      row.key = *reinterpret_cast<const Key*>(key.typed_data());
    } else {
      return "key must have two words for threefry2x32 or eight for chacha20";
    }
    if (!read_doubles(weights, row.weights) || weights.dimensions().size() != 1) {
      return "row must be float32 or float64, of one dimension";
    }
    std::vector<Leaf> leaves;
    std::string wrong = make_leaves(0, base, args, rets, attributes, leaves);
    if (wrong.empty()) dense_noise(pool, pool.num_threads(), row, leaves);
    return wrong;
  });
}

}  // namespace
}  // namespace jpk

JPK_HANDLER(jpk_dense_noise, jpk::run_dense_noise,
            xla::ffi::Ffi::Bind()
                .Ctx<xla::ffi::ThreadPool>()
                .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // key
                .Arg<xla::ffi::AnyBuffer>()              // row
                .Arg<xla::ffi::Buffer<xla::ffi::U32>>()  // base
                .RemainingArgs()
                .RemainingRets()
                .Attrs());
