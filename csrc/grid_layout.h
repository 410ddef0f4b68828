// How the grid algorithm cuts up a problem and lays out a CTA: the same formulas for the plan,
// which needs no GPU, and for the kernels.
#pragma once

#include <stdint.h>

#include "cluster_layout.h"

namespace fused_rnn {

inline constexpr int kGridWarps = 8;
inline constexpr int kMostOfLine = 8;

// What is fixed when a kernel is compiled. A block multiplies its rows of a matrix of weights by an
// operand that blocks of its team have made, for `tiles` times 8 rows of the batch. Forward its
// rows are the gates of its units, the operand is h, all of it. Backward the blocks of a team stand
// in lines: a line's blocks have the same rows, the units of all of them, and each has the gate
// gradients of another part of all units for an operand. Every warp has all of the block's rows and
// a part of the operand's K.
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
  // Units that a block owns at most.
  FUSED_RNN_FN constexpr int most_units() const { return backward ? 32 : rows() / gates; }
  // Of a thread: units of rows of the batch whose states it has.
  FUSED_RNN_FN constexpr int items() const {
    const int all = most_units() * columns(), threads = 32 * kGridWarps;
    return (all + threads - 1) / threads;
  }
  FUSED_RNN_FN constexpr int sums() const {  // of a lane
    return m_tiles * tiles * (exact ? 8 : 4);
  }
  // Registers of a thread beside the weights: the sums; of each item the states, what is fetched
  // and what is made; and the rest as compiled for sm_80 and later. Forward, two row tiles of 8
  // columns leave the most room for weights, and spilled where that was counted to the last.
  FUSED_RNN_FN constexpr int other_registers() const {
    const int of_item = backward ? saved + 3 * states + gates + 8 : 3 * gates + states + saved + 5;
    const int of_tiles = tiles == 1 ? 0 : backward ? 34 : items() == 1 ? 26 : 58;
    return sums() + items() * of_item + of_tiles +
           (backward && !exact ? 84 + 8 * (gates == 3) : 70) + 6 * (element - 2) + 72 * exact +
           8 * (!backward && tiles == 1 && m_tiles == 2);
  }
  // Tiles of K whose weights a warp keeps in registers. They are multiplied in pairs; an odd one
  // waits for registers for the other's, which float has not.
  FUSED_RNN_FN constexpr int held() const {
    const int fit = held_tiles(other_registers(), m_tiles);
    return element == 4 ? fit / 2 * 2 : fit;
  }
};

struct GridCut {
  int team, groups;  // blocks that hold the weights together; such teams at a time
  int line;          // blocks of a team with the same rows, each with its part of the units' gates
  bool overlaid;     // the sums stand where the operand stood: less shared memory, more barriers
  int granule;       // units whose values travel together
  int units;         // of the block with most
  int tiles;         // of a block's K, even
  int parts;         // of these, each a warp's
  int part_tiles;    // of a part, even; the last one may have fewer
  int chunks;        // of `granule` values, that a block receives of a row in a turn

  FUSED_RNN_FN constexpr int tiles_of(int part) const {
    return part + 1 < parts ? part_tiles : tiles - part * part_tiles;
  }
};

// Units are dealt to the parts, and a part's to the lines: a block owns those of its part and line.
struct GridUnits {
  int part_begin, part_end;  // of all blocks of the same part
  int begin, end;            // of the block

  FUSED_RNN_FN constexpr GridUnits(int64_t H, int64_t granule, int64_t team, int64_t of_line,
                                   int64_t line, int64_t part)
      : part_begin(int(unit_begin(H, granule, of_line, part))),
        part_end(int(unit_begin(H, granule, of_line, part + 1))),
        begin(of_part(granule, team / of_line, line)),
        end(of_part(granule, team / of_line, line + 1)) {}

 private:
  FUSED_RNN_FN constexpr int of_part(int64_t granule, int64_t lines, int64_t line) const {
    return part_begin + int(unit_begin(part_end - part_begin, granule, lines, line));
  }
};

constexpr int64_t most_grid_units(int64_t H, int64_t granule, int64_t team, int64_t of_line) {
  int64_t most = 0;
  for (int64_t part = 0; part < of_line; ++part) {
    const GridUnits all(H, granule, of_line, of_line, 0, part);
    const int64_t units = most_units(all.end - all.begin, granule, team / of_line);
    most = units > most ? units : most;
  }
  return most;
}

// With m_tiles of 0, no kernel is compiled for so many units.
constexpr GridShape grid_shape(int gates, int states, int saved, int element, bool exact,
                               bool backward, int64_t units, int64_t line, int64_t batch_tile) {
  GridShape shape{gates, states, saved, element, exact, backward, 0, int(batch_tile / 8)};
  const int64_t tiles =
      (units * line * shape.rows_of_unit() + shape.tile_rows() - 1) / shape.tile_rows();
  // Five: 80 rows of a GRU of 2,560 units in a half type, for which sm_90 has the memory.
  const bool five = backward && gates == 3 && element == 2 && shape.tiles == 1;
  shape.m_tiles = tiles <= 2 ? 2 : tiles <= 4 ? 4 : tiles == 5 && five ? 5 : 0;
  if (units > shape.most_units()) shape.m_tiles = 0;
  return shape;
}

constexpr GridCut grid_cut(GridShape shape, int64_t H, int64_t team, int64_t groups, int64_t line,
                           bool overlaid, int64_t granule) {
  GridCut cut{};
  cut.team = int(team);
  cut.groups = int(groups);
  cut.line = int(line);
  cut.overlaid = overlaid;
  cut.granule = int(granule);
  cut.units = int(most_grid_units(H, granule, team, line));
  cut.chunks = int((most_units(H, granule, line) + granule - 1) / granule) * shape.values_of_unit();
  const int K = cut.chunks * cut.granule, pair = 2 * shape.depth();
  const int pairs = (K + pair - 1) / pair;
  cut.parts = pairs < kGridWarps ? pairs : kGridWarps;
  cut.tiles = 2 * pairs;
  cut.part_tiles = (pairs + cut.parts - 1) / cut.parts * 2;
  cut.parts = (cut.tiles + cut.part_tiles - 1) / cut.part_tiles;  // the last ones may be left out
  return cut;
}

// Where things stand in shared memory, in bytes from its start; the operand first.
struct GridShared {
  int64_t stride;   // elements from row to row of the operand
  int64_t sums;     // of every part of K
  int64_t weights;  // those that registers do not hold
  int64_t others;   // the line's sums of the block's units
  int64_t bytes;

  FUSED_RNN_FN constexpr GridShared(GridShape shape, GridCut cut)
      // 16 bytes more than a multiple of 32: ldmatrix finds 8 rows in different banks.
      : stride(int64_t(cut.tiles) * shape.depth() + 16 / shape.element),
        sums(cut.overlaid ? 0 : shape.columns() * stride * shape.element),
        weights(more(shape.columns() * stride * shape.element,
                     sums + int64_t(cut.parts) * shape.rows() * shape.columns() * 4)),
        others(weights + weight_bytes(shape, cut)),
        bytes(others + int64_t(cut.line - 1) * shape.columns() * cut.units * 4) {}

  FUSED_RNN_FN static constexpr int64_t bytes_of_warp(GridShape shape, int tiles) {
    return tiles > shape.held() ? int64_t(tiles - shape.held()) * shape.m_tiles * 32 * 16 : 0;
  }
  FUSED_RNN_FN static constexpr int64_t weight_bytes(GridShape shape, GridCut cut) {
    return (cut.parts - 1) * bytes_of_warp(shape, cut.part_tiles) +
           bytes_of_warp(shape, cut.tiles_of(cut.parts - 1));
  }

 private:
  FUSED_RNN_FN static constexpr int64_t more(int64_t a, int64_t b) { return a > b ? a : b; }
};

// Words that a launch exchanges through, two slots for each group: of the operand's parts, and of
// the sums that the blocks of a line make for each other.
FUSED_RNN_FN constexpr int64_t operand_words(GridShape shape, GridCut cut) {
  return int64_t(2) * cut.groups * cut.line * shape.columns() * cut.chunks *
         shape.words(cut.granule);
}
FUSED_RNN_FN constexpr int64_t grid_words(GridShape shape, GridCut cut) {
  const int64_t sums = int64_t(2) * cut.groups * cut.team * cut.line * shape.columns() * cut.units;
  return operand_words(shape, cut) + (cut.line > 1 ? sums : 0);
}

}  // namespace fused_rnn
