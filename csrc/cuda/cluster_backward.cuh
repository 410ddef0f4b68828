// cluster, backward: a cluster of blocks holds W_hh on the chip and runs a tile of the batch back
// through all steps. It waits for nobody outside the cluster, and meets at no barrier of it inside
// the loop.
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
#include "stepwise_backward.cuh"
#include "weights.cuh"

namespace fused_rnn::cuda {

template <class T>
struct ClusterBackward {
  BackwardLayer<T> layer;
  BackwardCut cut;
  bool pairs;  // two neighbours, the first of them even, are one access everywhere
  const T* w_hh;
  const T *dh, *dc;           // [M, H], or null
  arithmetic_t<T>*dh0, *dc0;  // [N, H] the carried gradients, read before and written after
  T *dgx, *dgh;               // [M, G*H]; dgh is null where it equals dgx
};

// A warp's view: who it is, its registers, and what it does in a step.
template <class Cell, class T, int kM, int kTiles>
struct BackwardWarp {
  using A = arithmetic_t<T>;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  static constexpr BackwardShape kShape = {kGates, kStates, kSaved, sizeof(T), kM, kTiles};
  static constexpr int kHeld = kShape.held(), kUnits = BackwardShape::kUnits;
  using Pair = Vector<T, 2>;

  // What a step reads of a row, asked for a step ahead.
  struct Fetched {
    Pair saved[kSaved ? kSaved : 1], h, h_before, c, c_before, dh, dc;
  };

  const ClusterBackward<T>& a;
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
  int destinations[kM];      // of its tiles: the block's rank and the piece there, or -1
  A carried[2][2][kStates];  // of a row and a unit
  bool reaches[2];           // whether the product of the step after reaches the row's state
  Fetched fetched[2];
  Pair dgx[2][kGates], dgh[2];  // of dgh, the last gate: that of the GRU, which differs

  FUSED_RNN_DEVICE explicit BackwardWarp(const ClusterBackward<T>& args)
      : a(args), place(kShape, args.cut) {
    char* const shared = shared_memory<char>();
    operands = reinterpret_cast<T*>(shared);
    sums = reinterpret_cast<float*>(shared + place.sums);
    arrived = reinterpret_cast<Mbarrier*>(shared + place.barriers);
    rank = cluster_rank();
    block_unit = int(unit_begin(a.layer.H, kUnits, a.cut.team, rank));
    units_end = int(unit_begin(a.layer.H, kUnits, a.cut.team, rank + 1));
    own_tiles = (units_end - block_unit + kUnits - 1) / kUnits;
    piece = warp() / kTiles < own_tiles ? warp() / kTiles : -1;
    tile = warp() % kTiles;
    unit = block_unit + piece * kUnits + 2 * (lane() / 4);
    const int64_t first_row = int64_t(block_index().x / a.cut.team) * kShape.columns();
    row = first_row + 8 * tile + 2 * (lane() % 4);
    bytes = 0;
    FUSED_RNN_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int64_t left = (a.layer.N - first_row - 8 * t + 1) / 2;  // pairs of rows
      bytes += a.cut.team * own_tiles * 8 * 16 * int(left < 0 ? 0 : left < 4 ? left : 4);
    }
    const int blocks = int((a.layer.H + kUnits - 1) / kUnits);
    FUSED_RNN_UNROLL
    for (int m = 0; m < kM; ++m) {
      const int block = warp() * kM + m, owner = ((block + 1) * a.cut.team - 1) / blocks;
      destinations[m] = block < blocks ? owner << 16 | (block - owner * blocks / a.cut.team) : -1;
    }
  }

  FUSED_RNN_DEVICE int64_t row_of(int of_tile) const { return row + 8 * (of_tile - tile); }
  FUSED_RNN_DEVICE T* operand(int64_t turn) const {
    return operands + (turn & 1) * kShape.columns() * place.stride;
  }
  // Where a piece's sums from a block arrive: those of lane 0.
  FUSED_RNN_DEVICE float* arriving(int64_t turn, int from, int of_piece, int of_tile) const {
    const int at = ((int(turn & 1) * a.cut.team + from) * a.cut.own_tiles + of_piece) * kTiles;
    return sums + (at + of_tile) * 32 * 4;
  }

  FUSED_RNN_DEVICE Pair read_pair(const T* base, int64_t at) const {
    if (a.pairs) return load_vector<2>(base + at);
    return {{load(base + at), unit + 1 < a.layer.H ? load(base + at + 1) : from_float<T>(0)}};
  }
  FUSED_RNN_DEVICE void write_pair(T* base, int64_t at, Pair x) const {
    if (a.pairs) return store_vector(base + at, x);
    store(base + at, x[0]);
    if (unit + 1 < a.layer.H) store(base + at + 1, x[1]);
  }
  FUSED_RNN_DEVICE static A value(T x) {
    if constexpr (sizeof(T) == 2)
      return to_float(x);
    else
      return x;
  }

  // run(j, n) for the lane's rows that exist, where it has units.
  template <class Run>
  FUSED_RNN_DEVICE void each_row(Run run) const {
    if (piece < 0 || unit >= units_end) return;
    FUSED_RNN_UNROLL
    for (int j = 0; j < 2; ++j)
      if (row + j < a.layer.N) run(j, row + j);
  }
  // run(i, unit) for the lane's units that exist.
  template <class Run>
  FUSED_RNN_DEVICE void each_unit(Run run) const {
    FUSED_RNN_UNROLL
    for (int i = 0; i < 2; ++i)
      if (unit + i < units_end) run(i, unit + i);
  }

  // W_hh, transposed: its rows are units, K the gates of the block's units, unit by unit.
  FUSED_RNN_DEVICE void load_weights() {
    const int64_t H = a.layer.H;
    const int first = warp() * kM, count = (units_end - block_unit) * kGates;
    if (destinations[0] < 0) return;  // the warp only owns a piece
    char* const all = shared_memory<char>() + place.weights;
    const int64_t of_warp = BackwardShared::weight_bytes(kShape, 1, a.cut.k_tiles);
    weights.load(reinterpret_cast<uint32_t*>(all + warp() * of_warp), a.cut.k_tiles,
                 [&](int m, int half, int k) {
                   const int64_t u = (first + m) * kUnits + 2 * (lane() / 4) + half;
                   if (u >= H || k >= count) return from_float<T>(0);
                   return load(a.w_hh + (k % kGates * H + block_unit + k / kGates) * H + u);
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
    each_row([&](int j, int64_t n) {
      each_unit([&](int i, int64_t u) {
        carried[j][i][0] = read(a.dh0, n * a.layer.H + u);
        if constexpr (kStates == 2) carried[j][i][1] = read(a.dc0, n * a.layer.H + u);
      });
      reaches[j] = false;
    });
    fetch(a.layer.loop.T - 1);
    if (a.cut.team > 1)
      cluster_sync();
    else
      sync_block();
  }

  FUSED_RNN_DEVICE void fetch(int64_t step) {
    const BackwardLayer<T>& layer = a.layer;
    const StepRows now = layer.step(step);
    each_row([&](int j, int64_t n) {
      if (now.holds(n)) return;
      const int64_t index = now.index(n), at = index * layer.H + unit;
      const int64_t before = layer.before(step, n, index);
      const auto read_before = [&](const T* states, const T* initial) {
        if (before >= 0) return read_pair(states, before * layer.H + unit);
        if (before == kInitial && initial) return read_pair(initial, n * layer.H + unit);
        return Pair{{from_float<T>(0), from_float<T>(0)}};
      };
      Fetched& f = fetched[j];
      FUSED_RNN_UNROLL
      for (int i = 0; i < kSaved; ++i)
        f.saved[i] = read_pair(layer.saved, (index * kSaved + i) * layer.H + unit);
      if constexpr (kSaved == 0) f.h = read_pair(layer.h, at);
      if constexpr (Cell::kHiddenIsElementwise) f.h_before = read_before(layer.h, layer.h0);
      if constexpr (kStates == 2) {
        f.c = read_pair(layer.c, at);
        f.c_before = read_before(layer.c, layer.c0);
        if (a.dc) f.dc = read_pair(a.dc, at);
      }
      if (a.dh) f.dh = read_pair(a.dh, at);
    });
  }

  // Turn 0 makes the gradients of the last step; turn T only gathers what the first one sent. Until
  // the sums of the turn before are there, and for this one's bytes to be counted.
  FUSED_RNN_DEVICE void wait(int64_t turn) {
    if (a.cut.team == 1) {
      if (turn > 0) sync_block();
      return;
    }
    if (piece >= 0 && turn > 0) mbarrier_wait(arrived + (turn - 1) % 2, int((turn - 1) / 2 % 2));
    if (thread_index().x == 0 && turn < a.layer.loop.T)
      mbarrier_arrive_expect(arrived + turn % 2, bytes);
  }

  // What the steps after this one send into the carried hidden state of the lane's units and rows.
  FUSED_RNN_DEVICE void gather(int64_t turn) {
    if (piece < 0 || turn == 0 || row >= a.layer.N) return;
    float sum[4] = {};
    for (int from = 0; from < a.cut.team; ++from) {
      const auto part = load_vector<4>(arriving(turn - 1, from, piece, tile) + lane() * 4);
      FUSED_RNN_UNROLL
      for (int k = 0; k < 4; ++k) sum[k] += part[k];
    }
    each_row([&](int j, int64_t n) {
      if (!reaches[j]) return;
      each_unit([&](int i, int64_t u) {
        carried[j][i][0] += masked(a.layer.h_mask, n * a.layer.H + u, A(sum[2 * i + j]));
      });
    });
  }

  // The gate gradients of a step, for the product and for write_outputs.
  FUSED_RNN_DEVICE void update(int64_t turn, int64_t step) {
    const StepRows now = a.layer.step(step);
    each_row([&](int j, int64_t n) {
      A of_x[2][kGates] = {}, of_h[2][kGates] = {};
      reaches[j] = now.passes(n);
      if (!now.holds(n))
        each_unit([&](int i, int64_t u) {
          const Fetched& f = fetched[j];
          A ds1[kStates], s[kStates], s1[kStates], saved[4];
          ds1[0] = carried[j][i][0] + (a.dh ? value(f.dh[i]) : A(0));
          FUSED_RNN_UNROLL
          for (int k = 0; k < kSaved; ++k) saved[k] = value(f.saved[k][i]);
          if constexpr (kSaved == 0) s1[0] = value(f.h[i]);
          if constexpr (Cell::kHiddenIsElementwise) s[0] = value(f.h_before[i]);
          if constexpr (kStates == 2) {
            ds1[1] = carried[j][i][1] + (a.dc ? value(f.dc[i]) : A(0));
            s1[1] = value(f.c[i]), s[1] = value(f.c_before[i]);
          }
          const int64_t H = a.layer.H;
          unit_gradients<Cell>(now.keeps(n, u), kStates == 2 && now.keeps(n, H + u), reaches[j],
                               ds1, saved, s, s1, of_x[i], of_h[i], carried[j][i]);
        });
      FUSED_RNN_UNROLL
      for (int g = 0; g < kGates; ++g)
        dgx[j][g] = {{from_float<T>(of_x[0][g]), from_float<T>(of_x[1][g])}};
      dgh[j] = {{from_float<T>(of_h[0][kGates - 1]), from_float<T>(of_h[1][kGates - 1])}};
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
        if (row_of(t) >= a.layer.N) continue;  // nobody asks
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
    const StepRows now = a.layer.step(step);
    each_row([&](int j, int64_t n) {
      const int64_t index = now.index(n), H = a.layer.H;
      if (index < 0) return;
      FUSED_RNN_UNROLL
      for (int g = 0; g < kGates; ++g) {
        const int64_t at = (index * kGates + g) * H + unit;
        write_pair(a.dgx, at, dgx[j][g]);
        if constexpr (Cell::kSplitsGates)
          write_pair(a.dgh, at, g == kGates - 1 ? dgh[j] : dgx[j][g]);
      }
    });
  }

  FUSED_RNN_DEVICE void write_carried() const {
    each_row([&](int j, int64_t n) {
      each_unit([&](int i, int64_t u) {
        write(a.dh0, n * a.layer.H + u, carried[j][i][0]);
        if constexpr (kStates == 2) write(a.dc0, n * a.layer.H + u, carried[j][i][1]);
      });
    });
  }
};

template <class Cell, class T, int kM, int kTiles>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(32 * kClusterWarps, 1)
    cluster_backward(ClusterBackward<T> a) {
  if constexpr (!has_mma()) return unsupported("the cluster algorithm needs sm_80");
  // A block alone has at most 8 pieces, so 128 units: two tiles a warp.
  if constexpr (!has_clusters() && kM > 2) return unsupported("clusters need sm_90");
  BackwardWarp<Cell, T, kM, kTiles> warp(a);
  const int64_t T_ = a.layer.loop.T;
  warp.start();
  for (int64_t turn = 0; turn < T_; ++turn) {
    const int64_t step = T_ - 1 - turn;
    warp.wait(turn);
    warp.gather(turn);
    warp.update(turn, step);
    sync_block();
    warp.multiply_and_send(turn);
    warp.write_outputs(step);
    if (step > 0) warp.fetch(step - 1);
  }
  warp.wait(T_);
  warp.gather(T_);
  warp.write_carried();
}

template <class Cell, class T, class Machine>
void backward_cluster(const BackwardArgs& a, BackwardShape shape, const BackwardCut& cut,
                      Machine& machine) {
  backward_of<Cell, T>(a, machine, [&](const BackwardStep<T>& all) {
    const BackwardLayer<T>& layer = all.layer;
    ClusterBackward<T> loop{};
    loop.layer = layer;
    loop.cut = cut;
    loop.pairs = a.H % 2 == 0;
    for (const void* p : {a.dh, a.dc, a.h, a.c, a.saved, a.h0, a.c0})
      loop.pairs = loop.pairs && reinterpret_cast<uintptr_t>(p) % (2 * sizeof(T)) == 0;
    loop.w_hh = static_cast<const T*>(a.w_hh);
    loop.dh = all.dh, loop.dc = all.dc;
    loop.dh0 = all.dh0, loop.dc0 = all.dc0;
    loop.dgx = all.dgx, loop.dgh = all.dgh;
    const auto launch = [&](auto kernel) {
      machine.launch_clusters(kernel, cut.team, (a.N + shape.columns() - 1) / shape.columns(),
                              32 * cut.warps, BackwardShared(shape, cut).bytes, loop);
    };
    const int m = shape.m_tiles;
    if (shape.tiles == 2)
      launch(m == 2 ? cluster_backward<Cell, T, 2, 2> : cluster_backward<Cell, T, 4, 2>);
    else
      launch(m == 2   ? cluster_backward<Cell, T, 2, 1>
             : m == 4 ? cluster_backward<Cell, T, 4, 1>
                      : cluster_backward<Cell, T, 6, 1>);
  });
}

}  // namespace fused_rnn::cuda
