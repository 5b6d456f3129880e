// Squared norm of the worst min-sep participation in a Toeplitz strategy, and its gradient.
#ifndef JPK_MIN_SEP_NORM_H_
#define JPK_MIN_SEP_NORM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "simd.h"

namespace jpk {

// sums[t] = sum_{j < k} x[t - j sep], t < n, where x is zero before its start. x is cut into rows
// of sep elements, and the rows into groups of k: a window of k rows is the head of one group, up
// to row t, and the tail of the group before it. Only additions: no difference of running sums,
// which would round small terms away.
JPK_TARGET_CLONES static void window_sums(const double* x, int64_t n, int64_t sep, int64_t k,
                                          double* sums) {
  const int64_t rows = (n + sep - 1) / sep;
  auto width = [=](int64_t row) { return std::min(sep, n - row * sep); };
  for (int64_t row = 0; row < rows; ++row) {
    const double* from = x + row * sep;
    double* to = sums + row * sep;
    const int64_t count = width(row);
    if (row % k == 0) {
      std::copy(from, from + count, to);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = to[i - sep] + from[i];
    }
  }
  if (k >= rows) return;
  std::vector<double> tail(static_cast<size_t>(sep));
  for (int64_t group = k; group < rows; group += k) {
    std::fill(tail.begin(), tail.end(), 0.0);
    for (int64_t row = group - 1; row > group - k; --row) {
      const double* from = x + row * sep;
      for (int64_t i = 0; i < sep; ++i) tail[i] += from[i];
      const int64_t last = row + k - 1;  // of the window that starts in this row
      if (last >= rows) continue;
      double* to = sums + last * sep;
      const int64_t count = width(last);
      for (int64_t i = 0; i < count; ++i) to[i] += tail[i];
    }
  }
}

JPK_TARGET_CLONES static double squared_norm(const double* x, int64_t n) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  }
  double sum = 0;
  for (; i < n; ++i) sum += x[i] * x[i];
  for (double lane : lanes) sum += lane;
  return sum;
}

// The squared norm of the window sums of x, m elements followed by zeros up to n, if k sep >= n: no
// window ends, and a running sum for every remainder of t modulo sep will do.
JPK_TARGET_CLONES static double unlimited_norm(const double* x, int64_t m, int64_t n, int64_t sep) {
  std::vector<double> sums(static_cast<size_t>(sep)), squares(sums.size());
  for (int64_t t = 0; t < n; t += sep) {
    for (int64_t i = 0; i < std::min(sep, m - t); ++i) sums[i] += x[t + i];
    for (int64_t i = 0; i < std::min(sep, n - t); ++i) squares[i] += sums[i] * sums[i];
  }
  double norm = 0;
  for (double square : squares) norm += square;
  return norm;
}

// p[t] = max_{u >= t} |c[u]|.
JPK_TARGET_CLONES static void majorant(const double* c, int64_t m, double* p) {
  for (int64_t t = 0; t < m; ++t) p[t] = std::fabs(c[t]);
  int64_t increases = 0;  // Mostly there are none, and counting them vectorizes.
  for (int64_t t = 0; t + 1 < m; ++t) increases += p[t] < p[t + 1];
  if (increases == 0) return;
  for (int64_t t = m - 2; t >= 0; --t) p[t] = std::max(p[t], p[t + 1]);
}

JPK_TARGET_CLONES static bool any_nan(const double* x, int64_t n) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) found += x[i] != x[i];
  return found != 0;
}

// For m <= n coefficients c let p be the least non-increasing sequence above |c|, zero from m to n,
// and v its window sums: gives |v|^2, and if `gradient` is not null writes the m derivatives with
// respect to c. An element of p goes with the first |c_t| behind it that equals it, itself
// included; at c_t = 0 the derivative is that to the right. NaN in gives NaN out.
inline double min_sep_norm(const double* c, int64_t m, int64_t n, int64_t sep, int64_t k,
                           double* gradient) {
  if (any_nan(c, m)) {
    if (gradient) std::fill(gradient, gradient + m, std::nan(""));
    return std::nan("");
  }
  const bool unlimited = k >= (n + sep - 1) / sep && sep >= 16;  // else its loops are too short
  const int64_t vectors = gradient ? 3 : unlimited ? 1 : 2;
  const std::unique_ptr<double[]> memory(new double[static_cast<size_t>(vectors * n)]);
  double *p = memory.get(), *v = p + n;
  majorant(c, m, p);
  if (vectors == 1) return unlimited_norm(p, m, n, sep);
  std::fill(p + m, p + n, 0.0);
  window_sums(p, n, sep, k, v);
  const double norm = squared_norm(v, n);
  if (!gradient) return norm;

  // The derivatives with respect to p are 2 W^T v, and W^T is W on reversed vectors.
  double* transposed = v + n;
  std::reverse(v, v + n);
  window_sums(v, n, sep, k, transposed);
  double waiting = 0;  // for the |c_t| that sets these elements of p
  for (int64_t t = 0; t < m; ++t) {
    waiting += 2 * transposed[n - 1 - t];
    gradient[t] = 0;
    if (std::fabs(c[t]) != p[t]) continue;
    gradient[t] = c[t] < 0 ? -waiting : waiting;
    waiting = 0;
  }
  return norm;
}

}  // namespace jpk

#endif  // JPK_MIN_SEP_NORM_H_
