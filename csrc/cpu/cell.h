// A whole step of a cell for a few rows: both products and the update in one pass over the
// weights as torch stores them. Such a step reads each weight once and does nothing else of size,
// so packing would double the work.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::CellArgs;

inline constexpr int kCellRows = 4;  // that share a block of weights while it is in L1

// A vector's width of rows of a weight matrix.
template <class T>
struct WeightRows {
  const T* first;
  int64_t K;
  int count;  // the rows after these are not there

  // sum[i] += lanes of weight[i] * x
  template <class V>
  FUSED_RNN_FN void multiply(const T* x, V* sum) const {
    const T* row[V::kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < V::kWidth; ++i) row[i] = first + (i < count ? i : 0) * K;
    // As many as there are registers for, with the sums.
    int64_t k = multiply<V::kWidth / 2>(x, row, 0, sum);
    k = multiply<(V::kWidth + 3) / 4>(x, row, k, sum);
    k = multiply<1>(x, row, k, sum);
    if (k == K) return;
    const V input = V::load(x + k, K - k);
#pragma GCC unroll 16
    for (int i = 0; i < V::kWidth; ++i) sum[i] = V::load(row[i] + k, K - k) * input + sum[i];
  }

 private:
  // From `k` on, so many vectors of a row at a time, one cache line after the other: rows come from
  // L2. Returns where fewer are left.
  template <int kVectors, class V>
  FUSED_RNN_FN int64_t multiply(const T* x, const T* const* row, int64_t k, V* sum) const {
    static_assert(kVectors > 0);
    for (; k + kVectors * V::kWidth <= K; k += kVectors * V::kWidth) {
      V input[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) input[j] = V::load(x + k + j * V::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < V::kWidth; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j)
          sum[i] = V::load(row[i] + k + j * V::kWidth) * input[j] + sum[i];
    }
    return k;
  }
};

template <class Cell, class T>
void run_cell(const CellArgs& a) {
  using A = typename Arithmetic<T>::type;
  using V = Vec<A>;
  using X = Several<A, 1>;
  constexpr int kGates = Cell::kGates;
  constexpr int64_t kWidth = V::kWidth;
  const auto at = [](const void* base, int64_t offset) {
    return base ? static_cast<const T*>(base) + offset : nullptr;
  };
  const auto bias = [&](V sum, const void* base, int64_t offset, int64_t n) {
    return base ? sum + V::load(at(base, offset), n) : sum;
  };
  for (int64_t first = 0; first < a.N; first += kCellRows)
    for (int64_t unit = 0; unit < a.H; unit += kWidth) {
      const int64_t n = a.H - unit < kWidth ? a.H - unit : kWidth;
      const int rows = int(a.N - first < kCellRows ? a.N - first : kCellRows);
      X gx[kCellRows][kGates], gh[kCellRows][kGates];
      for (int g = 0; g < kGates; ++g) {
        const int64_t gate = g * a.H + unit;
        const WeightRows<T> ih{at(a.w_ih, gate * a.I), a.I, int(n)};
        const WeightRows<T> hh{at(a.w_hh, gate * a.H), a.H, int(n)};
        // Where only the sum of the halves counts, they are summed as they come.
        const bool apart = Cell::kSplitsGates && g == kGates - 1;
        for (int i = 0; i < rows; ++i) {
          V sum[kWidth];
          for (V& s : sum) s = V(0);
          ih.multiply(at(a.x, (first + i) * a.I), sum);
          V& x = gx[i][g].part[0];
          V& h = gh[i][g].part[0];
          x = V(0);
          if (apart) {
            x = lane_sums<kWidth / 2>(sum);
            for (V& s : sum) s = V(0);
          }
          hh.multiply(at(a.h, (first + i) * a.H), sum);
          h = bias(lane_sums<kWidth / 2>(sum), a.b_hh, gate, n);
          x = bias(x, a.b_ih, gate, n);
        }
      }
      for (int i = 0; i < rows; ++i) {
        const int64_t offset = (first + i) * a.H + unit;
        X s[Cell::kStates], s1[Cell::kStates], saved[4];
        if constexpr (Cell::kHiddenIsElementwise) s[0].part[0] = V::load(at(a.h, offset), n);
        if constexpr (Cell::kStates == 2) s[1].part[0] = V::load(at(a.c, offset), n);
        Cell::forward(gx[i], gh[i], s, s1, saved);
        s1[0].part[0].store(static_cast<T*>(a.h1) + offset, n);
        if constexpr (Cell::kStates == 2) s1[1].part[0].store(static_cast<T*>(a.c1) + offset, n);
      }
    }
}

}  // namespace FUSED_RNN_NAMESPACE
