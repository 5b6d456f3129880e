// The block function of ChaCha20 (RFC 8439, section 2.3), and where the bits of an element stand in
// its blocks.
//
// Words 4..11 of a block's input are the key. Word 12 and word 14 are the low and the high half of
// a block number of 64 bits, word 13 is the domain, which says what the block is for, and word 15
// counts within the domain. ops/_chacha20.py has the table; no two uses share a key and all four.
#ifndef JPK_CHACHA20_H_
#define JPK_CHACHA20_H_

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace jpk::chacha20 {

struct Key {
  uint32_t words[8];
};

// What blocks are for: Domain of ops/_chacha20.py.
enum class Domain : uint32_t {
  kSeed = 1,
  kSplit = 2,
  kFoldIn = 3,
  kBits32 = 32,
  kBits64 = 64,
  kGrid = 256,
  kGridExtension = 257,
};

inline constexpr int kWords = 16;  // of a block
inline constexpr int kLanes = 16;  // blocks that are computed at once

// Words 4..15 of the inputs of kLanes blocks, lane by lane.
struct Input {
  uint32_t key[8][kLanes];
  uint32_t nonce[4][kLanes];

  JPK_INLINE void set_key(const Key& of, int begin = 0, int end = kLanes) {
    for (int w = 0; w < 8; ++w) {
      for (int l = begin; l < end; ++l) key[w][l] = of.words[w];
    }
  }

  JPK_INLINE void set_domain(Domain domain, uint32_t count = 0) {
    for (int l = 0; l < kLanes; ++l) {
      nonce[1][l] = static_cast<uint32_t>(domain);
      nonce[3][l] = count;
    }
  }

  // Lanes begin .. end - 1 are blocks first, first + 1, ..; their low halves do not overflow.
  JPK_INLINE void set_blocks(uint64_t first, int begin = 0, int end = kLanes) {
    const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
    for (int l = begin; l < end; ++l) {
      nonce[0][l] = low + static_cast<uint32_t>(l - begin);
      nonce[2][l] = high;
    }
  }
};

JPK_INLINE uint32_t rotate_left(uint32_t x, int d) { return (x << d) | (x >> (32 - d)); }

JPK_INLINE void quarter_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  a += b, d = rotate_left(d ^ a, 16);
  c += d, b = rotate_left(b ^ c, 12);
  a += b, d = rotate_left(d ^ a, 8);
  c += d, b = rotate_left(b ^ c, 7);
}

// Words of each block, [kWords][kLanes]. Only the first Lanes of the blocks are computed.
template <int Lanes = kLanes>
JPK_INLINE void blocks(const Input& in, uint32_t (*words)[kLanes]) {
  uint32_t out[kWords][kLanes];  // nothing else points there, as the loop needs to vectorize
  const uint32_t c0 = 0x61707865u, c1 = 0x3320646Eu, c2 = 0x79622D32u, c3 = 0x6B206574u;
  for (int l = 0; l < Lanes; ++l) {
    uint32_t x0 = c0, x1 = c1, x2 = c2, x3 = c3;
    uint32_t x4 = in.key[0][l], x5 = in.key[1][l], x6 = in.key[2][l], x7 = in.key[3][l];
    uint32_t x8 = in.key[4][l], x9 = in.key[5][l], x10 = in.key[6][l], x11 = in.key[7][l];
    uint32_t x12 = in.nonce[0][l], x13 = in.nonce[1][l], x14 = in.nonce[2][l], x15 = in.nonce[3][l];
    // Inlined whatever else is in the file: a call would keep the loop from vectorizing.
    auto two_rounds = [&]() __attribute__((always_inline)) {
      quarter_round(x0, x4, x8, x12), quarter_round(x1, x5, x9, x13);
      quarter_round(x2, x6, x10, x14), quarter_round(x3, x7, x11, x15);
      quarter_round(x0, x5, x10, x15), quarter_round(x1, x6, x11, x12);
      quarter_round(x2, x7, x8, x13), quarter_round(x3, x4, x9, x14);
    };
    // Not a loop: one inside of the loop over lanes would keep that from vectorizing.
    two_rounds(), two_rounds(), two_rounds(), two_rounds(), two_rounds();
    two_rounds(), two_rounds(), two_rounds(), two_rounds(), two_rounds();
    out[0][l] = x0 + c0, out[1][l] = x1 + c1, out[2][l] = x2 + c2, out[3][l] = x3 + c3;
    out[4][l] = x4 + in.key[0][l], out[5][l] = x5 + in.key[1][l];
    out[6][l] = x6 + in.key[2][l], out[7][l] = x7 + in.key[3][l];
    out[8][l] = x8 + in.key[4][l], out[9][l] = x9 + in.key[5][l];
    out[10][l] = x10 + in.key[6][l], out[11][l] = x11 + in.key[7][l];
    out[12][l] = x12 + in.nonce[0][l], out[13][l] = x13 + in.nonce[1][l];
    out[14][l] = x14 + in.nonce[2][l], out[15][l] = x15 + in.nonce[3][l];
  }
  std::memcpy(words, out, sizeof out);
}

// A function of its own: its thousand instructions vectorize for themselves, once for all callers.
JPK_TARGET_CLONES static void all_blocks(const Input& in, uint32_t (*out)[kLanes]) {
  blocks<kLanes>(in, out);
}

// Elements are taken in groups of 128, whose bits fill Bits / 4 blocks: 8 blocks for 32 bits, 16
// for 64. Neighbours stand in neighbouring blocks, at the same word, so that lanes of blocks give
// bits in the order of elements. The high word of 64 bits is 8 words after the low one.
template <int Bits>
struct Layout {
  static constexpr int kGroup = 128;
  static constexpr int kBlocks = Bits / 4;  // of a group
  static uint64_t first_block(uint64_t group) { return group * kBlocks; }
  static uint64_t block(uint64_t element) {
    return first_block(element / kGroup) + element % kBlocks;
  }
  static int word(uint64_t element) { return static_cast<int>(element % kGroup / kBlocks); }
};

// Child number i of a key in a domain, kSplit or kFoldIn: words 0..7 of block i.
JPK_INLINE Key child(const Key& key, Domain domain, uint64_t i) {
  Input in;
  in.set_key(key, 0, 1), in.set_domain(domain), in.set_blocks(i, 0, 1);
  uint32_t words[kWords][kLanes];
  blocks<1>(in, words);
  Key found;
  for (int w = 0; w < 8; ++w) found.words[w] = words[w][0];
  return found;
}

}  // namespace jpk::chacha20

#endif  // JPK_CHACHA20_H_
