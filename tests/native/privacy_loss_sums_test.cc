// privacy_loss_sums against the same samples with their losses from the definition, by all
// sequences of participations, in long double; and exp and log against libm's.
#include "privacy_loss_sums.h"

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "check.h"
#include "elementary.h"
#include "thread_pool.h"

namespace {

using namespace jpk;
using namespace jpk::privacy_loss;
using Real = long double;
using Sequence = std::vector<int>;

constexpr Key kKey{123, 456};

void test_elementary() {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> wide(-708, 708), unit(0, 1);
  for (int i = 0; i < 200000; ++i) {
    const double x = i % 2 ? wide(random) : std::ldexp(wide(random), -i / 2 % 60);
    const double e = exp_lane(x);
    CHECK(
        std::fabs(e - std::exp(static_cast<Real>(x))) <= 0x1p-50L * std::exp(static_cast<Real>(x)),
        "exp(%.17g) = %.17g", x, e);
    const double y = std::exp(x), log = log_lane(y);
    const Real right = std::log(static_cast<Real>(y));
    CHECK(std::fabs(log - right) <= 0x1p-51L * std::max<Real>(1, std::fabs(right)),
          "log(%.17g) = %.17g", y, log);
    const double a = x / 10, b = a + 80 * (unit(random) - 0.5);
    const Real sum = std::log(std::exp(static_cast<Real>(a)) + std::exp(static_cast<Real>(b)));
    CHECK(std::fabs(log_add_exp_lane(a, b) - sum) <= 0x1p-49L * std::max<Real>(1, std::fabs(sum)),
          "log(e^%.17g + e^%.17g)", a, b);
  }
  CHECK(exp_lane(0) == 1 && log_lane(1) == 0, "at zero");
  CHECK(exp_lane(-1e300) == exp_lane(-708) && exp_lane(1e300) == exp_lane(708), "bounds");
  CHECK(std::isnan(exp_lane(std::nan(""))) && std::isnan(log_lane(std::nan(""))), "NaN");
  CHECK(log_add_exp_lane(kNever, 3) == 3 && log_add_exp_lane(3, kNever) == 3, "nothing added");
}

double normal(Key key, uint64_t counter) {
  uint32_t x0 = static_cast<uint32_t>(counter >> 32), x1 = static_cast<uint32_t>(counter);
  threefry2x32(key, x0, x1);
  return Gaussian<double>::any(Gaussian<double>::uniform(x0, x1), true);
}

struct Request {
  std::vector<double> sigmas, margins, epsilons;

  Targets targets() const {
    return {sigmas.data(),
            margins.data(),
            static_cast<int64_t>(sigmas.size()),
            epsilons.data(),
            static_cast<int64_t>(epsilons.size()),
            *std::min_element(epsilons.begin(), epsilons.end())};
  }
  size_t cells() const { return 2 * sigmas.size() * epsilons.size(); }
};

struct Sums {
  explicit Sums(size_t cells) : sum(cells), count(cells), maximum(cells) {}
  std::vector<double> sum, count, maximum;
};

const Request kRequest{{0.05, 0.5, 1.0, 3.0}, {1e-8, 1e-8, 1e-3, 1e-8}, {0.0, -0.5, 1.0}};

template <typename Make>
Sums run(uint64_t first, int64_t count, const Make& make, int threads = 0) {
  Sums sums(kRequest.cells());
  ThreadPool pool(threads);
  sum_up(pool, threads + 1, first, count, kRequest.targets(), make, sums.sum.data(),
         sums.count.data(), sums.maximum.data());
  return sums;
}

// Adds what one sample has, from its losses by sign and sigma.
void collect(const std::function<Real(int sign, double sigma)>& loss, Sums& sums) {
  size_t cell = 0;
  for (int sign = 0; sign < 2; ++sign) {
    for (size_t s = 0; s < kRequest.sigmas.size(); ++s) {
      const Real l = loss(sign, kRequest.sigmas[s]) + kRequest.margins[s];
      for (double epsilon : kRequest.epsilons) {
        const Real x = std::max<Real>(0, 1 - std::exp(epsilon - l));
        sums.sum[cell] += static_cast<double>(x);
        sums.count[cell] += x > 0;
        sums.maximum[cell] = std::max(sums.maximum[cell], static_cast<double>(x));
        ++cell;
      }
    }
  }
}

void compare(const Sums& found, const Sums& right, const char* what, double tolerance = 1e-9) {
  for (size_t i = 0; i < right.sum.size(); ++i) {
    CHECK(std::fabs(found.sum[i] - right.sum[i]) <= tolerance * (1 + right.sum[i]),
          "%s: sum %d is %.17g, not %.17g", what, int(i), found.sum[i], right.sum[i]);
    CHECK(found.count[i] == right.count[i], "%s: count %d is %g, not %g", what, int(i),
          found.count[i], right.count[i]);
    CHECK(std::fabs(found.maximum[i] - right.maximum[i]) <= tolerance, "%s: maximum %d", what,
          int(i));
  }
}

void test_bins(int64_t modes) {
  std::mt19937 random(2);
  std::normal_distribution<double> entry;
  std::vector<double> factor(modes * modes), gram(modes * modes);
  for (int64_t i = 0; i < modes; ++i) {  // rows with zeros at either end, and one of zeros only
    for (int64_t k = i / 2; k < modes - i / 3 && i != 4; ++k) factor[i * modes + k] = entry(random);
  }
  for (int64_t i = 0; i < modes; ++i) {
    for (int64_t j = 0; j < modes; ++j) {
      for (int64_t k = 0; k < modes; ++k) {
        gram[i * modes + j] += factor[i * modes + k] * factor[j * modes + k];
      }
    }
  }
  const Bins bins(modes, gram.data(), factor.data());
  const uint64_t first = 1000;
  const int64_t count = 77;
  Sums right(kRequest.cells());
  for (uint64_t s = first; s < first + count; ++s) {
    std::vector<Real> g(modes);
    for (int64_t i = 0; i < modes; ++i) {
      for (int64_t k = 0; k < modes; ++k) {
        g[i] += factor[i * modes + k] * static_cast<Real>(normal(split(kKey, 0), s * modes + k));
      }
    }
    const auto j = static_cast<int64_t>(unit(split(kKey, 1), s) * static_cast<double>(modes));
    collect(
        [&](int sign, double sigma) {
          Real sum = 0;
          for (int64_t i = 0; i < modes; ++i) {
            const Real y = (sign == 0 ? gram[i * modes + j] : 0) + sigma * g[i];
            sum += std::exp((y - gram[i * modes + i] / Real(2)) / (Real(sigma) * sigma));
          }
          return (sign == 0 ? 1 : -1) * std::log(sum / static_cast<Real>(modes));
        },
        right);
  }
  compare(run(first, count, [&] { return BinsBlocks(bins, kKey); }), right, "bins");
}

// What is not a number is seen in the sums of both signs, whatever mode it comes from.
void test_nan() {
  for (int64_t at = 0; at < 3; ++at) {
    std::vector<double> gram{1, 0, 0, 0, 1, 0, 0, 0, 1}, factor = gram;
    factor[4 * at] = std::nan("");
    const Bins bins(3, gram.data(), factor.data());
    // Numbers would be far from this epsilon, and left out.
    const double sigma = 3, margin = 0, epsilon = 50;
    Sums found(2);
    ThreadPool pool(0);
    sum_up(
        pool, 1, 0, 5, {&sigma, &margin, 1, &epsilon, 1, epsilon},
        [&] { return BinsBlocks(bins, kKey); }, found.sum.data(), found.count.data(),
        found.maximum.data());
    for (double sum : found.sum) CHECK(std::isnan(sum), "bins: NaN of mode %d is lost", int(at));
  }
}

// All x that the scheme allows, with their probabilities.
void visit(const Steps& steps, const std::function<void(const Sequence&, Real)>& take) {
  const int64_t n = steps.n, b = steps.period;
  Sequence x(n);
  const Real p = steps.p;
  std::function<void(int64_t, int64_t, Real)> walk = [&](int64_t t, int64_t open, Real chance) {
    if (chance == 0) return;
    if (t == n) return take(x, chance);
    if (t >= open) {
      x[t] = 1;
      walk(t + 1, t + b, chance * p);
      x[t] = 0;
      walk(t + 1, steps.scheme == Steps::kCyclic ? t + b : t, chance * (1 - p));
    } else {
      x[t] = 0;
      walk(t + 1, open, chance);
    }
  };
  if (steps.scheme == Steps::kMinSep) return walk(0, 0, 1);
  const Real spread = steps.scheme == Steps::kCyclic ? b : 1 + (b - 1) * p;
  for (int64_t r = 0; r < b; ++r) {
    walk(0, r, (steps.scheme == Steps::kCyclic || r == 0 ? 1 : p) / spread);
  }
}

// The x of a sample, as the kernel draws it.
Sequence draw(const Steps& steps, uint64_t sample) {
  const double b = static_cast<double>(steps.period), u = unit(split(kKey, 1), sample);
  const double unspent = 1 / (1 + (b - 1) * steps.p);
  double open = 0;
  if (steps.scheme == Steps::kCyclic) open = std::floor(u * b);
  if (steps.scheme == Steps::kMinSepWarm && u >= unspent) {
    open = 1 + std::floor((u - unspent) / (steps.p * unspent));
  }
  Sequence x(steps.n);
  double at = open;
  for (uint64_t e = 0; steps.p > 0; ++e) {
    // P(waits >= k) = (1 - p)^k
    const double chance = 1 - unit(split(kKey, 2), sample * (steps.n + 1) + e);
    const double waits = steps.p == 1 ? 0 : std::floor(std::log(chance) / std::log1p(-steps.p));
    at += waits * (steps.scheme == Steps::kCyclic ? b : 1);
    if (at >= static_cast<double>(steps.n)) break;
    x[static_cast<size_t>(at)] = 1;
    at += b;
  }
  return x;
}

void test_steps(const Steps& steps, const char* what) {
  const int64_t n = steps.n;
  auto times_c = [&](const Sequence& x) {
    std::vector<Real> y(n);
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t k = 0; k < steps.taps && t + k < n; ++k) y[t + k] += x[t] * Real(steps.c[k]);
    }
    return y;
  };
  const uint64_t first = 50;
  const int64_t count = 33;
  Sums right(kRequest.cells());
  for (uint64_t s = first; s < first + count; ++s) {
    const std::vector<Real> mean = times_c(draw(steps, s));
    collect(
        [&](int sign, double sigma) {
          std::vector<Real> y(n);
          for (int64_t t = 0; t < n; ++t) {
            y[t] = (sign == 0 ? mean[t] : 0) + sigma * Real(normal(split(kKey, 0), s * n + t));
          }
          Real sum = 0;
          visit(steps, [&](const Sequence& x, Real chance) {
            const std::vector<Real> mode = times_c(x);
            Real r = 0;
            for (int64_t t = 0; t < n; ++t) r += mode[t] * (y[t] - mode[t] / 2);
            sum += chance * std::exp(r / (Real(sigma) * sigma));
          });
          return (sign == 0 ? 1 : -1) * std::log(sum);
        },
        right);
  }
  compare(run(first, count, [&] { return StepsBlocks(steps, kKey, kRequest.targets()); }), right,
          what);
}

// The same bits for any number of threads, and for parts of the samples up to rounding.
template <typename Make>
void test_order(const Make& make, const char* what) {
  const int64_t count = 9000;
  const Sums one = run(3, count, make);
  for (int threads : {1, 3}) {
    const Sums several = run(3, count, make, threads);
    CHECK(one.sum == several.sum && one.count == several.count && one.maximum == several.maximum,
          "%s: other sums with %d threads", what, threads);
  }
  Sums parts = run(3, 1, make);
  const Sums rest = run(4, count - 1, make, 3);
  for (size_t i = 0; i < parts.sum.size(); ++i) {
    parts.sum[i] += rest.sum[i], parts.count[i] += rest.count[i];
    parts.maximum[i] = std::max(parts.maximum[i], rest.maximum[i]);
  }
  compare(parts, one, what);
}

// Scaled values and logarithms are two ways to the same losses.
void test_scaling() {
  std::vector<double> c(20);
  for (size_t k = 0; k < c.size(); ++k) c[k] = 1 / std::sqrt(1.0 + static_cast<double>(k));
  const Steps steps{Steps::kMinSepWarm, 1000, 25, 0.05, 20, c.data()};
  CHECK(steps.interval(0.05) == 0 && steps.interval(1.0) > 0, "intervals");
  for (double p : {0.0, 1.0}) {
    CHECK((Steps{Steps::kMinSep, 1000, 25, p, 20, c.data()}.interval(10.0) == 0), "p = %g", p);
  }
  // More steps than a tile, of a sigma that is scaled and of one that is not: between two that
  // are near, losses move little.
  double sigma = 1.0;
  while (steps.interval(sigma) > 0) sigma *= 0.999;
  const std::vector<double> sigmas{sigma / 0.999 * (1 + 1e-9), sigma}, margins{0, 0}, epsilons{1.0};
  const Targets targets{sigmas.data(), margins.data(), 2, epsilons.data(), 1, 1.0};
  ThreadPool pool(0);
  std::vector<double> sums(4), counts(4), maxima(4);
  sum_up(
      pool, 1, 0, 2000, targets, [&] { return StepsBlocks(steps, kKey, targets); }, sums.data(),
      counts.data(), maxima.data());
  for (int sign = 0; sign < 2; ++sign) {
    CHECK(std::fabs(sums[2 * sign] / sums[2 * sign + 1] - 1) < 0.01, "sums %g and %g",
          sums[2 * sign], sums[2 * sign + 1]);
  }
}

}  // namespace

int main() {
  test_elementary();
  for (int64_t modes : {1, 2, 4, 5, 13}) test_bins(modes);
  test_nan();
  const std::vector<double> c{1.0, 0.5, 0.375, 0.3125};
  for (Steps::Scheme scheme : {Steps::kMinSep, Steps::kMinSepWarm, Steps::kCyclic}) {
    for (double p : {0.0, 0.25, 0.9, 1.0}) {
      for (int64_t n : {int64_t{1}, int64_t{4}, int64_t{8}}) {
        for (int64_t period : {int64_t{1}, int64_t{3}, int64_t{4}, int64_t{11}}) {
          const int64_t taps = std::min({n, period, int64_t{4}});
          test_steps({scheme, n, period, p, taps, c.data()}, "steps");
          test_steps({scheme, n, period, p, 1, c.data()}, "steps, one tap");
        }
      }
    }
  }
  const std::vector<double> gram{2, 1, 1, 2},
      factor{std::sqrt(2), 0, std::sqrt(0.5), std::sqrt(1.5)};
  const Bins bins(2, gram.data(), factor.data());
  test_order([&] { return BinsBlocks(bins, kKey); }, "bins");
  const Steps steps{Steps::kMinSepWarm, 70, 4, 0.3, 4, c.data()};
  test_order([&] { return StepsBlocks(steps, kKey, kRequest.targets()); }, "steps");
  test_scaling();
  return report();
}
