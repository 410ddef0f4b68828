// Every product of a layer: a panel of one operand, packed, times a few rows of the other.
//
// A panel holds V vectors of outputs for all K inputs, [K][V][kWidth], so that the inner loop
// reads it front to back. Each row comes by its own pointer: held rows are left out and cleared
// rows point at zeros, without copies. Every output is a chain of multiply-adds in the order of k,
// or the sum of such chains, whatever the tile, so results do not depend on how the work was cut.
#pragma once

#include "arena.h"
#include "simd.h"

namespace FUSED_RNN_NAMESPACE {

inline constexpr int kMaxVectors = 4;  // of outputs in a panel
inline constexpr int kMaxRows = 8;     // in a tile
inline constexpr int kAhead = 12;      // rows of a panel to prefetch; it may be in L2
// Terms of a sum in one chain at most: rounding grows with a chain's length.
inline constexpr int64_t kChain = 512;

// Rows whose accumulators fit the registers beside V weight vectors and a broadcast state.
constexpr int tile_rows(int vectors) {
  const int rows = (kRegisters - 1 - (kRegisters > 16 ? vectors : 1)) / vectors;
  return rows < kMaxRows ? rows : kMaxRows;
}

// A width rounded up to whole vectors.
template <class A>
int64_t padded(int64_t width) {
  constexpr int64_t kWidth = Vec<A>::kWidth;
  return (width + kWidth - 1) / kWidth * kWidth;
}

// A distance of rows of at least `width`, of an odd number of vectors: rows that lie a power of two
// apart share one set of the cache, and push each other out.
template <class A>
int64_t row_distance(int64_t width) {
  constexpr int64_t kWidth = Vec<A>::kWidth;
  return (padded<A>(width) / kWidth | 1) * kWidth;
}

// The part'th of `parts` nearly equal parts of [0, count).
struct Range {
  int64_t begin, end;
  explicit Range(int64_t count, int64_t part = 0, int64_t parts = 1)
      : begin(count * part / parts), end(count * (part + 1) / parts) {}
  int64_t size() const { return end - begin; }
};

// What a tile's sums are added to, or where they go: row n at data + n * stride.
template <class A>
struct TileRows {
  A* data;
  int64_t stride;
};

// out[n][v] = (sum over k of panel[k][v] * x[n][k * kStep]) + more[n][v]; no more is zero.
template <class A, int kStep, int V, int N>
void multiply_tile(const A* panel, TileRows<const A> more, const A* const* x, int64_t K,
                   TileRows<A> out) {
  constexpr int kWidth = Vec<A>::kWidth;
  Vec<A> sum[N][V];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[n][v] = Vec<A>(0);
  const A* row[N];
  for (int n = 0; n < N; ++n) row[n] = x[n];
  for (int64_t k = 0; k < K; ++k, panel += V * kWidth) {
    Vec<A> weight[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      weight[v] = Vec<A>::load(panel + v * kWidth);
      __builtin_prefetch(panel + (kAhead * V + v) * kWidth);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec<A> state(row[n][k * kStep]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[n][v] = weight[v] * state + sum[n][v];
    }
  }
  if (more.data) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sum[n][v] = sum[n][v] + Vec<A>::load(more.data + n * more.stride + v * kWidth);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[n][v].store(out.data + n * out.stride + v * kWidth);
}

template <class A>
using MultiplyTile = void (*)(const A*, TileRows<const A>, const A* const*, int64_t, TileRows<A>);

template <class A, int kStep, int V, int N>
MultiplyTile<A> find_tile(int rows) {
  if constexpr (N > 1) {
    if (rows < N) return find_tile<A, kStep, V, N - 1>(rows);
  }
  return multiply_tile<A, kStep, V, N>;
}

// For rows whose values lie kStep apart.
template <class A, int kStep = 1>
MultiplyTile<A> find_tile(int vectors, int rows) {
  switch (vectors) {
    case 1: return find_tile<A, kStep, 1, tile_rows(1)>(rows);
    case 2: return find_tile<A, kStep, 2, tile_rows(2)>(rows);
    case 3: return find_tile<A, kStep, 3, tile_rows(3)>(rows);
    default: return find_tile<A, kStep, 4, tile_rows(4)>(rows);
  }
}

// The sums of a tile of more than kChain terms.
template <class A>
void multiply_chains(MultiplyTile<A> tile, int vectors, int rows, const A* panel,
                     TileRows<const A> more, const A* const* x, int64_t K, TileRows<A> out) {
  const A* from[kMaxRows];
  for (int64_t k = 0; k < K; k += kChain) {
    for (int n = 0; n < rows; ++n) from[n] = x[n] + k;
    tile(panel + k * vectors * Vec<A>::kWidth, more, from, K - k < kChain ? K - k : kChain, out);
    more = {out.data, out.stride};
  }
}

// A tile of any K.
template <class A>
FUSED_RNN_FN void multiply_panel(int vectors, int rows, const A* panel, TileRows<const A> more,
                                 const A* const* x, int64_t K, TileRows<A> out) {
  const MultiplyTile<A> tile = find_tile<A>(vectors, rows);
  if (K <= kChain)
    tile(panel, more, x, K, out);
  else
    multiply_chains(tile, vectors, rows, panel, more, x, K, out);
}

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

// A weight matrix as panels. An output is (gate, unit); a panel holds every gate of `blocks`
// vectors of neighbouring units, so that one tile ends with all that a state update needs.
template <class A>
struct Panels {
  int64_t gates, units, K;
  int blocks;  // vectors of units in a panel; the last panel may have fewer
  A* weights = nullptr;
  A* bias = nullptr;  // zero where there is none

  static constexpr int64_t kWidth = Vec<A>::kWidth;

  Panels(int64_t gates, int64_t units, int64_t K)
      : gates(gates), units(units), K(K), blocks(int(kMaxVectors / gates)) {}

  void take(Arena& arena, bool with_bias) {
    weights = arena.take<A>(size());
    bias = with_bias ? arena.take<A>(bias_size()) : nullptr;
  }

  int64_t unit_blocks() const { return (units + kWidth - 1) / kWidth; }
  int64_t count() const { return (unit_blocks() + blocks - 1) / blocks; }
  int64_t size() const { return unit_blocks() * gates * K * kWidth; }
  int64_t bias_size() const { return unit_blocks() * gates * kWidth; }

  int64_t first_block(int64_t panel) const { return panel * blocks; }
  int block_count(int64_t panel) const {
    const int64_t left = unit_blocks() - first_block(panel);
    return int(left < blocks ? left : blocks);
  }
  // The panel that comes i-th in a sweep over a part of them. Weights are swept again at every
  // step, and may fill L2: there and back finds in it what the last sweep read last, where always
  // the same way finds nothing.
  int64_t in_sweep(Range part, int64_t i, int64_t sweep) const {
    return sweep & 1 ? part.end - 1 - i : part.begin + i;
  }
  int vectors(int64_t panel) const { return int(gates) * block_count(panel); }
  A* panel_weights(int64_t panel) const {
    return weights + first_block(panel) * gates * K * kWidth;
  }
  // The same for every row.
  TileRows<const A> panel_bias(int64_t panel) const {
    return {bias ? bias + first_block(panel) * gates * kWidth : nullptr, 0};
  }

  // matrix [gates*units, K], as torch stores w_hh
  template <class T>
  void pack(int64_t panel, const T* matrix, const T* bias_vector) {
    for (int b = 0; b < block_count(panel); ++b)
      for (int64_t gate = 0; gate < gates; ++gate) pack_block(matrix, bias_vector, panel, b, gate);
  }

  // matrix [K, units], read as its transpose: what the backward multiplies by. One gate.
  template <class T>
  void pack_transposed(int64_t panel, const T* matrix) {
    const int64_t unit = first_block(panel) * kWidth, stride = block_count(panel) * kWidth;
    A* to = panel_weights(panel);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t b = 0; b < block_count(panel); ++b) {
        const int64_t u = unit + b * kWidth;
        Vec<A>::load(matrix + k * units + u, units - u).store(to + k * stride + b * kWidth);
      }
  }

 private:
  template <class T>
  void pack_block(const T* matrix, const T* bias_vector, int64_t panel, int b, int64_t gate) {
    const int64_t unit = (first_block(panel) + b) * kWidth;
    const int64_t stride = int64_t(vectors(panel)) * kWidth;
    const int64_t column = (b * gates + gate) * kWidth;
    A* to = panel_weights(panel) + column;
    const int64_t rows = units - unit;
    for (int64_t k0 = 0; k0 < K; k0 += kWidth) {
      const int64_t n = K - k0 < kWidth ? K - k0 : kWidth;
      Vec<A> square[kWidth];
#pragma GCC unroll 16
      for (int lane = 0; lane < kWidth; ++lane)
        square[lane] = lane < rows ? Vec<A>::load(matrix + (gate * units + unit + lane) * K + k0, n)
                                   : Vec<A>(0);
      transpose<kWidth / 2>(square);
      for (int64_t k = 0; k < n; ++k) square[k].store(to + (k0 + k) * stride);
    }
    if (!bias) return;
    A* bias_to = bias + first_block(panel) * gates * kWidth + column;
    const Vec<A> values =
        bias_vector ? Vec<A>::load(bias_vector + gate * units + unit, rows) : Vec<A>(0);
    values.store(bias_to);
  }
};

// Rows of x times a part of a matrix of one gate: store(row, unit, lanes, value) receives each
// vector.
template <class A, class Store>
void multiply(const Panels<A>& panels, Range part, const A* const* x, int64_t count, int64_t sweep,
              Store store) {
  constexpr int64_t kWidth = Vec<A>::kWidth;
  alignas(kVectorBytes) A out[kMaxRows * kMaxVectors * kWidth];
  for (int64_t i = 0; i < part.size(); ++i) {
    const int64_t p = panels.in_sweep(part, i, sweep);
    const int vectors = panels.vectors(p);
    for_each_tile(count, vectors, [&](int64_t first, int rows) {
      multiply_panel<A>(vectors, rows, panels.panel_weights(p), panels.panel_bias(p), x + first,
                        panels.K, {out, vectors * kWidth});
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
