// XLA binding of min_sep_norm.h.
#include <string>

#include "ffi_reals.h"
#include "min_sep_norm.h"
#include "registry.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;

ffi::Error run_min_sep_norm(ffi::ThreadPool pool, ffi::AnyBuffer coef, ffi::RemainingRets results,
                            int64_t n, int64_t min_sep, int64_t max_participations) {
  return guarded("min_sep_norm", [&]() -> std::string {
    const int64_t m = dimension(coef, 1);
    if (m > n || n > kMost || min_sep < 1 || min_sep > n || max_participations < 1) {
      return "needs coefficients [..., m], m <= n, 1 <= min_sep <= n and max_participations >= 1";
    }
    return map_rows(pool, coef, results, [=](const double* row, double* gradient) {
      return min_sep_norm(row, m, n, min_sep, max_participations, gradient);
    });
  });
}

}  // namespace
}  // namespace jpk

JPK_HANDLER(jpk_min_sep_norm, jpk::run_min_sep_norm,
            xla::ffi::Ffi::Bind()
                .Ctx<xla::ffi::ThreadPool>()
                .Arg<xla::ffi::AnyBuffer>()  // coef
                .RemainingRets()             // values, gradients
                .Attr<int64_t>("n")
                .Attr<int64_t>("min_sep")
                .Attr<int64_t>("max_participations"));
