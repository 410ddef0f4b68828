// What every CUDA algorithm reads of a layer: dtypes, where the rows of a step stand, and what the
// host code of a loop needs from its machine.
#pragma once

#include <functional>

#include "../cells.h"
#include "../layer.h"
#include "cuda/primitives.cuh"

namespace fused_rnn::cuda {

// Gates, states and sums of the half types are float.
template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using arithmetic_t = typename ArithmeticOf<T>::type;

// Widened at load, rounded at store.
template <class T>
FUSED_RNN_DEVICE arithmetic_t<T> read(const T* base, int64_t at) {
  if constexpr (sizeof(T) == 2)
    return to_float(load(base + at));
  else
    return load(base + at);
}
template <class T>
FUSED_RNN_DEVICE void write(T* base, int64_t at, arithmetic_t<T> x) {
  if constexpr (sizeof(T) == 2)
    store(base + at, from_float<T>(x));
  else
    store(base + at, x);
}

// Host code of a loop runs over a Machine, which has memory, products and launches:
//   machine.memory<T>(count)                      scratch until forget(), not cleared
//   machine.forget()                              all of it may be used for something else
//   machine.multiply(sizes, a, b, out)            out = a b
//   machine.launch(kernel, units, rows, argument) kernel(argument), see Place
//   machine.begin(step), machine.end(step)        around a chunk of steps, by its first one
//
// Layers of a stack may run side by side: between fork(layers) and join(), what follows on(layer)
// waits for nothing but what was there before fork, its own, and at begin() the end of the same
// chunk of the layer before. Otherwise all runs in its order, and begin() and end() do nothing.
// Memory is kept until join().
//
// A loop on its way: a call is the next chunk of its steps, and says whether there is another one.
using Steps = std::function<bool()>;

inline void run_all(const Steps& steps) {
  while (steps()) continue;
}

// A product: out [m, n] = a b, all dense and row-major; a is [m, k], or [k, m] where it is
// transposed, b is [k, n], or [n, k]. Operands have the dtype of the tensors, sums are made in the
// arithmetic type.
struct Sizes {
  int64_t m, n, k;
  bool a_transposed = false, b_transposed = false;
};

// The same product as a BLAS takes it, which counts columns first and so reads every matrix as its
// transpose: out' = b' a'. Its first operand is b. A stride is from column to column.
struct ColumnMajor {
  bool first_transposed, second_transposed;
  int64_t m, n, k, first_stride, second_stride, out_stride;

  explicit ColumnMajor(Sizes s)
      : first_transposed(s.b_transposed),
        second_transposed(s.a_transposed),
        m(s.n),
        n(s.m),
        k(s.k),
        first_stride(s.b_transposed ? s.k : s.n),
        second_stride(s.a_transposed ? s.m : s.k),
        out_stride(s.n) {}
};

// Where the rows of one step stand.
struct StepRows {
  const uint8_t* control;  // [N], or null
  const int32_t* rows;     // [N], or null
  const uint8_t* keep;     // [N, states], or null
  int64_t first;           // without rows, the first row; the others follow
  int64_t states;          // of one row, all states together

  FUSED_RNN_DEVICE uint8_t bits(int64_t n) const {
    return control ? load(control + n) : uint8_t(0);
  }
  // Of x, h, c and saved; -1 where the step has none.
  FUSED_RNN_DEVICE int64_t index(int64_t n) const { return rows ? load(rows + n) : first + n; }
  FUSED_RNN_DEVICE bool holds(int64_t n) const { return (bits(n) & kHold) || index(n) < 0; }
  FUSED_RNN_DEVICE bool clears(int64_t n) const { return (bits(n) & kClear) && !holds(n); }
  // Whether element `state` of all states of a row stays as it was.
  FUSED_RNN_DEVICE bool keeps(int64_t n, int64_t state) const {
    return keep && load(keep + n * states + state);
  }
  // What becomes of such an element. Shares, carry [states] or null, are the same in every step.
  template <class A>
  FUSED_RNN_DEVICE A after(const void* keep_share, int64_t n, int64_t state, A before,
                           A computed) const {
    if (keep_share)
      return computed + load(static_cast<const A*>(keep_share) + state) * (before - computed);
    return keeps(n, state) ? before : computed;
  }
  // Whether a gradient reaches the state before.
  FUSED_RNN_DEVICE bool passes(int64_t n) const {
    return !holds(n) && !(bits(n) & (kClear | kCut));
  }
};

// What acts inside the loop, for all steps.
struct Loop {
  const uint8_t* control;
  const int32_t* rows;
  const uint8_t* keep;
  const void* keep_share;
  int64_t T, N, states;
  bool reverse;

  Loop() = default;
  Loop(const Layer& a, int64_t states)
      : control(a.control),
        rows(a.rows),
        keep(a.keep),
        keep_share(a.keep_share),
        T(a.T),
        N(a.N),
        states(states),
        reverse(a.reverse) {}

  // The step'th step in the order in which forward runs.
  FUSED_RNN_FN StepRows step(int64_t step) const {
    const int64_t t = reverse ? T - 1 - step : step;
    return {control ? control + t * N : nullptr, rows ? rows + t * N : nullptr,
            keep ? keep + t * N * states : nullptr, t * N, states};
  }
};

// A hidden state on its way into the recurrent product, or a gradient on its way back.
template <class T>
FUSED_RNN_DEVICE arithmetic_t<T> masked(const T* h_mask, int64_t at, arithmetic_t<T> x) {
  return h_mask ? x * read(h_mask, at) : x;
}

inline constexpr int kThreads = 128;

// Of a pointwise kernel: a block owns kThreads units of one row and of every stride'th row after
// it, a thread one of these units.
struct Place {
  int64_t unit, first_row, stride;
  FUSED_RNN_DEVICE Place()
      : unit(int64_t(block_index().x) * kThreads + thread_index().x),
        first_row(block_index().y),
        stride(grid_size().y) {}
};

}  // namespace fused_rnn::cuda
