// Errors of a banded strategy on a momentum workload, and their derivatives.
//
// The noise x_t = (z_t - sum_{l=1..b-1} rows[t, l] x_{t-l}) / rows[t, 0] goes through
//   m_t = momentum m_{t-1} + scale[t] x_t,    y_t = y_{t-1} + rates[t] m_t,
// prefix sums for momentum 0 and rates 1. The errors are the variances of the y_t, for independent
// z of variance 1. (x_{t-1} .. x_{t-b+1}, m_{t-1}, y_{t-1}) is a Markov process: its covariance K
// follows from step to step, O(b^2) each, where a row of the matrix would take O(t b).
#ifndef JPK_BANDED_ERROR_H_
#define JPK_BANDED_ERROR_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace jpk::banded {

// One step. The covariance is dim x dim, with dim = w + 2: w = b - 1 lags, then m and y.
struct Step {
  int64_t w;
  const double* h;  // [w], how x depends on the lags
  double inverse;   // and on z
  double momentum, scale, rate;

  int64_t dim() const { return w + 2; }
};

// q = K h.
JPK_INLINE void times_lags(const Step& s, const double* K, double* q) {
  const int64_t dim = s.dim();
  std::fill(q, q + dim, 0.0);
  for (int64_t l = 0; l < s.w; ++l) {
    const double* row = K + l * dim;  // K is symmetric
    for (int64_t i = 0; i < dim; ++i) q[i] += s.h[l] * row[i];
  }
}

JPK_INLINE double variance(const Step& s, const double* q) {
  double sum = s.inverse * s.inverse;
  for (int64_t l = 0; l < s.w; ++l) sum += s.h[l] * q[l];
  return sum;
}

// The covariance after the step; q has room for dim numbers.
JPK_TARGET_CLONES static void forward(const Step& s, const double* K, double* q, double* next) {
  const int64_t w = s.w, dim = s.dim(), m = w, y = w + 1;
  times_lags(s, K, q);
  const double xx = variance(s, q);
  const double mx = s.momentum * q[m] + s.scale * xx, yx = q[y] + s.rate * mx;
  double *to_m = next + m * dim, *to_y = next + y * dim;
  const double *of_m = K + m * dim, *of_y = K + y * dim;
  if (w) {
    next[0] = xx;
    for (int64_t j = 1; j < w; ++j) next[j] = q[j - 1];
    next[m] = to_m[0] = mx;
    next[y] = to_y[0] = yx;
  }
  for (int64_t j = 1; j < w; ++j) {
    double* row = next + j * dim;
    const double* from = K + (j - 1) * dim;
    row[0] = q[j - 1];
    for (int64_t k = 1; k < w; ++k) row[k] = from[k - 1];
    row[m] = to_m[j] = s.momentum * of_m[j - 1] + s.scale * q[j - 1];
    row[y] = to_y[j] = of_y[j - 1] + s.rate * row[m];
  }
  const double mm =
      s.momentum * s.momentum * of_m[m] + 2 * s.momentum * s.scale * q[m] + s.scale * s.scale * xx;
  const double ym = s.momentum * of_y[m] + s.scale * q[y];  // of the old y and the new m
  to_m[m] = mm;
  to_m[y] = to_y[m] = ym + s.rate * mm;
  to_y[y] = of_y[y] + 2 * s.rate * ym + s.rate * s.rate * mm;
}

struct Derivatives {
  double* h;  // [w]
  double inverse, momentum, scale, rate;
};

// From G, the derivatives with respect to the covariance after the step, `next`, those with respect
// to the one before it, K, and to the step. work has room for 3 dim numbers.
//
// The step is K' = (S + c h^T) K (S + c h^T)^T + inverse^2 c c^T: S shifts the lags and carries m
// and y on, and c = (1, 0 .., scale, rate scale) adds the new x.
JPK_TARGET_CLONES static void backward(const Step& s, const double* K, const double* next,
                                       const double* G, double* work, double* before,
                                       Derivatives& bar) {
  const int64_t w = s.w, dim = s.dim(), m = w, y = w + 1;
  const double beta = s.momentum, eta = s.rate, d = s.scale;
  double *a = work, *shifted = work + dim, *q = work + 2 * dim;
  const double *G_m = G + m * dim, *G_y = G + y * dim;
  for (int64_t i = 0; i < dim; ++i) a[i] = d * G_m[i] + eta * d * G_y[i];  // G c
  if (w) {
    for (int64_t i = 0; i < dim; ++i) a[i] += G[i];
  }
  const double alpha = (w ? a[0] : 0.0) + d * a[m] + eta * d * a[y];        // c^T G c
  for (int64_t j = 0; j < w; ++j) shifted[j] = j + 1 < w ? a[j + 1] : 0.0;  // S^T G c
  shifted[m] = beta * (a[m] + eta * a[y]);
  shifted[y] = a[y];

  times_lags(s, K, q);
  const double xx = variance(s, q);
  // With respect to c it is 2 G (S q + xx c).
  double bar_m = beta * q[m] * (G_m[m] + eta * G_m[y]) + q[y] * G_m[y] + xx * a[m];
  double bar_y = beta * q[m] * (G_y[m] + eta * G_y[y]) + q[y] * G_y[y] + xx * a[y];
  for (int64_t j = 1; j < w; ++j) {
    bar_m += G_m[j] * q[j - 1];
    bar_y += G_y[j] * q[j - 1];
  }
  bar.scale = 2 * (bar_m + eta * bar_y);
  // The rate brings the new m into y, the momentum the old m into both; of_m is (S + c h^T) K e_m.
  bar.rate = 0;
  for (int64_t i = 0; i < dim; ++i) bar.rate += 2 * G_y[i] * next[m * dim + i];
  const double of_m = beta * K[m * dim + m] + d * q[m];
  bar.momentum =
      (G_m[m] + eta * G_y[m]) * of_m + (G_m[y] + eta * G_y[y]) * (K[y * dim + m] + eta * of_m);
  if (w) bar.momentum += (G_m[0] + eta * G_y[0]) * q[m];
  for (int64_t j = 1; j < w; ++j) {
    bar.momentum += (G_m[j] + eta * G_y[j]) * K[(j - 1) * dim + m];
  }
  bar.momentum *= 2;
  bar.inverse = 2 * alpha * s.inverse;
  for (int64_t l = 0; l < w; ++l) bar.h[l] = 2 * alpha * q[l];
  for (int64_t i = 0; i < dim; ++i) {
    const double* row = K + i * dim;
    for (int64_t l = 0; l < w; ++l) bar.h[l] += 2 * shifted[i] * row[l];
  }

  // S^T G S + h shifted^T + shifted h^T + alpha h h^T.
  for (int64_t j = 0; j < dim; ++j) {
    double* row = before + j * dim;
    const double of_j = j < w ? s.h[j] : 0.0;
    if (j + 1 < w) {
      const double* from = G + (j + 1) * dim;
      for (int64_t k = 0; k + 1 < w; ++k) row[k] = from[k + 1];
      row[w - 1] = 0;
      row[m] = beta * (from[m] + eta * from[y]);
      row[y] = from[y];
    } else if (j < w) {
      std::fill(row, row + dim, 0.0);
    } else {
      const double top = j == m ? beta : 0.0, last = j == m ? beta * eta : 1.0;
      for (int64_t k = 0; k + 1 < w; ++k) row[k] = top * G_m[k + 1] + last * G_y[k + 1];
      if (w) row[w - 1] = 0;
      const double mid_m = top * G_m[m] + last * G_y[m], mid_y = top * G_m[y] + last * G_y[y];
      row[m] = beta * (mid_m + eta * mid_y);
      row[y] = mid_y;
    }
    for (int64_t k = 0; k < w; ++k) row[k] += (shifted[j] + alpha * of_j) * s.h[k];
    for (int64_t k = 0; k < dim; ++k) row[k] += of_j * shifted[k];
  }
}

// The errors [n] of rows [n, b], scale [n] and rates [n].
class Errors {
 public:
  Errors(const double* rows, const double* scale, const double* rates, double momentum, int64_t n,
         int64_t b)
      : rows_(rows), scale_(scale), rates_(rates), momentum_(momentum), n_(n), b_(b), h_(b) {}

  void values(double* errors) {
    const int64_t dim = b_ + 1, size = dim * dim;
    std::vector<double> K(static_cast<size_t>(size)), next(K.size()), q(static_cast<size_t>(dim));
    for (int64_t t = 0; t < n_; ++t) {
      forward(step(t), K.data(), q.data(), next.data());
      K.swap(next);
      errors[t] = K[size - 1];
    }
  }

  // Derivatives of <g, errors> with respect to everything; gives the one for the momentum.
  // Covariances are kept at the start of every segment of about sqrt(n) steps, and computed again
  // inside of one.
  double gradients(const double* g, double* rows_bar, double* scale_bar, double* rates_bar) {
    double momentum_bar = 0;
    const int64_t dim = b_ + 1, size = dim * dim, w = b_ - 1;
    const int64_t length = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(n_))));
    const int64_t segments = (n_ + length - 1) / length;
    std::vector<double> starts(static_cast<size_t>(segments * size));
    std::vector<double> inside(static_cast<size_t>((length + 1) * size));
    std::vector<double> work(static_cast<size_t>(3 * dim)), h_bar(static_cast<size_t>(b_));
    std::vector<double> G(static_cast<size_t>(size)), before(G.size());
    // inside[i] is the covariance before step i of a segment.
    auto run = [&](int64_t segment) {
      const int64_t first = segment * length, steps = std::min(length, n_ - first);
      const double* start = starts.data() + segment * size;
      std::copy(start, start + size, inside.data());
      for (int64_t i = 0; i < steps; ++i) {
        double* K = inside.data() + i * size;
        forward(step(first + i), K, work.data(), K + size);
      }
      return steps;
    };
    for (int64_t segment = 0; segment + 1 < segments; ++segment) {
      const double* last = inside.data() + run(segment) * size;
      std::copy(last, last + size, starts.data() + (segment + 1) * size);
    }
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      for (int64_t i = run(segment) - 1; i >= 0; --i) {
        const int64_t t = segment * length + i;
        G[size - 1] += g[t];
        const Step s = step(t);
        Derivatives bar{h_bar.data(), 0, 0, 0, 0};
        const double* K = inside.data() + i * size;
        backward(s, K, K + size, G.data(), work.data(), before.data(), bar);
        G.swap(before);
        scale_bar[t] = bar.scale;
        rates_bar[t] = bar.rate;
        momentum_bar += bar.momentum;
        // h = -rows[t, 1:] / rows[t, 0], inverse = 1 / rows[t, 0].
        double* row_bar = rows_bar + t * b_;
        double inverse_bar = bar.inverse;
        for (int64_t l = 0; l < w; ++l) {
          row_bar[l + 1] = -s.inverse * h_bar[l];
          inverse_bar -= rows_[t * b_ + l + 1] * h_bar[l];
        }
        row_bar[0] = -inverse_bar * s.inverse * s.inverse;
      }
    }
    return momentum_bar;
  }

 private:
  // Valid until the next one is made.
  Step step(int64_t t) {
    const double* row = rows_ + t * b_;
    const double inverse = 1 / row[0];
    for (int64_t l = 1; l < b_; ++l) h_[l - 1] = -row[l] * inverse;
    return {b_ - 1, h_.data(), inverse, momentum_, scale_[t], rates_[t]};
  }

  const double *rows_, *scale_, *rates_;
  double momentum_;
  int64_t n_, b_;
  std::vector<double> h_;
};

}  // namespace jpk::banded

#endif  // JPK_BANDED_ERROR_H_
