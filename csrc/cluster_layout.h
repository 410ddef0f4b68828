// How the cluster algorithm cuts up a problem and lays out a CTA: the same formulas for the plan,
// which needs no GPU, and for the kernels.
#pragma once

#include <stdint.h>

#include "function.h"

namespace fused_rnn {

inline constexpr int kClusterWarps = 8;  // of a CTA at most: an SM has registers for 8 full warps
inline constexpr int kMostRegisters = 255;  // of a thread: the instruction encoding's limit

// Tiles of K whose weights a warp keeps in registers at most. Tests set it low, so that small
// problems have weights in shared memory, too.
#ifdef FUSED_RNN_MOST_HELD
inline constexpr int kMostHeld = FUSED_RNN_MOST_HELD;
#else
inline constexpr int kMostHeld = kMostRegisters;
#endif

// How many fit a thread beside `other` registers: 4 hold its share of a tile.
FUSED_RNN_FN constexpr int held_tiles(int other, int m_tiles) {
  const int fit = (kMostRegisters - other) / (4 * m_tiles);
  return fit < kMostHeld ? fit : kMostHeld;
}

// The first unit of CTA i when blocks of `granule` units are dealt evenly to a team.
FUSED_RNN_FN constexpr int64_t unit_begin(int64_t H, int64_t granule, int64_t team, int64_t i) {
  const int64_t unit = i * ((H + granule - 1) / granule) / team * granule;
  return unit < H ? unit : H;
}

// What is fixed when a kernel is compiled: a warp owns `blocks` times 8 units, all gates of each,
// for `tiles` times 8 rows of the batch. On the tensor cores W_hh is the left operand, tiles of 16
// rows by 32 bytes of K; half a tile is 8 units at one gate.
struct WarpShape {
  int gates, states, saved;  // of the cell
  int element;               // bytes of an element of W_hh
  int blocks, tiles;

  FUSED_RNN_FN constexpr int units() const { return 8 * blocks; }
  FUSED_RNN_FN constexpr int columns() const { return 8 * tiles; }
  FUSED_RNN_FN constexpr int depth() const { return 32 / element; }  // of a tile, along K
  FUSED_RNN_FN constexpr int chunk() const { return 16 / element; }  // units of a message
  FUSED_RNN_FN constexpr int m_tiles() const { return (blocks * gates + 1) / 2; }
  FUSED_RNN_FN constexpr int sums() const { return m_tiles() * tiles * 4; }  // of a lane
  // Arrays that a step writes: h, c and what is saved.
  FUSED_RNN_FN constexpr int outputs() const { return states + saved; }
  FUSED_RNN_FN constexpr int staged() const { return columns() * units(); }  // elements of one
  // Registers of a thread beside the weights: for each of its elements the sums (or what is saved,
  // which comes after them), gx, the states, and the rest as compiled for sm_90.
  FUSED_RNN_FN constexpr int other_registers() const {
    return 2 * blocks * tiles * ((gates > saved ? gates : saved) + gates + states + 1) + 84 +
           8 * element * (tiles - 1);
  }
  // Tiles of K whose weights a warp keeps in registers; even, as tiles are multiplied in pairs.
  FUSED_RNN_FN constexpr int held() const {
    return held_tiles(other_registers(), m_tiles()) / 2 * 2;
  }
};

// The rest of the cut: groups of warps with the same units, each split over `parts` of K.
struct ClusterCut {
  int team;        // CTAs of a cluster
  int groups;      // of the CTA with most units
  int parts;       // of K
  int part_tiles;  // tiles of K in a part, even
  int64_t units;   // of the CTA with most
  bool wide;       // outputs leave in pieces of 16 bytes, for which each has room in shared memory

  FUSED_RNN_FN constexpr int warps() const { return groups * parts; }
};

constexpr int64_t most_units(int64_t H, int64_t granule, int64_t team) {
  int64_t most = 0;
  for (int64_t i = 0; i < team; ++i) {
    const int64_t units = unit_begin(H, granule, team, i + 1) - unit_begin(H, granule, team, i);
    most = units > most ? units : most;
  }
  return most;
}

// Where things stand in shared memory, in bytes from its start.
struct ClusterShared {
  int64_t stride;   // elements from row to row of what the product reads
  int64_t weights;  // those that registers do not hold
  int64_t sums;     // of all parts of K but the first
  int64_t barriers;
  int64_t staging;  // what a step sends, and then what it writes
  int64_t bytes;

  FUSED_RNN_FN constexpr ClusterShared(WarpShape shape, const ClusterCut& cut)
      // 16 bytes more than a multiple of 32: ldmatrix finds 8 rows in different banks.
      : stride(int64_t(cut.parts) * cut.part_tiles * shape.depth() + shape.chunk()),
        weights(2 * shape.columns() * stride * shape.element),
        sums(weights + weight_bytes(shape, cut.warps(), cut.part_tiles)),
        barriers(sums + int64_t(cut.groups) * (cut.parts - 1) * shape.sums() * 32 * 4),
        staging(barriers + 2 * 8),
        bytes(staging + cut.groups * staged(shape, cut) * shape.element) {}

  // Elements of a warp.
  FUSED_RNN_FN static constexpr int64_t staged(WarpShape shape, const ClusterCut& cut) {
    return int64_t(cut.wide ? shape.outputs() : 1) * shape.staged();
  }

  FUSED_RNN_FN static constexpr int64_t weight_bytes(WarpShape shape, int warps, int part_tiles) {
    const int left = part_tiles > shape.held() ? part_tiles - shape.held() : 0;
    return int64_t(warps) * left * shape.m_tiles() * 32 * 16;
  }
};

// As few blocks a warp as there are warps for; two where one would leave half a tile empty. Kernels
// are compiled for two blocks or two tiles, not for both.
constexpr WarpShape warp_shape(int gates, int states, int saved, int element, int64_t H,
                               int64_t team, int64_t batch_tile) {
  const int64_t units = most_units(H, 16 / element, team);
  const int tiles = int(batch_tile / 8);
  const bool two = tiles == 1 && (units > 8 * kClusterWarps || (gates % 2 && units > 8));
  return {gates, states, saved, element, two ? 2 : 1, tiles};
}

// As many parts of K as there are warps for and pairs of tiles in it. With more groups than warps
// the problem does not fit. Of the `room` bytes of shared memory that a CTA may have, weights take
// theirs first.
constexpr ClusterCut cluster_cut(WarpShape shape, int64_t H, int64_t team, int64_t room) {
  ClusterCut cut{};
  cut.team = int(team);
  cut.units = most_units(H, shape.chunk(), team);
  cut.groups = int((cut.units + shape.units() - 1) / shape.units());
  const int pairs = int((H + 2 * shape.depth() - 1) / (2 * shape.depth()));
  cut.parts = kClusterWarps / cut.groups;
  cut.parts = cut.parts < 1 ? 1 : cut.parts < pairs ? cut.parts : pairs;
  cut.part_tiles = (pairs + cut.parts - 1) / cut.parts * 2;
  cut.wide = H % shape.chunk() == 0;
  cut.wide = cut.wide && ClusterShared(shape, cut).bytes <= room;
  return cut;
}

// ---- Backward: a block multiplies the gate gradients of its units by its rows of W_hh, and every
// peer gets the partial sums of that peer's units.

// What is fixed when a kernel is compiled: a warp multiplies `m_tiles` times 16 units, of all, by
// the block's gates, for `tiles` times 8 rows of the batch.
struct BackwardShape {
  static constexpr int kUnits = 16;

  int gates, states, saved;  // of the cell
  int element;               // bytes of an element of W_hh
  int m_tiles, tiles;

  FUSED_RNN_FN constexpr int columns() const { return 8 * tiles; }
  FUSED_RNN_FN constexpr int depth() const { return 32 / element; }  // of a tile, along K
  FUSED_RNN_FN constexpr int chunk() const { return 16 / element; }
  // Tiles that a warp multiplies at a time; with another warp beside it, two keep the tensor cores
  // busy.
  FUSED_RNN_FN constexpr int at_once() const {
    if (m_tiles > 2 && (element == 4 || tiles == 2)) return 2;
    return m_tiles <= 4 ? m_tiles : m_tiles == 6 ? 3 : m_tiles / 2;
  }
  // Registers of a thread beside the weights: the sums and where they go; for 2 units of 2 rows the
  // states' gradients, what is fetched and the gates' gradients; and the rest as compiled for
  // sm_90.
  FUSED_RNN_FN constexpr int other_registers() const {
    return 4 * at_once() * tiles + m_tiles + 4 * states +
           element * (saved + 1 + 3 * states + gates + (gates == 3)) + 10 * (element - 2) +
           8 * (gates == 3) + 36 * (tiles - 1) + 82 - 4 * (m_tiles < 6 ? m_tiles : 6);
  }
  // Tiles of K whose weights a warp keeps in registers. They are multiplied in pairs; an odd one
  // waits for registers for the other's, which float has not.
  FUSED_RNN_FN constexpr int held() const {
    const int fit = held_tiles(other_registers(), m_tiles);
    return element == 4 ? fit / 2 * 2 : fit;
  }
};

struct BackwardCut {
  int team;       // CTAs of a cluster
  int own_tiles;  // of 16 units, of the CTA with most
  int k_tiles;    // of the gates of these units, even
  int multiply;   // warps that multiply, the first ones
  int warps;      // these, or those that own units, whichever are more
};

// Tiles of 16 units of a warp at most, for which there are kernels: as many as 16 CTAs have memory
// for at some H. Of 8 or more that is so where a unit has one gate.
constexpr int most_backward_tiles(int gates, int element, int tiles) {
  if (tiles == 2) return 4;
  return gates > 1 ? 6 : element == 4 ? 8 : 10;
}

// With m_tiles of 0, no kernel is compiled for so many units.
constexpr BackwardShape backward_shape(int gates, int states, int saved, int element, int64_t H,
                                       int64_t batch_tile) {
  const int64_t of_warp = (H + 16 * kClusterWarps - 1) / (16 * kClusterWarps);
  const int tiles = int(batch_tile / 8), m_tiles = int((of_warp + 1) / 2 * 2);
  const bool compiled = tiles <= 2 && m_tiles <= most_backward_tiles(gates, element, tiles);
  return {gates, states, saved, element, compiled ? m_tiles : 0, tiles};
}

constexpr BackwardCut backward_cut(BackwardShape shape, int64_t H, int64_t team) {
  BackwardCut cut{};
  cut.team = int(team);
  const int units = shape.kUnits;
  cut.own_tiles = int((most_units(H, units, team) + units - 1) / units);
  cut.k_tiles =
      (cut.own_tiles * units * shape.gates + 2 * shape.depth() - 1) / (2 * shape.depth()) * 2;
  cut.multiply = int((H + units * shape.m_tiles - 1) / (units * shape.m_tiles));
  const int own = cut.own_tiles * shape.tiles;
  cut.warps = cut.multiply > own ? cut.multiply : own;
  return cut;
}

struct BackwardShared {
  int64_t stride;   // elements from row to row of the operand
  int64_t weights;  // those that registers do not hold
  int64_t sums;     // that arrive
  int64_t barriers, bytes;

  FUSED_RNN_FN constexpr BackwardShared(BackwardShape shape, BackwardCut cut)
      // 16 bytes more than a multiple of 32: ldmatrix finds 8 rows in different banks.
      : stride(int64_t(cut.k_tiles) * shape.depth() + shape.chunk()),
        weights(2 * shape.columns() * stride * shape.element),
        sums(weights + weight_bytes(shape, cut.multiply, cut.k_tiles)),
        barriers(sums + int64_t(2) * cut.team * cut.own_tiles * shape.tiles * 32 * 16),
        bytes(barriers + 2 * 8) {}

  FUSED_RNN_FN static constexpr int64_t weight_bytes(BackwardShape shape, int warps, int k_tiles) {
    const int left = k_tiles > shape.held() ? k_tiles - shape.held() : 0;
    return int64_t(warps) * left * shape.m_tiles * 32 * 16;
  }
};

}  // namespace fused_rnn
