// XLA binding of participation_max.h.
#include <string>

#include "ffi_reals.h"
#include "participation_max.h"
#include "registry.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;

ffi::Error run_participation_max(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingRets results,
                                 int64_t min_sep, int64_t max_participations) {
  return guarded("participation_max", [&]() -> std::string {
    const int64_t n = dimension(x, 1);
    if (min_sep < 1 || max_participations < 0) {
      return "needs min_sep >= 1 and max_participations >= 0";
    }
    return map_rows(pool, x, results, [=](const double* row, double* gradient) {
      return participation_max(row, n, min_sep, max_participations, gradient);
    });
  });
}

}  // namespace
}  // namespace jpk

JPK_HANDLER(jpk_participation_max, jpk::run_participation_max,
            xla::ffi::Ffi::Bind()
                .Ctx<xla::ffi::ThreadPool>()
                .Arg<xla::ffi::AnyBuffer>()  // x
                .RemainingRets()             // values, gradients
                .Attr<int64_t>("min_sep")
                .Attr<int64_t>("max_participations"));
