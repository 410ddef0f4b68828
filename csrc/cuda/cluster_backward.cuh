// cluster, backward: a cluster of blocks holds W_hh on the chip and runs a tile of the batch back
// through all steps, in one direction of the one or two that a launch has. It waits for nobody
// outside the cluster, and meets at no barrier of it inside the loop.
//
// A block owns some units, and the rows of W_hh of all their gates. In a step it makes their gate
// gradients and multiplies them by its rows: partial sums of dL/dh of all units, for the step
// before. Each goes to the block that owns the unit, by st.async from the registers that it was
// made in, and is added there to those of the other blocks, in the order of their ranks. 4 C bytes
// a unit and row arrive at a block; the gate gradients of all units would be 2 G H of them, twice
// as many for the LSTM in a half type and H units on C blocks.
//
// Two kinds of work, for a block's warps at once: a warp multiplies kM tiles of 16 units of all;
// and it owns one piece or none, 16 of the block's units for 8 rows of the batch. A lane owns units
// 2 (lane / 4) and the next of a piece, for rows 2 (lane % 4) and the next, in registers. That is
// how the tensor cores leave the sums, rows r and r + 8 of a tile being units 2 r and 2 r + 1.
//
// In shared memory, twice: the operand, gate gradients of the block's units, and the partial sums
// that arrive. Sums of a step overwrite those of two steps before, which a block reads at the start
// of the step between; then its warps meet and send. A peer that sends has those sums from every
// block.
#pragma once

#include "../cluster_layout.h"
#include "backward_units.cuh"
#include "weights.cuh"

namespace fused_rnn::cuda {

template <class T>
struct ClusterBackward {
  BackwardLoop<T> loops[kMostDirections];
  int directions;
  BackwardCut cut;
};

// A warp's view: who it is, its registers, and what it does in a step.
template <class Cell, class T, int kM, int kTiles>
struct BackwardWarp {
  using A = arithmetic_t<T>;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  static constexpr BackwardShape kShape = {kGates, kStates, kSaved, sizeof(T), kM, kTiles};
  static constexpr int kHeld = kShape.held(), kUnits = BackwardShape::kUnits;

  const ClusterBackward<T>& a;
  const BackwardLoop<T>& loop;
  const BackwardShared place;
  T* operands;
  float* sums;  // [2][rank of the sender][the block's tiles of units][kTiles][32 lanes][4]
  Mbarrier* arrived;
  int rank, own_tiles;
  int block_unit, units_end;  // the block's first, and past its last
  int piece, tile;            // of the block's units and of the rows; piece < 0: none
  int unit;                   // the lane's first
  int64_t row;
  int bytes;  // that arrive in a turn

  Weights<T, kM, kHeld> weights;
  int destinations[kM];  // of its tiles: the block's rank and the piece there, or -1
  BackwardUnits<Cell, T, 2> rows[2];

  FUSED_RNN_DEVICE explicit BackwardWarp(const ClusterBackward<T>& args)
      : a(args), loop(args.loops[cluster_index() % args.directions]), place(kShape, args.cut) {
    char* const shared = shared_memory<char>();
    operands = reinterpret_cast<T*>(shared);
    sums = reinterpret_cast<float*>(shared + place.sums);
    arrived = reinterpret_cast<Mbarrier*>(shared + place.barriers);
    rank = cluster_rank();
    block_unit = int(unit_begin(sizes().H, kUnits, a.cut.team, rank));
    units_end = int(unit_begin(sizes().H, kUnits, a.cut.team, rank + 1));
    own_tiles = (units_end - block_unit + kUnits - 1) / kUnits;
    piece = warp() / kTiles < own_tiles ? warp() / kTiles : -1;
    tile = warp() % kTiles;
    unit = block_unit + piece * kUnits + 2 * (lane() / 4);
    const int64_t first_row = int64_t(cluster_index() / a.directions) * kShape.columns();
    row = first_row + 8 * tile + 2 * (lane() % 4);
    bytes = 0;
    FUSED_RNN_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int64_t left = (sizes().N - first_row - 8 * t + 1) / 2;  // pairs of rows
      bytes += a.cut.team * own_tiles * 8 * 16 * int(left < 0 ? 0 : left < 4 ? left : 4);
    }
    const int blocks = int((sizes().H + kUnits - 1) / kUnits);
    FUSED_RNN_UNROLL
    for (int m = 0; m < kM; ++m) {
      const int block = warp() * kM + m, owner = ((block + 1) * a.cut.team - 1) / blocks;
      destinations[m] = block < blocks ? owner << 16 | (block - owner * blocks / a.cut.team) : -1;
    }
  }

  // All directions have the same; those of the first stand in instructions, not in registers.
  FUSED_RNN_DEVICE const BackwardLayer<T>& sizes() const { return a.loops[0].layer; }
  FUSED_RNN_DEVICE int64_t turns() const { return a.loops[0].count; }
  FUSED_RNN_DEVICE int64_t step_of(int64_t turn) const {
    return a.loops[0].first + turns() - 1 - turn;
  }
  // Neighbouring clusters run the same rows, each in its direction.
  FUSED_RNN_DEVICE int cluster_index() const { return block_index().x / a.cut.team; }
  FUSED_RNN_DEVICE int64_t row_of(int of_tile) const { return row + 8 * (of_tile - tile); }
  FUSED_RNN_DEVICE T* operand(int64_t turn) const {
    return operands + (turn & 1) * kShape.columns() * place.stride;
  }
  // Where a piece's sums from a block arrive: those of lane 0.
  FUSED_RNN_DEVICE float* arriving(int64_t turn, int from, int of_piece, int of_tile) const {
    const int at = ((int(turn & 1) * a.cut.team + from) * a.cut.own_tiles + of_piece) * kTiles;
    return sums + (at + of_tile) * 32 * 4;
  }

  // run(j, n) for the lane's rows that exist, where it has units.
  template <class Run>
  FUSED_RNN_DEVICE void each_row(Run run) const {
    if (piece < 0 || unit >= units_end) return;
    FUSED_RNN_UNROLL
    for (int j = 0; j < 2; ++j)
      if (row + j < sizes().N) run(j, row + j);
  }
  // W_hh, transposed: its rows are units, K the gates of the block's units, unit by unit.
  FUSED_RNN_DEVICE void load_weights() {
    const int64_t H = sizes().H;
    const int first = warp() * kM, count = (units_end - block_unit) * kGates;
    if (destinations[0] < 0) return;  // the warp only owns a piece
    char* const all = shared_memory<char>() + place.weights;
    const int64_t of_warp = BackwardShared::weight_bytes(kShape, 1, a.cut.k_tiles);
    weights.load(reinterpret_cast<uint32_t*>(all + warp() * of_warp), a.cut.k_tiles,
                 [&](int m, int half, int k) {
                   const int64_t u = (first + m) * kUnits + 2 * (lane() / 4) + half;
                   if (u >= H || k >= count) return from_float<T>(0);
                   return load(loop.w_hh + (k % kGates * H + block_unit + k / kGates) * H + u);
                 });
  }

  FUSED_RNN_DEVICE void start() {
    if (thread_index().x == 0 && a.cut.team > 1) {
      mbarrier_init(arrived, 1);
      mbarrier_init(arrived + 1, 1);
      fence_mbarrier_init();
    }
    // What no lane writes meets weights of zero, and must be finite.
    const int elements = int(2 * kShape.columns() * place.stride);
    for (int i = thread_index().x; i < elements; i += 32 * a.cut.warps)
      store(operands + i, from_float<T>(0));
    load_weights();
    each_row([&](int j, int64_t n) { rows[j].load_carried(loop, n, unit, units_end); });
    fetch(0);
    if (a.cut.team > 1)
      cluster_sync();
    else
      sync_block();
  }

  FUSED_RNN_DEVICE void fetch(int64_t turn) {
    const int64_t step = step_of(turn);
    each_row([&](int j, int64_t n) { rows[j].fetch(loop, step, n, unit); });
  }

  // Turn 0 makes the gradients of the last step; the turn after all steps only gathers what the
  // first one sent. Until the sums of the turn before are there, and for this one's bytes to be
  // counted.
  FUSED_RNN_DEVICE void wait(int64_t turn) {
    if (a.cut.team == 1) {
      if (turn > 0) sync_block();
      return;
    }
    if (piece >= 0 && turn > 0) mbarrier_wait(arrived + (turn - 1) % 2, int((turn - 1) / 2 % 2));
    if (thread_index().x == 0 && turn < turns()) mbarrier_arrive_expect(arrived + turn % 2, bytes);
  }

  // What the steps after this one send into the carried hidden state of the lane's units and rows.
  FUSED_RNN_DEVICE void gather(int64_t turn) {
    if (piece < 0 || turn == 0 || row >= sizes().N) return;
    float sum[4] = {};
    for (int from = 0; from < a.cut.team; ++from) {
      const auto part = load_vector<4>(arriving(turn - 1, from, piece, tile) + lane() * 4);
      FUSED_RNN_UNROLL
      for (int k = 0; k < 4; ++k) sum[k] += part[k];
    }
    each_row([&](int j, int64_t n) {
      const A of_row[2] = {sum[j], sum[2 + j]};
      rows[j].add(loop, n, unit, units_end, of_row);
    });
  }

  // The gate gradients of a step, for the product and for write_outputs.
  FUSED_RNN_DEVICE void update(int64_t turn, int64_t step) {
    each_row([&](int j, int64_t n) {
      A of_h[2][kGates];
      rows[j].update(loop, step, n, unit, units_end, of_h);
      // As the product reads it: the tensor cores would cut float off, not round it.
      T* const to = operand(turn) + (8 * tile + 2 * (lane() % 4) + j) * place.stride +
                    (piece * kUnits + 2 * (lane() / 4)) * kGates;
      FUSED_RNN_UNROLL
      for (int k = 0; k < 2 * kGates; k += 4 / sizeof(T)) {
        uint32_t bits;
        if constexpr (sizeof(T) == 4)
          bits = to_tf32(of_h[k / kGates][k % kGates]);
        else
          bits = pack(from_float<T>(of_h[k / kGates][k % kGates]),
                      from_float<T>(of_h[(k + 1) / kGates][(k + 1) % kGates]));
        store(reinterpret_cast<uint32_t*>(to + k), bits);
      }
    });
  }

  // The block's gate gradients times the warp's weights, to the blocks whose units they are of:
  // some tiles after the others, so that their sums need not all have registers at once.
  template <int kFirst = 0>
  FUSED_RNN_DEVICE void multiply_and_send(int64_t turn) {
    constexpr int kCount = kShape.at_once();
    if (destinations[kFirst] < 0) return;
    float sum[kCount][kTiles][4] = {};
    weights.template multiply<kFirst>(operand(turn), place.stride, sum);
    FUSED_RNN_UNROLL
    for (int m = 0; m < kCount; ++m) {
      const int to = destinations[kFirst + m], peer = to >> 16, of_peer = to & 0xffff;
      if (to < 0) return;
      FUSED_RNN_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (row_of(t) >= sizes().N) continue;  // nobody asks
        const Vector<float, 4> part = {{sum[m][t][0], sum[m][t][1], sum[m][t][2], sum[m][t][3]}};
        float* const at = arriving(turn, rank, of_peer, t) + lane() * 4;
        if (a.cut.team == 1)
          store_vector(at, part);
        else
          store_async(reinterpret_cast<Vector<float, 4>*>(at), part, arrived + turn % 2, peer);
      }
    }
    if constexpr (kFirst + kCount < kM) multiply_and_send<kFirst + kCount>(turn);
  }

  FUSED_RNN_DEVICE void write_outputs(int64_t step) const {
    each_row([&](int j, int64_t n) { rows[j].write_outputs(loop, step, n, unit); });
  }
  FUSED_RNN_DEVICE void write_carried() const {
    each_row([&](int j, int64_t n) { rows[j].write_carried(loop, n, unit, units_end); });
  }
};

template <class Cell, class T, int kM, int kTiles>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(32 * kClusterWarps, 1)
    cluster_backward(FUSED_RNN_ARGUMENT ClusterBackward<T> a) {
  if constexpr (!has_mma()) return unsupported("the cluster algorithm needs sm_80");
  // A block alone has at most 8 pieces, so 128 units: two tiles a warp.
  if constexpr (!has_clusters() && kM > 2) return unsupported("clusters need sm_90");
  BackwardWarp<Cell, T, kM, kTiles> warp(a);
  warp.start();
  for (int64_t turn = 0; turn < warp.turns(); ++turn) {
    const int64_t step = warp.step_of(turn);
    warp.wait(turn);
    warp.gather(turn);
    warp.update(turn, step);
    sync_block();
    warp.multiply_and_send(turn);
    warp.write_outputs(step);
    if (turn + 1 < warp.turns()) warp.fetch(turn + 1);
  }
  warp.wait(warp.turns());
  warp.gather(warp.turns());
  warp.write_carried();
}

template <class Cell, class T, class Machine>
Steps backward_cluster(Directions<BackwardArgs> directions, BackwardShape shape,
                       const BackwardCut& cut, Machine& machine) {
  const int64_t tiles = (directions[0].N + shape.columns() - 1) / shape.columns();
  const int64_t T_ = directions[0].T, chunk = directions[0].chunk ? directions[0].chunk : T_;
  const auto run = [=, &machine](const auto& steps, auto first, auto count) {
    ClusterBackward<T> all{{}, directions.count, cut};
    for (int i = 0; i < directions.count; ++i)
      all.loops[i] = BackwardLoop<T>(directions[i], steps[size_t(i)], first, count, 2);
    const auto launch = [&](auto kernel) {
      machine.launch_clusters(kernel, cut.team, directions.count * tiles, 32 * cut.warps,
                              BackwardShared(shape, cut).bytes, all);
    };
    const int m = shape.m_tiles;
    constexpr int kMost = most_backward_tiles(Cell::kGates, sizeof(T), 1);
    if (shape.tiles == 2)
      return launch(m == 2 ? cluster_backward<Cell, T, 2, 2> : cluster_backward<Cell, T, 4, 2>);
    if constexpr (kMost >= 8)
      if (m > 6)
        return launch(m == 8 ? cluster_backward<Cell, T, 8, 1>
                             : cluster_backward<Cell, T, kMost, 1>);
    launch(m == 2   ? cluster_backward<Cell, T, 2, 1>
           : m == 4 ? cluster_backward<Cell, T, 4, 1>
                    : cluster_backward<Cell, T, 6, 1>);
  };
  return backward_of<Cell, T>(directions, chunk, machine, run);
}

}  // namespace fused_rnn::cuda
