// What the forwards share that keep W_hh on the chip: a layer's operands, one unit of one row of
// the batch from step to step, and the host's loop.
#pragma once

#include <algorithm>
#include <vector>

#include "stepwise_forward.cuh"

namespace fused_rnn::cuda {

template <class T>
struct ForwardLayer {
  using A = arithmetic_t<T>;
  Loop loop;
  int64_t first, count;  // the steps to run
  int64_t N, H;
  const A* gx;  // products of the input from row gx_first on, or null: x is the product
  int64_t gx_first;
  const T *x, *w_hh, *b_ih, *b_hh;  // biases: or null
  const T* h_mask;                  // [N, H], or null
  T *h, *c, *saved;                 // c, saved: or null
  A *h_n, *c_n;                     // the carried states, read before and written after

  FUSED_RNN_FN StepRows step(int64_t i) const { return loop.step(first + i); }
  // What the first product reads of a row.
  FUSED_RNN_DEVICE A first_operand(int64_t n, int64_t u) const {
    return step(0).clears(n) ? A(0) : masked(h_mask, n * H + u, read(h_n, n * H + u));
  }
};

template <class Cell, class T>
struct Biases {
  using A = arithmetic_t<T>;
  A x[Cell::kGates], h[Cell::kGates];

  FUSED_RNN_DEVICE void load(const ForwardLayer<T>& a, int64_t u, bool exists) {
    FUSED_RNN_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) {
      x[g] = exists && a.b_ih ? read(a.b_ih, g * a.H + u) : A(0);
      h[g] = exists && a.b_hh ? read(a.b_hh, g * a.H + u) : A(0);
    }
  }
};

// A unit of a row, in registers.
template <class Cell, class T>
struct ForwardUnit {
  using A = arithmetic_t<T>;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;

  A gx[kGates], states[kStates];

  FUSED_RNN_DEVICE void load_states(const ForwardLayer<T>& a, int64_t n, int64_t u) {
    states[0] = read(a.h_n, n * a.H + u);
    if constexpr (kStates == 2) states[1] = read(a.c_n, n * a.H + u);
  }
  FUSED_RNN_DEVICE void fetch(const ForwardLayer<T>& a, const StepRows& now, int64_t n, int64_t u) {
    if (now.holds(n)) return;
    const int64_t index = now.index(n);
    FUSED_RNN_UNROLL
    for (int g = 0; g < kGates; ++g)
      gx[g] = a.gx ? read(a.gx, ((index - a.gx_first) * kGates + g) * a.H + u)
                   : read(a.x, (index * kGates + g) * a.H + u);
  }
  // The states after a step whose recurrent product is `gh`, and what is saved of it.
  FUSED_RNN_DEVICE void update(const ForwardLayer<T>& a, const StepRows& now,
                               const Biases<Cell, T>& bias, int64_t n, int64_t u, A (&gh)[kGates],
                               A (&saved)[4]) {
    if (now.holds(n)) return;
    A x[kGates], s[kStates], s1[kStates];
    FUSED_RNN_UNROLL
    for (int g = 0; g < kGates; ++g) x[g] = gx[g] + bias.x[g], gh[g] += bias.h[g];
    FUSED_RNN_UNROLL
    for (int i = 0; i < kStates; ++i) s[i] = now.clears(n) ? A(0) : states[i];
    Cell::forward(x, gh, s, s1, saved);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kStates; ++i)
      states[i] = now.after(a.loop.keep_share, n, i * a.H + u, s[i], s1[i]);
  }
  // What the next step's product reads.
  FUSED_RNN_DEVICE A operand(const ForwardLayer<T>& a, const StepRows& next, int64_t n,
                             int64_t u) const {
    return next.clears(n) ? A(0) : masked(a.h_mask, n * a.H + u, states[0]);
  }
  FUSED_RNN_DEVICE void write_outputs(const ForwardLayer<T>& a, const StepRows& now, int64_t n,
                                      int64_t u, const A (&saved)[4]) const {
    const int64_t index = now.index(n);
    if (index < 0) return;
    const bool holds = now.holds(n);
    write(a.h, index * a.H + u, holds ? A(0) : states[0]);
    if constexpr (kStates == 2)
      if (a.c) write(a.c, index * a.H + u, holds ? A(0) : states[1]);
    if (a.saved) FUSED_RNN_UNROLL
    for (int i = 0; i < kSaved; ++i)
      write(a.saved, (index * kSaved + i) * a.H + u, holds ? A(0) : saved[i]);
  }
  FUSED_RNN_DEVICE void write_states(const ForwardLayer<T>& a, int64_t n, int64_t u) const {
    write(a.h_n, n * a.H + u, states[0]);
    if constexpr (kStates == 2) write(a.c_n, n * a.H + u, states[1]);
  }
};

// What a kernel reads of a layer, before the first launch.
template <class Cell, class T>
ForwardLayer<T> forward_layer(const ForwardArgs& a, const arithmetic_t<T>* gx) {
  using A = arithmetic_t<T>;
  const auto matrix = [](const void* x) { return static_cast<const T*>(x); };
  ForwardLayer<T> layer{};
  layer.loop = Loop(a, Cell::kStates * a.H);
  layer.N = a.N;
  layer.H = a.H;
  layer.gx = gx;
  layer.x = matrix(a.x);
  layer.w_hh = matrix(a.w_hh);
  layer.b_ih = matrix(a.b_ih);
  layer.b_hh = matrix(a.b_hh);
  layer.h_mask = matrix(a.h_mask);
  layer.h = static_cast<T*>(a.h);
  layer.c = static_cast<T*>(a.c);
  layer.saved = static_cast<T*>(a.saved);
  layer.h_n = static_cast<A*>(a.h_n);
  layer.c_n = static_cast<A*>(a.c_n);
  return layer;
}

// launch(layers) for as many steps at a time as have their products of the input: as many in each
// direction, since what they depend on is the same.
template <class Cell, class T, class Machine, class Launch>
Steps forward_of(Directions<ForwardArgs> directions, Machine& machine, Launch launch) {
  std::vector<InputProducts<T, Machine>> inputs;
  std::vector<ForwardLayer<T>> layers;
  for (const ForwardArgs& a : directions) {
    inputs.emplace_back(a, Cell::kGates, machine);
    layers.push_back(forward_layer<Cell, T>(a, inputs.back().data()));
    start_states<Cell, T>(a, static_cast<T*>(nullptr), machine);
  }
  const int64_t steps = directions[0].T;
  int64_t first = 0;
  return [=, &machine]() mutable {
    int64_t count = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
      layers[i].first = first;
      layers[i].count = count = inputs[i].make(first);
      layers[i].gx_first = inputs[i].first_row(first);
    }
    launch(layers);
    machine.end(first);
    first += count;
    return first < steps;
  };
}

}  // namespace fused_rnn::cuda
