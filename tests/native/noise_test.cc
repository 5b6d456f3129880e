// correlated_noise and dense_noise against the definitions of filters and rows, evaluated one
// element at a time in double, with nothing looked ahead and nothing forgotten. Shares no code with
// them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "correlated_noise.h"
#include "dense_noise.h"
#include "thread_pool.h"

namespace {

using jpk::Filter;
using jpk::FloatType;
using jpk::Key;

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;  // the sanitizer's own guards lie right at the ends
#else
constexpr size_t kGuard = 64;
#endif

// Memory of exactly the size asked for.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes), memory_(new unsigned char[bytes + 2 * kGuard]) {
    std::memset(memory_.get(), kFill, bytes + 2 * kGuard);
  }
  void* data() const { return memory_.get() + kGuard; }
  size_t size() const { return bytes_; }
  void fill(unsigned char value) { std::memset(data(), value, bytes_); }
  bool same(const Buffer& other) const {
    return bytes_ == other.bytes_ && (bytes_ == 0 || !std::memcmp(data(), other.data(), bytes_));
  }
  bool guards_intact() const {
    const unsigned char* end = memory_.get() + bytes_ + 2 * kGuard;
    auto filled = [](unsigned char c) { return c == kFill; };
    return std::all_of(memory_.get(), memory_.get() + kGuard, filled) &&
           std::all_of(end - kGuard, end, filled);
  }

 private:
  static constexpr unsigned char kFill = 0xA5;
  size_t bytes_;
  std::unique_ptr<unsigned char[]> memory_;
};

size_t bytes_of(FloatType type) {
  if (type == FloatType::kFloat64) return 8;
  return type == FloatType::kFloat32 ? 4 : 2;
}

template <typename T>
T load(const void* p, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const unsigned char*>(p) + i * sizeof value, sizeof value);
  return value;
}

template <typename T>
void store(void* p, int64_t i, T value) {
  std::memcpy(static_cast<unsigned char*>(p) + i * sizeof value, &value, sizeof value);
}

// A finite 16-bit float of `fraction` bits after the point, by the formula of IEEE 754.
double decode(uint16_t bits, int fraction, int bias) {
  const int exponent = (bits & 0x7FFF) >> fraction, significand = bits & ((1 << fraction) - 1);
  const double magnitude =
      exponent ? std::ldexp((1 << fraction) + significand, exponent - bias - fraction)
               : std::ldexp(significand, 1 - bias - fraction);
  return bits & 0x8000 ? -magnitude : magnitude;
}

double read(const void* p, FloatType type, int64_t i) {
  switch (type) {
    case FloatType::kFloat16:
      return decode(load<uint16_t>(p, i), 10, 15);
    case FloatType::kBFloat16:
      return decode(load<uint16_t>(p, i), 7, 127);
    case FloatType::kFloat32:
      return load<float>(p, i);
    default:
      return load<double>(p, i);
  }
}

// Half a unit in the last place of a number of size 1.
double rounding(FloatType type) {
  switch (type) {
    case FloatType::kFloat16:
      return 0x1p-11;
    case FloatType::kBFloat16:
      return 0x1p-8;
    case FloatType::kFloat32:
      return 0x1p-24;
    default:
      return 0x1p-53;
  }
}

// The i-th gradient, exact in every type.
double gradient(int64_t i) { return (static_cast<double>(i * 37 % 97) - 48) / 16; }

uint16_t encode(double value, int fraction, int bias) {
  if (value == 0) return 0;
  const int exponent = std::ilogb(value);
  const double significand = std::ldexp(std::fabs(value), fraction - exponent);
  return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) + ((exponent + bias - 1) << fraction) +
                               static_cast<int>(significand));
}

void write_gradient(void* p, FloatType type, int64_t i) {
  const double value = gradient(i);
  switch (type) {
    case FloatType::kFloat16:
      return store(p, i, encode(value, 10, 15));
    case FloatType::kBFloat16:
      return store(p, i, encode(value, 7, 127));
    case FloatType::kFloat32:
      return store(p, i, static_cast<float>(value));
    case FloatType::kFloat64:
      return store(p, i, value);
  }
}

// Threefry-2x32, 20 rounds.
void encrypt(Key key, uint32_t x[2]) {
  const int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t k[3] = {key.k0, key.k1, key.k0 ^ key.k1 ^ 0x1BD11BDAu};
  x[0] += k[0];
  x[1] += k[1];
  for (uint32_t group = 0; group < 5; ++group) {
    for (int rotation : rotations[group % 2]) {
      x[0] += x[1];
      x[1] = (x[1] << rotation | x[1] >> (32 - rotation)) ^ x[0];
    }
    x[0] += k[(group + 1) % 3];
    x[1] += k[(group + 2) % 3] + group + 1;
  }
}

// sqrt(2) erfinv(u): a formula good to 0.2 %, then two Halley steps, each of which cubes the error.
double to_normal(double u) {
  const double a = 0.147, pi = 3.14159265358979323846;
  const double l = std::log((1 - u) * (1 + u)), b = 2 / (pi * a) + l / 2;
  double y = std::sqrt(std::max(0.0, std::sqrt(b * b - l / a) - b));
  for (int i = 0; i < 2; ++i) {
    const double error = std::erfc(y) - (1 - std::fabs(u));
    const double newton = error * std::exp(y * y) * std::sqrt(pi) / 2;
    y += newton / (1 - y * newton);
  }
  return std::copysign(std::sqrt(2.0) * y, u);
}

// The i-th standard normal under a leaf's key.
double normal(Key leaf_key, uint64_t i, FloatType type) {
  uint32_t x[2] = {static_cast<uint32_t>(i >> 32), static_cast<uint32_t>(i)};
  encrypt(leaf_key, x);
  const bool wide = type == FloatType::kFloat64;
  // Uniform bits after the point, on [-1, 1 - ulp], shifted up to leave out -1.
  const double unit =
      wide ? std::ldexp(static_cast<double>((uint64_t{x[0]} << 32 | x[1]) >> 12), -52)
           : std::ldexp((x[0] ^ x[1]) >> 9, -23);
  const double lowest = wide ? -1 + 0x1p-53 : -1 + 0x1p-24;
  const double u = 2 * unit + lowest;
  return to_normal(wide ? u : static_cast<float>(u));
}

Key step_key(int64_t t) {
  uint32_t x[2] = {0, static_cast<uint32_t>(t)};
  encrypt({2024, 7}, x);
  return {x[0], x[1]};
}

struct Types {
  FloatType grad, noise, ring;
};

// Everything of one leaf, for one number of workers.
struct LeafMemory {
  LeafMemory(int64_t size, int64_t rows, const Types& types)
      : grad(size * bytes_of(types.grad)),
        out(size * bytes_of(types.grad)),
        ring(rows * size * bytes_of(types.ring)),
        before(rows * size * bytes_of(types.ring)) {
    for (int64_t i = 0; i < size; ++i) write_gradient(grad.data(), types.grad, i);
    ring.fill(0);
  }
  bool guards_intact() const {
    return grad.guards_intact() && out.guards_intact() && ring.guards_intact() &&
           before.guards_intact();
  }
  Buffer grad, out, ring;
  Buffer before;  // the ring, where a step may not write to it
};

struct Worst {
  double value = 0;
  int64_t at = 0;
  void update(double error, int64_t i) {
    if (!(error <= value)) value = std::isnan(error) ? HUGE_VAL : error, at = i;
  }
};

// By what a filter turns z into x. All its numbers matter and differ, yet errors do not build up.
struct Definition {
  Filter filter;
  int64_t slots;
  bool by_row = false;  // a recurrence of coefficients that differ from row to row
  int64_t terms = 0;    // of a moving average or a dense row; or the number of buffers
  bool dense = false;   // a row of samples with keys of their own: dense_noise, of one step

  int64_t buffers() const {
    return filter == Filter::kBuffers || filter == Filter::kInverseBuffers ? terms : 0;
  }
  int64_t behind() const { return filter == Filter::kMovingAverage ? terms - 1 : 0; }
  // C[t, t - lag]: sum_l |c_l| < 0.9 c_0.
  double coef(int64_t t, int64_t lag) const {
    const double c_0 = by_row ? 1.25 + 0.125 * (t % 5) : 1.25;
    if (lag == 0) return c_0;
    const double sign = (by_row ? lag + t : lag) % 3 ? 1 : -1;
    return sign * 0.9 * c_0 * (0.5 + 0.5 * lag / (slots + 1)) / slots;
  }
  double weight(int64_t lag) const { return (lag % 3 ? -1.0 : 1.5) / (lag + 1); }
  double decay(int64_t i) const { return 0.9 / (i + 1); }
  double scale(int64_t i) const { return 0.25 / (i + 2); }

  // What the kernel is told at step t.
  jpk::Step step(int64_t t, const std::vector<Key>& keys, double output_scale,
                 bool accurate) const {
    jpk::Step made = jpk::make_step(filter, t, slots, keys.data(), output_scale, accurate);
    std::vector<double> numbers;
    if (filter == Filter::kRecurrence) {
      const int64_t rows = by_row ? std::max<int64_t>(slots, 1) : 1;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t lag = 0; lag <= slots; ++lag) numbers.push_back(coef(t + row, lag));
      }
      jpk::set_recurrence(made, numbers.data(), rows);
    } else if (behind() || terms == 1) {
      for (int64_t lag = terms - 1; lag >= 0; --lag) numbers.push_back(weight(lag));
      jpk::set_moving_average(made, numbers.data(), terms - 1);
    }
    if (buffers()) {
      numbers.clear();
      for (int64_t i = 0; i < terms; ++i) numbers.push_back(decay(i));
      for (int64_t i = 0; i < terms; ++i) numbers.push_back(scale(i));
      jpk::set_buffers(made, numbers.data(), terms);
    }
    return made;
  }

  // What dense_noise is told.
  jpk::Row row(Key key, double output_scale, bool accurate) const {
    jpk::Row made{key, {}, accurate};
    for (int64_t lag = terms - 1; lag >= 0; --lag) {
      made.weights.push_back(output_scale * weight(lag));
    }
    return made;
  }

  // x and the buffers before every step, [steps] and [steps + 1][buffers], from z.
  void apply(const std::vector<double>& z, std::vector<double>& x,
             std::vector<std::vector<double>>& u) const {
    const int64_t steps = static_cast<int64_t>(z.size());
    x.assign(z.size(), 0.0);
    u.assign(z.size() + 1, std::vector<double>(buffers(), 0.0));
    for (int64_t t = 0; t < steps; ++t) {
      if (filter == Filter::kRecurrence) {
        double sum = z[t];
        for (int64_t lag = 1; lag <= std::min(t, slots); ++lag) sum -= coef(t, lag) * x[t - lag];
        x[t] = sum / coef(t, 0);
      } else if (buffers()) {
        double read = 0;
        for (int64_t i = 0; i < terms; ++i) read += scale(i) * u[t][i];
        const bool inverse = filter == Filter::kInverseBuffers;
        x[t] = inverse ? z[t] - read : z[t] + read;
        for (int64_t i = 0; i < terms; ++i) {
          u[t + 1][i] = decay(i) * u[t][i] + (inverse ? x[t] : z[t]);
        }
      } else {
        for (int64_t lag = 0; lag < std::min(t + 1, terms); ++lag) x[t] += weight(lag) * z[t - lag];
      }
    }
  }
};

struct Problem {
  Definition definition;
  bool accurate;
  std::vector<int64_t> sizes;
  std::vector<Types> types;
  std::vector<jpk::Shard> shards{};  // of the leaves; none for whole leaves
};

// The index in the leaf of every element of a shard, counted out.
std::vector<uint64_t> indices(const jpk::Shard& shard, int64_t size) {
  std::vector<uint64_t> found{shard.base};
  for (const jpk::Axis& axis : shard.axes) {
    std::vector<uint64_t> finer;
    for (uint64_t index : found) {
      for (int64_t i = 0; i < axis.count; ++i) finer.push_back(index + i * axis.stride);
    }
    found = finer;
  }
  std::vector<uint64_t> all;
  for (uint64_t index : found) {
    for (int64_t i = 0; i < std::min(shard.run, size); ++i) all.push_back(index + i);
  }
  return all;
}

void run(ThreadPool& pool, const Problem& problem) {
  const Definition& definition = problem.definition;
  const int64_t slots = definition.slots, buffers = definition.buffers(), rows = buffers + slots;
  const int64_t ahead = std::max<int64_t>(slots, 1), behind = definition.behind();
  const bool row = definition.dense;
  const int64_t steps = row ? 1 : 3 * slots + 2;
  const int64_t workers[] = {1, 2, 5, 3};
  const size_t elsewhere = 3;  // one that adds to gradients in place, and to rings elsewhere

  const size_t leaves = problem.sizes.size();
  std::vector<int64_t> first_tile(1, 0);
  for (int64_t size : problem.sizes) {
    first_tile.push_back(first_tile.back() + (size + jpk::kTile - 1) / jpk::kTile);
  }
  std::vector<std::vector<uint64_t>> place(leaves);
  for (size_t l = 0; l < leaves; ++l) {
    const jpk::Shard shard = problem.shards.empty() ? jpk::Shard{} : problem.shards[l];
    place[l] = indices(shard, problem.sizes[l]);
    CHECK(place[l].size() == static_cast<size_t>(problem.sizes[l]), "leaf %zu", l);
  }
  auto phase_of = [&](size_t l, int64_t i) {
    const int64_t tile = place[l][i] / jpk::kTile;
    return slots ? (tile + tile / slots + first_tile[l]) % slots : 0;
  };
  // Positions need not be 0, 1, ..: a step may be asked for some leaves of a tree.
  auto index = [](size_t l) { return static_cast<uint32_t>(3 * l + 1); };

  // x[l][t * size + i], also of the steps that the last ring looks ahead to, and the buffers
  // u[l][(t * buffers + m) * size + i].
  std::vector<std::vector<double>> x(leaves), u(leaves);
  for (size_t l = 0; l < leaves; ++l) {
    const int64_t size = problem.sizes[l], horizon = row ? definition.terms : steps + slots;
    x[l].resize(horizon * size);
    u[l].resize((horizon + 1) * buffers * size);
    std::vector<Key> keys;
    for (int64_t t = 0; t < horizon; ++t) {
      uint32_t key[2] = {0, index(l)};
      encrypt(step_key(row ? 0 : t), key);
      uint32_t folded[2] = {0, static_cast<uint32_t>(t)};
      encrypt({key[0], key[1]}, folded);
      keys.push_back(row ? Key{folded[0], folded[1]} : Key{key[0], key[1]});
    }
    std::vector<double> z(horizon), of_element;
    std::vector<std::vector<double>> of_buffers;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t t = 0; t < horizon; ++t)
        z[t] = normal(keys[t], place[l][i], problem.types[l].noise);
      definition.apply(z, of_element, of_buffers);
      for (int64_t t = 0; t < horizon; ++t) x[l][t * size + i] = of_element[t];
      if (row) x[l][i] = of_element.back();  // all of its samples are there at once
      for (int64_t t = 0; t <= horizon; ++t) {
        for (int64_t m = 0; m < buffers; ++m) u[l][(t * buffers + m) * size + i] = of_buffers[t][m];
      }
    }
  }

  std::vector<Buffer> grads;  // as they must stay
  for (size_t l = 0; l < leaves; ++l) {
    grads.push_back(std::move(LeafMemory(problem.sizes[l], rows, problem.types[l]).grad));
  }
  std::vector<std::vector<LeafMemory>> memory(std::size(workers));  // [workers][leaf]
  for (auto& of_leaves : memory) {
    for (size_t l = 0; l < leaves; ++l) {
      of_leaves.emplace_back(problem.sizes[l], rows, problem.types[l]);
    }
  }

  double largest[2] = {0, 0};  // of float32 and float64 noise
  for (int64_t t = 0; t < steps; ++t) {
    std::vector<Key> keys;
    for (int64_t tau = t - behind; tau < t + ahead; ++tau) keys.push_back(step_key(tau));
    if (row) keys = {step_key(0)};
    const double scale = 1 + 0.25 * (t % 3);
    const jpk::Step step = definition.step(t, keys, scale, problem.accurate);

    // The whole ring is compared at some steps; the slot of x_t at all.
    const bool whole_ring = t <= 1 || t == slots / 2 || t % std::max<int64_t>(slots - 1, 1) == 0;

    for (size_t w = 0; w < memory.size(); ++w) {
      std::vector<jpk::Leaf> list(leaves);
      for (size_t l = 0; l < leaves; ++l) {
        const bool moves = w == elsewhere;
        memory[w][l].out.fill(0xFF);  // a NaN in every type
        if (moves) {
          std::memcpy(memory[w][l].out.data(), memory[w][l].grad.data(), memory[w][l].grad.size());
          std::swap(memory[w][l].ring, memory[w][l].before);
          memory[w][l].ring.fill(0xFF);
        }
        list[l] = {moves ? memory[w][l].out.data() : memory[w][l].grad.data(),
                   memory[w][l].out.data(),
                   rows ? memory[w][l].ring.data() : nullptr,
                   problem.sizes[l],
                   first_tile[l],
                   index(l),
                   problem.types[l].grad,
                   problem.types[l].noise,
                   problem.types[l].ring,
                   problem.shards.empty() ? jpk::Shard{} : problem.shards[l]};
        if (moves && rows) {
          const int64_t row_bytes = problem.sizes[l] * bytes_of(problem.types[l].ring);
          list[l].copy = {memory[w][l].before.data(), rows, row_bytes};
        }
      }
      if (row) {
        const jpk::Row weights = definition.row(keys[0], scale, problem.accurate);
        jpk::dense_noise(pool, workers[w], weights, list);
      } else {
        jpk::correlated_noise(pool, workers[w], step, list);
      }
      for (size_t l = 0; l < leaves; ++l) {
        const LeafMemory& one = memory[w][l];
        CHECK(one.guards_intact(), "slots %d leaf %zu", int(slots), l);
        CHECK(one.grad.same(grads[l]), "slots %d leaf %zu", int(slots), l);
        // How the work is shared out changes nothing, not even the last bit.
        CHECK(one.out.same(memory[0][l].out) && (!whole_ring || one.ring.same(memory[0][l].ring)),
              "slots %d step %d leaf %zu workers %d", int(slots), int(t), l, int(workers[w]));
      }
    }

    for (size_t l = 0; l < leaves; ++l) {
      const int64_t size = problem.sizes[l];
      const Types types = problem.types[l];
      const LeafMemory& one = memory[0][l];
      const bool wide = types.noise == FloatType::kFloat64;
      // Ten times what is measured. Without jax_accurate_erf_inv the tails are as far off as XLA's.
      const double tolerance = (problem.accurate ? (wide ? 2e-14 : 1e-5) : (wide ? 2e-10 : 2e-4));
      Worst out_error, x_error;
      for (int64_t i = 0; i < size; ++i) {
        const double want = gradient(i) + scale * x[l][t * size + i];
        out_error.update(
            std::fabs(read(one.out.data(), types.grad, i) - want) /
                (scale * tolerance + 1.001 * rounding(types.grad) * std::max(std::fabs(want), 1.0)),
            i);
      }
      for (int64_t slot = 0; slot < slots; ++slot) {
        if (!whole_ring && slot != t % slots) continue;
        for (int64_t i = 0; i < size; ++i) {
          // Which term stands here. Warming up: x_slot, or nothing yet. Refreshed last at step r:
          // the one of r .. r + S - 1 that is slot modulo S.
          const int64_t phase = phase_of(l, i);
          const int64_t r = t - (t - phase) % slots;
          const int64_t tau = t < phase ? slot : r + (slot - r % slots + slots) % slots;
          const double want = t < phase && slot > t ? 0 : x[l][tau * size + i];
          x_error.update(
              std::fabs(read(one.ring.data(), types.ring, (buffers + slot) * size + i) - want) /
                  tolerance,
              i);
        }
      }
      for (int64_t m = 0; m < buffers; ++m) {
        for (int64_t i = 0; i < size; ++i) {
          // The buffers stand where the terms made so far end.
          const int64_t phase = phase_of(l, i);
          const int64_t refreshed = t - (slots ? (t - phase) % slots : 0);
          const int64_t made = t < phase ? t + 1 : refreshed + ahead;
          const double want = u[l][(made * buffers + m) * size + i];
          x_error.update(
              std::fabs(read(one.ring.data(), types.ring, m * size + i) - want) / tolerance, i);
        }
      }
      CHECK(out_error.value <= 1,
            "slots %d step %d leaf %zu: element %d of out is %g tolerances off", int(slots), int(t),
            l, int(out_error.at), out_error.value);
      CHECK(x_error.value <= 1,
            "slots %d step %d leaf %zu: element %d of the ring is %g tolerances off", int(slots),
            int(t), l, int(x_error.at), x_error.value);
      largest[wide] = std::max(largest[wide], x_error.value * tolerance);
    }
  }
  if (rows == 0) return;
  std::printf("filter %d, %d slots: x differs by up to %.1e (float32), %.1e (float64)\n",
              int(definition.filter), int(slots), largest[0], largest[1]);
}

// One run from within a tile, also far behind; runs of several tiles, of less than a block, and of
// single elements; axes within axes.
const jpk::Shard kShards[] = {
    {100, 5000, {}},
    {(uint64_t{1} << 32) - 700, 3000, {}},
    {(uint64_t{1} << 40) + 5, 1024, {}},
    {1024, 2048, {{3, 8192}}},
    {300, 1500, {{2, 3000}}},
    {7, 16, {{200, 128}}},
    {(uint64_t{1} << 33) - 50, 100, {{30, 1000}}},
    {3, 1, {{1500, 8}}},
    {11, 5, {{4, 10000}, {3, 100}, {20, 10}}},
};

int64_t size_of(const jpk::Shard& shard) {
  int64_t size = shard.run;
  for (const jpk::Axis& axis : shard.axes) size *= axis.count;
  return size;
}

// Everything is visited once, as its tile has it, in full blocks as far as can be.
void visit(const jpk::Shard& shard, int64_t size, int64_t first_tile, int64_t slots, int64_t t) {
  const std::vector<uint64_t> place = indices(shard, size);
  for (int64_t cut : {int64_t{0}, size / 3, size}) {
    std::vector<int> seen(size, 0);
    for (auto [first, last] : {std::pair{int64_t{0}, cut}, std::pair{cut, size}}) {
      int64_t making[2] = {0, 0}, blocks[2] = {0, 0};
      jpk::Visits visits(shard, first_tile, slots, t, first, last);
      while (const jpk::Visit* visit = visits.next()) {
        int64_t count = 0;
        for (int64_t s = 0; s < visit->spans; ++s) {
          const jpk::Span& span = visit->span[s];
          count += span.count;
          for (int64_t i = 0; i < span.count; ++i) {
            const int64_t at = span.here + i;
            CHECK(at >= first && at < last, "element %d", int(at));
            ++seen[at];
            const int64_t tile = place[at] / jpk::kTile, now = slots ? t % slots : 0;
            const int64_t phase = slots ? (tile + tile / slots + first_tile) % slots : 0;
            const int64_t terms = phase == now ? std::max<int64_t>(slots, 1) : t < phase ? 1 : 0;
            CHECK(visit->terms == terms, "element %d", int(at));
            // An idle span may go on in other tiles and runs.
            CHECK(terms == 0 || span.index + i == place[at], "element %d", int(at));
          }
        }
        CHECK(count == visit->count && count > 0, "count %d", int(count));
        if (visit->terms == 0) continue;
        CHECK(count <= jpk::kBlock, "count %d", int(count));
        const bool one = visit->terms == 1;
        making[one] += count, blocks[one] += 1;
      }
      for (int one = 0; one < 2; ++one) {
        CHECK(blocks[one] == (making[one] + jpk::kBlock - 1) / jpk::kBlock,
              "%d elements, %d blocks", int(making[one]), int(blocks[one]));
      }
    }
    CHECK(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; }), "slots %d",
          int(slots));
  }
}

}  // namespace

int main() {
  constexpr FloatType kGrads[] = {FloatType::kFloat16, FloatType::kBFloat16, FloatType::kFloat32,
                                  FloatType::kFloat64};
  constexpr FloatType kNoises[][2] = {{FloatType::kFloat32, FloatType::kFloat32},
                                      {FloatType::kFloat32, FloatType::kFloat64},
                                      {FloatType::kFloat64, FloatType::kFloat64}};
  std::vector<Types> all_types;
  for (FloatType grad : kGrads) {
    for (auto [noise, ring] : kNoises) all_types.push_back({grad, noise, ring});
  }

  ThreadPool pool(3);
  const Definition definitions[] = {
      {Filter::kRecurrence, 0},
      {Filter::kRecurrence, 1},
      {Filter::kRecurrence, 2},
      {Filter::kRecurrence, 7},
      {Filter::kRecurrence, 31},
      {Filter::kRecurrence, 0, true},
      {Filter::kRecurrence, 1, true},
      {Filter::kRecurrence, 5, true},
      {Filter::kMovingAverage, 0, false, 1},
      {Filter::kMovingAverage, 0, false, 3},
      {Filter::kMovingAverage, 1, false, 2},
      {Filter::kMovingAverage, 3, false, 7},
      {Filter::kMovingAverage, 7, false, 3},
      {Filter::kMovingAverage, 0, false, 1, true},
      {Filter::kMovingAverage, 0, false, 9, true},
      {Filter::kBuffers, 0, false, 1},
      {Filter::kBuffers, 3, false, 4},
      {Filter::kInverseBuffers, 0, false, 3},
      {Filter::kInverseBuffers, 1, false, 2},
      {Filter::kInverseBuffers, 5, false, 2},
  };
  int count = 0;
  for (const Definition& definition : definitions) {
    const int64_t slots = definition.slots, full = slots * jpk::kTile;
    Problem problem{definition, count++ != 2, {}, {}};
    if (slots <= 2) {
      for (const Types& types : all_types) {
        for (int64_t size : {int64_t{0}, int64_t{1}, int64_t{1023}, int64_t{1024}, int64_t{1025},
                             std::max<int64_t>(full - 1, 0), full, full + 1}) {
          problem.sizes.push_back(size);
          problem.types.push_back(types);
        }
      }
    } else {  // every type once, to be done in time
      problem.sizes = {
          1025, full + 1, 3,  0, full - 1, 1023, 1, 2049, std::min<int64_t>(full, 8192),
          1024, 130,      300};
      problem.types = all_types;
    }
    run(pool, problem);
  }
  for (const Definition& definition : definitions) {
    Problem problem{definition, true, {}, {}, {}};
    for (const jpk::Shard& shard : kShards) {
      if (definition.slots > 7 && size_of(shard) > 3000) continue;  // to be done in time
      problem.shards.push_back(shard);
      problem.sizes.push_back(size_of(shard));
      problem.types.push_back(all_types[problem.shards.size() % all_types.size()]);
    }
    run(pool, problem);
  }
  for (int64_t slots : {0, 1, 2, 7, 31}) {
    for (int64_t t : {0, 1, 5, 6, 7, 30, 31, 100}) {
      for (const jpk::Shard& shard : kShards) visit(shard, size_of(shard), 5, slots, t);
      for (int64_t size : {1, 127, 1024, 70000}) visit(jpk::Shard{}, size, 2, slots, t);
    }
  }
  return report();
}
