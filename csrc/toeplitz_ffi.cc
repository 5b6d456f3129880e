// XLA bindings of toeplitz.h and toeplitz_fft.h. Python has checked the arguments already; whatever
// decides which memory is touched is checked again.
#include <string>

#include "ffi_reals.h"
#include "registry.h"
#include "toeplitz.h"
#include "toeplitz_fft.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;

// Coefficients [..., m], vectors [..., n, columns] and results [..., rows, columns], with the same
// leading dimensions, which may be none.
std::string make_batch(const ffi::AnyBuffer& coef, const ffi::AnyBuffer& rhs,
                       const ffi::AnyBuffer& out, bool transpose, toeplitz::Batch& batch) {
  if (!is_real(coef) || !is_real(rhs) || !is_real(out)) return "needs float32 or float64 buffers";
  const size_t rank = rhs.dimensions().size();
  if (rank < 2 || out.dimensions().size() != rank || coef.dimensions().size() != rank - 1) {
    return "needs coefficients [..., m], vectors [..., n, columns] and results [..., rows, "
           "columns]";
  }
  batch = {1,        dimension(coef, 1), dimension(rhs, 2), dimension(rhs, 1), dimension(out, 2),
           transpose};
  for (size_t i = 0; i + 2 < rank; ++i) {
    batch.problems *= rhs.dimensions()[i];
    if (coef.dimensions()[i] != rhs.dimensions()[i] || out.dimensions()[i] != rhs.dimensions()[i]) {
      return "needs equal leading dimensions";
    }
  }
  if (batch.m < 1 || batch.n < 1 || batch.rows < 1 || batch.rows > batch.n ||
      dimension(out, 1) != batch.columns) {
    return "needs m >= 1, 1 <= rows <= n and as many columns out as in";
  }
  return "";
}

template <bool solves>
ffi::Error multiply_or_solve(ffi::ThreadPool pool, ffi::AnyBuffer coef, ffi::AnyBuffer rhs,
                             ffi::Result<ffi::AnyBuffer> out, bool transpose) {
  return guarded(solves ? "toeplitz_solve" : "toeplitz_multiply", [&]() -> std::string {
    toeplitz::Batch batch;
    const std::string wrong = make_batch(coef, rhs, *out, transpose, batch);
    if (!wrong.empty()) return wrong;
    const Reals c = reals(coef), x = reals(rhs), y = reals(*out);
    if (!solves) {
      toeplitz::multiply(pool, pool.num_threads(), batch, c, x, y);
    } else if (batch.rows == batch.n) {
      toeplitz::solve(pool, pool.num_threads(), batch, c, x, y);
    } else {
      return "solves for all rows";
    }
    return "";
  });
}

// Spectra [..., bands, F] and [..., blocks, F]; their sums of products [..., blocks, F].
ffi::Error multiply_spectra(ffi::ThreadPool pool, ffi::AnyBuffer left, ffi::AnyBuffer right,
                            ffi::Result<ffi::AnyBuffer> sums) {
  return guarded("toeplitz_multiply", [&]() -> std::string {
    for (const ffi::AnyBuffer& buffer : {left, right, *sums}) {
      if (buffer.element_type() != ffi::DataType::C128) return "needs complex128 spectra";
    }
    const int64_t bands = dimension(left, 2), blocks = dimension(right, 2);
    const int64_t frequencies = dimension(right, 1);
    if (bands < 1 || blocks < 1 || frequencies < 1) return "needs spectra [..., blocks, F]";
    const int64_t problems = elements(right) / (blocks * frequencies);
    if (elements(right) != problems * blocks * frequencies ||
        elements(left) != problems * bands * frequencies || elements(*sums) != elements(right)) {
      return "needs as many problems and frequencies in all spectra";
    }
    auto doubles = [](const ffi::AnyBuffer& b) { return static_cast<double*>(b.untyped_data()); };
    toeplitz::multiply_spectra(pool, pool.num_threads(), problems, bands, blocks, frequencies,
                               doubles(left), doubles(right), doubles(*sums));
    return "";
  });
}

// Coefficients [..., m], vectors [..., n], and what an FFT made of them and of their absolute
// values, [..., 2, n]; the products [..., n].
ffi::Error finish_multiply(ffi::ThreadPool pool, ffi::AnyBuffer coef, ffi::AnyBuffer rhs,
                           ffi::AnyBuffer far, ffi::Result<ffi::AnyBuffer> out, int64_t block) {
  return guarded("toeplitz_multiply", [&]() -> std::string {
    for (const ffi::AnyBuffer& buffer : {coef, rhs, far, *out}) {
      if (buffer.element_type() != ffi::DataType::F64) return "needs float64 buffers";
    }
    const int64_t m = dimension(coef, 1), n = dimension(rhs, 1);
    if (m < 1 || n < m || block < 1 || block > kMost || block % toeplitz::kLags) {
      return "needs 1 <= m <= n, and blocks of a multiple of 8";
    }
    const int64_t problems = elements(rhs) / n;
    if (elements(coef) != problems * m || elements(rhs) != problems * n ||
        elements(far) != 2 * problems * n || elements(*out) != problems * n) {
      return "needs as many problems in all operands";
    }
    for (int64_t i = 0; i < problems; ++i) {
      toeplitz::Padded c(m), x(n), y(n);
      read(reals(coef), i * m, 1, m, c.data());
      read(reals(rhs), i * n, 1, n, x.data());
      const double* sums = static_cast<const double*>(far.untyped_data()) + 2 * i * n;
      toeplitz::finish(pool, pool.num_threads(), c, m, x, n, block, sums, sums + n, y);
      write(y.data(), i * n, 1, n, reals(*out));
    }
    return "";
  });
}

}  // namespace
}  // namespace jpk

JPK_HANDLER(jpk_toeplitz_multiply, jpk::multiply_or_solve<false>,
            jpk::bind_buffers<2>().Attr<bool>("transpose"));
JPK_HANDLER(jpk_toeplitz_solve, jpk::multiply_or_solve<true>,
            jpk::bind_buffers<2>().Attr<bool>("transpose"));
JPK_HANDLER(jpk_toeplitz_spectra, jpk::multiply_spectra, jpk::bind_buffers<2>());
JPK_HANDLER(jpk_toeplitz_finish, jpk::finish_multiply,
            jpk::bind_buffers<3>().Attr<int64_t>("block"));
