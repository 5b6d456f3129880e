// Samples of the privacy loss of b-min-sep and of cyclic Poisson sampling, step by step.
//
// x is a random sequence, no two participations closer than C has bands: the columns of C that make
// up C x do not overlap. A participation at step i multiplies the likelihood ratio of y by
// exp(r_i),
//
//   r_i = (<c_i, y> - |c_i|^2 / 2) / sigma^2,   c_i = column i of C,
//
// where <c_i, y> is <c_i, C x> + sigma <c_i, z> for y = C x + sigma z: the two inner products serve
// all sigmas.
//
// b-min-sep: F_i is the likelihood ratio of y over the x up to step i that leave step i open to a
// participation, times their probability, so that
//
//   F_{i+1} = (1 - p) F_i + p exp(r_{i+1-b}) F_{i+1-b}.
//
// A start that is warm puts F_i into the first b steps by itself. In the end, x that are still
// waiting count as well. (The recurrence of https://arxiv.org/abs/2602.09338, turned around so that
// it runs forward with the samples.)
//
// Cyclic Poisson: every residue of the steps by the cycle is as likely, and in its steps
// participations are independent: L = log mean_j exp sum_i log(1 - p + p exp(r_i)).
#ifndef JPK_PRIVACY_LOSS_STEPS_H_
#define JPK_PRIVACY_LOSS_STEPS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "privacy_loss.h"

namespace jpk {
namespace privacy_loss {

struct Steps {
  enum Scheme { kMinSep, kMinSepWarm, kCyclic };

  Scheme scheme;
  int64_t n, period;  // the separation or the cycle's length
  double p;
  int64_t taps;  // at most period, at most n
  const double* c;

  // No |r_i| is larger: |<c_i, C x>| is at most that of two columns that meet c_i.
  double reach(double sigma) const {
    double sum = 0, squares = 0;
    for (int64_t k = 0; k < taps; ++k) sum += std::fabs(c[k]), squares += c[k] * c[k];
    return kLargestNormal * sum / sigma + 2.5 * squares / (sigma * sigma);
  }

  // Steps between two scalings, if F may be kept as it is, which costs half as much, and not as its
  // logarithm: between scalings all that was not zero stays between e^-600 and e^600. Or 0.
  int64_t interval(double sigma) const {
    if (scheme == kCyclic || !(p > 0) || !(p < 1)) return 0;
    const int64_t steps = period < 4 ? 16 * period : (period + kTile - 1) / kTile * kTile;
    const double takes = static_cast<double>((steps + period - 1) / period + 2);
    const double waits = static_cast<double>(steps + 2 * period) * -std::log1p(-p);
    const double spread =
        takes * reach(sigma) + waits - std::log(p) + std::log1p(static_cast<double>(period) * p);
    return spread <= 600 ? steps : 0;
  }

  static constexpr int64_t kTile = 64;  // steps that are made together
};

class StepsBlocks {
 public:
  StepsBlocks(const Steps& steps, Key key, const Targets& targets)
      : steps_(steps),
        normal_key_(split(key, 0)),
        choice_key_(split(key, 1)),
        draw_key_(split(key, 2)),
        ahead_((steps.taps - 1 + kRows - 1) / kRows * kRows),
        normals_(static_cast<size_t>((ahead_ + kTile) * kLanes)),
        states_(static_cast<size_t>(2 * targets.sigma_count * (steps.period + 2) * kLanes)),
        products_(static_cast<size_t>(steps.taps)) {
    const int64_t taps = steps.taps;
    for (int64_t d = 0; d < taps; ++d) products_[d] = product(d, taps - d);
    for (int64_t k = 1; k <= taps; ++k) half_.push_back(product(0, k) / 2);
    for (int64_t s = 0; s < targets.sigma_count; ++s) {
      interval_.push_back(steps.interval(targets.sigmas[s]));
    }
  }

  // What an object takes, up to a few numbers; participations double as they come.
  static double bytes(const Steps& steps, int64_t sigma_count) {
    const double slots =
        2.0 * static_cast<double>(sigma_count) * (static_cast<double>(steps.period) + 2);
    const double events = 2.0 * (static_cast<double>(steps.n / steps.period) + 2);
    return (static_cast<double>(steps.taps + kTile) + slots + events) * sizeof(Row);
  }

  JPK_TARGET_CLONES void run(uint64_t sample, int count, Tally& tally) {
    const Targets& targets = tally.targets;
    auto rows = [](std::vector<double>& v) { return reinterpret_cast<Row*>(v.data()); };
    Row *normals = rows(normals_), *states = rows(states_);
    const int64_t n = steps_.n, each = steps_.period + 2;
    const double log_p = steps_.p > 0 ? std::log(steps_.p) : kNever;
    const double log_rest = steps_.p < 1 ? std::log1p(-steps_.p) : kNever;

    begin(states, targets.sigma_count, log_p);
    participate(sample);
    for (int64_t i = 0; i < ahead_; i += kRows) extend(sample, i, normals + i);
    Row noise[kTile], signal[kTile];
    for (int64_t first = 0; first < n; first += kTile) {
      const int64_t tile = std::min<int64_t>(kTile, n - first);
      for (int64_t i = 0; i < kTile; i += kRows) {
        extend(sample, first + ahead_ + i, normals + ahead_ + i);
      }
      for (int64_t i = 0; i < tile; ++i) correlate(normals + i, noise[i]);
      overlap(first, tile, signal);
      std::memmove(normals, normals + kTile, static_cast<size_t>(ahead_) * sizeof(Row));
      for (int64_t s = 0; s < targets.sigma_count; ++s) {
        const double a = 1 / targets.sigmas[s], v = a * a;
        for (int sign = 0; sign < 2; ++sign) {
          const double by_signal = sign == kPositive ? v : 0;
          Row* state = states + (2 * s + sign) * each;
          if (interval_[s]) {
            advance(first, tile, noise, signal, a, v, by_signal, interval_[s], state);
          } else {
            advance_logs(first, tile, noise, signal, a, v, by_signal, log_p, log_rest, state);
          }
        }
      }
    }
    for (int64_t s = 0; s < targets.sigma_count; ++s) {
      const double up = targets.margins[s];
      for (int sign = 0; sign < 2; ++sign) {
        Row value, loss;
        finish(states + (2 * s + sign) * each, interval_[s] != 0, value);
        for (int l = 0; l < kLanes; ++l) {
          loss[l] = l < count ? (sign == kPositive ? value[l] : -value[l]) + up : kNever;
        }
        tally.add(static_cast<Sign>(sign), s, loss);
      }
    }
  }

 private:
  static constexpr int64_t kTile = Steps::kTile;

  // The state of one sigma and sign: row 0 is F_i, or its logarithm; row 1 + i % period, what F_i
  // will get once it is reached; the last row, the power of two that was taken out of all of them.
  // For a cycle, row 1 + j is the sum of residue j.
  JPK_INLINE void begin(Row* states, int64_t sigma_count, double log_p) const {
    const int64_t period = steps_.period;
    const double likely = std::log1p(static_cast<double>(period - 1) * steps_.p);
    const bool cyclic = steps_.scheme == Steps::kCyclic, warm = steps_.scheme == Steps::kMinSepWarm;
    const double at_once = warm ? -likely : 0, later = warm ? log_p - likely : kNever;
    for (int64_t i = 0; i < 2 * sigma_count; ++i) {
      const bool logs = interval_[i / 2] == 0;
      auto start = [&](double x) { return cyclic ? 0.0 : logs ? x : std::exp(x); };
      for (int64_t row = 0; row < period + 2; ++row) {
        const double value = row == period + 1 ? 0 : start(row == 0 ? at_once : later);
        for (int l = 0; l < kLanes; ++l) (*states)[l] = value;
        ++states;
      }
    }
  }

  // The steps of participations, row by row: the first of every lane, the second, ..., n if there
  // is none. Waiting times are geometric, in steps, or in turns of the cycle.
  JPK_INLINE void participate(uint64_t sample) {
    const int64_t n = steps_.n;
    const bool cyclic = steps_.scheme == Steps::kCyclic, warm = steps_.scheme == Steps::kMinSepWarm;
    const double period = static_cast<double>(steps_.period), end = static_cast<double>(n);
    const double unspent = 1 / (1 + (period - 1) * steps_.p);  // the probability to be open
    const double turn = cyclic ? period : 1, scale = 1 / std::log1p(-steps_.p);
    Row at;
    for (int l = 0; l < kLanes; ++l) {
      const double u = unit(choice_key_, sample + static_cast<uint64_t>(l));
      const double bin = std::floor(u * period);
      const double wait = u < unspent ? 0 : 1 + std::floor((u - unspent) / (steps_.p * unspent));
      at[l] = std::min(cyclic ? bin : warm ? wait : 0.0, period - 1);
      passed_[l] = 0;
    }
    events_.clear();
    for (uint64_t number = 0, some = 1; some != 0; ++number) {
      for (int l = 0; l < kLanes; ++l) {
        const uint64_t counter = (sample + static_cast<uint64_t>(l)) * static_cast<uint64_t>(n + 1);
        const double u = unit(draw_key_, counter + number);
        const double waits = std::floor(log_lane(1.0 - u) * scale);
        const double next = at[l] + waits * turn;
        at[l] = next < end ? next : end;  // without a probability to wait for, too
      }
      some = 0;
      for (int l = 0; l < kLanes; ++l) some |= at[l] < end;
      events_.insert(events_.end(), at, at + kLanes);
      for (int l = 0; l < kLanes; ++l) at[l] += period;
    }
  }

  // z of the steps from `first` on, kRows of them.
  JPK_INLINE void extend(uint64_t sample, int64_t first, Row* normals) const {
    if (first < steps_.n) {
      const uint64_t stride = static_cast<uint64_t>(steps_.n);
      normal_rows(normal_key_, sample, stride, static_cast<uint64_t>(first), normals);
    }
    for (int64_t i = std::max<int64_t>(steps_.n - first, 0); i < kRows; ++i) {
      for (int l = 0; l < kLanes; ++l) normals[i][l] = 0;  // there is no such step
    }
  }

  // <c_i, z>.
  JPK_INLINE void correlate(const Row* normals, double* __restrict noise) const {
    Row sum = {};
    for (int64_t k = 0; k < steps_.taps; ++k) {
      for (int l = 0; l < kLanes; ++l) sum[l] += steps_.c[k] * normals[k][l];
    }
    for (int l = 0; l < kLanes; ++l) noise[l] = sum[l];
  }

  // sum_{k < count} c_k c_{k + d}: two columns of C, d apart, with so many steps in common.
  double product(int64_t d, int64_t count) const {
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += steps_.c[k] * steps_.c[k + d];
    return sum;
  }

  // <c_i, C x> of a tile: the columns at participations that meet c_i.
  JPK_INLINE void overlap(int64_t first, int64_t tile, Row* signal) {
    const int64_t n = steps_.n, taps = steps_.taps;
    std::memset(signal, 0, static_cast<size_t>(tile) * sizeof(Row));
    for (int l = 0; l < kLanes; ++l) {
      const double* event = events_.data() + passed_[l] * kLanes + l;
      for (; *event < static_cast<double>(n); event += kLanes) {
        const int64_t at = static_cast<int64_t>(*event);
        if (at - taps + 1 >= first + tile) break;
        if (at + taps <= first) ++passed_[l];
        const int64_t from = std::max(first, at - taps + 1);
        const int64_t to = std::min(first + tile, at + taps);
        for (int64_t i = from; i < to; ++i) {
          const int64_t d = i < at ? at - i : i - at, left = n - std::max(i, at);
          signal[i - first][l] += left >= taps - d ? products_[d] : product(d, left);
        }
      }
    }
  }

  JPK_INLINE void advance(int64_t first, int64_t tile, const Row* noise, const Row* signal,
                          double a, double v, double by_signal, int64_t interval,
                          Row* state) const {
    const int64_t n = steps_.n, taps = steps_.taps, period = steps_.period;
    const double p = steps_.p, rest = 1 - p;
    Row* const slots = state + 1;
    int64_t slot = first % period, until = interval - first % interval;
    Row open;
    for (int l = 0; l < kLanes; ++l) open[l] = state[0][l];
    for (int64_t i = 0; i < tile; ++i) {
      const double shift = v * half_[std::min(taps, n - first - i) - 1];
      double* now = slots[slot];
      slot = slot + 1 == period ? 0 : slot + 1;
      for (int l = 0; l < kLanes; ++l) {
        const double r = a * noise[i][l] + by_signal * signal[i][l] - shift;
        now[l] = p * open[l] * exp_lane(r);
      }
      for (int l = 0; l < kLanes; ++l) open[l] = rest * open[l] + slots[slot][l];
      if (--until == 0) {
        rescale(open, slots, state[period + 1]);
        until = interval;
      }
    }
    for (int l = 0; l < kLanes; ++l) state[0][l] = open[l];
  }

  // Takes the power of two out of `open`.
  JPK_INLINE void rescale(double* open, Row* slots, double* exponents) const {
    Row factor;
    for (int l = 0; l < kLanes; ++l) {
      const int64_t exponent = static_cast<int32_t>(bit_cast<uint64_t>(open[l]) >> 52) - 1023;
      factor[l] = bit_cast<double>(static_cast<uint64_t>(1023 - exponent) << 52);
      exponents[l] += static_cast<double>(static_cast<int32_t>(exponent));
      open[l] *= factor[l];
    }
    for (int64_t i = 0; i < steps_.period; ++i) {
      for (int l = 0; l < kLanes; ++l) slots[i][l] *= factor[l];
    }
  }

  JPK_INLINE void advance_logs(int64_t first, int64_t tile, const Row* noise, const Row* signal,
                               double a, double v, double by_signal, double log_p, double log_rest,
                               Row* state) const {
    const int64_t n = steps_.n, taps = steps_.taps, period = steps_.period;
    Row* const slots = state + 1;
    int64_t slot = first % period;
    for (int64_t i = 0; i < tile; ++i) {
      const double shift = v * half_[std::min(taps, n - first - i) - 1];
      double *open = state[0], *now = slots[slot];
      slot = slot + 1 == period ? 0 : slot + 1;
      Row take;
      for (int l = 0; l < kLanes; ++l) {
        take[l] = log_p + (a * noise[i][l] + by_signal * signal[i][l] - shift);
      }
      if (steps_.scheme == Steps::kCyclic) {
        for (int l = 0; l < kLanes; ++l) now[l] += log_add_exp_lane(log_rest, take[l]);
      } else {
        for (int l = 0; l < kLanes; ++l) now[l] = take[l] + open[l];
        for (int l = 0; l < kLanes; ++l) {
          open[l] = log_add_exp_lane(log_rest + open[l], slots[slot][l]);
        }
      }
    }
  }

  // L, from the state after n steps: F_n has got what was due at n, and the other slots count too.
  JPK_INLINE void finish(const Row* state, bool scaled, double* value) const {
    const int64_t period = steps_.period;
    const bool cyclic = steps_.scheme == Steps::kCyclic;
    const int64_t done = cyclic ? 0 : steps_.n % period;
    const Row& first = state[cyclic ? 1 : 0];
    for (int l = 0; l < kLanes; ++l) value[l] = first[l];
    for (int64_t i = 1; i < period; ++i) {
      const Row& slot = state[1 + (done + i) % period];
      if (scaled) {
        for (int l = 0; l < kLanes; ++l) value[l] += slot[l];
      } else {
        for (int l = 0; l < kLanes; ++l) value[l] = log_add_exp_lane(value[l], slot[l]);
      }
    }
    const double mean = cyclic ? std::log(static_cast<double>(period)) : 0;
    const Row& exponents = state[period + 1];
    for (int l = 0; l < kLanes; ++l) {
      const double base = scaled ? 0.693147180559945309 * exponents[l] : -mean;
      value[l] = (scaled ? log_lane(value[l]) : value[l]) + base;
    }
  }

  const Steps& steps_;
  Key normal_key_, choice_key_, draw_key_;
  int64_t ahead_;
  std::vector<double> normals_;    // z of the tile and of `ahead_` steps more
  std::vector<double> states_;     // [sigma, sign, period + 2, kLanes]
  std::vector<double> products_;   // of whole columns, by their distance
  std::vector<double> half_;       // half the squared norms of columns that are cut off
  std::vector<int64_t> interval_;  // of every sigma
  std::vector<double> events_;     // [participations, kLanes]
  int64_t passed_[kLanes];         // participations that no later step meets
};

}  // namespace privacy_loss
}  // namespace jpk

#endif  // JPK_PRIVACY_LOSS_STEPS_H_
