// Which elements of a leaf are worked on at a step, and in what blocks.
//
// A leaf, in row-major order, is cut into tiles, and tiles take turns in making terms
// (ops/correlated_noise/_schedule.py). What is here of it may be a shard: runs of elements that
// follow each other in the leaf, at any distances from one another. Tiles stay those of the whole
// leaf, so that nothing depends on how it is sharded.
#ifndef JPK_VISITS_H_
#define JPK_VISITS_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "normal.h"

namespace jpk {

inline constexpr int64_t kTile = 1024;
static_assert(kTile % kBlock == 0);

struct Axis {
  int64_t count;
  int64_t stride;  // from one place on the axis to the next, in elements of the leaf
};

// Which elements of a leaf are here: from `base` on, runs, one for each place on the axes.
struct Shard {
  uint64_t base = 0;
  int64_t run = std::numeric_limits<int64_t>::max();  // in elements
  std::vector<Axis> axes;                             // the outermost first

  // The index in the leaf of the first element of a run.
  uint64_t index(int64_t of_run) const {
    uint64_t index = base;
    for (size_t k = axes.size(); k-- > 0;) {
      const int64_t outer = k ? of_run / axes[k].count : 0, place = of_run - outer * axes[k].count;
      index += static_cast<uint64_t>(place) * static_cast<uint64_t>(axes[k].stride);
      of_run = outer;
    }
    return index;
  }

  // A shard is shared out in parts of a tile's size, the tiles themselves if it is one run.
  int64_t shift() const { return axes.empty() ? static_cast<int64_t>(base % kTile) : 0; }
  int64_t parts(int64_t size) const { return size ? (size + shift() + kTile - 1) / kTile : 0; }
  int64_t part(int64_t p, int64_t size) const {  // where it begins
    return std::clamp<int64_t>(p * kTile - shift(), 0, size);
  }
};

// Elements that follow each other, here and in the leaf.
struct Span {
  int64_t here;
  uint64_t index;  // in the leaf
  int64_t count;
};

// Elements to treat alike. If they make terms, they are at most kBlock.
struct Visit {
  int64_t terms;  // that each makes: as many as there are slots, 1, or none
  int64_t count;
  int64_t spans;
  Span span[kBlock];

  void clear(int64_t of_terms) { terms = of_terms, count = spans = 0; }
  void add(const Span& more) { span[spans++] = more, count += more.count; }
};

// The visits to elements [first, last) of a shard at step t. Blocks are full, but for the last of
// each kind: elements that are too few for one wait for others.
class Visits {
 public:
  Visits(const Shard& shard, int64_t first_tile, int64_t slots, int64_t t, int64_t first,
         int64_t last)
      : shard_(shard),
        first_tile_(first_tile),
        slots_(slots),
        t_(t),
        now_(slots ? t % slots : 0),
        last_(last),
        here_(first),
        run_(first / shard.run),
        left_(shard.run - first % shard.run),
        index_(shard.index(run_) + static_cast<uint64_t>(first % shard.run)) {
    whole_.clear(0), ahead_.clear(std::max<int64_t>(slots, 1)), one_.clear(1);
  }

  // Null at the end; else valid until the next call.
  const Visit* next() {
    if (done_) done_->clear(done_->terms), done_ = nullptr;
    for (;;) {
      if (rest_.count == 0 && here_ < last_) take();
      if (rest_.count == 0)
        return ahead_.count ? finish(ahead_) : one_.count ? finish(one_) : nullptr;
      if (rest_terms_ == 0) return idle();
      if (rest_.count >= kBlock) {
        whole_.clear(rest_terms_);
        move(kBlock, whole_);
        return &whole_;
      }
      Visit& waiting = rest_terms_ == ahead_.terms ? ahead_ : one_;
      move(std::min<int64_t>(rest_.count, kBlock - waiting.count), waiting);
      if (waiting.count == kBlock) return finish(waiting);
    }
  }

 private:
  // What comes next, as far as it is of one tile and one run.
  void take() {
    const int64_t tile = static_cast<int64_t>(index_ / kTile);
    const int64_t in_tile = kTile - static_cast<int64_t>(index_ % kTile);
    rest_ = {here_, index_, std::min({last_ - here_, left_, in_tile})};
    here_ += rest_.count, left_ -= rest_.count, index_ += static_cast<uint64_t>(rest_.count);
    if (left_ == 0 && here_ < last_) left_ = shard_.run, index_ = shard_.index(++run_);
    if (tile == tile_) return;
    tile_ = tile;
    const int64_t phase = slots_ ? (tile + tile / slots_ + first_tile_) % slots_ : 0;
    rest_terms_ = phase == now_ ? ahead_.terms : t_ < phase ? 1 : 0;
  }

  void move(int64_t count, Visit& to) {
    to.add({rest_.here, rest_.index, count});
    rest_.here += count, rest_.index += static_cast<uint64_t>(count), rest_.count -= count;
  }

  const Visit* idle() {
    whole_.clear(0);
    Span all = rest_;
    for (rest_.count = 0; here_ < last_ && rest_.count == 0;) {
      take();
      if (rest_terms_ == 0) all.count += rest_.count, rest_.count = 0;
    }
    whole_.add(all);
    return &whole_;
  }

  const Visit* finish(Visit& visit) { return done_ = &visit; }

  const Shard& shard_;
  const int64_t first_tile_, slots_, t_, now_, last_;
  int64_t here_, run_, left_;  // left_ of the run
  uint64_t index_;             // of here_ in the leaf
  int64_t tile_ = -1;          // of what was taken last
  Span rest_{0, 0, 0};
  int64_t rest_terms_ = 0;
  Visit whole_, ahead_, one_;  // the latter two wait
  Visit* done_ = nullptr;
};

}  // namespace jpk

#endif  // JPK_VISITS_H_
