// Products with lower-triangular Toeplitz matrices and their inverses, in double.
//
// T is given by the first m entries of its first column: T[i, j] = coef[i - j], 0 <= i - j < m.
// Everything is a sum of products over a range of lags, computed by one loop (add_products), each
// output by itself: an output is accurate relative to the sizes of its own terms.
#ifndef JPK_TOEPLITZ_H_
#define JPK_TOEPLITZ_H_

#include <algorithm>
#include <cstdint>
#include <memory>

#include "parallel_for.h"
#include "reals.h"
#include "simd.h"

namespace jpk::toeplitz {

constexpr int64_t kLags = 8;  // summed up in registers, before they are added to the output
constexpr int64_t kTaskRows =
    512;                        // outputs of a task; with their inputs they stay in the L1 cache
constexpr int64_t kSolve = 64;  // outputs solved for before the next ones are updated
constexpr int64_t kSolvedAtOnce = 4096;  // outputs solved for by one thread
constexpr int64_t kPad = kTaskRows + kLags;

// A vector between zeros: kPad before its start and kPad behind its end. Its elements are not set.
class Padded {
 public:
  explicit Padded(int64_t size) : values_(new double[static_cast<size_t>(size + 2 * kPad)]) {
    std::fill(values_.get(), data(), 0.0);
    std::fill(data() + size, data() + size + kPad, 0.0);
  }
  double* data() { return values_.get() + kPad; }
  const double* data() const { return values_.get() + kPad; }

 private:
  std::unique_ptr<double[]> values_;  // A std::vector would touch all of it twice.
};

// out[i] += sum_{l < lags} coef[l] x[i - l], i < count. Reads coefficients up to the next multiple
// of kLags, which must be zero, and as many elements of x.
JPK_TARGET_CLONES static void add_products(const double* coef, int64_t lags, const double* x,
                                           int64_t count, double* out) {
  for (int64_t l = 0; l < lags; l += kLags) {
    const double c0 = coef[l], c1 = coef[l + 1], c2 = coef[l + 2], c3 = coef[l + 3];
    const double c4 = coef[l + 4], c5 = coef[l + 5], c6 = coef[l + 6], c7 = coef[l + 7];
    const double* p = x - l - 7;
    // Small groups are summed up before they meet the running sum: fewer roundings of its size.
    for (int64_t i = 0; i < count; ++i) {
      double s = c0 * p[i + 7];
      s += c1 * p[i + 6];
      s += c2 * p[i + 5];
      s += c3 * p[i + 4];
      s += c4 * p[i + 3];
      s += c5 * p[i + 2];
      s += c6 * p[i + 1];
      s += c7 * p[i];
      out[i] += s;
    }
  }
}

// Solves x_i = u_i + sum_{l = 1..lags} coef[l - 1] x_{i-l} in place of u, i < n: a group at a time,
// which is then added to the `lags` elements behind it. Reads kLags coefficients behind the last,
// which must be zero, and reads and writes u up to the next multiple of kLags.
JPK_TARGET_CLONES static void solve_ahead(const double* coef, int64_t lags, int64_t n, double* u) {
  const double c1 = coef[0], c2 = coef[1], c3 = coef[2], c4 = coef[3];
  const double c5 = coef[4], c6 = coef[5], c7 = coef[6];
  for (int64_t g = 0; g < n; g += kLags) {
    double* v = u + g;
    const double v0 = v[0];
    const double v1 = v[1] + c1 * v0;
    const double v2 = (v[2] + c2 * v0) + c1 * v1;
    const double v3 = ((v[3] + c3 * v0) + c2 * v1) + c1 * v2;
    const double v4 = (((v[4] + c4 * v0) + c3 * v1) + c2 * v2) + c1 * v3;
    const double v5 = ((((v[5] + c5 * v0) + c4 * v1) + c3 * v2) + c2 * v3) + c1 * v4;
    const double v6 = (((((v[6] + c6 * v0) + c5 * v1) + c4 * v2) + c3 * v3) + c2 * v4) + c1 * v5;
    const double v7 =
        ((((((v[7] + c7 * v0) + c6 * v1) + c5 * v2) + c4 * v3) + c3 * v4) + c2 * v5) + c1 * v6;
    v[1] = v1, v[2] = v2, v[3] = v3, v[4] = v4, v[5] = v5, v[6] = v6, v[7] = v7;
    const int64_t rest = std::min(n - g - kLags, lags);
    double* w = v + kLags;
    for (int64_t i = 0; i < rest; ++i) {
      double s = coef[i + 7] * v0;
      s += coef[i + 6] * v1;
      s += coef[i + 5] * v2;
      s += coef[i + 4] * v3;
      s += coef[i + 3] * v4;
      s += coef[i + 2] * v5;
      s += coef[i + 1] * v6;
      s += coef[i] * v7;
      w[i] += s;
    }
  }
}

// Rows `first` to n of T x, in these places of out; coef is zero from m on.
template <typename Pool>
void multiply(Pool& pool, int64_t workers, const Padded& coef, int64_t m, const Padded& x,
              int64_t first, int64_t n, Padded& out) {
  parallel_for(pool, (n - first + kTaskRows - 1) / kTaskRows, workers, [&](int64_t tile, int64_t) {
    const int64_t row = first + tile * kTaskRows, count = std::min(kTaskRows, n - row);
    double* sums = out.data() + row;
    std::fill(sums, sums + count, 0.0);
    add_products(coef.data(), std::min(m, row + count), x.data() + row, count, sums);
  });
}

// Solves x_i = u_i + sum_{l = 1..lags} coef[l - 1] x_{i-l} in place of u, with one thread.
inline void solve_block(const double* coef, int64_t lags, int64_t n, double* u) {
  if (lags < kTaskRows) return solve_ahead(coef, lags, n, u);
  for (int64_t t = 0; t < n; t += kSolve) {
    const int64_t count = std::min(kSolve, n - t);
    double tile[kSolve] = {};
    std::copy(u + t, u + t + count, tile);
    std::fill(u + t, u + t + count, 0.0);  // what is not solved for adds nothing below
    add_products(coef, std::min(lags, t + count - 1), u + t - 1, std::min(count, lags), tile);
    solve_ahead(coef, lags, kSolve, tile);
    std::copy(tile, tile + count, u + t);
  }
}

// x with T x = rhs, in place; coef[0] != 0, and coef is zero from m on. Changes coef.
template <typename Pool>
void solve(Pool& pool, int64_t workers, Padded& coef, int64_t m, Padded& rhs, int64_t n) {
  const double c0 = coef.data()[0];
  double* c = coef.data() + 1;
  double* u = rhs.data();
  const int64_t lags = m - 1;
  for (int64_t l = 0; l < lags; ++l) c[l] /= -c0;
  for (int64_t i = 0; i < n; ++i) u[i] /= c0;
  if (lags == 0) return;
  if (workers == 1 || m <= kTaskRows) return solve_block(c, lags, n, u);

  // All threads add what lies before a block, then one solves the block.
  Padded block(std::min(kSolvedAtOnce, n));
  for (int64_t b = 0; b < n; b += kSolvedAtOnce) {
    const int64_t size = std::min(kSolvedAtOnce, n - b), reach = std::min(size, lags);
    std::copy(u + b, u + b + size, block.data());
    std::fill(u + b, u + b + size, 0.0);
    parallel_for(pool, (reach + kTaskRows - 1) / kTaskRows, workers, [&](int64_t tile, int64_t) {
      const int64_t first = tile * kTaskRows, count = std::min(kTaskRows, reach - first);
      add_products(c, std::min(lags, b + first + count - 1), u + b + first - 1, count,
                   block.data() + first);
    });
    solve_block(c, lags, size, block.data());
    std::copy(block.data(), block.data() + size, u + b);
  }
}

// Independent problems: coefficients [problems, m] and vectors [problems, n, columns], row-major.
// Every column of a problem meets the problem's coefficients. Results are [problems, rows,
// columns]: the first rows of T x, T^T x, or what solves for x.
struct Batch {
  int64_t problems, m, n, columns, rows;
  bool transpose;  // T^T instead of T: that is T, if vectors are read and written from their end

  void read_column(const Reals& from, int64_t problem, int64_t column, Padded& to) const {
    const int64_t top = problem * n * columns + column, end = top + (n - 1) * columns;
    read(from, transpose ? end : top, transpose ? -columns : columns, n, to.data());
  }
  void write_column(const Padded& from, int64_t problem, int64_t column, const Reals& to) const {
    const int64_t top = problem * rows * columns + column, end = top + (rows - 1) * columns;
    const double* first = from.data() + (transpose ? n - rows : 0);
    write(first, transpose ? end : top, transpose ? -columns : columns, rows, to);
  }
  // Copies the coefficients; gives their number up to the last that is not zero, at least 1.
  int64_t read_coef(const Reals& from, int64_t problem, Padded& to) const {
    int64_t used = std::min(m, n);
    read(from, problem * m, 1, used, to.data());
    std::fill(to.data() + used, to.data() + m, 0.0);
    while (used > 1 && to.data()[used - 1] == 0) --used;
    return used;
  }
};

// Runs body(problem, column, workers inside) over all columns: at a time if there are many, with
// all threads inside if there are few.
template <typename Pool, typename Body>
void for_each_column(Pool& pool, int64_t workers, const Batch& batch, const Body& body) {
  const int64_t columns = batch.problems * batch.columns;
  const bool many = columns >= workers;
  parallel_for(pool, columns, many ? workers : 1, [&](int64_t i, int64_t) {
    body(i / batch.columns, i % batch.columns, many ? 1 : workers);
  });
}

// out = the first rows of T rhs.
template <typename Pool>
void multiply(Pool& pool, int64_t workers, const Batch& batch, const Reals& coef, const Reals& rhs,
              const Reals& out) {
  const int64_t first = batch.transpose ? batch.n - batch.rows : 0, last = first + batch.rows;
  for_each_column(pool, workers, batch, [&](int64_t problem, int64_t column, int64_t inside) {
    Padded c(batch.m), x(batch.n), y(batch.n);
    const int64_t m = batch.read_coef(coef, problem, c);
    batch.read_column(rhs, problem, column, x);
    multiply(pool, inside, c, m, x, first, last, y);
    batch.write_column(y, problem, column, out);
  });
}

// out with T out = rhs; all rows.
template <typename Pool>
void solve(Pool& pool, int64_t workers, const Batch& batch, const Reals& coef, const Reals& rhs,
           const Reals& out) {
  for_each_column(pool, workers, batch, [&](int64_t problem, int64_t column, int64_t inside) {
    Padded c(batch.m), x(batch.n);
    const int64_t m = batch.read_coef(coef, problem, c);
    batch.read_column(rhs, problem, column, x);
    solve(pool, inside, c, m, x, batch.n);
    batch.write_column(x, problem, column, out);
  });
}

}  // namespace jpk::toeplitz

#endif  // JPK_TOEPLITZ_H_
