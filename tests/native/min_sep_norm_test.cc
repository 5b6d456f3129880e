// min_sep_norm against its definition in long double, sum by sum. All terms are positive, so value
// and gradient may be off by a few units of themselves.
#include "min_sep_norm.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "parallel_for.h"
#include "thread_pool.h"

namespace {

struct Problem {
  int64_t n, m, sep, k;
};

enum Kind { kAny, kTies, kDecreasing, kIncreasing, kConstant, kZero, kKinds };

std::vector<double> make_coef(int64_t m, Kind kind) {
  std::mt19937 random(static_cast<uint32_t>(m));
  std::normal_distribution<double> normal;
  std::vector<double> coef(m);
  for (double& c : coef) {
    c = kind == kZero ? 0 : kind == kConstant ? 0.7 : normal(random);
    if (kind == kTies) c = std::round(2 * c);
  }
  auto larger = [](double a, double b) { return std::fabs(a) > std::fabs(b); };
  if (kind == kDecreasing) std::sort(coef.begin(), coef.end(), larger);
  if (kind == kIncreasing) std::sort(coef.rbegin(), coef.rend(), larger);
  return coef;
}

void run(const Problem& problem, Kind kind) {
  const auto [n, m, sep, k] = problem;
  const std::vector<double> coef = make_coef(m, kind);
  // p, and the first coefficient behind every element that equals it.
  std::vector<long double> p(n), v(n), gradient(m);
  std::vector<int64_t> source(m);
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t u = m - 1; u >= t; --u) {
      if (std::fabs(coef[u]) >= p[t]) p[t] = std::fabs(coef[u]), source[t] = u;
    }
  }
  long double norm = 0;
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t j = 0; j < k && j * sep <= t; ++j) v[t] += p[t - j * sep];
    norm += v[t] * v[t];
  }
  for (int64_t t = 0; t < m; ++t) {
    long double sum = 0;
    for (int64_t j = 0; j < k && t + j * sep < n; ++j) sum += 2 * v[t + j * sep];
    const double c = coef[source[t]];
    gradient[source[t]] += c < 0 ? -sum : sum;  // at 0 the derivative to the right
  }

  const long double units = (n + 3 * std::min(k, n) + 10) * 0x1p-53L;
  std::vector<double> actual(m, std::nan(""));  // on the heap, where overruns are seen
  const double value = jpk::min_sep_norm(coef.data(), m, n, sep, k, nullptr);
  const double again = jpk::min_sep_norm(coef.data(), m, n, sep, k, actual.data());
  CHECK(std::fabs(value - again) <= 1e-14 * again,  // sums in another order
        "n %d m %d sep %d k %d", int(n), int(m), int(sep), int(k));
  CHECK(std::fabs(value - norm) <= units * norm, "n %d m %d sep %d k %d kind %d: %.17g, not %.17Lg",
        int(n), int(m), int(sep), int(k), kind, value, norm);
  for (int64_t t = 0; t < m; ++t) {
    CHECK(std::fabs(actual[t] - gradient[t]) <= units * std::fabs(gradient[t]),
          "n %d m %d sep %d k %d kind %d: derivative %d is %.17g, not %.17Lg", int(n), int(m),
          int(sep), int(k), kind, int(t), actual[t], gradient[t]);
  }
}

void test_nan() {
  for (int64_t at = 0; at < 4; ++at) {
    std::vector<double> coef(4, 1.0), gradient(4);
    coef[at] = std::nan("");
    CHECK(std::isnan(jpk::min_sep_norm(coef.data(), 4, 5, 2, 2, nullptr)), "NaN at %d", int(at));
    CHECK(std::isnan(jpk::min_sep_norm(coef.data(), 4, 5, 2, 2, gradient.data())), "NaN at %d",
          int(at));
    for (double g : gradient) CHECK(std::isnan(g), "%g", g);
  }
}

void test_infinities() {
  std::vector<double> coef{1, -HUGE_VAL, 2, HUGE_VAL, 3}, gradient(5);
  CHECK(std::isinf(jpk::min_sep_norm(coef.data(), 5, 6, 2, 2, gradient.data())), "no infinity");
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
  for (int64_t n : {1, 2, 5, 8, 15, 16, 17, 63, 64, 65, 130}) {
    for (int64_t m : {int64_t{1}, (n + 1) / 2, n}) {
      for (int64_t sep : {int64_t{1}, int64_t{2}, int64_t{7}, (n + 1) / 2, n - 1, n}) {
        if (sep < 1 || sep > n) continue;
        for (int64_t k : {int64_t{1}, int64_t{2}, int64_t{3}, (n + 3) / 4, n, n + 1}) {
          problems.push_back({n, m, sep, k});
        }
      }
    }
  }
  for (int64_t n : {511, 512, 513, 1000}) problems.push_back({n, n, n / 8, 5});
  problems.push_back({4096, 4096, 64, 8});
  problems.push_back({4097, 4000, 3, 512});
  problems.push_back({4097, 300, 1, 64});
  problems.push_back({20, 20, 3, std::numeric_limits<int64_t>::max()});

  // In parallel, as rows are.
  ThreadPool pool(3);
  jpk::parallel_for(pool, static_cast<int64_t>(problems.size()), 4, [&](int64_t i, int64_t) {
    for (int kind = 0; kind < kKinds; ++kind) run(problems[i], static_cast<Kind>(kind));
  });
  test_nan();
  test_infinities();
  return report();
}
