// participation_max against the best of all sets, and against the recursion that defines it, whose
// derivative is taken branch by branch.
#include "participation_max.h"

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
  int64_t n, sep, k;
  bool ties;
};

std::vector<double> make_row(const Problem& problem, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> x(problem.n);
  for (double& v : x) v = problem.ties ? std::round(1.5 * normal(random)) : normal(random);
  return x;
}

// Value and gradient, in memory of exactly their size.
double run(const std::vector<double>& x, const Problem& problem, std::vector<double>& gradient) {
  gradient.assign(x.size(), std::nan(""));
  const int64_t n = x.size();
  const double alone = jpk::participation_max(x.data(), n, problem.sep, problem.k, nullptr);
  const double value = jpk::participation_max(x.data(), n, problem.sep, problem.k, gradient.data());
  CHECK(alone == value, "n %d sep %d k %d: %g without gradient, %g with it", int(n),
        int(problem.sep), int(problem.k), alone, value);
  return value;
}

void test_all_sets(const Problem& problem, uint32_t seed) {
  const std::vector<double> x = make_row(problem, seed);
  long double best = 0;
  unsigned best_set = 0;
  for (unsigned set = 0; set < 1u << problem.n; ++set) {
    long double sum = 0;
    int64_t count = 0, last = -problem.sep;
    bool allowed = true;
    for (int64_t i = 0; i < problem.n; ++i) {
      if (!(set >> i & 1)) continue;
      allowed &= i - last >= problem.sep && ++count <= problem.k;
      last = i;
      sum += x[i];
    }
    if (allowed && sum > best) best = sum, best_set = set;
  }
  std::vector<double> gradient;
  const double value = run(x, problem, gradient);
  CHECK(std::fabs(value - best) <= 16 * 0x1p-53L * best, "n %d sep %d k %d: %.17g, not %.17Lg",
        int(problem.n), int(problem.sep), int(problem.k), value, best);
  long double sum = 0;
  for (int64_t i = 0; i < problem.n; ++i) {
    if (!problem.ties) CHECK(gradient[i] == (best_set >> i & 1), "derivative %d", int(i));
    sum += static_cast<long double>(gradient[i]) * x[i];
  }
  // Also halves of best sets add up to the best.
  CHECK(std::fabs(sum - best) <= 1e-14L * (1 + best), "n %d sep %d k %d: %.17Lg, not %.17Lg",
        int(problem.n), int(problem.sep), int(problem.k), sum, best);
}

void test_recursion(const Problem& problem, uint32_t seed) {
  const std::vector<double> x = make_row(problem, seed);
  const int64_t n = problem.n, k = std::min(problem.k, n), width = k + 1;
  auto later = [&](int64_t i) { return std::min(problem.sep, n - i) + i; };
  std::vector<double> F((n + 1) * width), weight((n + 1) * width), expected(n);
  for (int64_t i = n - 1; i >= 0; --i) {
    for (int64_t j = 1; j <= k; ++j) {
      F[i * width + j] = std::max(x[i] + F[later(i) * width + j - 1], F[(i + 1) * width + j]);
    }
  }
  weight[k] = 1;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 1; j <= k; ++j) {
      const double take = x[i] + F[later(i) * width + j - 1], skip = F[(i + 1) * width + j];
      const double taken = take > skip ? 1 : take < skip ? 0 : 0.5;
      const double here = weight[i * width + j];
      expected[i] += taken * here;
      weight[later(i) * width + j - 1] += taken * here;
      weight[(i + 1) * width + j] += (1 - taken) * here;
    }
  }
  std::vector<double> gradient;
  const double value = run(x, problem, gradient);
  CHECK(value == F[k], "n %d sep %d k %d: %.17g, not %.17g", int(n), int(problem.sep),
        int(problem.k), value, F[k]);
  for (int64_t i = 0; i < n; ++i) {
    CHECK(std::fabs(gradient[i] - expected[i]) <= static_cast<double>(n) * 0x1p-53,
          "n %d sep %d k %d: derivative %d is %.17g, not %.17g", int(n), int(problem.sep),
          int(problem.k), int(i), gradient[i], expected[i]);
  }
}

void test_nan() {
  for (int64_t k : {0, 1, 2, 4}) {
    for (int64_t at = 0; at < 4; ++at) {
      std::vector<double> x(4, 1.0), gradient(4);
      x[at] = std::nan("");
      CHECK(std::isnan(jpk::participation_max(x.data(), 4, 2, k, nullptr)), "k %d", int(k));
      CHECK(std::isnan(jpk::participation_max(x.data(), 4, 2, k, gradient.data())), "k %d", int(k));
      for (double g : gradient) CHECK(std::isnan(g), "k %d: %g", int(k), g);
    }
  }
}

void test_infinities() {
  const double inf = HUGE_VAL;
  for (int64_t k : {1, 2, 4}) {
    std::vector<double> gradient, with{1, inf, -3, 2}, without{1, -inf, -3, 2}, both{-inf, inf, 1};
    CHECK(run(with, {4, 1, k, false}, gradient) == inf, "k %d", int(k));
    CHECK(gradient[1] == 1, "k %d: %g", int(k), gradient[1]);
    CHECK(run(without, {4, 1, k, false}, gradient) == (k == 1 ? 2 : 3), "k %d", int(k));
    CHECK(gradient[1] == 0, "k %d: %g", int(k), gradient[1]);
    gradient.resize(3);
    jpk::participation_max(both.data(), 3, 1, k, gradient.data());
  }
}

}  // namespace

int main() {
  std::vector<Problem> small, large;
  for (bool ties : {false, true}) {
    for (int64_t n : {1, 2, 3, 7, 8, 9}) {
      for (int64_t sep : {int64_t{1}, int64_t{2}, int64_t{3}, n, n + 5}) {
        for (int64_t k : {int64_t{0}, int64_t{1}, int64_t{2}, n / 2, n, n + 5}) {
          small.push_back({n, sep, k, ties});
        }
      }
    }
    for (int64_t n : {63, 64, 65, 511, 512, 513}) {
      for (int64_t sep : {int64_t{1}, int64_t{2}, int64_t{8}, n / 3, n + 1}) {
        for (int64_t k : {int64_t{1}, int64_t{7}, (n - 1) / sep, (n + sep - 1) / sep, n}) {
          large.push_back({n, sep, k, ties});
        }
      }
    }
    large.push_back({4097, 64, 63, ties});
    large.push_back({4097, 64, 65, ties});
    large.push_back({4096, 3, 8, ties});
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 2;
    large.push_back({50, kMost, 1, ties});
    large.push_back({50, 3, kMost, ties});
  }

  // In parallel, as rows are.
  ThreadPool pool(3);
  jpk::parallel_for(pool, static_cast<int64_t>(small.size()), 4, [&](int64_t i, int64_t) {
    for (uint32_t seed = 0; seed < 3; ++seed) test_all_sets(small[i], seed);
    test_recursion(small[i], 3);
  });
  jpk::parallel_for(pool, static_cast<int64_t>(large.size()), 4,
                    [&](int64_t i, int64_t) { test_recursion(large[i], 0); });
  test_nan();
  test_infinities();
  return report();
}
