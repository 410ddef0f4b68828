// The gradient of a weight: the sum over slots of one row of gate gradients times one row of what
// the weight was multiplied with. It grows block by block: one chain of multiply-adds over all
// slots would lose digits. The blocks are the same whatever the chunks and threads.
#pragma once

#include "gemm.h"

namespace FUSED_RNN_NAMESPACE {

// Gate gradients of a chunk as the sums read them: blocks of kWidth units, each [slots][kWidth].
template <class A>
struct Blocks {
  static constexpr int64_t kWidth = Vec<A>::kWidth;
  A* data;
  int64_t distance;  // from block to block

  Blocks(int64_t blocks, int64_t slots, Arena& arena)
      : data(nullptr), distance(row_distance<A>(slots * kWidth)) {
    data = arena.take<A>(blocks * distance);
  }
  A* at(int64_t block, int64_t slot = 0) const { return data + block * distance + slot * kWidth; }
};

// Of a weight [rows.count() units of each gate, columns].
template <class A>
class WeightGradient {
  static constexpr int64_t kWidth = Vec<A>::kWidth;

  int64_t gates_, units_, columns_, capacity_;
  int64_t split_from_, split_to_;  // gate split_from_ of the weight is gate split_to_ of the blocks
  A* sums_ = nullptr;              // [panels][row blocks][kWidth][vectors * kWidth]
  A* factors_ = nullptr;           // [panels][slots][vectors * kWidth]

 public:
  // gates = 0: nobody asks for it.
  WeightGradient(int64_t gates, int64_t units, int64_t columns, int64_t capacity, Arena& arena,
                 int64_t split_from = -1, int64_t split_to = -1)
      : gates_(gates),
        units_(units),
        columns_(columns),
        capacity_(capacity),
        split_from_(split_from),
        split_to_(split_to) {
    const int64_t width = gates > 0 ? padded<A>(columns) : 0;
    sums_ = arena.take<A>(row_blocks() * kWidth * width);
    factors_ = arena.take<A>(capacity * width);
  }

  int64_t panels() const { return gates_ ? (column_blocks() + kMaxVectors - 1) / kMaxVectors : 0; }
  int64_t row_blocks() const { return gates_ * ((units_ + kWidth - 1) / kWidth); }

  void clear() {
    if (gates_) memset(sums_, 0, sizeof(A) * size_t(row_blocks() * kWidth * padded<A>(columns_)));
  }

  // Packs a panel of `count` factors: load(slot, column, lanes) is a vector of one.
  template <class Load>
  void pack(int64_t panel, int64_t count, const Load& load) {
    const int vectors = vectors_of(panel);
    A* to = factors_ + first_block(panel) * kWidth * capacity_;
    for (int64_t slot = 0; slot < count; ++slot)
      for (int v = 0; v < vectors; ++v, to += kWidth) {
        const int64_t column = (first_block(panel) + v) * kWidth;
        load(slot, column, columns_ - column).store(to);
      }
  }

  // Adds slots [begin, end) to the part'th of `parts` parts of the rows. The factors of all panels
  // are read again for each block, which should find them in L2, the block itself in L1. The sums
  // are far away: each tile asks for its own before it begins.
  void add(const Blocks<A>& blocks, int64_t begin, int64_t end, int64_t part, int64_t parts) {
    const int64_t last = row_blocks() * (part + 1) / parts;
    for (int64_t block = row_blocks() * part / parts; block < last; ++block) {
      const A* gradients = blocks.at(source(block), begin);
      for (int64_t i = 0; i < panels(); ++i) {
        const int64_t panel = block & 1 ? panels() - 1 - i : i;  // there and back, as in_sweep
        const int vectors = vectors_of(panel);
        const int64_t stride = vectors * kWidth;
        const A* factors = factors_ + first_block(panel) * kWidth * capacity_ + begin * stride;
        A* sums = panel_sums(panel) + block * kWidth * stride;
        for_each_tile(kWidth, vectors, [&](int64_t first, int rows) {
          const A* x[kMaxRows];
          for (int n = 0; n < rows; ++n) x[n] = gradients + first + n;
          A* to = sums + first * stride;
          for (int n = 0; n < rows; ++n)
            for (int v = 0; v < vectors; ++v) __builtin_prefetch(to + n * stride + v * kWidth, 1);
          find_tile<A, kWidth>(vectors, rows)(factors, {to, stride}, x, end - begin, {to, stride});
        });
      }
    }
  }

  template <class T>
  void store(int64_t panel, T* to) const {
    const int vectors = vectors_of(panel);
    const A* sums = panel_sums(panel);
    const int64_t blocks = row_blocks() / gates_;
    for (int64_t gate = 0; gate < gates_; ++gate)
      for (int64_t unit = 0; unit < units_; ++unit) {
        const A* from = sums + (gate * blocks * kWidth + unit) * vectors * kWidth;
        for (int v = 0; v < vectors; ++v) {
          const int64_t column = (first_block(panel) + v) * kWidth;
          Vec<A>::load(from + v * kWidth)
              .store(to + (gate * units_ + unit) * columns_ + column, columns_ - column);
        }
      }
  }

 private:
  int64_t column_blocks() const { return (columns_ + kWidth - 1) / kWidth; }
  A* panel_sums(int64_t panel) const {
    return sums_ + first_block(panel) * kWidth * row_blocks() * kWidth;
  }
  static int64_t first_block(int64_t panel) { return panel * kMaxVectors; }
  int vectors_of(int64_t panel) const {
    const int64_t left = column_blocks() - first_block(panel);
    return int(left < kMaxVectors ? left : kMaxVectors);
  }
  // The block of gate gradients that belongs to a block of the weight's rows.
  int64_t source(int64_t block) const {
    const int64_t blocks = row_blocks() / gates_, gate = block / blocks;
    return gate == split_from_ ? split_to_ * blocks + block % blocks : block;
  }
};

}  // namespace FUSED_RNN_NAMESPACE
