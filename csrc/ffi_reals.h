// What the FFI files of the coefficient ops share: buffers of float or double, and errors.
#ifndef JPK_FFI_REALS_H_
#define JPK_FFI_REALS_H_

#include <cstdint>
#include <exception>
#include <memory>
#include <string>

#include "parallel_for.h"
#include "reals.h"
#include "xla/ffi/api/ffi.h"

namespace jpk {

// Attributes that sizes are computed from are bounded by this, so that none overflows.
constexpr int64_t kMost = int64_t{1} << 60;

inline bool is_real(const xla::ffi::AnyBuffer& buffer) {
  return buffer.element_type() == xla::ffi::DataType::F32 ||
         buffer.element_type() == xla::ffi::DataType::F64;
}

inline Reals reals(const xla::ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), buffer.element_type() == xla::ffi::DataType::F64};
}

inline int64_t dimension(const xla::ffi::AnyBuffer& buffer, size_t from_the_end) {
  const auto dimensions = buffer.dimensions();
  return from_the_end <= dimensions.size() ? dimensions[dimensions.size() - from_the_end] : 1;
}

inline int64_t elements(const xla::ffi::AnyBuffer& buffer) {
  return static_cast<int64_t>(buffer.element_count());
}

// How XLA calls a handler: with its thread pool, `args` buffers and `rets` results.
template <int args, int rets = 1>
auto bind_buffers() {
  if constexpr (rets > 0) {
    return bind_buffers<args, rets - 1>().template Ret<xla::ffi::AnyBuffer>();
  } else if constexpr (args > 0) {
    return bind_buffers<args - 1, 0>().template Arg<xla::ffi::AnyBuffer>();
  } else {
    return xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>();
  }
}

// Runs body(), which gives what is wrong or an empty string; what it throws becomes an XLA error.
template <typename Body>
xla::ffi::Error guarded(const char* op, const Body& body) {
  using xla::ffi::Error;
  try {
    const std::string wrong = body();
    if (wrong.empty()) return Error::Success();
    return Error::InvalidArgument(std::string(op) + ": " + wrong);
  } catch (const std::exception& error) {  // out of memory, at worst
    return Error(xla::ffi::ErrorCode::kResourceExhausted, std::string(op) + ": " + error.what());
  }
}

// A function of rows [..., m] into results [...], and if they are asked for into a second result,
// its gradients [..., m]. value(row, gradient) is the function; it leaves a null gradient alone.
template <typename Value>
std::string map_rows(xla::ffi::ThreadPool& pool, const xla::ffi::AnyBuffer& rows,
                     const xla::ffi::RemainingRets& results, const Value& value) {
  const int64_t m = dimension(rows, 1);
  if (!is_real(rows) || m < 1) return "needs float32 or float64 rows [..., m], m >= 1";
  const int64_t count = elements(rows) / m;
  auto values = results.get<xla::ffi::AnyBuffer>(0);
  if (values.has_error() || !is_real(**values) || elements(**values) != count) {
    return "needs one result for every row";
  }
  if (results.size() > 2) return "gives values and gradients only";
  const bool differentiate = results.size() == 2;
  Reals gradients{};
  if (differentiate) {
    auto buffer = results.get<xla::ffi::AnyBuffer>(1);
    if (buffer.has_error() || !is_real(**buffer) || elements(**buffer) != elements(rows)) {
      return "needs gradients of the shape of the rows";
    }
    gradients = reals(**buffer);
  }
  const Reals from = reals(rows), to = reals(**values);
  parallel_for(pool, count, pool.num_threads(), [&](int64_t i, int64_t) {
    const std::unique_ptr<double[]> row(new double[static_cast<size_t>(m)]);  // not zeroed first
    const std::unique_ptr<double[]> gradient(differentiate ? new double[static_cast<size_t>(m)]
                                                           : nullptr);
    read(from, i * m, 1, m, row.get());
    const double result = value(row.get(), gradient.get());
    write(&result, i, 1, 1, to);
    if (differentiate) write(gradient.get(), i * m, 1, m, gradients);
  });
  return "";
}

}  // namespace jpk

#endif  // JPK_FFI_REALS_H_
