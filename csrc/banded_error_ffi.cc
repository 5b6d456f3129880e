// XLA bindings of banded_error.h.
#include <string>
#include <vector>

#include "banded_error.h"
#include "ffi_reals.h"
#include "parallel_for.h"
#include "registry.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;

// Rows [..., n, b], scale [..., n], rates [..., n] and momentum [...], of one problem or several.
struct BandedErrorOperands {
  ffi::AnyBuffer rows, scale, rates, momentum;
  int64_t n, b, problems;

  std::string check() {
    n = dimension(rows, 2), b = dimension(rows, 1);
    if (rows.dimensions().size() < 2 || n < 1 || b < 1) return "needs rows [..., n, b]";
    problems = elements(rows) / (n * b);
    if (!is_real(rows) || !fits(scale, n) || !fits(rates, n) || !fits(momentum, 1)) {
      return "needs float32 or float64 scale [..., n], rates [..., n] and momentum [...]";
    }
    return "";
  }

  bool fits(const ffi::AnyBuffer& buffer, int64_t size) const {
    return is_real(buffer) && elements(buffer) == problems * size;
  }

  // The given elements of problem i, as double.
  static std::vector<double> copy(const ffi::AnyBuffer& buffer, int64_t i, int64_t size) {
    std::vector<double> values(static_cast<size_t>(size));
    read(reals(buffer), i * size, 1, size, values.data());
    return values;
  }

  // Runs body(problem, errors) over all problems.
  template <typename Body>
  void for_each(ffi::ThreadPool& pool, const Body& body) const {
    parallel_for(pool, problems, pool.num_threads(), [&](int64_t i, int64_t) {
      const auto r = copy(rows, i, n * b), s = copy(scale, i, n), e = copy(rates, i, n);
      body(i, banded::Errors(r.data(), s.data(), e.data(), copy(momentum, i, 1)[0], n, b));
    });
  }
};

ffi::Error banded_error(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer scale,
                        ffi::AnyBuffer rates, ffi::AnyBuffer momentum,
                        ffi::Result<ffi::AnyBuffer> out) {
  return guarded("banded_error", [&]() -> std::string {
    BandedErrorOperands operands{rows, scale, rates, momentum, 0, 0, 0};
    const std::string wrong = operands.check();
    if (!wrong.empty()) return wrong;
    const int64_t n = operands.n;
    if (!operands.fits(*out, n)) return "needs results [..., n]";
    operands.for_each(pool, [&](int64_t i, banded::Errors errors) {
      std::vector<double> result(static_cast<size_t>(n));
      errors.values(result.data());
      write(result.data(), i * n, 1, n, reals(*out));
    });
    return "";
  });
}

ffi::Error banded_error_gradients(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer scale,
                                  ffi::AnyBuffer rates, ffi::AnyBuffer momentum, ffi::AnyBuffer g,
                                  ffi::Result<ffi::AnyBuffer> rows_bar,
                                  ffi::Result<ffi::AnyBuffer> scale_bar,
                                  ffi::Result<ffi::AnyBuffer> rates_bar,
                                  ffi::Result<ffi::AnyBuffer> momentum_bar) {
  return guarded("banded_error", [&]() -> std::string {
    BandedErrorOperands operands{rows, scale, rates, momentum, 0, 0, 0};
    const std::string wrong = operands.check();
    if (!wrong.empty()) return wrong;
    const int64_t n = operands.n, b = operands.b;
    if (!operands.fits(g, n) || !operands.fits(*rows_bar, n * b) || !operands.fits(*scale_bar, n) ||
        !operands.fits(*rates_bar, n) || !operands.fits(*momentum_bar, 1)) {
      return "needs g [..., n], and results shaped like the operands";
    }
    operands.for_each(pool, [&](int64_t i, banded::Errors errors) {
      std::vector<double> row(static_cast<size_t>(n * b)), s(static_cast<size_t>(n)), e(s.size());
      const double m = errors.gradients(BandedErrorOperands::copy(g, i, n).data(), row.data(),
                                        s.data(), e.data());
      write(row.data(), i * n * b, 1, n * b, reals(*rows_bar));
      write(s.data(), i * n, 1, n, reals(*scale_bar));
      write(e.data(), i * n, 1, n, reals(*rates_bar));
      write(&m, i, 1, 1, reals(*momentum_bar));
    });
    return "";
  });
}

}  // namespace
}  // namespace jpk

JPK_HANDLER(jpk_banded_error, jpk::banded_error, jpk::bind_buffers<4>());
JPK_HANDLER(jpk_banded_error_gradients, jpk::banded_error_gradients, (jpk::bind_buffers<5, 4>()));
