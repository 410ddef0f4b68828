// One step of a cell whose two products are given, forward and backward: a thread owns one unit of
// a row.
#pragma once

#include "layer.cuh"

namespace fused_rnn::cuda {

template <class Cell, class T>
FUSED_RNN_DEVICE void step_unit(const StepArgs& a, int64_t n, int64_t unit) {
  using A = arithmetic_t<T>;
  constexpr int G = Cell::kGates;
  const auto get = [](const void* x, int64_t at) { return read(static_cast<const T*>(x), at); };
  const auto put = [](void* to, int64_t at, A x) { write(static_cast<T*>(to), at, x); };
  const int64_t at = n * a.H + unit;
  A gx[G], gh[G], s[Cell::kStates], s1[Cell::kStates], saved[4];
  for (int g = 0; g < G; ++g) {
    gx[g] = get(a.gx, (n * G + g) * a.H + unit);
    gh[g] = get(a.gh, (n * G + g) * a.H + unit);
  }
  if constexpr (Cell::kHiddenIsElementwise) s[0] = get(a.h, at);
  if constexpr (Cell::kStates == 2) s[1] = get(a.c, at);
  Cell::forward(gx, gh, s, s1, saved);
  put(a.h1, at, s1[0]);
  if constexpr (Cell::kStates == 2) put(a.c1, at, s1[1]);
  if (a.saved)
    for (int i = 0; i < Cell::kSaved; ++i)
      put(a.saved, (n * Cell::kSaved + i) * a.H + unit, saved[i]);
}

template <class Cell, class T>
FUSED_RNN_DEVICE void step_backward_unit(const StepArgs& a, int64_t n, int64_t unit) {
  using A = arithmetic_t<T>;
  constexpr int G = Cell::kGates;
  const auto get = [](const void* x, int64_t at) {
    return x ? read(static_cast<const T*>(x), at) : A(0);
  };
  const auto put = [](void* to, int64_t at, A x) {
    if (to) write(static_cast<T*>(to), at, x);
  };
  const int64_t at = n * a.H + unit;
  A ds1[Cell::kStates], ds[Cell::kStates], s[Cell::kStates], s1[Cell::kStates], saved[4], dgx[G],
      dgh[G];
  ds1[0] = get(a.dh1, at);
  s[0] = get(a.h, at);
  s1[0] = get(a.h1, at);
  if constexpr (Cell::kStates == 2) {
    ds1[1] = get(a.dc1, at);
    s[1] = get(a.c, at);
    s1[1] = get(a.c1, at);
  }
  for (int i = 0; i < Cell::kSaved; ++i)
    saved[i] = get(a.saved, (n * Cell::kSaved + i) * a.H + unit);
  Cell::backward(ds1, saved, s, s1, dgx, dgh, ds);
  for (int g = 0; g < G; ++g) {
    put(a.dgx, (n * G + g) * a.H + unit, dgx[g]);
    put(a.dgh, (n * G + g) * a.H + unit, dgh[g]);
  }
  put(a.dh, at, ds[0]);
  if constexpr (Cell::kStates == 2) put(a.dc, at, ds[1]);
}

template <class Cell, class T, bool kBackward>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1) one_step(StepArgs a) {
  const Place place;
  if (place.unit >= a.H) return;
  for (int64_t n = place.first_row; n < a.N; n += place.stride) {
    if constexpr (kBackward)
      step_backward_unit<Cell, T>(a, n, place.unit);
    else
      step_unit<Cell, T>(a, n, place.unit);
  }
}

}  // namespace fused_rnn::cuda
