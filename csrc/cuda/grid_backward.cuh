// grid, backward: teams of blocks that fill the chip hold W_hh transposed and run a tile of the
// batch back through all steps, and then the next one. See grid.cuh for how they work together.
//
// A block owns some units; its rows are the units of all blocks of its line. In a turn it makes the
// gate gradients of its units, gets those of its part of all units from the blocks of the same
// part, and multiplies. The sums of its rows it divides with its line: each block adds up what all
// of them have of its own units, dL/dh for the step before. docs/kernels/grid_backward.md counts
// the bytes.
#pragma once

#include "backward_units.cuh"
#include "grid.cuh"

namespace fused_rnn::cuda {

template <class T>
struct GridBackward {
  BackwardLoop<T> loops[kMostDirections];
  GridTeam team;
};

template <class Cell, class T, bool kExact, int kM, int kTiles>
struct GridBackwardBlock : GridBlock<Cell, T, true, kExact, kM, kTiles> {
  using Block = GridBlock<Cell, T, true, kExact, kM, kTiles>;
  using typename Block::A;
  static constexpr int kItems = Block::kItems, kGates = Cell::kGates;

  const GridBackward<T>& args;
  const BackwardLoop<T>& loop;
  BackwardUnits<Cell, T, 1> mine[kItems];

  FUSED_RNN_DEVICE explicit GridBackwardBlock(const GridBackward<T>& a)
      : Block(a.team), args(a), loop(a.loops[this->direction()]) {
    const int64_t H = this->team.H;
    const GridCut& cut = this->team.cut;
    // Chunks of the operand are units of a granule at one gate after the other.
    this->load_weights(
        [&](int row) {
          if (row >= cut.line * cut.units) return -1;
          const GridUnits its = this->units_of(row / cut.units);
          const int u = its.begin + row % cut.units;
          return u < its.end ? u : -1;
        },
        [&](int unit, int k) {
          const int granule = k / cut.granule / kGates, gate = k / cut.granule % kGates;
          const int u = this->own.part_begin + granule * cut.granule + k % cut.granule;
          const bool exists = unit >= 0 && u < this->own.part_end;
          return exists ? load(loop.w_hh + (gate * H + u) * H + unit) : from_float<T>(0);
        });
    // Where nothing arrives the operand meets weights of zero, and must be finite.
    const int elements = int(Block::kColumns * this->place.stride);
    for (int i = thread_index().x; i < elements; i += Block::kThreads)
      this->store_operand(0, i, A(0));
    sync_block();
  }

  // The same in all directions; of the first it stands in instructions, not in registers.
  FUSED_RNN_DEVICE int64_t steps() const { return args.loops[0].layer.loop.T; }

  FUSED_RNN_DEVICE void start() {
    this->each([&](int k, int64_t n, int64_t u) { mine[k].load_carried(loop, n, u, u + 1); });
    fetch(steps() - 1);
  }
  FUSED_RNN_DEVICE void fetch(int64_t step) {
    this->each([&](int k, int64_t n, int64_t u) { mine[k].fetch(loop, step, n, u); });
  }
  // What a turn's product sends into the carried hidden states.
  FUSED_RNN_DEVICE void add() {
    this->each([&](int k, int64_t n, int64_t u) {
      const A sum[1] = {this->sum_of_line(this->units[k], this->columns[k])};
      mine[k].add(loop, n, u, u + 1, sum);
    });
  }
  // The gate gradients of a step, to the other blocks.
  FUSED_RNN_DEVICE void update(int64_t step, int64_t turn) {
    A of_h[kItems][1][kGates], values[kItems][kGates];
    this->each(
        [&](int k, int64_t n, int64_t u) { mine[k].update(loop, step, n, u, u + 1, of_h[k]); });
    FUSED_RNN_UNROLL
    for (int i = 0; i < kItems * kGates; ++i)
      values[i / kGates][i % kGates] = of_h[i / kGates][0][i % kGates];
    this->send(turn, values);
  }
  FUSED_RNN_DEVICE void write_outputs(int64_t step) const {
    this->each([&](int k, int64_t n, int64_t u) { mine[k].write_outputs(loop, step, n, u); });
  }
  FUSED_RNN_DEVICE void write_carried() const {
    this->each([&](int k, int64_t n, int64_t u) { mine[k].write_carried(loop, n, u, u + 1); });
  }
};

template <class Cell, class T, bool kExact, int kM, int kTiles>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(32 * kGridWarps, 1)
    grid_backward(FUSED_RNN_ARGUMENT GridBackward<T> a) {
  if constexpr (!has_mma()) return unsupported("the grid algorithm needs sm_80");
  if constexpr (!has_clusters() && kM == 5) return unsupported("so many rows need sm_90");
  GridBackwardBlock<Cell, T, kExact, kM, kTiles> block(a);
  int64_t turn = 0;
  for (block.row = block.first_row(); block.row < a.team.N; block.row += block.row_stride()) {
    block.start();
    for (int64_t step = block.steps() - 1; step >= 0; --step, ++turn) {
      block.update(step, turn);
      block.write_outputs(step);
      if (step > 0) block.fetch(step - 1);
      block.gather(turn);
      sync_block();
      block.multiply();
      sync_block();
      if (a.team.cut.line > 1) {
        block.exchange_sums(turn);
        sync_block();
      }
      block.add();
    }
    block.write_carried();
  }
}

template <class Cell, class T, bool kExact, class Machine>
void backward_grid(Directions<BackwardArgs> directions, GridShape shape, const GridCut& cut,
                   Machine& machine) {
  const auto run = [&](const auto& steps, auto first, auto count) {
    GridBackward<T> loop{};
    loop.team = {cut, directions.count, directions[0].N, directions[0].H,
                 machine.template memory<uint64_t>(grid_words(shape, cut))};
    for (int i = 0; i < directions.count; ++i)
      loop.loops[i] = BackwardLoop<T>(directions[i], steps[size_t(i)], first, count, 1);
    const auto launch = [&](auto kernel) { launch_grid(machine, shape, cut, kernel, loop); };
    const int m = shape.m_tiles;
    if constexpr (kExact) {
      launch(m == 2 ? grid_backward<Cell, T, true, 2, 1> : grid_backward<Cell, T, true, 4, 1>);
    } else {
      if constexpr (sizeof(T) == 2 && Cell::kGates == 3)
        if (m == 5) return launch(grid_backward<Cell, T, false, 5, 1>);
      if (shape.tiles == 2)
        launch(m == 2 ? grid_backward<Cell, T, false, 2, 2> : grid_backward<Cell, T, false, 4, 2>);
      else
        launch(m == 2 ? grid_backward<Cell, T, false, 2, 1> : grid_backward<Cell, T, false, 4, 1>);
    }
  };
  run_all(backward_of<Cell, T>(directions, directions[0].T, machine, run));
}

}  // namespace fused_rnn::cuda
