// The block function against the vectors of RFC 8439, and the stream of uniform numbers against
// its layout (docs/security.md), one element at a time, wherever elements stand.
#include "chacha20.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "streams.h"
#include "visits.h"

namespace {

using jpk::chacha20::Key;

uint32_t rotate(uint32_t x, int by) { return x << by | x >> (32 - by); }

// Section 2.3 of the RFC, in words: key 4..11, then the four that say which block.
void define(const Key& key, const uint32_t nonce[4], uint32_t out[16]) {
  uint32_t in[16], x[16];
  std::memcpy(in, "expand 32-byte k", 16);  // as on machines with the lowest byte first
  for (int i = 0; i < 8; ++i) in[4 + i] = key.words[i];
  for (int i = 0; i < 4; ++i) in[12 + i] = nonce[i];
  std::copy(in, in + 16, x);
  for (int round = 0; round < 20; ++round) {
    const int shift = round % 2;  // to the diagonals
    for (int i = 0; i < 4; ++i) {
      uint32_t &a = x[i], &b = x[4 + (i + shift) % 4], &c = x[8 + (i + 2 * shift) % 4],
               &d = x[12 + (i + 3 * shift) % 4];
      for (int half = 0; half < 2; ++half) {
        a += b, d = rotate(d ^ a, half ? 8 : 16);
        c += d, b = rotate(b ^ c, half ? 7 : 12);
      }
    }
  }
  for (int i = 0; i < 16; ++i) out[i] = x[i] + in[i];
}

struct Vector {
  uint8_t key[32];
  uint32_t nonce[4];
  uint32_t block[16];
};

// Section 2.3.2, then appendix A.1.
const Vector kVectors[] = {
    {{0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
      16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31},
     {1, 0x09000000, 0x4a000000, 0},
     {0xe4e7f110, 0x15593bd1, 0x1fdd0f50, 0xc47120a3, 0xc7f4d1c7, 0x0368c033, 0x9aaa2204,
      0x4e6cd4c3, 0x466482d2, 0x09aa9f07, 0x05d7c214, 0xa2028bd9, 0xd19c12b5, 0xb94e16de,
      0xe883d0cb, 0x4e3c50a2}},
    {{0},
     {0, 0, 0, 0},
     {0xade0b876, 0x903df1a0, 0xe56a5d40, 0x28bd8653, 0xb819d2bd, 0x1aed8da0, 0xccef36a8,
      0xc70d778b, 0x7c5941da, 0x8d485751, 0x3fe02477, 0x374ad8b8, 0xf4b8436a, 0x1ca11815,
      0x69b687c3, 0x8665eeb2}},
    {{0},
     {1, 0, 0, 0},
     {0xbee7079f, 0x7a385155, 0x7c97ba98, 0x0d082d73, 0xa0290fcb, 0x6965e348, 0x3e53c612,
      0xed7aee32, 0x7621b729, 0x434ee69c, 0xb03371d5, 0xd539d874, 0x281fed31, 0x45fb0a51,
      0x1f0ae1ac, 0x6f4d794b}},
    {{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
      0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
     {1, 0, 0, 0},
     {0x2452eb3a, 0x9249f8ec, 0x8d829d9b, 0xddd4ceb1, 0xe8252083, 0x60818b01, 0xf38422b8,
      0x5aaa49c9, 0xbb00ca8e, 0xda3ba7b4, 0xc4b592d1, 0xfdf2732f, 0x4436274e, 0x2561b3c8,
      0xebdd4aa6, 0xa0136c00}},
    {{0, 0xff},
     {2, 0, 0, 0},
     {0xfb4dd572, 0x4bc42ef1, 0xdf922636, 0x327f1394, 0xa78dea8f, 0x5e269039, 0xa1bebbc1,
      0xcaf09aae, 0xa25ab213, 0x48a6b46c, 0x1b9d9bcb, 0x092c5be6, 0x546ca624, 0x1bec45d5,
      0x87f47473, 0x96f0992e}},
    {{0},
     {0, 0, 0, 0x02000000},
     {0x374dc6c2, 0x3736d58c, 0xb904e24a, 0xcd3f93ef, 0x88228b1a, 0x96a4dfb3, 0x5b76ab72,
      0xc727ee54, 0x0e0e978a, 0xf3145c95, 0x1b748ea8, 0xf786c297, 0x99c28f5f, 0x628314e8,
      0x398a19fa, 0x6ded1b53}},
};

void vectors() {
  for (const Vector& vector : kVectors) {
    Key key;
    std::memcpy(key.words, vector.key, sizeof key.words);
    uint32_t defined[16], words[16][jpk::chacha20::kLanes];
    define(key, vector.nonce, defined);
    jpk::chacha20::Input in;
    in.set_key(key);
    for (int i = 0; i < 4; ++i) {
      std::fill(in.nonce[i], in.nonce[i] + jpk::chacha20::kLanes, vector.nonce[i]);
    }
    jpk::chacha20::all_blocks(in, words);
    for (int w = 0; w < 16; ++w) {
      CHECK(defined[w] == vector.block[w], "word %d", w);
      for (uint32_t word : words[w]) CHECK(word == vector.block[w], "word %d", w);
    }
  }
}

Key some_key(uint32_t seed) {
  Key key;
  for (uint32_t i = 0; i < 8; ++i) key.words[i] = (seed + 1) * 0x9E3779B9u * (i + 1);
  return key;
}

// Splits and folds are words 0..7 of the block of that number, in domains of their own.
void children() {
  const Key key = some_key(1);
  for (uint32_t i : {0u, 1u, 77u, 0xFFFFFFFFu}) {
    uint32_t split[16], folded[16];
    const uint32_t of_split[4] = {i, 2, 0, 0}, of_fold[4] = {i, 3, 0, 0};
    define(key, of_split, split), define(key, of_fold, folded);
    const Key child = jpk::ChaCha20Stream<float>::split(key, i);
    const Key fold = jpk::ChaCha20Stream<float>::fold_in(key, i);
    CHECK(!std::memcmp(child.words, split, sizeof child.words), "split %u", i);
    CHECK(!std::memcmp(fold.words, folded, sizeof fold.words), "fold %u", i);
  }
}

template <typename Z>
Z uniform(const Key& key, uint64_t element) {
  constexpr bool wide = sizeof(Z) == 8;
  const uint64_t lanes = wide ? 16 : 8, place = element % 128;
  const uint64_t number = element / 128 * lanes + place % lanes;
  const uint32_t nonce[4] = {static_cast<uint32_t>(number), wide ? 64u : 32u,
                             static_cast<uint32_t>(number >> 32), 0};
  uint32_t words[16];
  define(key, nonce, words);
  const uint32_t low = words[place / lanes];
  if constexpr (wide) {
    const uint64_t high = words[place / lanes + 8];
    return jpk::Gaussian<Z>::uniform(high << 32 | low);
  } else {
    return jpk::Gaussian<Z>::uniform(low);
  }
}

template <typename Z>
void shard(const jpk::Shard& shard, int64_t size, int64_t slots, int64_t t, int count) {
  std::vector<Key> keys;
  for (int j = 0; j < count; ++j) keys.push_back(some_key(static_cast<uint32_t>(j)));
  jpk::ChaCha20Stream<Z> stream(keys.data(), count);
  jpk::Visits visits(shard, 3, slots, t, 0, size);
  while (const jpk::Visit* visit = visits.next()) {
    if (visit->terms == 0) continue;
    stream.begin(*visit);
    // In any order, and more than once.
    for (int k = 0; k < count + 2; ++k) {
      const int j = k < count ? k : (k * 5 + 1) % count;
      Z u[jpk::kBlock];
      stream.uniforms(j, u);
      int i = 0;
      for (int64_t s = 0; s < visit->spans; ++s) {
        for (int64_t n = 0; n < visit->span[s].count; ++n, ++i) {
          const uint64_t element = visit->span[s].index + static_cast<uint64_t>(n);
          CHECK(u[i] == uniform<Z>(keys[j], element), "element %ld of key %d",
                static_cast<long>(element), j);
        }
      }
    }
  }
}

}  // namespace

int main() {
  vectors();
  children();
  struct Place {
    jpk::Shard shard;
    int64_t size;
  };
  const Place places[] = {
      {{}, 5000},
      {{}, 130},
      {{128, 700, {}}, 700},
      {{100, 3000, {}}, 3000},
      {{(uint64_t{1} << 32) - 700, 2000, {}}, 2000},
      {{(uint64_t{1} << 36) - 128, 1024, {}}, 1024},  // a carry into the high half of the number
      {{(uint64_t{1} << 40) + 5, 1024, {}}, 1024},
      {{7, 16, {{60, 128}}}, 960},
      {{3, 1, {{700, 8}}}, 700},
      {{(uint64_t{1} << 33) - 50, 100, {{10, 1000}}}, 1000},
  };
  for (const Place& place : places) {
    for (int count : {1, 2, 3}) {
      for (int64_t slots : {0, 2}) {
        for (int64_t t : {0, 1}) {
          shard<float>(place.shard, place.size, slots, t, count);
          shard<double>(place.shard, place.size, slots, t, count);
        }
      }
    }
  }
  return report();
}
