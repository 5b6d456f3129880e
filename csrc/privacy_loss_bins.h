// Samples of the privacy loss of balls in bins.
//
// x is one of `modes` patterns, each as likely. The loss depends on y only through its inner
// products with the modes C x_i: for y = C x_j + sigma z these are G_ij + sigma g_i, with G the
// modes' Gram matrix and g ~ N(0, G), and
//
//   L = log mean_i exp(t_i),   t_i = (<C x_i, y> - G_ii / 2) / sigma^2.
//
// One g serves both signs and all sigmas.
#ifndef JPK_PRIVACY_LOSS_BINS_H_
#define JPK_PRIVACY_LOSS_BINS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "privacy_loss.h"

namespace jpk {
namespace privacy_loss {

struct Bins {
  int64_t modes;
  const double* gram;                // [modes, modes]
  const double* factor;              // [modes, modes]; its product with its transpose is gram
  std::vector<int64_t> start, stop;  // what of every row of factor is not zero
  std::vector<double> half;          // G_ii / 2
  double mean_half;                  // the mean of half

  Bins(int64_t modes, const double* gram, const double* factor)
      : modes(modes), gram(gram), factor(factor), mean_half(0) {
    for (int64_t i = 0; i < modes; ++i) {
      int64_t from = 0, to = modes;
      const double* row = factor + i * modes;
      while (from < to && row[from] == 0) ++from;
      while (to > from && row[to - 1] == 0) --to;
      start.push_back(from);
      stop.push_back(to);
      half.push_back(gram[i * modes + i] / 2);
      mean_half += half.back() / static_cast<double>(modes);
    }
  }
};

// The factor's row times the normals.
JPK_INLINE void combine(const double* factor, int64_t from, int64_t to, const Row* normals,
                        double* __restrict out) {
  Row sum = {};
  for (int64_t k = from; k < to; ++k) {
    for (int l = 0; l < kLanes; ++l) sum[l] += factor[k] * normals[k][l];
  }
  for (int l = 0; l < kLanes; ++l) out[l] = sum[l];
}

class BinsBlocks {
 public:
  BinsBlocks(const Bins& bins, Key key)
      : bins_(bins),
        normal_key_(split(key, 0)),
        choice_key_(split(key, 1)),
        normals_(static_cast<size_t>((bins.modes + kRows - 1) / kRows * kRows * kLanes)),
        products_(static_cast<size_t>(bins.modes * kLanes)),
        offsets_(products_.size()),
        centers_(products_.size()) {
    for (int64_t i = 0; i < bins.modes; ++i) {
      for (int l = 0; l < kLanes; ++l) centers_[i * kLanes + l] = -bins.half[i];
    }
  }

  // What an object takes, up to a few numbers.
  static double bytes(int64_t modes) { return 4.0 * static_cast<double>(modes) * sizeof(Row); }

  // Samples sample .. sample + kLanes - 1, of which the first `count` are counted.
  JPK_TARGET_CLONES void run(uint64_t sample, int count, Tally& tally) {
    const int64_t modes = bins_.modes;
    auto rows = [](std::vector<double>& v) { return reinterpret_cast<Row*>(v.data()); };
    Row *normals = rows(normals_), *products = rows(products_), *offsets = rows(offsets_);
    const Row* centers = rows(centers_);
    for (int64_t i = 0; i < modes; i += kRows) {
      normal_rows(normal_key_, sample, static_cast<uint64_t>(modes), static_cast<uint64_t>(i),
                  normals + i);
    }
    Row mean = {};
    for (int64_t i = 0; i < modes; ++i) {
      combine(bins_.factor + i * modes, bins_.start[i], bins_.stop[i], normals, products[i]);
      for (int l = 0; l < kLanes; ++l) mean[l] += products[i][l];
    }
    for (int l = 0; l < kLanes; ++l) {
      mean[l] /= static_cast<double>(modes);
      // The largest t begins with this one, and stays NaN: what is not a number is not left out.
      products[0][l] = mean[l] == mean[l] ? products[0][l] : mean[l];
    }
    for (int l = 0; l < kLanes; ++l) {
      const double u = unit(choice_key_, sample + static_cast<uint64_t>(l));
      const int64_t j = std::min(static_cast<int64_t>(u * static_cast<double>(modes)), modes - 1);
      const double* row = bins_.gram + j * modes;
      for (int64_t i = 0; i < modes; ++i) offsets[i][l] = row[i] - bins_.half[i];
    }

    const double least = tally.targets.least_epsilon;
    for (int64_t s = 0; s < tally.targets.sigma_count; ++s) {
      const double sigma = tally.targets.sigmas[s], a = 1 / sigma, v = a * a;
      const double up = tally.targets.margins[s];
      // By Jensen's inequality, L >= mean_i t_i: most samples of Q need no more than that.
      int open = 0;
      for (int l = 0; l < kLanes; ++l) open |= !(v * bins_.mean_half - a * mean[l] + up <= least);
      if (open) evaluate(kNegative, s, count, products, centers, a, v, up, tally);
      evaluate(kPositive, s, count, products, offsets, a, v, up, tally);
    }
  }

 private:
  JPK_INLINE void evaluate(Sign sign, int64_t s, int count, const Row* __restrict products,
                           const Row* __restrict offsets, double a, double v, double up,
                           Tally& tally) const {
    const int64_t modes = bins_.modes;
    Row top, sum = {}, loss;
    for (int l = 0; l < kLanes; ++l) top[l] = a * products[0][l] + v * offsets[0][l];
    for (int64_t i = 1; i < modes; ++i) {
      for (int l = 0; l < kLanes; ++l) {
        const double t = a * products[i][l] + v * offsets[i][l];
        top[l] = t > top[l] ? t : top[l];
      }
    }
    if (sign == kPositive) {  // L <= max_i t_i
      int open = 0;
      for (int l = 0; l < kLanes; ++l) open |= !(top[l] + up <= tally.targets.least_epsilon);
      if (!open) return;
    }
    for (int64_t i = 0; i < modes; ++i) {
      for (int l = 0; l < kLanes; ++l) {
        sum[l] += exp_lane(a * products[i][l] + v * offsets[i][l] - top[l]);
      }
    }
    const double log_modes = std::log(static_cast<double>(modes));
    for (int l = 0; l < kLanes; ++l) {
      const double value = top[l] + log_lane(sum[l]) - log_modes;
      loss[l] = l < count ? (sign == kPositive ? value : -value) + up : kNever;
    }
    tally.add(sign, s, loss);
  }

  const Bins& bins_;
  Key normal_key_, choice_key_;
  // [modes, kLanes]: z; g; and what is added to sigma g in t, G_ij - G_ii / 2 and -G_ii / 2.
  std::vector<double> normals_, products_, offsets_, centers_;
};

}  // namespace privacy_loss
}  // namespace jpk

#endif  // JPK_PRIVACY_LOSS_BINS_H_
