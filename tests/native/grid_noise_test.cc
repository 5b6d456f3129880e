// Exact noise: samples against mpmath's, steps against the definition, element by element.
#include "grid_noise.h"

#include <cinttypes>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "grid_sums.h"
#include "thread_pool.h"

namespace jpk {
namespace {

void block(const Rounding& rounding, const uint32_t* hi, const uint32_t* lo,
           const uint32_t (*words)[4], double* out) {
  rounded_normal_block(
      rounding, hi, lo, [&](int i, uint32_t* more) { std::copy_n(words[i], 4, more); }, out);
}

// Every sample of the golden table, at every place of a block.
void test_golden_samples() {
  std::FILE* file = std::fopen(JPK_GOLDEN_NORMAL, "r");
  CHECK(file != nullptr, "%s cannot be read", JPK_GOLDEN_NORMAL);
  if (file == nullptr) return;
  Rounding rounding;
  uint64_t* limb = rounding.spacing.limb;
  uint64_t bits, more, still_more;
  int64_t expected;
  long rows = 0;
  while (std::fscanf(file,
                     "%la,%" SCNx64 ",%" SCNx64 ",%" SCNx64 ",%" SCNx64 ",%" SCNx64 ",%" SCNx64
                     ",%" SCNx64 ",%" SCNx64 ",%" SCNd64,
                     &rounding.scale, limb, limb + 1, limb + 2, limb + 3, limb + 4, &bits, &more,
                     &still_more, &expected) == 10) {
    const int64_t settled = settle(rounding, bits, more, still_more);
    CHECK(settled == expected, "%" PRId64 " for %" PRId64 " of %" PRIx64 " at scale %g", settled,
          expected, bits, rounding.scale);
    uint32_t hi[kBlock], lo[kBlock], words[kBlock][4];
    const int place = static_cast<int>(rows++ % kBlock);
    for (int i = 0; i < kBlock; ++i) {
      const bool here = i == place;
      hi[i] = here ? static_cast<uint32_t>(bits >> 32) : 0x80000000u;
      lo[i] = here ? static_cast<uint32_t>(bits) : 0u;
      words[i][0] = static_cast<uint32_t>(more >> 32), words[i][1] = static_cast<uint32_t>(more);
      words[i][2] = static_cast<uint32_t>(still_more >> 32);
      words[i][3] = static_cast<uint32_t>(still_more);
    }
    double out[kBlock];
    block(rounding, hi, lo, words, out);
    CHECK(out[place] == static_cast<double>(expected), "%g for %" PRId64, out[place], expected);
  }
  std::fclose(file);
  CHECK(rows > 500, "%ld rows", rows);
}

Rounding rounding_of(double scale) {  // a power of two
  Rounding rounding{scale, {{0, 0, 0, 0, 0}}};
  int bit = 192 - 1;
  for (double s = scale; s > 1; s /= 2) --bit;
  rounding.spacing.limb[bit / 64] = uint64_t{1} << bit % 64;
  return rounding;
}

// What estimates give is what all bits give.
void test_estimates_settle_rightly() {
  std::mt19937_64 random(1);
  for (double scale : {1.0, 64.0, 0x1p30, 0x1p42}) {
    const Rounding rounding = rounding_of(scale);
    for (int repeat = 0; repeat < 4; ++repeat) {
      uint32_t hi[kBlock], lo[kBlock], words[kBlock][4];
      for (int i = 0; i < kBlock; ++i) {
        const uint64_t bits = random() >> (i % 8 ? 0 : random() % 40);
        hi[i] = static_cast<uint32_t>(bits >> 32), lo[i] = static_cast<uint32_t>(bits);
        for (uint32_t& word : words[i]) word = static_cast<uint32_t>(random());
      }
      double out[kBlock];
      block(rounding, hi, lo, words, out);
      for (int i = 0; i < kBlock; ++i) {
        const auto pair = [](uint32_t a, uint32_t b) { return uint64_t{a} << 32 | b; };
        const int64_t expected =
            settle(rounding, pair(hi[i], lo[i]), pair(words[i][0], words[i][1]),
                   pair(words[i][2], words[i][3]));
        CHECK(out[i] == static_cast<double>(expected), "%g for %" PRId64 " at scale %g", out[i],
              expected, scale);
      }
    }
  }
}

// No place of a block that has no element asks for further bits, whatever the scale is: it has no
// index to ask for.
void test_places_without_elements() {
  const double quartile = 0.6744897501960817;  // z of the uniform in the middle
  for (double about : {0x1p10, 0x1p36, 0x1p41}) {
    Rounding rounding{};
    rounding.scale = (std::floor(about * quartile) + 0.5) / quartile;
    Visit visit;
    visit.clear(1), visit.add({0, 7, 5});
    chacha20::Input input{};
    input.set_domain(chacha20::Domain::kGrid);
    const GridBits bits(visit, input);
    double out[kBlock];
    rounded_normal_block(
        rounding, bits.high(), bits.low(),
        [&](int i, uint32_t* words) {
          CHECK(i < visit.count, "place %d of %" PRId64 " elements", i, visit.count);
          std::fill_n(words, 4, 0u);
        },
        out);
  }
}

// The sample of one element, from all of its bits.
int64_t naive_sample(const Rounding& rounding, const chacha20::Key& key, uint64_t index) {
  using Layout = chacha20::Layout<64>;
  chacha20::Input input;
  input.set_key(key), input.set_domain(chacha20::Domain::kGrid);
  input.set_blocks(Layout::block(index), 0, 1);
  uint32_t words[chacha20::kWords][chacha20::kLanes], more[4];
  chacha20::blocks<1>(input, words);
  const int word = Layout::word(index);
  more_bits(key, index, more);
  return settle(rounding, uint64_t{words[word + 8][0]} << 32 | words[word][0],
                uint64_t{more[0]} << 32 | more[1], uint64_t{more[2]} << 32 | more[3]);
}

int64_t naive_quotient(int64_t n, int64_t d) {
  if (d < 0) n = -n, d = -d;
  const int64_t a = 2 * n + d, q = a / (2 * d);
  return q - (a % (2 * d) < 0);
}

struct Case {
  int64_t bands;
  bool by_row;
  bool in_doubles;
  bool wide_grad, wide_ring;
  double scale;
};

int32_t coefficient(const Case& of, int64_t row, int64_t lag) {
  if (!of.by_row) row = 0;
  if (lag == 0) return static_cast<int32_t>(row % 2 ? -(37 + row) : 64 + row);
  return static_cast<int32_t>((row + 3 * lag) % 11 - 5);
}

template <typename T>
int64_t read(const std::vector<char>& memory, int64_t i) {
  T value;
  std::memcpy(&value, memory.data() + static_cast<size_t>(i) * sizeof value, sizeof value);
  return static_cast<int64_t>(value);
}

void test_steps(const Case& of) {
  const int64_t slots = of.bands - 1, steps = 2 * slots + 3;
  const Shard shards[] = {{}, {1000, 1500, {}}, {700, 130, {{3, 900}}}};
  const int64_t sizes[] = {2300, 1500, 390};
  std::vector<chacha20::Key> keys(static_cast<size_t>(steps + of.bands));
  for (size_t t = 0; t < keys.size(); ++t) {
    for (uint32_t w = 0; w < 8; ++w) keys[t].words[w] = static_cast<uint32_t>(t) * 97 + w;
  }
  const size_t grad_bytes = of.wide_grad ? 8 : 4, ring_bytes = of.wide_ring ? 8 : 4;
  std::vector<GridLeaf> leaves;
  std::vector<std::vector<char>> grads, outs, rings, apart, before;
  int64_t first_tile = 0;
  for (size_t l = 0; l < 3; ++l) {
    const size_t size = static_cast<size_t>(sizes[l]);
    grads.emplace_back(size * grad_bytes), outs.emplace_back(size * grad_bytes);
    rings.emplace_back(size * ring_bytes * static_cast<size_t>(slots));
    apart.emplace_back(rings.back().size()), before.emplace_back(rings.back().size());
    for (size_t i = 0; i < size; ++i) {
      const int64_t value = static_cast<int64_t>(i) - 700;
      const int32_t narrow = static_cast<int32_t>(value);
      std::memcpy(grads[l].data() + i * grad_bytes,
                  of.wide_grad ? static_cast<const void*>(&value) : &narrow, grad_bytes);
    }
    GridLeaf leaf{};
    leaf.size = sizes[l], leaf.first_tile = first_tile, leaf.index = static_cast<uint32_t>(l) + 5;
    leaf.wide_grad = of.wide_grad, leaf.wide_ring = of.wide_ring, leaf.shard = shards[l];
    if (!l) leaf.shard.run = leaf.size;
    leaves.push_back(leaf), first_tile += 3;
  }
  for (size_t l = 0; l < 3; ++l) {
    leaves[l].grad = grads[l].data(), leaves[l].out = outs[l].data(),
    leaves[l].ring = rings[l].data();
  }
  // By the definition: all terms of every element.
  std::vector<std::vector<int64_t>> terms;  // [leaf, element][step]
  for (const GridLeaf& leaf : leaves) {
    for (int64_t i = 0; i < leaf.size; ++i) {
      const uint64_t index = leaf.shard.index(i / leaf.shard.run) + uint64_t(i % leaf.shard.run);
      std::vector<int64_t> x;
      for (int64_t t = 0; t < steps; ++t) {
        const auto key = chacha20::child(keys[size_t(t)], chacha20::Domain::kSplit, leaf.index);
        int64_t n = naive_sample(rounding_of(of.scale), key, index);
        for (int64_t lag = 1; lag <= std::min(t, slots); ++lag) {
          n -= coefficient(of, t, lag) * x[size_t(t - lag)];
        }
        x.push_back(naive_quotient(n, coefficient(of, t, 0)));
      }
      terms.push_back(x);
    }
  }
  ThreadPool pool(2);
  for (int64_t t = 0; t < steps; ++t) {
    GridStep step{};
    step.t = t, step.slots = slots, step.now = slots ? t % slots : 0, step.keys = &keys[size_t(t)];
    step.rounding = rounding_of(of.scale), step.in_doubles = of.in_doubles;
    const int64_t rows = of.by_row ? step.most_steps() : 1;
    std::vector<int32_t> coef;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t lag = 0; lag < of.bands; ++lag) coef.push_back(coefficient(of, t + row, lag));
    }
    set_grid_recurrence(step, coef.data(), rows);
    grid_noise(pool, 3, step, leaves);
    // In place of the gradients, and elsewhere than the rings before; not valid at the first step.
    std::vector<GridLeaf> moved = leaves;
    std::vector<std::vector<char>> sums = grads;
    for (size_t l = 0; l < 3; ++l) {
      moved[l].grad = moved[l].out = sums[l].data();
    }
    if (t == 0) {
      grid_nothing(pool, 3, moved);
      for (size_t l = 0; l < 3; ++l) {
        for (int64_t i = 0; i < leaves[l].size; ++i) {
          const int64_t found =
              of.wide_grad ? read<int64_t>(sums[l], i) : read<int32_t>(sums[l], i);
          CHECK(found == (of.wide_grad ? INT64_MIN : INT32_MIN), "%" PRId64, found);
        }
      }
      sums = grads;
    }
    for (size_t l = 0; l < 3; ++l) {
      moved[l].grad = moved[l].out = sums[l].data();
      std::swap(apart[l], before[l]);
      moved[l].ring = apart[l].data();
      if (slots) moved[l].copy = {before[l].data(), slots, int64_t(ring_bytes) * leaves[l].size};
    }
    grid_noise(pool, 3, step, moved);
    for (size_t l = 0; l < 3; ++l) {
      CHECK(sums[l] == outs[l] && apart[l] == rings[l], "leaf %zu", l);
    }
    size_t element = 0;
    for (size_t l = 0; l < 3; ++l) {
      for (int64_t i = 0; i < leaves[l].size; ++i, ++element) {
        const int64_t expected = i - 700 + terms[element][size_t(t)];
        const int64_t found = of.wide_grad ? read<int64_t>(outs[l], i) : read<int32_t>(outs[l], i);
        CHECK(found == expected, "%" PRId64 " for %" PRId64 ": %" PRId64 " bands, step %" PRId64,
              found, expected, of.bands, t);
      }
    }
  }
}

// Quotients, at and beside the halves that floats might round to the other side.
void test_quotients() {
  std::mt19937_64 random(2);
  for (int64_t divisor : {1, 2, 3, 7, 64, 4095, 1 << 20, (1 << 30) + 1}) {
    double x[kBlock];
    int64_t wide[kBlock], expected[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const int64_t q = static_cast<int64_t>(random() % (uint64_t{1} << 40)) / divisor - 1000;
      wide[i] = q * divisor + (i % 2 ? divisor / 2 + i % 5 - 2 : i % 3 - 1);
      x[i] = static_cast<double>(wide[i]), expected[i] = naive_quotient(wide[i], divisor);
    }
    divide_rounding(divisor, x), divide_rounding(divisor, wide);
    for (int i = 0; i < kBlock; ++i) {
      CHECK(x[i] == static_cast<double>(expected[i]), "%g by %" PRId64, x[i], divisor);
      CHECK(wide[i] == expected[i], "%" PRId64 " by %" PRId64, wide[i], divisor);
    }
  }
}

// A sum of one sample is that sample, rounded; its opposite is its opposite. Shards and slots, sums
// of several, where bits of all samples are needed or not.
void test_sums() {
  std::vector<chacha20::Key> keys(12);
  for (size_t t = 0; t < keys.size(); ++t) {
    for (uint32_t w = 0; w < 8; ++w) keys[t].words[w] = static_cast<uint32_t>(t) * 31 + w;
  }
  const int64_t size = 5000;
  std::vector<int64_t> zeros(size, 0), one(size), other(size);
  GridLeaf leaf{};
  leaf.grad = zeros.data(), leaf.size = size, leaf.index = 3, leaf.shard.run = size;
  leaf.wide_grad = leaf.wide_ring = true;
  ThreadPool pool(2);
  const auto run = [&](const auto& step, std::vector<int64_t>& out, std::vector<int64_t>* ring) {
    GridLeaf here = leaf;
    here.out = out.data(), here.ring = ring ? ring->data() : nullptr;
    const std::vector<GridLeaf> leaves{here};
    if constexpr (std::is_same_v<std::decay_t<decltype(step)>, GridStep>) {
      grid_noise(pool, 3, step, leaves);
    } else {
      grid_sums(pool, 3, step, leaves);
    }
  };
  for (double scale : {64.0, 0x1p30, 0x1p42}) {
    GridStep step{};
    step.keys = keys.data(), step.rounding = rounding_of(scale);
    const int32_t unit = 1;
    set_grid_recurrence(step, &unit, 1);
    run(step, one, nullptr);
    GridSums sums{};
    sums.keys = keys.data(), sums.weights = {1.0}, sums.stddev = scale;
    run(sums, other, nullptr);
    CHECK(one == other, "one sample at scale %g", scale);
    sums.weights = {-0.5}, sums.stddev = 2 * scale;
    run(sums, other, nullptr);
    for (int64_t& x : other) x = -x;
    CHECK(one == other, "its opposite at scale %g", scale);
  }
  // With slots the same terms as without, and those that all bits give.
  for (double stddev : {100.0, 0x1p40}) {
    const int64_t behind = 2;
    std::vector<int64_t> ring(3 * size, 0);
    for (int64_t t = 0; t < 7; ++t) {
      GridSums sums{};
      sums.t = t, sums.behind = behind, sums.weights = {0.3, 0.0, -1.7}, sums.stddev = stddev;
      sums.keys = keys.data() + t;
      run(sums, one, nullptr);
      sums.slots = 3, sums.now = t % 3;
      run(sums, other, &ring);
      CHECK(one == other, "slots at step %" PRId64, t);
      std::vector<chacha20::Key> of_leaf;
      for (int64_t j = 0; j <= behind; ++j) {
        of_leaf.push_back(chacha20::child(sums.keys[j], chacha20::Domain::kSplit, leaf.index));
      }
      for (int64_t i = 0; i < size; i += 97) {
        const int64_t expected = settle_sum(sums, of_leaf.data(), 0, static_cast<uint64_t>(i));
        CHECK(one[static_cast<size_t>(i)] == expected, "%" PRId64, expected);
      }
    }
  }
}

}  // namespace
}  // namespace jpk

int main() {
  jpk::test_golden_samples();
  jpk::test_estimates_settle_rightly();
  jpk::test_places_without_elements();
  jpk::test_quotients();
  jpk::test_sums();
  for (const jpk::Case& of :
       {jpk::Case{1, false, true, false, false, 0x1p10},
        jpk::Case{2, false, true, false, false, 0x1p10},
        jpk::Case{5, false, true, true, false, 0x1p10},
        jpk::Case{4, true, true, false, false, 0x1p10},
        jpk::Case{1, true, true, true, true, 0x1p10}, jpk::Case{4, true, false, true, true, 0x1p40},
        jpk::Case{3, false, false, true, false, 0x1p20}}) {
    jpk::test_steps(of);
  }
  return report();
}
