// What forward and backward of the cells with layer norms share: sums along a row, and the norms'
// parameters as the loops read them.
#pragma once

#include "rows.h"

namespace FUSED_RNN_NAMESPACE {

FUSED_RNN_FN float square_root(float x) { return __builtin_sqrtf(x); }
FUSED_RNN_FN double square_root(double x) { return __builtin_sqrt(x); }

// The sum of `count` values: term(at, lanes) is a vector of them, whose lanes from `lanes` on are
// 0.
template <class A, class Term>
FUSED_RNN_FN A sum_of(int64_t count, const Term& term) {
  using V = Vec<A>;
  constexpr int64_t kWidth = V::kWidth;
  constexpr int kSums = 4;  // side by side: an addition waits four cycles for the one before
  V sum[kSums] = {V(0), V(0), V(0), V(0)};
  int64_t at = 0;
  for (; at + kSums * kWidth <= count; at += kSums * kWidth)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sum[i] = sum[i] + term(at + i * kWidth, kWidth);
  for (; at < count; at += kWidth) sum[0] = sum[0] + term(at, count - at);
  A lanes[kWidth];
  ((sum[0] + sum[1]) + (sum[2] + sum[3])).store(lanes);
  for (int64_t apart = kWidth / 2; apart; apart /= 2)
    for (int64_t i = 0; i < apart; ++i) lanes[i] += lanes[i + apart];
  return lanes[0];
}

// Takes the mean of `count` values away; they go into `to`, which may be `from`. Returns
// 1 / sqrt(variance + eps), which is left to multiply by.
template <class A>
A centre(const A* from, A* to, int64_t count, A eps) {
  using V = Vec<A>;
  const A mean =
      sum_of<A>(count, [&](int64_t at, int64_t n) { return V::load(from + at, n); }) / A(count);
  const A squares = sum_of<A>(count, [&](int64_t at, int64_t n) {
    (V::load(from + at, n) - V(mean)).store(to + at, n);
    const V x = V::load(to + at, n);
    return x * x;
  });
  return 1 / square_root(squares / A(count) + eps);
}

// A flag that a function takes as an argument and a template as a parameter.
template <bool kValue>
struct Constant {
  constexpr operator bool() const { return kValue; }
};

// Of a cell with layer norms.
template <class Cell>
struct Norms {
  static constexpr int kGroups = int(sizeof(Cell::kGroups) / sizeof(int));
  static constexpr int kStats = kGroups + Cell::kNormsC;
  // Gates in saved, before what is normalised: the product, then c.
  static constexpr int kKept = Cell::kSaved - Cell::kGates - Cell::kNormsC;

  // The group that a gate belongs to.
  static constexpr int group(int gate) {
    int found = 0;
    for (int end = Cell::kGroups[0]; end <= gate; end += Cell::kGroups[found]) ++found;
    return found;
  }
};

// A norm's gain and bias in the type they are computed in.
template <class A>
struct Affine {
  A *gain, *bias;

  Affine(int64_t width, Arena& arena) : gain(arena.take<A>(width)), bias(arena.take<A>(width)) {}

  template <class T>
  void load(const void* gains, const void* biases, int64_t width) const {
    copy_row(static_cast<const T*>(gains), gain, width);
    if (biases)
      copy_row(static_cast<const T*>(biases), bias, width);
    else
      memset(bias, 0, sizeof(A) * size_t(width));
  }
  FUSED_RNN_FN Vec<A> apply(Vec<A> x, int64_t at, int64_t n) const {
    return x * Vec<A>::load(gain + at, n) + Vec<A>::load(bias + at, n);
  }
};

}  // namespace FUSED_RNN_NAMESPACE
