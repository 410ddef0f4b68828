// One step of a cell whose two products are at hand, forward and backward: what the cell modules
// run. Only the pointwise part is here; the products are torch's GEMMs.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::StepArgs;

template <class Cell, class T>
struct Steps {
  using A = typename Arithmetic<T>::type;
  using V = Vec<A>;
  using X = Several<A, 1>;
  static constexpr int64_t kWidth = V::kWidth;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;

  static X load(const void* base, int64_t at, int64_t n) {
    X x;
    x.part[0] = V::load(static_cast<const T*>(base) + at, n);
    return x;
  }
  static X load_or_zero(const void* base, int64_t at, int64_t n) {
    return base ? load(base, at, n) : X(0);
  }
  static void store(const X& x, void* base, int64_t at, int64_t n) {
    x.part[0].store(static_cast<T*>(base) + at, n);
  }

  static void forward(const StepArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t unit = 0; unit < a.H; unit += kWidth) {
        const int64_t n = a.H - unit, gate = row * kGates * a.H + unit, at = row * a.H + unit;
        X gx[kGates], gh[kGates], s[kStates], s1[kStates], saved[4];
        for (int g = 0; g < kGates; ++g) {
          gx[g] = load(a.gx, gate + g * a.H, n);
          gh[g] = load(a.gh, gate + g * a.H, n);
        }
        if constexpr (Cell::kHiddenIsElementwise) s[0] = load(a.h, at, n);
        if constexpr (kStates == 2) s[1] = load(a.c, at, n);
        Cell::forward(gx, gh, s, s1, saved);
        store(s1[0], a.h1, at, n);
        if constexpr (kStates == 2) store(s1[1], a.c1, at, n);
        if (!a.saved) continue;
        for (int i = 0; i < kSaved; ++i)
          store(saved[i], a.saved, (row * kSaved + i) * a.H + unit, n);
      }
  }

  static void backward(const StepArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t unit = 0; unit < a.H; unit += kWidth) {
        const int64_t n = a.H - unit, gate = row * kGates * a.H + unit, at = row * a.H + unit;
        X s[kStates], s1[kStates], ds1[kStates], ds[kStates], saved[4], dgx[kGates], dgh[kGates];
        ds1[0] = load_or_zero(a.dh1, at, n);
        s1[0] = load(a.h1, at, n);
        if constexpr (Cell::kHiddenIsElementwise) s[0] = load(a.h, at, n);
        if constexpr (kStates == 2) {
          ds1[1] = load_or_zero(a.dc1, at, n);
          s[1] = load(a.c, at, n);
          s1[1] = load(a.c1, at, n);
        }
        for (int i = 0; i < kSaved; ++i)
          saved[i] = load(a.saved, (row * kSaved + i) * a.H + unit, n);
        Cell::backward(ds1, saved, s, s1, dgx, dgh, ds);
        for (int g = 0; g < kGates; ++g) {
          store(dgx[g], a.dgx, gate + g * a.H, n);
          if constexpr (Cell::kSplitsGates) store(dgh[g], a.dgh, gate + g * a.H, n);
        }
        if constexpr (Cell::kHiddenIsElementwise) store(ds[0], a.dh, at, n);
        if constexpr (kStates == 2) store(ds[1], a.dc, at, n);
      }
  }
};

}  // namespace FUSED_RNN_NAMESPACE
