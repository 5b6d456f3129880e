// The most that one user can add to a linear function: the dynamic program VecSens (Algorithm 3 of
// https://arxiv.org/abs/2306.08153), and its subgradient.
#ifndef JPK_PARTICIPATION_MAX_H_
#define JPK_PARTICIPATION_MAX_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace jpk {

// best[j] = max(x + later[j - 1], next[j]) for 0 < j <= k, and best[0] = 0.
JPK_TARGET_CLONES static void better(double x, const double* later, const double* next, int64_t k,
                                     double* best) {
  best[0] = 0;
  for (int64_t j = 1; j <= k; ++j) {
    const double take = x + later[j - 1];
    best[j] = take > next[j] ? take : next[j];
  }
}

// The maximum of sum_{i in I} x[i] over sets I of at most k elements of [0, n), any two of which
// differ by at least sep >= 1. If `gradient` is not null, writes the n derivatives: 1 for what is
// taken, and half of what is left to decide to either side of a tie. NaN in gives NaN out.
inline double participation_max(const double* x, int64_t n, int64_t sep, int64_t k,
                                double* gradient) {
  const double* nan = std::find_if(x, x + n, [](double v) { return std::isnan(v); });
  if (nan != x + n) {
    if (gradient) std::fill(gradient, gradient + n, *nan);
    return *nan;
  }
  sep = std::min(sep, n);
  // F(i, j) is the maximum over [i, n) with at most j elements:
  //   F(i, j) = max(x[i] + F(i + sep, j - 1), F(i + 1, j)).
  // A limit that does not bind needs no j, F(i) = max(x[i] + F(i + sep), F(i + 1)).
  if (k >= (n + sep - 1) / sep) {
    std::vector<double> best(static_cast<size_t>(n + sep));
    for (int64_t i = n - 1; i >= 0; --i) {
      const double take = x[i] + best[i + sep];
      best[i] = take > best[i + 1] ? take : best[i + 1];
    }
    if (!gradient) return best[0];
    std::vector<double> weight(static_cast<size_t>(n + sep));
    weight[0] = 1;
    for (int64_t i = 0; i < n; ++i) {
      const double take = x[i] + best[i + sep], skip = best[i + 1];
      gradient[i] = take > skip ? weight[i] : take == skip ? weight[i] / 2 : 0;
      weight[i + sep] += gradient[i];
      weight[i + 1] += weight[i] - gradient[i];
    }
    return best[0];
  }

  // Row i of a table is F(i, 0..k). A ring of sep + 1 rows will do for the value alone.
  const int64_t width = k + 1, rows = gradient ? n + sep : sep + 1;
  std::vector<double> table(static_cast<size_t>(rows * width));
  auto row = [&](std::vector<double>& of, int64_t i) { return of.data() + i % rows * width; };
  for (int64_t i = n - 1; i >= 0; --i) {
    better(x[i], row(table, i + sep), row(table, i + 1), k, row(table, i));
  }
  if (!gradient) return row(table, 0)[k];
  std::vector<double> weights(static_cast<size_t>(rows * width));
  row(weights, 0)[k] = 1;
  for (int64_t i = 0; i < n; ++i) {
    const double *later = row(table, i + sep), *next = row(table, i + 1), *here = row(weights, i);
    double *taken = row(weights, i + sep), *skipped = row(weights, i + 1), sum = 0;
    for (int64_t j = 1; j <= k; ++j) {
      const double take = x[i] + later[j - 1];
      const double part = take > next[j] ? here[j] : take == next[j] ? here[j] / 2 : 0;
      taken[j - 1] += part;
      skipped[j] += here[j] - part;
      sum += part;
    }
    gradient[i] = sum;
  }
  return row(table, 0)[k];
}

}  // namespace jpk

#endif  // JPK_PARTICIPATION_MAX_H_
