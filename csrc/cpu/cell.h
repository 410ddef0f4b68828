// A whole step of a cell for a few rows: both products and the update in one pass over the
// weights as torch stores them. Such a step reads each weight once and does nothing else of size,
// so packing would double the work.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::CellArgs;

inline constexpr int kDotRows = 8;  // weight rows at a time: as many independent sums

// out[i] = weight[i] . x for `rows` <= kDotRows rows of `weight`, each K long
template <class T, class A = typename Arithmetic<T>::type>
FUSED_RNN_FN void dot_rows(const T* weight, const T* x, int64_t K, int rows, A* out) {
  using V = Vec<A>;
  V sum[kDotRows];
  for (V& s : sum) s = V(0);
  const T* row[kDotRows];
  for (int i = 0; i < kDotRows; ++i) row[i] = weight + (i < rows ? i : 0) * K;
  int64_t k = 0;
  for (; k + V::kWidth <= K; k += V::kWidth) {
    const V input = V::load(x + k);
#pragma GCC unroll 8
    for (int i = 0; i < kDotRows; ++i) {
      sum[i] = V::load(row[i] + k) * input + sum[i];
      __builtin_prefetch(row[i] + k + kDotRows * K);  // the next rows' turn comes at once
    }
  }
  if (k < K) {
    const V input = V::load(x + k, K - k);
#pragma GCC unroll 8
    for (int i = 0; i < kDotRows; ++i) sum[i] = V::load(row[i] + k, K - k) * input + sum[i];
  }
  for (int i = 0; i < rows; ++i) out[i] = sum[i].total();
}

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
  for (int64_t unit = 0; unit < a.H; unit += kWidth) {
    const int64_t n = a.H - unit < kWidth ? a.H - unit : kWidth;
    for (int64_t row = 0; row < a.N; ++row) {
      alignas(kVectorBytes) A input[kGates][kWidth] = {}, hidden[kGates][kWidth] = {};
      for (int g = 0; g < kGates; ++g)
        for (int64_t i = 0; i < n; i += kDotRows) {
          const int64_t gate = g * a.H + unit + i;
          const int rows = int(n - i < kDotRows ? n - i : kDotRows);
          dot_rows(at(a.w_ih, gate * a.I), at(a.x, row * a.I), a.I, rows, input[g] + i);
          dot_rows(at(a.w_hh, gate * a.H), at(a.h, row * a.H), a.H, rows, hidden[g] + i);
        }
      const int64_t offset = row * a.H + unit;
      X gx[kGates], gh[kGates], s[Cell::kStates], s1[Cell::kStates], saved[4];
      for (int g = 0; g < kGates; ++g) {
        gx[g].part[0] = V::load(input[g]);
        gh[g].part[0] = V::load(hidden[g]);
        if (a.b_ih) gx[g].part[0] = gx[g].part[0] + V::load(at(a.b_ih, g * a.H + unit), n);
        if (a.b_hh) gh[g].part[0] = gh[g].part[0] + V::load(at(a.b_hh, g * a.H + unit), n);
      }
      if constexpr (Cell::kHiddenIsElementwise) s[0].part[0] = V::load(at(a.h, offset), n);
      if constexpr (Cell::kStates == 2) s[1].part[0] = V::load(at(a.c, offset), n);
      Cell::forward(gx, gh, s, s1, saved);
      s1[0].part[0].store(static_cast<T*>(a.h1) + offset, n);
      if constexpr (Cell::kStates == 2) s1[1].part[0].store(static_cast<T*>(a.c1) + offset, n);
    }
  }
}

}  // namespace FUSED_RNN_NAMESPACE
