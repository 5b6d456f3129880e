// Monte Carlo sums of the hockey-stick divergence of amplified matrix mechanisms.
//
// An example's participations x are random; without it the output of the mechanism is y ~ Q =
// N(0, sigma^2 I), with it y ~ P, the mixture of N(C x, sigma^2 I) over x. With the privacy loss
// L = log P(y)/Q(y), delta(epsilon) is the larger of E_P (1 - e^(epsilon - L))_+ and
// E_Q (1 - e^(epsilon + L))_+. Samples of both are summed here, for many sigmas and epsilons.
//
// Sample s is a function of the key and of s. Samples come in blocks of kLanes, blocks are shared
// out over strands, whose number and limits depend on the number of samples alone, and the strands
// are added up in order: the sums are the same for any number of threads.
//
// To every loss a margin is added that exceeds the error of its computation, so that sums do not
// understate delta.
#ifndef JPK_PRIVACY_LOSS_SUMS_H_
#define JPK_PRIVACY_LOSS_SUMS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel_for.h"
#include "privacy_loss_bins.h"
#include "privacy_loss_steps.h"

namespace jpk {
namespace privacy_loss {

inline constexpr int64_t kStrands = 128;

// Writes sums, counts and maxima [sign, sigma, epsilon] of samples first .. first + count - 1.
// make() gives the blocks of one strand.
template <typename Pool, typename Make>
void sum_up(Pool& pool, int64_t workers, uint64_t first, int64_t count, const Targets& targets,
            const Make& make, double* sums, double* counts, double* maxima) {
  const int64_t blocks = (count + kLanes - 1) / kLanes, strands = std::min(blocks, kStrands);
  std::vector<std::vector<Cell>> parts(static_cast<size_t>(strands));
  parallel_for(pool, strands, workers, [&](int64_t strand, int64_t) {
    Tally tally(targets);
    auto work = make();
    // 128-bit products: blocks may be many.
    const auto limit = [&](int64_t i) {
      return static_cast<int64_t>(static_cast<__int128>(blocks) * i / strands);
    };
    for (int64_t block = limit(strand); block < limit(strand + 1); ++block) {
      const int64_t at = block * kLanes;
      work.run(first + static_cast<uint64_t>(at),
               static_cast<int>(std::min<int64_t>(kLanes, count - at)), tally);
    }
    parts[strand] = std::move(tally.cells);
  });
  const int64_t cells = 2 * targets.sigma_count * targets.epsilon_count;
  for (int64_t i = 0; i < cells; ++i) {
    sums[i] = counts[i] = maxima[i] = 0;
    for (const auto& part : parts) {
      for (int l = 0; l < kLanes; ++l) {
        sums[i] += part[i].sum[l];
        counts[i] += part[i].count[l];
        maxima[i] = std::max(maxima[i], part[i].maximum[l]);
      }
    }
  }
}

}  // namespace privacy_loss
}  // namespace jpk

#endif  // JPK_PRIVACY_LOSS_SUMS_H_
