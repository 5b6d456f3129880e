// Toeplitz products of long vectors by blocks, whose products come from an FFT made elsewhere.
//
// Coefficients and vector are cut into blocks of L elements. Output block r is the sum of products
// of coefficient block p and vector block q with p + q = r or r - 1. The first block of either is
// multiplied directly: strategies begin steeply, and an error of an FFT is relative to the norms of
// what it transforms. For the others the spectra of blocks are multiplied and added up. Each output
// block is then held against what an FFT may have lost, and computed directly if that is too much:
// the result is as accurate as toeplitz.h makes it, to within kTolerance of the sum of the sizes of
// its own terms.
#ifndef JPK_TOEPLITZ_FFT_H_
#define JPK_TOEPLITZ_FFT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel_for.h"
#include "simd.h"
#include "toeplitz.h"

namespace jpk::toeplitz {

constexpr int64_t kFrequencies = 64;  // of a task: all blocks of these stay in the L2 cache
constexpr double kTolerance = 1e-13;

// c[i] += a[i] b[i], complex.
JPK_TARGET_CLONES static void add_complex_products(const double* a, const double* b, int64_t count,
                                                   double* c) {
  for (int64_t i = 0; i < count; ++i) {
    const double re = a[2 * i] * b[2 * i] - a[2 * i + 1] * b[2 * i + 1];
    const double im = a[2 * i] * b[2 * i + 1] + a[2 * i + 1] * b[2 * i];
    c[2 * i] += re;
    c[2 * i + 1] += im;
  }
}

// sums[r] = sum_{p + q = r; p, q >= 1} left[p] right[q], r < blocks, for every frequency. Arrays
// are complex, [problems, bands, frequencies] and [problems, blocks, frequencies].
template <typename Pool>
void multiply_spectra(Pool& pool, int64_t workers, int64_t problems, int64_t bands, int64_t blocks,
                      int64_t frequencies, const double* left, const double* right, double* sums) {
  const int64_t chunks = (frequencies + kFrequencies - 1) / kFrequencies;
  parallel_for(pool, problems * chunks, workers, [&](int64_t task, int64_t) {
    const int64_t problem = task / chunks, first = task % chunks * kFrequencies;
    const int64_t count = std::min(kFrequencies, frequencies - first);
    const double* a = left + 2 * (problem * bands * frequencies + first);
    const double* b = right + 2 * (problem * blocks * frequencies + first);
    double* c = sums + 2 * (problem * blocks * frequencies + first);
    for (int64_t r = 0; r < blocks; ++r) {
      double* to = c + 2 * r * frequencies;
      std::fill(to, to + 2 * count, 0.0);
      for (int64_t p = 1; p < std::min(bands, r); ++p) {
        add_complex_products(a + 2 * p * frequencies, b + 2 * (r - p) * frequencies, count, to);
      }
    }
  });
}

// One product of length n; block is a multiple of kLags. far[t] holds what the FFT made of the
// products of all blocks but the first ones, and sizes[t] what it made of them for absolute values.
// Adds the first blocks, and replaces what is not accurate enough.
template <typename Pool>
void finish(Pool& pool, int64_t workers, const Padded& coef, int64_t m, const Padded& x, int64_t n,
            int64_t block, const double* far, const double* sizes, Padded& out) {
  const int64_t blocks = (n + block - 1) / block, bands = (m + block - 1) / block;
  // Scaled, so that it does not underflow to less than the elements.
  auto norm = [&](const Padded& of, int64_t b, int64_t size) {
    const double *begin = of.data() + b * block, *end = of.data() + std::min(size, (b + 1) * block);
    double largest = 0, sum = 0;
    for (const double* x = begin; x != end; ++x) largest = std::max(largest, std::fabs(*x));
    if (largest == 0) return 0.0;
    for (const double* x = begin; x != end; ++x) sum += (*x / largest) * (*x / largest);
    return largest * std::sqrt(sum);
  };
  std::vector<double> left(static_cast<size_t>(bands)), right(static_cast<size_t>(blocks));
  for (int64_t b = 0; b < bands; ++b) left[b] = norm(coef, b, m);
  for (int64_t b = 0; b < blocks; ++b) right[b] = norm(x, b, n);
  // The products of first blocks with each other are counted once.
  Padded later(n);
  std::fill(later.data(), later.data() + n, 0.0);
  if (m > block) std::copy(coef.data() + block, coef.data() + m, later.data() + block);
  Padded head(std::min(block, n));
  std::copy(x.data(), x.data() + std::min(block, n), head.data());

  parallel_for(pool, blocks, workers, [&](int64_t r, int64_t) {
    // A product by FFTs of length N errs by less than 3 eps log2(N) times both norms, and sums of
    // many spectra by a random walk on top. Where products of norms underflow, nothing is known.
    double most = 0;
    bool accurate = true;
    for (int64_t d = std::max<int64_t>(r - 1, 0); d <= r; ++d) {
      for (int64_t p = 1; p < std::min(bands, d); ++p) {
        const double product = left[p] * right[d - p];
        accurate &= product > 1e-280 || left[p] == 0 || right[d - p] == 0;
        most += product;
      }
    }
    most *= 3 * 0x1p-52 *
            (std::log2(2.0 * static_cast<double>(block)) + std::sqrt(static_cast<double>(blocks)));
    const int64_t begin = r * block, end = std::min(n, begin + block);
    for (int64_t t = begin; t < end; ++t) {
      accurate &= most <= kTolerance * (sizes[t] - most) && std::isfinite(sizes[t]);
    }
    for (int64_t row = begin; row < end; row += kTaskRows) {
      const int64_t count = std::min(kTaskRows, end - row);
      double* sums = out.data() + row;
      std::fill(sums, sums + count, 0.0);
      if (!accurate && r > 1) {
        add_products(coef.data(), std::min(m, row + count), x.data() + row, count, sums);
        continue;
      }
      add_products(coef.data(), std::min({m, block, row + count}), x.data() + row, count, sums);
      // The vector takes the part of the coefficients, which it is exchangeable with.
      const int64_t heads = std::min({block, n, row + count});
      if (r >= 1) add_products(head.data(), heads, later.data() + row, count, sums);
      if (r > 1) {
        for (int64_t i = 0; i < count; ++i) sums[i] += far[row + i];
      }
    }
  });
}

}  // namespace jpk::toeplitz

#endif  // JPK_TOEPLITZ_FFT_H_
