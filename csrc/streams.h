// Where samples get their bits: a stream gives every element a uniform number under every key of
// its leaf. One for each type of keys, which all have
//
//   Key, split(), fold_in()      as jax.random has them for keys of the type
//   Stream(keys, count)          the keys that the samples of a leaf have
//   begin(visit)                 the elements that are asked for, up to kBlock
//   uniforms(j, u)               u[i] of element i under keys[j]; what is past the end is arbitrary
#ifndef JPK_STREAMS_H_
#define JPK_STREAMS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "chacha20.h"
#include "normal.h"
#include "simd.h"
#include "threefry.h"
#include "visits.h"

namespace jpk {

// threefry2x32 with jax_threefry_partitionable: the bits of an element are its encrypted index.
template <typename Z>
class ThreefryStream {
 public:
  using Key = jpk::Key;
  static Key split(const Key& key, uint32_t i) { return jpk::split(key, i); }
  static Key fold_in(const Key& key, uint32_t i) { return jpk::split(key, i); }

  JPK_INLINE ThreefryStream(const Key* keys, int64_t) : keys_(keys) {}

  JPK_INLINE void begin(const Visit& visit) {
    uint32_t *h = hi_, *l = lo_;
    for (int64_t s = 0; s < visit.spans; ++s) {
      const Span& span = visit.span[s];
      const uint32_t high = static_cast<uint32_t>(span.index >> 32);
      const uint32_t low = static_cast<uint32_t>(span.index);
      for (int64_t i = 0; i < span.count; ++i) {
        l[i] = low + static_cast<uint32_t>(i);
        h[i] = high + (l[i] < low);
      }
      h += span.count, l += span.count;
    }
    std::fill(h, hi_ + kBlock, 0u), std::fill(l, lo_ + kBlock, 0u);
  }

  JPK_INLINE void uniforms(int64_t j, Z* __restrict u) { uniform_block(keys_[j], hi_, lo_, u); }

 private:
  const Key* keys_;
  uint32_t hi_[kBlock], lo_[kBlock];
};

// chacha20: see chacha20::Layout. Blocks are computed kLanes at a time. A group of 64 bits fills
// them; of 32 bits, one group of two keys does, and two groups of the last of an odd number of
// keys.
template <typename Z>
class ChaCha20Stream {
 public:
  using Key = chacha20::Key;
  static Key split(const Key& key, uint32_t i) {
    return chacha20::child(key, chacha20::Domain::kSplit, i);
  }
  static Key fold_in(const Key& key, uint32_t i) {
    return chacha20::child(key, chacha20::Domain::kFoldIn, i);
  }

  JPK_INLINE ChaCha20Stream(const Key* keys, int64_t count) : keys_(keys), count_(count) {
    in_.set_domain(kWide ? chacha20::Domain::kBits64 : chacha20::Domain::kBits32);
    in_.set_blocks(0);
  }

  JPK_INLINE void begin(const Visit& visit) {
    const Span& span = visit.span[0];
    whole_ = visit.spans == 1 && span.index % Layout::kGroup == 0;
    if (!whole_) return list(visit);
    group_ = span.index / Layout::kGroup;
    of_two_keys_.made = kNone;
  }

  JPK_INLINE void uniforms(int64_t j, Z* __restrict u) {
    if (!whole_) return listed(keys_[j], u);
    if constexpr (kWide) {
      in_.set_key(keys_[j]), in_.set_blocks(Layout::first_block(group_));
      chacha20::all_blocks(in_, of_two_keys_.words);
      const uint32_t *low = of_two_keys_.words[0], *high = of_two_keys_.words[8];
      for (int i = 0; i < kBlock; ++i) {
        u[i] = Gaussian<Z>::uniform(static_cast<uint64_t>(high[i]) << 32 | low[i]);
      }
    } else {
      const bool alone = j == count_ - 1 && count_ % 2;
      const uint64_t at = alone ? group_ : static_cast<uint64_t>(j);
      Two& two = alone ? of_two_groups_ : of_two_keys_;
      if (two.made != at / 2) alone ? make_two_groups() : make_two_keys(j / 2);
      uint32_t bits[kBlock];
      for (int w = 0; w < chacha20::kWords; ++w) {
        std::memcpy(bits + w * kHalf, two.words[w] + at % 2 * kHalf, kHalf * sizeof(uint32_t));
      }
      for (int i = 0; i < kBlock; ++i) u[i] = Gaussian<Z>::uniform(bits[i]);
    }
  }

 private:
  static constexpr bool kWide = std::is_same_v<Z, double>;
  using Layout = chacha20::Layout<kWide ? 64 : 32>;
  static_assert(Layout::kGroup == kBlock);
  static constexpr int kHalf = chacha20::kLanes / 2;
  static constexpr uint64_t kNone = ~uint64_t{0};

  // Blocks of two halves, and which pair of groups or of keys they are of.
  struct Two {
    uint32_t words[chacha20::kWords][chacha20::kLanes];
    uint64_t made = kNone;
  };

  // The group of this visit and its neighbour, which the visit before or after this one may need.
  JPK_INLINE void make_two_groups() {
    in_.set_key(keys_[count_ - 1]), in_.set_blocks(Layout::first_block(group_ & ~uint64_t{1}));
    chacha20::all_blocks(in_, of_two_groups_.words);
    of_two_groups_.made = group_ / 2;
  }

  JPK_INLINE void make_two_keys(int64_t pair) {
    in_.set_key(keys_[2 * pair], 0, kHalf);
    in_.set_key(keys_[2 * pair + 1], kHalf, chacha20::kLanes);
    in_.set_blocks(Layout::first_block(group_), 0, kHalf);
    in_.set_blocks(Layout::first_block(group_), kHalf, chacha20::kLanes);
    chacha20::all_blocks(in_, of_two_keys_.words);
    of_two_keys_.made = static_cast<uint64_t>(pair);
  }

  // Elements of several groups: the blocks that they need, and where in them each has its bits.
  void list(const Visit& visit) {
    blocks_ = 0;
    int i = 0;
    uint64_t group = kNone;
    int8_t known[Layout::kBlocks];  // the place among the listed blocks, or -1
    for (int64_t s = 0; s < visit.spans; ++s) {
      for (int64_t k = 0; k < visit.span[s].count; ++k) {
        const uint64_t element = visit.span[s].index + static_cast<uint64_t>(k);
        if (element / Layout::kGroup != group) {
          group = element / Layout::kGroup;
          std::fill(known, known + Layout::kBlocks, int8_t{-1});
        }
        int8_t& place = known[element % Layout::kBlocks];
        if (place < 0)
          place = static_cast<int8_t>(blocks_), block_[blocks_++] = Layout::block(element);
        at_[i++] = static_cast<int16_t>(place / chacha20::kLanes * kChunk +
                                        Layout::word(element) * chacha20::kLanes +
                                        place % chacha20::kLanes);
      }
    }
    std::fill(at_ + i, at_ + kBlock, int16_t{0});
  }

  void listed(const Key& key, Z* __restrict u) {
    uint32_t words[kBlock / chacha20::kLanes][chacha20::kWords][chacha20::kLanes];
    in_.set_key(key);
    for (int first = 0; first < blocks_; first += chacha20::kLanes) {
      const int count = std::min(blocks_ - first, chacha20::kLanes);
      for (int l = 0; l < count; ++l) in_.set_blocks(block_[first + l], l, l + 1);
      chacha20::all_blocks(in_, words[first / chacha20::kLanes]);
    }
    const uint32_t* all = words[0][0];
    for (int i = 0; i < kBlock; ++i) {
      if constexpr (kWide) {
        const uint64_t high = all[at_[i] + 8 * chacha20::kLanes];
        u[i] = Gaussian<Z>::uniform(high << 32 | all[at_[i]]);
      } else {
        u[i] = Gaussian<Z>::uniform(all[at_[i]]);
      }
    }
  }

  static constexpr int kChunk = chacha20::kWords * chacha20::kLanes;

  const Key* keys_;
  const int64_t count_;
  chacha20::Input in_;
  Two of_two_keys_, of_two_groups_;
  bool whole_ = false;
  uint64_t group_ = 0;
  int blocks_ = 0;
  uint64_t block_[kBlock];
  int16_t at_[kBlock];  // among the words of the listed blocks
};

}  // namespace jpk

#endif  // JPK_STREAMS_H_
