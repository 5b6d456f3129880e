// banded_error against its definition in long double, row by row, and its derivatives against
// central differences of that. Sums of up to 2b + 8 terms are made n times; the sums of the terms'
// absolute values are the errors of a comparison, see banded_error_test.py.
#include "banded_error.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "parallel_for.h"
#include "thread_pool.h"

namespace {

using Wide = long double;
constexpr Wide kUnit = 0x1p-53L;

struct Problem {
  int64_t n, b;
  double momentum;
};

// Rows, scale and rates one behind the other, and the momentum last.
struct Arguments {
  int64_t n, b;
  std::vector<Wide> all;

  const Wide* rows() const { return all.data(); }
  const Wide* scale() const { return rows() + n * b; }
  const Wide* rates() const { return scale() + n; }
  Wide momentum() const { return all.back(); }
};

// sum |rows[t, 1:]| < |rows[t, 0]|, so that errors do not build up. What lies before the start is
// large.
Arguments make_arguments(const Problem& problem) {
  const auto [n, b, momentum] = problem;
  std::mt19937 random(static_cast<uint32_t>(100 * n + b));
  std::uniform_real_distribution<double> uniform(-1, 1);
  Arguments arguments{n, b, {}};
  for (int64_t t = 0; t < n; ++t) {
    const double diagonal = uniform(random) < 0 ? -1.5 : 0.75;
    for (int64_t l = 0; l < b; ++l) {
      const double entry = 0.7 * uniform(random) / static_cast<double>(std::max(b - 1, int64_t{1}));
      arguments.all.push_back(l == 0 ? diagonal : l <= t ? entry : -1e30);
    }
  }
  for (int64_t t = 0; t < n; ++t) arguments.all.push_back(1 + 0.5 * uniform(random));
  for (int64_t t = 0; t < n; ++t) arguments.all.push_back(uniform(random));
  arguments.all.push_back(momentum);
  return arguments;
}

// For errors [n], row by row of the matrix that takes z to y. Of the comparison if asked for.
std::vector<Wide> definition(const Arguments& arguments, bool comparison = false) {
  const int64_t n = arguments.n, b = arguments.b;
  auto sized = [=](Wide x) { return comparison ? std::fabs(x) : x; };
  std::vector<Wide> x(static_cast<size_t>(n * n)), m(static_cast<size_t>(n)), y(m), errors(m);
  for (int64_t t = 0; t < n; ++t) {
    const Wide* row = arguments.rows() + t * b;
    for (int64_t s = 0; s <= t; ++s) {
      Wide sum = s == t;
      for (int64_t l = 1; l < std::min(b, t + 1); ++l) {
        sum -= (comparison ? -std::fabs(row[l]) : row[l]) * x[(t - l) * n + s];
      }
      x[t * n + s] = sum / sized(row[0]);
      m[s] = sized(arguments.momentum()) * m[s] + sized(arguments.scale()[t]) * x[t * n + s];
      y[s] += sized(arguments.rates()[t]) * m[s];
      errors[t] += y[s] * y[s];
    }
  }
  return errors;
}

void run(const Problem& problem) {
  const int64_t n = problem.n, b = problem.b;
  Arguments arguments = make_arguments(problem);
  // On the heap, where overruns are seen.
  const std::vector<double> narrow(arguments.all.begin(), arguments.all.end());
  const std::vector<double> rows(narrow.begin(), narrow.begin() + n * b);
  const std::vector<double> scale(narrow.begin() + n * b, narrow.begin() + n * b + n);
  const std::vector<double> rates(narrow.begin() + n * b + n, narrow.end() - 1);
  jpk::banded::Errors op(rows.data(), scale.data(), rates.data(), problem.momentum, n, b);

  std::vector<double> actual(n, std::nan("")), again(n, std::nan(""));
  op.values(actual.data());
  const auto exact = definition(arguments), sizes = definition(arguments, true);
  const Wide units = n * (2 * b + 8) * kUnit;
  for (int64_t t = 0; t < n; ++t) {
    CHECK(std::fabs(actual[t] - exact[t]) <= units * sizes[t],
          "n %d b %d momentum %g: error %d is %.17g, not %.17Lg", int(n), int(b), problem.momentum,
          int(t), actual[t], exact[t]);
  }

  std::vector<double> g(n), rows_bar(n * b, std::nan("")), scale_bar(n, std::nan("")), rates_bar;
  rates_bar = scale_bar;
  for (int64_t t = 0; t < n; ++t) g[t] = std::cos(2.0 * static_cast<double>(t));
  const double bar = op.gradients(g.data(), rows_bar.data(), scale_bar.data(), rates_bar.data());
  op.values(again.data());
  CHECK(again == actual, "n %d b %d: other values after the derivatives", int(n), int(b));

  std::vector<double> derivatives = rows_bar;
  derivatives.insert(derivatives.end(), scale_bar.begin(), scale_bar.end());
  derivatives.insert(derivatives.end(), rates_bar.begin(), rates_bar.end());
  derivatives.push_back(bar);
  // Of <g, errors>; the step's square and the long double's unit over the step are below 1e-9 of
  // the largest.
  const Wide step = 1e-6L;
  auto weighted = [&] {
    const auto errors = definition(arguments);
    Wide sum = 0;
    for (int64_t t = 0; t < n; ++t) sum += g[t] * errors[t];
    return sum;
  };
  Wide largest = 0;
  std::vector<Wide> numeric;
  for (Wide& argument : arguments.all) {
    const Wide before = argument;
    argument = before + step;
    const Wide above = weighted();
    argument = before - step;
    numeric.push_back((above - weighted()) / (2 * step));
    argument = before;
    largest = std::max(largest, std::fabs(numeric.back()));
  }
  for (size_t i = 0; i < numeric.size(); ++i) {
    CHECK(std::fabs(derivatives[i] - numeric[i]) <= 1e-8L * largest,
          "n %d b %d momentum %g: derivative %d is %.12g, not %.12Lg", int(n), int(b),
          problem.momentum, int(i), derivatives[i], numeric[i]);
  }
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t l = t + 1; l < b; ++l) CHECK(rows_bar[t * b + l] == 0, "%d, %d", int(t), int(l));
  }
}

// Derivatives of every error alone add up to those of their sum.
void test_weights() {
  const int64_t n = 11, b = 3;
  const Arguments arguments = make_arguments({n, b, 0.6});
  const std::vector<double> all(arguments.all.begin(), arguments.all.end());
  const double *rows = all.data(), *scale = rows + n * b, *rates = scale + n;
  jpk::banded::Errors op(rows, scale, rates, 0.6, n, b);
  std::vector<double> sum(n * b + 2 * n), bar(sum.size());
  double momentum_sum = 0;
  for (int64_t t = 0; t < n; ++t) {
    std::vector<double> g(n);
    g[t] = 1;
    momentum_sum += op.gradients(g.data(), &bar[0], &bar[n * b], &bar[n * b + n]);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += bar[i];
    // Later steps take no part.
    for (int64_t s = t + 1; s < n; ++s) {
      CHECK(bar[s * b] == 0 && bar[n * b + s] == 0 && bar[n * b + n + s] == 0, "%d of %d", int(s),
            int(t));
    }
  }
  const std::vector<double> ones(n, 1.0);
  const double momentum = op.gradients(ones.data(), &bar[0], &bar[n * b], &bar[n * b + n]);
  CHECK(std::fabs(momentum - momentum_sum) <= 1e-12 * std::fabs(momentum), "%g", momentum);
  const double largest = std::fabs(*std::max_element(
      bar.begin(), bar.end(), [](double x, double y) { return std::fabs(x) < std::fabs(y); }));
  for (size_t i = 0; i < sum.size(); ++i) {
    CHECK(std::fabs(bar[i] - sum[i]) <= 1e-12 * largest, "%d: %g, not %g", int(i), bar[i], sum[i]);
  }
}

// From its step on, and not before.
void test_nan() {
  const int64_t n = 6, b = 3;
  const Arguments arguments = make_arguments({n, b, 0.5});
  for (size_t at : {3 * b + 1, n * b + 3, n * b + n + 3}) {
    std::vector<double> all(arguments.all.begin(), arguments.all.end()), errors(n);
    all[at] = std::nan("");
    const double* rows = all.data();
    jpk::banded::Errors(rows, rows + n * b, rows + n * b + n, 0.5, n, b).values(errors.data());
    for (int64_t t = 0; t < n; ++t) {
      CHECK(std::isnan(errors[t]) == (t >= 3), "NaN at %d, error %d is %g", int(at), int(t),
            errors[t]);
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
  std::vector<Problem> problems;
  for (int64_t n : {1, 2, 3, 4, 5, 8, 9, 10, 15, 16, 17, 25, 26}) {  // segments are sqrt(n) long
    for (int64_t b : {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{6}, n, n + 2}) {
      if (b > 10) continue;
      for (double momentum : {0.0, 0.9, -1.0}) problems.push_back({n, b, momentum});
    }
  }
  problems.push_back({50, 4, 0.7});
  problems.push_back({20, 17, 0.5});

  // In parallel, as problems are.
  ThreadPool pool(3);
  jpk::parallel_for(pool, static_cast<int64_t>(problems.size()), 4,
                    [&](int64_t i, int64_t) { run(problems[i]); });
  test_weights();
  test_nan();
  return report();
}
