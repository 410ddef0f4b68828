// How a thread's share of the batch walks through time: which rows are live at a step, and where
// they lie. Shared by forward and backward.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::kClear;
using fused_rnn::kCut;
using fused_rnn::kHold;
using fused_rnn::Layer;
using fused_rnn::Share;

// Hands out pieces of one block of memory. Without a block it only adds up their sizes, so that
// the code that takes the pieces is the code that computes how much is needed.
struct Arena {
  char* base = nullptr;
  size_t used = 0;

  template <class X>
  X* take(int64_t count) {
    X* piece = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += (size_t(count) * sizeof(X) + 63) / 64 * 64;
    return piece;
  }
};

inline int64_t row_of(Share share, int64_t i) { return share.first + i * share.stride; }

struct Step {
  const Layer& layer;
  int64_t t;

  // The step'th step in the order in which forward runs.
  Step(const Layer& layer, int64_t step)
      : layer(layer), t(layer.reverse ? layer.T - 1 - step : step) {}

  uint8_t control(int64_t n) const { return layer.control ? layer.control[t * layer.N + n] : 0; }
  bool holds(int64_t n) const {
    return (control(n) & kHold) || (layer.rows && layer.rows[t * layer.N + n] < 0);
  }
  // Row of (t, n) in gx, h, c, saved; -1 where the step has none.
  int64_t index(int64_t n) const {
    return layer.rows ? layer.rows[t * layer.N + n] : t * layer.N + n;
  }
};

// Cuts `count` rows into the fewest tiles that fit, of nearly equal size, and calls
// run(first, rows) for each.
template <class Run>
void for_each_tile(int64_t count, int vectors, Run run) {
  const int64_t tiles = (count + tile_rows(vectors) - 1) / tile_rows(vectors);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * count / tiles;
    run(first, int((tile + 1) * count / tiles - first));
  }
}

template <class T>
void zero_row(void* base, int64_t index, int64_t width) {
  if (base && index >= 0) memset(static_cast<T*>(base) + index * width, 0, width * sizeof(T));
}

// out row i = sum over k of x[i][k] * weights, plain GEMM over panels of one gate:
// store(i, unit, lanes, value) receives each vector.
template <class A, class Store>
void multiply(const Panels<A>& panels, const A* const* x, int64_t count, Store store) {
  constexpr int64_t kWidth = Vec<A>::kWidth;
  alignas(kVectorBytes) A out[kMaxRows * kMaxVectors * kWidth];
  for (int64_t p = 0; p < panels.count(); ++p) {
    const int vectors = panels.vectors(p);
    for_each_tile(count, vectors, [&](int64_t first, int rows) {
      find_tile<A>(vectors, rows)(panels.panel_weights(p), nullptr, x + first, panels.K, out);
      for (int i = 0; i < rows; ++i)
        for (int v = 0; v < vectors; ++v) {
          const int64_t unit = (panels.first_block(p) + v) * kWidth;
          store(first + i, unit, panels.units - unit,
                Vec<A>::load(out + (i * vectors + v) * kWidth));
        }
    });
  }
}

}  // namespace FUSED_RNN_NAMESPACE
