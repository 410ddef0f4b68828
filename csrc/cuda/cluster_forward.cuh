// cluster, forward: a cluster of blocks holds W_hh on the chip and runs a tile of the batch through
// all steps, in one direction of the one or two that a launch has. It waits for nobody outside the
// cluster and meets at no barrier inside the loop.
//
// A block owns some units, all gates of each, for 8 or 16 rows of the batch. A warp owns one or two
// times 8 of the block's units, and one part of K; the warps of part 0 end with the sums of all
// parts. There a lane owns unit lane / 4 of each 8, and of every 8 rows of the batch two,
// 2 (lane % 4) and the next: all gates of a unit meet in one lane, which keeps its states.
//
// In registers: a warp's weights, as many as fit; states; the next step's gx. In shared memory: the
// rest of the weights, and what the product reads, h of all units, twice: while a step reads one,
// all blocks of the cluster fill the other by st.async, whose bytes an mbarrier counts. The one
// being filled was read in the step before, and that is over: who sends has this step's h from
// every block, and each of its warps sent after it had read.
//
// What leaves a warp, h to its peers and then what the step writes, goes through shared memory of
// its own: there the units of a row, which 8 lanes hold, become pieces of 16 bytes.
#pragma once

#include "../cluster_layout.h"
#include "forward_layer.cuh"
#include "weights.cuh"

namespace fused_rnn::cuda {

template <class T>
struct ClusterForward {
  ForwardLayer<T> layers[kMostDirections];
  int directions;
  ClusterCut cut;
};

// A warp's view: who it is, its registers, and what it does in a step.
template <class Cell, class T, int kBlocks, int kTiles>
struct ClusterWarp {
  using A = arithmetic_t<T>;
  static constexpr int kGates = Cell::kGates;
  static constexpr WarpShape kShape = {kGates,    Cell::kStates, Cell::kSaved,
                                       sizeof(T), kBlocks,       kTiles};
  static constexpr int kM = kShape.m_tiles(), kHeld = kShape.held(), kChunk = kShape.chunk(),
                       kUnits = kShape.units(), kColumns = kShape.columns(),
                       kDepth = kShape.depth(), kSums = kShape.sums(), kStaged = kShape.staged();

  const ClusterForward<T>& a;
  const ForwardLayer<T>& layer;
  const ClusterShared place;
  T *operands, *staging;  // staging: [output][row of staging][unit] of the warp
  float* sums;
  Mbarrier* arrived;
  int part, group;
  int64_t row, unit, units_end;  // the first of the tile, of the warp; past the block's last

  Weights<T, kM, kHeld> weights;
  Biases<Cell, T> biases[kBlocks];
  ForwardUnit<Cell, T> units[kBlocks][kTiles][2] = {};  // zero where there is none

  FUSED_RNN_DEVICE explicit ClusterWarp(const ClusterForward<T>& args)
      : a(args), layer(args.layers[cluster_index() % args.directions]), place(kShape, args.cut) {
    char* const shared = shared_memory<char>();
    operands = reinterpret_cast<T*>(shared);
    sums = reinterpret_cast<float*>(shared + place.sums);
    staging = reinterpret_cast<T*>(shared + place.staging);
    arrived = reinterpret_cast<Mbarrier*>(shared + place.barriers);
    const int groups = a.cut.groups, rank = cluster_rank();
    part = warp() / groups;
    group = warp() % groups;
    row = int64_t(cluster_index() / a.directions) * kColumns;
    unit = unit_begin(layer.H, kChunk, a.cut.team, rank) + group * kUnits;
    units_end = unit_begin(layer.H, kChunk, a.cut.team, rank + 1);
    staging += group * ClusterShared::staged(kShape, a.cut);
  }

  // Neighbouring clusters run the same rows, each in its direction.
  FUSED_RNN_DEVICE int cluster_index() const { return block_index().x / a.cut.team; }
  FUSED_RNN_DEVICE int64_t unit_of(int block) const { return unit + 8 * block + lane() / 4; }
  // Rows of the batch are staged in another order: those that lanes store together, every second
  // one, stand side by side, so in different banks.
  FUSED_RNN_DEVICE static int staged_row(int tile, int j) { return 8 * tile + 4 * j + lane() % 4; }
  FUSED_RNN_DEVICE static int column_of(int staged_row) {
    return staged_row / 8 * 8 + staged_row % 4 * 2 + staged_row / 4 % 2;
  }
  FUSED_RNN_DEVICE T* staged(int block, int tile, int j) const {
    return staging + staged_row(tile, j) * kUnits + 8 * block + lane() / 4;
  }
  FUSED_RNN_DEVICE T* operand(int64_t step) const {
    return operands + (step & 1) * kColumns * place.stride;
  }

  // As the product reads it: the tensor cores would cut float off, not round it.
  FUSED_RNN_DEVICE static void store_operand(T* to, A h) {
    if constexpr (sizeof(T) == 4)
      store(reinterpret_cast<uint32_t*>(to), to_tf32(h));
    else
      store(to, from_float<T>(h));
  }

  // run(block, tile, j, n, unit) for the elements of this lane that exist.
  template <class Run>
  FUSED_RNN_DEVICE void each(Run run) const {
    FUSED_RNN_UNROLL
    for (int i = 0; i < 2 * kBlocks * kTiles; ++i) {
      const int block = i / (2 * kTiles), tile = i / 2 % kTiles, j = i % 2;
      const int64_t n = row + column_of(staged_row(tile, j)), u = unit_of(block);
      if (n < layer.N && u < units_end) run(block, tile, j, n, u);
    }
  }

  // Rows of a tile: half of it is 8 units at one gate. What lies outside of W_hh is zero.
  FUSED_RNN_DEVICE void load_weights() {
    const int first = part * a.cut.part_tiles * kDepth;
    const T* rows[2 * kM];
    FUSED_RNN_UNROLL
    for (int half = 0; half < 2 * kM; ++half) {
      const int64_t u = unit_of(half / kGates);
      const bool exists = half < kBlocks * kGates && u < units_end;
      rows[half] = exists ? layer.w_hh + (half % kGates * layer.H + u) * layer.H : nullptr;
    }
    char* const all = shared_memory<char>() + place.weights;
    const int64_t of_warp = ClusterShared::weight_bytes(kShape, 1, a.cut.part_tiles);
    weights.load(reinterpret_cast<uint32_t*>(all + warp() * of_warp), a.cut.part_tiles,
                 [&](int m, int half, int k) {
                   const T* const row = rows[2 * m + half];
                   return row && first + k < layer.H ? load(row + first + k) : from_float<T>(0);
                 });
  }

  // Weights, states and the first operand are in place, mbarriers stand, and operands are zero
  // where nobody sends.
  FUSED_RNN_DEVICE void start() {
    if (thread_index().x == 0 && a.cut.team > 1) {
      mbarrier_init(arrived, 1);
      mbarrier_init(arrived + 1, 1);
      fence_mbarrier_init();
    }
    load_weights();
    load_states();
    if (part == 0) fetch(0);
    if (a.cut.team > 1)
      cluster_sync();
    else
      sync_block();
  }
  // Until the operand of a step is there, and for the next one's bytes to be counted. A block alone
  // has all its warps at work, and they meet.
  FUSED_RNN_DEVICE void wait(int64_t step) {
    if (a.cut.team == 1) {
      if (step > 0) sync_block();
      return;
    }
    if (step > 0) mbarrier_wait(arrived + step % 2, int((step - 1) / 2 % 2));
    if (thread_index().x == 0 && step + 1 < layer.count)
      mbarrier_arrive_expect(arrived + (step + 1) % 2,
                             kColumns * int((layer.H + kChunk - 1) / kChunk) * 16);
  }

  // The carried states, and what the first product reads: all units, not the block's own alone.
  FUSED_RNN_DEVICE void load_states() {
    for (int i = thread_index().x; i < 2 * kColumns * place.stride; i += 32 * a.cut.warps())
      store(operands + i, from_float<T>(0));
    // What no lane writes meets weights of zero, and must be finite.
    for (int i = lane(); i < kStaged; i += 32)
      if (part == 0) store(staging + i, from_float<T>(0));
    sync_block();
    for (int column = warp(); column < kColumns; column += a.cut.warps()) {
      const int64_t n = row + column;
      if (n >= layer.N) continue;
      for (int64_t u = lane(); u < layer.H; u += 32)
        store_operand(operand(0) + column * place.stride + u, layer.first_operand(n, u));
    }
    each([&](int block, int tile, int j, int64_t n, int64_t u) {
      units[block][tile][j].load_states(layer, n, u);
    });
    FUSED_RNN_UNROLL
    for (int block = 0; block < kBlocks; ++block)
      biases[block].load(layer, unit_of(block), unit_of(block) < units_end);
  }

  FUSED_RNN_DEVICE void fetch(int64_t step) {
    const StepRows now = layer.step(step);
    each([&](int block, int tile, int j, int64_t n, int64_t u) {
      units[block][tile][j].fetch(layer, now, n, u);
    });
  }

  // The warp's rows of W_hh times the operand, over its part of K.
  FUSED_RNN_DEVICE void multiply(int64_t step, float (&sum)[kM][kTiles][4]) const {
    weights.template multiply<0>(operand(step) + part * a.cut.part_tiles * kDepth, place.stride,
                                 sum);
  }

  // The sums of all parts, in their order, in the warps of part 0; the others leave theirs there.
  FUSED_RNN_DEVICE void add_parts(float (&sum)[kM][kTiles][4]) const {
    const int groups = a.cut.groups;
    const auto each_sum = [&](int of_part, auto run) {
      float* const base = sums + ((of_part - 1) * groups + group) * kSums * 32 + lane();
      FUSED_RNN_UNROLL
      for (int i = 0; i < kSums; ++i)
        run(base + i * 32, sum[i / (4 * kTiles)][i / 4 % kTiles][i % 4]);
    };
    if (part > 0) each_sum(part, [](float* at, float x) { store(at, x); });
    sync_threads(1 + group, 32 * a.cut.parts);
    if (part > 0) return;
    for (int other = 1; other < a.cut.parts; ++other)
      each_sum(other, [](const float* at, float& x) { x += load(at); });
  }

  // The states after a step, and what is saved of it; what the next product reads, staged.
  FUSED_RNN_DEVICE void update(int64_t step, const float (&sum)[kM][kTiles][4],
                               A (&saved)[kBlocks][kTiles][2][4]) {
    const StepRows now = layer.step(step);
    const bool last = step + 1 == layer.count;
    const StepRows next = layer.step(last ? step : step + 1);
    each([&](int block, int tile, int j, int64_t n, int64_t u) {
      ForwardUnit<Cell, T>& mine = units[block][tile][j];
      A gh[kGates];
      FUSED_RNN_UNROLL
      for (int g = 0; g < kGates; ++g) {
        const int half = block * kGates + g;
        gh[g] = sum[half / 2][tile][half % 2 * 2 + j];
      }
      mine.update(layer, now, biases[block], n, u, gh, saved[block][tile][j]);
      if (!last) store_operand(staged(block, tile, j), mine.operand(layer, next, n, u));
    });
  }

  // The staged operand to all blocks of the cluster, this one included.
  FUSED_RNN_DEVICE void send(int64_t step) {
    constexpr int kOfRow = kUnits / kChunk, kMessages = kColumns * kOfRow;
    sync_warp();
    for (int i = lane(); i < kMessages * a.cut.team; i += 32) {
      const int peer = i / kMessages, of_row = i % kOfRow * kChunk;
      const int from = i % kMessages / kOfRow;
      const int64_t u = unit + of_row;
      if (u >= units_end) continue;
      const auto h = load_vector<kChunk>(staging + from * kUnits + of_row);
      T* const to = operand(step + 1) + column_of(from) * place.stride + u;
      if (a.cut.team == 1)
        store_vector(to, h);
      else
        store_async(reinterpret_cast<Vector<T, kChunk>*>(to), h, arrived + (step + 1) % 2, peer);
    }
    sync_warp();
  }

  // Where what was sent stood: also elements that do not exist, to be done without asking.
  FUSED_RNN_DEVICE void stage_outputs(const A (&saved)[kBlocks][kTiles][2][4]) const {
    const auto stage = [&](auto run) {
      FUSED_RNN_UNROLL
      for (int i = 0; i < 2 * kBlocks * kTiles; ++i) {
        const int block = i / (2 * kTiles), tile = i / 2 % kTiles, j = i % 2;
        run(staged(block, tile, j), units[block][tile][j].states, saved[block][tile][j]);
      }
    };
    stage([](T* to, const auto& states, const auto&) {
      FUSED_RNN_UNROLL
      for (int k = 0; k < Cell::kStates; ++k) write(to, k * kStaged, states[k]);
    });
    if (layer.saved)
      stage([](T* to, const auto&, const auto& of_element) {
        FUSED_RNN_UNROLL
        for (int k = 0; k < Cell::kSaved; ++k)
          write(to, (Cell::kStates + k) * kStaged, of_element[k]);
      });
  }

  // The staged outputs to where they belong. A lane has a piece of 16 bytes at the same place in
  // one array after the other, or in every other one where there are lanes for several.
  FUSED_RNN_DEVICE void copy_outputs(int64_t step) const {
    constexpr int kOfRow = kUnits / kChunk, kPieces = kStaged / kChunk, kAtOnce = 32 / kPieces;
    const int piece = lane() % kPieces, mine = lane() / kPieces;
    const int64_t n = row + column_of(piece / kOfRow), u = unit + piece % kOfRow * kChunk;
    if (n >= layer.N || u >= units_end) return;
    const StepRows now = layer.step(step);
    const int64_t index = now.index(n);
    if (index < 0) return;
    const bool holds = now.bits(n) & kHold;
    const auto copy = [&](int output, T* base, int64_t of_base) {
      auto values = load_vector<kChunk>(staging + output * kStaged + piece * kChunk);
      FUSED_RNN_UNROLL
      for (int i = 0; i < kChunk; ++i)
        if (holds) values[i] = from_float<T>(0);
      store_vector(base + of_base * layer.H + u, values);
    };
    if (layer.saved) FUSED_RNN_UNROLL
    for (int i = mine; i < Cell::kSaved; i += kAtOnce)
      copy(Cell::kStates + i, layer.saved, index * Cell::kSaved + i);
    FUSED_RNN_UNROLL
    for (int i = mine; i < Cell::kStates; i += kAtOnce)
      if (T* const base = i == 0 ? layer.h : layer.c) copy(i, base, index);
  }

  FUSED_RNN_DEVICE void write_outputs(int64_t step, const A (&saved)[kBlocks][kTiles][2][4]) const {
    if (a.cut.wide) {
      stage_outputs(saved);
      sync_warp();
      copy_outputs(step);
      sync_warp();  // the next step stages in the same place
      return;
    }
    const StepRows now = layer.step(step);
    each([&](int block, int tile, int j, int64_t n, int64_t u) {
      units[block][tile][j].write_outputs(layer, now, n, u, saved[block][tile][j]);
    });
  }

  FUSED_RNN_DEVICE void write_states() const {
    each([&](int block, int tile, int j, int64_t n, int64_t u) {
      units[block][tile][j].write_states(layer, n, u);
    });
  }
};

template <class Cell, class T, int kBlocks, int kTiles>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(32 * kClusterWarps, 1)
    cluster_forward(FUSED_RNN_ARGUMENT ClusterForward<T> a) {
  if constexpr (!has_mma()) return unsupported("the cluster algorithm needs sm_80");
  ClusterWarp<Cell, T, kBlocks, kTiles> warp(a);
  const bool updates = warp.part == 0;
  warp.start();
  if (warp.unit >= warp.units_end) return;  // the block has fewer units than another

  for (int64_t step = 0; step < warp.layer.count; ++step) {
    warp.wait(step);
    float sum[warp.kM][kTiles][4] = {};
    warp.multiply(step, sum);
    if (a.cut.parts > 1) warp.add_parts(sum);
    if (!updates) continue;
    arithmetic_t<T> saved[kBlocks][kTiles][2][4] = {};
    warp.update(step, sum, saved);
    if (step + 1 < warp.layer.count) {
      warp.send(step);
      warp.fetch(step + 1);
    }
    warp.write_outputs(step, saved);
  }
  if (updates) warp.write_states();
}

template <class Cell, class T, class Machine>
Steps forward_cluster(Directions<ForwardArgs> directions, WarpShape shape, const ClusterCut& cut,
                      Machine& machine) {
  const int64_t tiles = (directions[0].N + shape.columns() - 1) / shape.columns();
  const int64_t bytes = ClusterShared(shape, cut).bytes;
  ClusterForward<T> loop{{}, directions.count, cut};
  for (const ForwardArgs& a : directions)
    for (const void* p : {a.h, a.c, a.saved})
      loop.cut.wide = loop.cut.wide && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return forward_of<Cell, T>(directions, machine, [=, &machine](const auto& layers) mutable {
    std::copy(layers.begin(), layers.end(), loop.layers);
    machine.launch_clusters(shape.blocks == 2  ? cluster_forward<Cell, T, 2, 1>
                            : shape.tiles == 2 ? cluster_forward<Cell, T, 1, 2>
                                               : cluster_forward<Cell, T, 1, 1>,
                            cut.team, directions.count * tiles, 32 * cut.warps(), bytes, loop);
  });
}

}  // namespace fused_rnn::cuda
