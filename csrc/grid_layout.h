// How the grid algorithm cuts up a problem and lays out a CTA: the same formulas for the plan,
// which needs no GPU, and for the kernels.
#pragma once

#include <stdint.h>

#include "cluster_layout.h"

namespace fused_rnn {

inline constexpr int kGridWarps = 8;

// What is fixed when a kernel is compiled. A block multiplies its rows of a matrix of weights by an
// operand that all blocks of its team have made, for `tiles` times 8 rows of the batch. Forward its
// rows are the gates of its units and the operand is h; backward they are its units and the operand
// is the gate gradients. Every warp has all of the block's rows and a part of K.
struct GridShape {
  int gates, states, saved;  // of the cell
  int element;               // bytes of an element of the weights and of the operand
  bool exact, backward;      // exact: float multiplied as float, not on the tensor cores
  int m_tiles, tiles;

  FUSED_RNN_FN constexpr int columns() const { return 8 * tiles; }
  FUSED_RNN_FN constexpr int tile_rows() const { return exact ? 8 : 16; }
  FUSED_RNN_FN constexpr int rows() const { return m_tiles * tile_rows(); }
  FUSED_RNN_FN constexpr int depth() const { return exact ? 16 : 32 / element; }  // along K
  FUSED_RNN_FN constexpr int rows_of_unit() const { return backward ? 1 : gates; }
  FUSED_RNN_FN constexpr int values_of_unit() const { return backward ? gates : 1; }
  // A word of 64 bits carries so many values and the number of its turn.
  FUSED_RNN_FN constexpr int values_of_word() const { return element == 2 ? 3 : 1; }
  FUSED_RNN_FN constexpr int words(int granule) const {
    return (granule + values_of_word() - 1) / values_of_word();
  }
  // Of a thread: units of rows of the batch whose states it has.
  FUSED_RNN_FN constexpr int items() const {
    const int all = rows() / rows_of_unit() * columns(), threads = 32 * kGridWarps;
    return (all + threads - 1) / threads;
  }
  FUSED_RNN_FN constexpr int sums() const {  // of a lane
    return m_tiles * tiles * (exact ? 8 : 4);
  }
  // Registers of a thread beside the weights: the sums; of each item the states, what is fetched
  // and what is made; and the rest as compiled for sm_80 and later.
  FUSED_RNN_FN constexpr int other_registers() const {
    const int of_item = backward ? saved + 3 * states + gates + 8 : 3 * gates + states + saved + 5;
    const int of_tiles = tiles == 1 ? 0 : backward || items() == 1 ? 26 : 46;
    return sums() + items() * of_item + of_tiles + (backward ? 55 : 66) + 6 * (element - 2) +
           72 * exact;
  }
  // Tiles of K whose weights a warp keeps in registers. They are multiplied in pairs; an odd one
  // waits for registers for the other's, which float has not.
  FUSED_RNN_FN constexpr int held() const {
    const int fit = (kMostRegisters - other_registers()) / (4 * m_tiles);
    if (element == 4) return fit / 2 * 2;
    return backward ? (fit - 1) / 2 * 2 + 1 : fit;  // an even one spilled more often
  }
};

struct GridCut {
  int team, groups;  // blocks that hold the weights together; such teams at a time
  int granule;       // units whose values travel together
  int units;         // of the block with most
  int parts;         // of K, each a warp's
  int part_tiles;    // tiles of K in a part, even
  int chunks;        // of `granule` values, that travel of a row of the batch in a turn
};

// With m_tiles of 0, no kernel is compiled for so many units.
constexpr GridShape grid_shape(int gates, int states, int saved, int element, bool exact,
                               bool backward, int64_t units, int64_t batch_tile) {
  GridShape shape{gates, states, saved, element, exact, backward, 1, int(batch_tile / 8)};
  const int64_t rows = units * shape.rows_of_unit();
  const int most = backward && !exact ? 2 : 4;
  while (shape.m_tiles < most && shape.rows() < rows) shape.m_tiles *= 2;
  // Forward, one tile holds the units of the RNN alone, and two do for it.
  if (!backward && shape.m_tiles == 1) shape.m_tiles = 2;
  if (shape.rows() < rows) shape.m_tiles = 0;
  return shape;
}

constexpr GridCut grid_cut(GridShape shape, int64_t H, int64_t team, int64_t groups,
                           int64_t granule) {
  GridCut cut{};
  cut.team = int(team);
  cut.groups = int(groups);
  cut.granule = int(granule);
  cut.units = int(most_units(H, granule, team));
  cut.chunks = int((H + granule - 1) / granule) * shape.values_of_unit();
  const int K = cut.chunks * cut.granule, pair = 2 * shape.depth();
  const int pairs = (K + pair - 1) / pair;
  cut.parts = pairs < kGridWarps ? pairs : kGridWarps;
  cut.part_tiles = (pairs + cut.parts - 1) / cut.parts * 2;
  cut.parts = (2 * pairs + cut.part_tiles - 1) / cut.part_tiles;  // the last ones may be left out
  return cut;
}

// Where things stand in shared memory, in bytes from its start; the operand first.
struct GridShared {
  int64_t stride;   // elements from row to row of the operand
  int64_t weights;  // those that registers do not hold
  int64_t sums;     // of every part of K
  int64_t bytes;

  FUSED_RNN_FN constexpr GridShared(GridShape shape, GridCut cut)
      // 16 bytes more than a multiple of 32: ldmatrix finds 8 rows in different banks.
      : stride(int64_t(cut.parts) * cut.part_tiles * shape.depth() + 16 / shape.element),
        weights(shape.columns() * stride * shape.element),
        sums(weights + weight_bytes(shape, cut.parts, cut.part_tiles)),
        bytes(sums + int64_t(cut.parts) * shape.rows() * shape.columns() * 4) {}

  FUSED_RNN_FN static constexpr int64_t weight_bytes(GridShape shape, int warps, int part_tiles) {
    const int left = part_tiles > shape.held() ? part_tiles - shape.held() : 0;
    return int64_t(warps) * left * shape.m_tiles * 32 * 16;
  }
};

// Words that a launch exchanges through: two slots for each group.
FUSED_RNN_FN constexpr int64_t grid_words(GridShape shape, GridCut cut) {
  return int64_t(2) * cut.groups * shape.columns() * cut.chunks * shape.words(cut.granule);
}

}  // namespace fused_rnn
