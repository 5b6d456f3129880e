// Toeplitz products and systems against sums over the definition, in long double, one entry at a
// time. Entries are allowed the rounding errors of any order of summation, and of their own type.
#include "toeplitz.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "thread_pool.h"
#include "toeplitz_fft.h"

namespace {

using jpk::Reals;
using jpk::toeplitz::Batch;

constexpr long double kUnit = 0x1p-53L;

template <typename T>
Reals reals(const std::vector<T>& values) {
  return {const_cast<T*>(values.data()), std::is_same_v<T, double>};
}

// What comes out, and how far off it may be.
struct Exact {
  std::vector<long double> values, errors;
};

// T x for a lower-triangular T; with absolute values, and a factor, the error.
std::vector<long double> product(const std::vector<long double>& coef,
                                 const std::vector<long double>& x) {
  const int64_t n = x.size(), m = coef.size();
  std::vector<long double> out(n);
  for (int64_t i = 0; i < n; ++i) {
    long double sum = 0;
    for (int64_t l = 0; l <= std::min(i, m - 1); ++l) sum += coef[l] * x[i - l];
    out[i] = sum;
  }
  return out;
}

std::vector<long double> solution(const std::vector<long double>& coef,
                                  const std::vector<long double>& u) {
  const int64_t n = u.size(), m = coef.size();
  std::vector<long double> x(n);
  for (int64_t i = 0; i < n; ++i) {
    long double sum = u[i];
    for (int64_t l = 1; l <= std::min(i, m - 1); ++l) sum -= coef[l] * x[i - l];
    x[i] = sum / coef[0];
  }
  return x;
}

std::vector<long double> absolute(std::vector<long double> x) {
  for (long double& v : x) v = std::fabs(v);
  return x;
}

Exact multiplied(const std::vector<long double>& coef, const std::vector<long double>& x) {
  Exact exact{product(coef, x), product(absolute(coef), absolute(x))};
  for (long double& e : exact.errors) e *= (std::min(coef.size(), x.size()) + 2) * kUnit;
  return exact;
}

// The error by the comparison matrix, see toeplitz_solve_test.py.
Exact solved(const std::vector<long double>& coef, const std::vector<long double>& u) {
  Exact exact{solution(coef, u), {}};
  std::vector<long double> comparison = absolute(coef);
  std::vector<long double> moved = product(comparison, absolute(exact.values));
  for (long double& e : moved) e *= (std::min(coef.size(), u.size()) + 3) * kUnit;
  for (size_t l = 1; l < coef.size(); ++l) comparison[l] = -comparison[l];
  exact.errors = solution(comparison, moved);
  return exact;
}

// Coefficients C, vectors R and results O: each of float or double.
template <typename C, typename R, typename O>
void run(ThreadPool& pool, const Batch& batch, int64_t used, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<C> coef(batch.problems * batch.m);
  std::vector<R> rhs(batch.problems * batch.n * batch.columns);
  for (int64_t p = 0; p < batch.problems; ++p) {
    // sum |c_l| < 2 |c_0|, so that errors do not build up. Zero from `used` on.
    for (int64_t l = 0; l < std::min(used, batch.m); ++l) {
      coef[p * batch.m + l] = l == 0 ? 1.5 - p : 0.3 * normal(random) / std::min(used, batch.m);
    }
  }
  for (R& v : rhs) v = normal(random);
  const std::vector<C> coef_before = coef;
  const std::vector<R> rhs_before = rhs;

  // exact[solve][problem * columns + column], of all n rows
  std::vector<Exact> exact[2];
  for (int64_t p = 0; p < batch.problems; ++p) {
    const auto begin = coef.begin() + p * batch.m;
    const std::vector<long double> c(begin, begin + batch.m);
    for (int64_t j = 0; j < batch.columns; ++j) {
      std::vector<long double> x(batch.n);
      for (int64_t i = 0; i < batch.n; ++i) x[i] = rhs[(p * batch.n + i) * batch.columns + j];
      if (batch.transpose) std::reverse(x.begin(), x.end());
      for (bool solve : {false, true}) {
        Exact e = solve ? solved(c, x) : multiplied(c, x);
        if (batch.transpose) {
          std::reverse(e.values.begin(), e.values.end());
          std::reverse(e.errors.begin(), e.errors.end());
        }
        exact[solve].push_back(e);
      }
    }
  }

  std::vector<O> first;
  for (int64_t workers : {1, 2, 4}) {
    for (bool solve : {false, true}) {
      Batch now = batch;
      if (solve) now.rows = batch.n;
      std::vector<O> out(now.problems * now.rows * now.columns, std::nan(""));
      if (solve) {
        jpk::toeplitz::solve(pool, workers, now, reals(coef), reals(rhs), reals(out));
      } else {
        jpk::toeplitz::multiply(pool, workers, now, reals(coef), reals(rhs), reals(out));
        if (workers == 1) first = out;
        CHECK(out == first, "%d workers make another product", int(workers));
      }
      CHECK(coef == coef_before && rhs == rhs_before, "an argument is written to");
      long double worst = 0;
      int64_t at = 0;
      for (int64_t i = 0; i < int64_t(out.size()); ++i) {
        const int64_t column = i % now.columns, row = i / now.columns % now.rows;
        const int64_t problem = i / now.columns / now.rows;
        const Exact& e = exact[solve][problem * now.columns + column];
        const long double rounding = std::numeric_limits<O>::epsilon() / 2;
        const long double allowed =
            e.errors[row] + 1.001L * rounding * (std::fabs(e.values[row]) + e.errors[row]);
        const long double error = std::fabs(out[i] - e.values[row]) / allowed;
        if (e.values[row] == out[i] || error <= worst) continue;
        worst = std::isnan(error) ? HUGE_VALL : error;
        at = i;
      }
      CHECK(worst <= 1,
            "%s, %d workers: problems %d, m %d, n %d, columns %d, rows %d, transpose %d, used %d: "
            "entry %d is %Lg tolerances off",
            solve ? "solve" : "multiply", int(workers), int(now.problems), int(now.m), int(now.n),
            int(now.columns), int(now.rows), now.transpose, int(used), int(at), worst);
    }
  }
}

void test_sizes(ThreadPool& pool) {
  uint32_t seed = 0;
  auto any_types = [&](const Batch& batch, int64_t used) {
    switch (++seed % 4) {
      case 0:
        return run<float, float, float>(pool, batch, used, seed);
      case 1:
        return run<double, double, double>(pool, batch, used, seed);
      case 2:
        return run<float, double, double>(pool, batch, used, seed);
      default:
        return run<double, float, float>(pool, batch, used, seed);
    }
  };
  for (int64_t n : {1, 2, 7, 8, 9, 63, 64, 65, 511, 512, 513}) {
    for (int64_t m : {int64_t{1}, int64_t{2}, int64_t{8}, n - 1, n, n + 9}) {
      if (m < 1) continue;
      for (bool transpose : {false, true}) {
        for (int64_t rows : {int64_t{1}, (n + 1) / 2, n}) {
          const int64_t shape =
              seed / 3 % 3;  // one vector, or three columns, or two problems of two
          const Batch batch{shape == 2 ? 2 : 1, m, n, shape + 1, rows, transpose};
          any_types(batch, seed % 5 == 0 ? (m + 1) / 2 : m);
        }
      }
    }
  }
  // Many tiles and blocks: several threads in one column, and one for each.
  const int64_t sizes[][2] = {{1025, 514}, {4095, 1000}, {4700, 4650}, {4096, 513}, {8200, 600}};
  bool transpose = false;
  for (auto [n, m] : sizes) {
    transpose = !transpose;
    any_types({1, m, n, 1, n - 1, transpose}, m);
    if (n < 4096) any_types({1, m, n, 3, n, !transpose}, m);
  }
  any_types({0, 3, 5, 2, 5, false}, 3);
  any_types({2, 3, 5, 0, 5, true}, 3);
}

// sums[r] = sum_{p + q = r; p, q >= 1} left[p] right[q], term by term.
void test_spectra(ThreadPool& pool) {
  using Complex = std::complex<double>;
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (auto [problems, bands, blocks, frequencies] : {std::array<int64_t, 4>{1, 1, 1, 1},
                                                      {2, 2, 3, 5},
                                                      {1, 4, 4, 64},
                                                      {3, 3, 7, 65},
                                                      {1, 9, 5, 129}}) {
    std::vector<Complex> left(problems * bands * frequencies);
    std::vector<Complex> right(problems * blocks * frequencies);
    for (Complex& z : left) z = {normal(random), normal(random)};
    for (Complex& z : right) z = {normal(random), normal(random)};
    for (int64_t workers : {1, 2, 4}) {
      std::vector<Complex> sums(right.size(), std::nan(""));
      jpk::toeplitz::multiply_spectra(pool, workers, problems, bands, blocks, frequencies,
                                      reinterpret_cast<const double*>(left.data()),
                                      reinterpret_cast<const double*>(right.data()),
                                      reinterpret_cast<double*>(sums.data()));
      for (int64_t i = 0; i < int64_t(sums.size()); ++i) {
        const int64_t f = i % frequencies, r = i / frequencies % blocks;
        const int64_t problem = i / frequencies / blocks;
        std::complex<long double> want = 0;
        for (int64_t p = 1; p < std::min(bands, r); ++p) {
          want += std::complex<long double>(left[(problem * bands + p) * frequencies + f]) *
                  std::complex<long double>(right[(problem * blocks + r - p) * frequencies + f]);
        }
        CHECK(std::abs(std::complex<long double>(sums[i]) - want) < 1e-13L,
              "bands %d, blocks %d, frequencies %d: sum %d", int(bands), int(blocks),
              int(frequencies), int(i));
      }
    }
  }
}

// What transforms make is taken where it is accurate, and made anew where it is not.
void test_finish(ThreadPool& pool) {
  std::mt19937 random(2);
  std::normal_distribution<double> normal;
  struct Sizes {
    int64_t n, m, block;
    bool smooth;  // accurate enough from the second block on
  };
  for (const Sizes& of : {Sizes{1, 1, 8, false},
                          {64, 64, 64, false},
                          {65, 65, 64, false},
                          {200, 150, 8, true},
                          {203, 203, 16, true},
                          {700, 650, 64, false},
                          {513, 200, 512, false},
                          {1100, 1100, 512, true}}) {
    // C++17 captures no structured bindings.
    const int64_t n = of.n, m = of.m, block = of.block;
    const bool smooth = of.smooth;
    std::vector<long double> coef(m), x(n);
    for (auto& c : coef) c = smooth ? 1 : normal(random);
    for (auto& v : x) v = smooth ? 1 + 0.01 * normal(random) : normal(random);
    jpk::toeplitz::Padded padded_coef(m), padded_x(n);
    for (int64_t l = 0; l < m; ++l) coef[l] = padded_coef.data()[l] = static_cast<double>(coef[l]);
    for (int64_t i = 0; i < n; ++i) x[i] = padded_x.data()[i] = static_cast<double>(x[i]);
    const Exact exact = multiplied(coef, x);
    std::vector<long double> late_coef = coef, late_x = x;  // without their first blocks
    std::fill(late_coef.begin(), late_coef.begin() + std::min(block, m), 0);
    std::fill(late_x.begin(), late_x.begin() + std::min(block, n), 0);
    const auto late = product(late_coef, late_x);
    const auto late_sizes = product(absolute(late_coef), absolute(late_x));

    for (int64_t workers : {1, 2, 4}) {
      auto run = [&](const auto& change) {
        std::vector<double> far(late.begin(), late.end());
        std::vector<double> sizes(late_sizes.begin(), late_sizes.end());
        for (int64_t t = 0; t < n; ++t) change(t, far[t], sizes[t]);
        jpk::toeplitz::Padded out(n);
        jpk::toeplitz::finish(pool, workers, padded_coef, m, padded_x, n, block, far.data(),
                              sizes.data(), out);
        return std::vector<double>(out.data(), out.data() + n);
      };
      auto check = [&](const std::vector<double>& out, const char* what) {
        for (int64_t t = 0; t < n; ++t) {
          CHECK(std::fabs(out[t] - exact.values[t]) <= exact.errors[t],
                "n %d, m %d, block %d, %d workers, %s: entry %d is %g, not %Lg", int(n), int(m),
                int(block), int(workers), what, int(t), out[t], exact.values[t]);
        }
      };
      check(run([](int64_t, double&, double&) {}), "as made");
      check(run([](int64_t, double& far, double& size) { far = 1e9, size = 0; }), "all lost");
      check(run([](int64_t, double& far, double& size) { far = size = std::nan(""); }), "NaN");
      // One entry of a block is lost, and the block with it.
      check(run([&](int64_t t, double& far, double& size) {
              const int64_t r = t / block;
              if (r % 3 != 2) return;
              far = 1e9;
              if (t == std::min((r + 1) * block, n) - 1) size = 0;
            }),
            "some lost");
      const auto taken = run([](int64_t, double& far, double&) { far += 1; });
      for (int64_t t = 2 * block; smooth && block < 512 && t < n; ++t) {
        CHECK(std::fabs(taken[t] - 1 - exact.values[t]) <= exact.errors[t] + 1e-15L * taken[t],
              "block %d: entry %d is made anew", int(block), int(t));
      }
    }
  }
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
// Memory that is not set holds NaN.
extern "C" const char* __asan_default_options() {
  return "max_malloc_fill_size=16777216:malloc_fill_byte=255";
}
#endif

int main() {
  ThreadPool pool(3);
  test_sizes(pool);
  test_spectra(pool);
  test_finish(pool);
  return report();
}
