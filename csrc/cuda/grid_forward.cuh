// grid, forward: teams of blocks that fill the chip hold W_hh and run a tile of the batch through
// all steps, and then the next one. See grid.cuh for how they work together.
//
// A block owns some units; its rows are their gates, row g * units + u. A thread owns a unit of a
// row of the batch, its states and the next step's gx in registers.
#pragma once

#include "forward_layer.cuh"
#include "grid.cuh"

namespace fused_rnn::cuda {

template <class T>
struct GridForward {
  ForwardLayer<T> layers[kMostDirections];
  GridTeam team;
  const T* operand;  // [directions, N, H] of the first product
};

template <class Cell, class T, bool kExact, int kM, int kTiles>
struct GridForwardBlock : GridBlock<Cell, T, false, kExact, kM, kTiles> {
  using Block = GridBlock<Cell, T, false, kExact, kM, kTiles>;
  using typename Block::A;
  static constexpr int kItems = Block::kItems, kGates = Cell::kGates;

  const GridForward<T>& args;
  const ForwardLayer<T>& layer;
  Biases<Cell, T> biases[kItems];
  ForwardUnit<Cell, T> mine[kItems];
  A saved[kItems][4];

  FUSED_RNN_DEVICE explicit GridForwardBlock(const GridForward<T>& a)
      : Block(a.team), args(a), layer(a.layers[this->direction()]) {
    const int of_gate = this->team.cut.units;
    this->load_weights(
        [&](int row) {
          const int gate = row / of_gate, u = this->own.begin + row % of_gate;
          return gate < kGates && u < this->own.end ? gate * int(this->team.H) + u : -1;
        },
        [&](int row, int k) {
          const int64_t H = this->team.H;
          return row >= 0 && k < H ? load(layer.w_hh + row * H + k) : from_float<T>(0);
        });
    FUSED_RNN_UNROLL
    for (int k = 0; k < kItems; ++k) {
      const int64_t u = this->own.begin + this->units[k];
      biases[k].load(layer, u, u < this->own.end);
    }
  }

  // The same in all directions; of the first it stands in instructions, not in registers.
  FUSED_RNN_DEVICE int64_t count() const { return args.layers[0].count; }

  // The states before a tile's first step, and its operand: all units, not the block's own alone.
  FUSED_RNN_DEVICE void start() {
    const int length = int(this->place.stride);
    const int64_t N = this->team.N, H = this->team.H;
    const T* const first_operand = args.operand + this->direction() * N * H;
    if (this->team.cut.overlaid) sync_block();  // others still read the sums of the tile before
    for (int i = thread_index().x; i < Block::kColumns * length; i += Block::kThreads) {
      const int column = i / length, k = i % length;
      const bool exists = this->has_row(column) && k < H;
      const int64_t at = (this->row + column) * H + k;
      this->store_operand(column, k, exists ? read(first_operand, at) : A(0));
    }
    this->each([&](int k, int64_t n, int64_t u) { mine[k].load_states(layer, n, u); });
    fetch(0);
  }

  FUSED_RNN_DEVICE void fetch(int64_t step) {
    const StepRows now = layer.step(step);
    this->each([&](int k, int64_t n, int64_t u) { mine[k].fetch(layer, now, n, u); });
  }

  // A step of the thread's units, and for the next one's product to the other blocks.
  FUSED_RNN_DEVICE void update(int64_t step, int64_t turn, bool sends) {
    const StepRows now = layer.step(step);
    const StepRows next = layer.step(step + 1 < count() ? step + 1 : step);
    A h[kItems][1];
    this->each([&](int k, int64_t n, int64_t u) {
      A gh[kGates];
      FUSED_RNN_UNROLL
      for (int g = 0; g < kGates; ++g)
        gh[g] = this->sum_of(g * this->team.cut.units + this->units[k], this->columns[k]);
      mine[k].update(layer, now, biases[k], n, u, gh, saved[k]);
      h[k][0] = mine[k].operand(layer, next, n, u);
    });
    if (sends) this->send(turn, h);
  }

  FUSED_RNN_DEVICE void write_outputs(int64_t step) const {
    const StepRows now = layer.step(step);
    this->each(
        [&](int k, int64_t n, int64_t u) { mine[k].write_outputs(layer, now, n, u, saved[k]); });
  }
  FUSED_RNN_DEVICE void write_states() const {
    this->each([&](int k, int64_t n, int64_t u) { mine[k].write_states(layer, n, u); });
  }
};

template <class Cell, class T, bool kExact, int kM, int kTiles>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(32 * kGridWarps, 1)
    grid_forward(FUSED_RNN_ARGUMENT GridForward<T> a) {
  if constexpr (!has_mma()) return unsupported("the grid algorithm needs sm_80");
  GridForwardBlock<Cell, T, kExact, kM, kTiles> block(a);
  int64_t turn = 0;
  for (block.row = block.first_row(); block.row < a.team.N; block.row += block.row_stride()) {
    block.start();
    for (int64_t step = 0; step < block.count(); ++step) {
      const bool last = step + 1 == block.count();
      if (step > 0) block.gather(turn - 1);
      sync_block();
      block.multiply();
      sync_block();
      block.update(step, turn, !last);
      turn += !last;
      if (!last) block.fetch(step + 1);
      block.write_outputs(step);
    }
    block.write_states();
  }
}

template <class Cell, class T, bool kExact, class Machine>
void forward_grid(Directions<ForwardArgs> directions, GridShape shape, const GridCut& cut,
                  Machine& machine) {
  const int64_t N = directions[0].N, H = directions[0].H;
  GridForward<T> loop{};
  loop.team = {cut, directions.count, N, H,
               machine.template memory<uint64_t>(grid_words(shape, cut))};
  // Apart from the carried states: a block may write its own before another has read them.
  T* const operand = machine.template memory<T>(directions.count * N * H);
  loop.operand = operand;
  run_all(forward_of<Cell, T>(directions, machine, [&](const auto& layers) {
    std::copy(layers.begin(), layers.end(), loop.layers);
    for (size_t i = 0; i < layers.size(); ++i) {
      const ForwardLayer<T>& layer = layers[i];
      machine.launch(start_state<T>, H, N,
                     Start<T>{layer.step(0), N, H, layer.h_n, layer.h_n, layer.h_mask,
                              operand + int64_t(i) * N * H});
    }
    const auto launch = [&](auto kernel) { launch_grid(machine, shape, cut, kernel, loop); };
    if constexpr (kExact)
      launch(shape.m_tiles == 2 ? grid_forward<Cell, T, true, 2, 1>
                                : grid_forward<Cell, T, true, 4, 1>);
    else if (shape.tiles == 2)
      launch(shape.m_tiles == 2 ? grid_forward<Cell, T, false, 2, 2>
                                : grid_forward<Cell, T, false, 4, 2>);
    else
      launch(shape.m_tiles == 2 ? grid_forward<Cell, T, false, 2, 1>
                                : grid_forward<Cell, T, false, 4, 1>);
  }));
}

}  // namespace fused_rnn::cuda
