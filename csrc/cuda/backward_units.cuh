// What the backwards share that keep W_hh on the chip: a loop's operands, and neighbouring units of
// one row of the batch from step to step.
#pragma once

#include "stepwise_backward.cuh"

namespace fused_rnn::cuda {

template <class T>
struct BackwardLoop {
  BackwardLayer<T> layer;
  int64_t first, count;  // the steps to run, from the last
  bool wide;             // neighbouring units that a lane owns are one access everywhere
  const T* w_hh;
  const T *dh, *dc;           // [M, H], or null
  arithmetic_t<T>*dh0, *dc0;  // [N, H] the carried gradients, read before and written after
  T *dgx, *dgh;               // [M, G*H]; dgh is null where it equals dgx

  BackwardLoop() = default;
  BackwardLoop(const BackwardArgs& a, const BackwardStep<T>& step, int64_t first, int64_t count,
               int width)
      : layer(step.layer),
        first(first),
        count(count),
        wide(a.H % width == 0),
        w_hh(static_cast<const T*>(a.w_hh)),
        dh(step.dh),
        dc(step.dc),
        dh0(step.dh0),
        dc0(step.dc0),
        dgx(step.dgx),
        dgh(step.dgh) {
    for (const void* p : {a.dh, a.dc, a.h, a.c, a.saved, a.h0, a.c0})
      wide = wide && reinterpret_cast<uintptr_t>(p) % (size_t(width) * sizeof(T)) == 0;
  }
};

// In registers: kWidth units of a row, from `unit` on, of which those below `end` exist.
template <class Cell, class T, int kWidth>
struct BackwardUnits {
  using A = arithmetic_t<T>;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  using Values = Vector<T, kWidth>;

  A carried[kWidth][kStates];
  bool reaches = false;  // whether the product of the step after reaches the row's state
  Values saved[kSaved ? kSaved : 1], h, h_before, c, c_before, dh, dc;  // of a step, fetched
  Values dgx[kGates], dgh;  // of dgh, the last gate: that of the GRU, which differs

  // run(i, unit) for the units that exist.
  template <class Run>
  FUSED_RNN_DEVICE static void each(int64_t unit, int64_t end, Run run) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kWidth; ++i)
      if (unit + i < end) run(i, unit + i);
  }

  FUSED_RNN_DEVICE void load_carried(const BackwardLoop<T>& a, int64_t n, int64_t unit,
                                     int64_t end) {
    each(unit, end, [&](int i, int64_t u) {
      carried[i][0] = read(a.dh0, n * a.layer.H + u);
      if constexpr (kStates == 2) carried[i][1] = read(a.dc0, n * a.layer.H + u);
    });
    reaches = false;
  }

  FUSED_RNN_DEVICE void fetch(const BackwardLoop<T>& a, int64_t step, int64_t n, int64_t unit) {
    const BackwardLayer<T>& layer = a.layer;
    const StepRows now = layer.step(step);
    if (now.holds(n)) return;
    const int64_t index = now.index(n), at = index * layer.H + unit;
    const int64_t before = layer.before(step, n, index);
    const auto read_before = [&](const T* states, const T* initial) {
      if (before >= 0) return read_values(a, states, before * layer.H + unit, unit);
      if (before == kInitial && initial) return read_values(a, initial, n * layer.H + unit, unit);
      return zero();
    };
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSaved; ++i)
      saved[i] = read_values(a, layer.saved, (index * kSaved + i) * layer.H + unit, unit);
    if constexpr (kSaved == 0) h = read_values(a, layer.h, at, unit);
    if constexpr (Cell::kHiddenIsElementwise) h_before = read_before(layer.h, layer.h0);
    if constexpr (kStates == 2) {
      c = read_values(a, layer.c, at, unit);
      c_before = read_before(layer.c, layer.c0);
      if (a.dc) dc = read_values(a, a.dc, at, unit);
    }
    if (a.dh) dh = read_values(a, a.dh, at, unit);
  }

  // What the steps after this one send into the carried hidden state.
  FUSED_RNN_DEVICE void add(const BackwardLoop<T>& a, int64_t n, int64_t unit, int64_t end,
                            const A (&sum)[kWidth]) {
    if (!reaches) return;
    each(unit, end, [&](int i, int64_t u) {
      carried[i][0] += masked(a.layer.h_mask, n * a.layer.H + u, sum[i]);
    });
  }

  // The gate gradients of a step; of_h for the product.
  FUSED_RNN_DEVICE void update(const BackwardLoop<T>& a, int64_t step, int64_t n, int64_t unit,
                               int64_t end, A (&of_h)[kWidth][kGates]) {
    const StepRows now = a.layer.step(step);
    A of_x[kWidth][kGates] = {};
    FUSED_RNN_UNROLL
    for (int k = 0; k < kWidth * kGates; ++k) of_h[k / kGates][k % kGates] = A(0);
    reaches = now.passes(n);
    if (!now.holds(n))
      each(unit, end, [&](int i, int64_t u) {
        A ds1[kStates], s[kStates], s1[kStates], all_saved[4];
        ds1[0] = carried[i][0] + (a.dh ? value(dh[i]) : A(0));
        FUSED_RNN_UNROLL
        for (int k = 0; k < kSaved; ++k) all_saved[k] = value(saved[k][i]);
        if constexpr (kSaved == 0) s1[0] = value(h[i]);
        if constexpr (Cell::kHiddenIsElementwise) s[0] = value(h_before[i]);
        if constexpr (kStates == 2) {
          ds1[1] = carried[i][1] + (a.dc ? value(dc[i]) : A(0));
          s1[1] = value(c[i]), s[1] = value(c_before[i]);
        }
        const int64_t H = a.layer.H;
        unit_gradients<Cell>(now.keeps(n, u), kStates == 2 && now.keeps(n, H + u), reaches, ds1,
                             all_saved, s, s1, of_x[i], of_h[i], carried[i]);
      });
    FUSED_RNN_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      FUSED_RNN_UNROLL
      for (int g = 0; g < kGates; ++g) dgx[g][i] = from_float<T>(of_x[i][g]);
      dgh[i] = from_float<T>(of_h[i][kGates - 1]);
    }
  }

  FUSED_RNN_DEVICE void write_outputs(const BackwardLoop<T>& a, int64_t step, int64_t n,
                                      int64_t unit) const {
    const int64_t index = a.layer.step(step).index(n), H = a.layer.H;
    if (index < 0) return;
    FUSED_RNN_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int64_t at = (index * kGates + g) * H + unit;
      write_values(a, a.dgx, at, unit, dgx[g]);
      if constexpr (Cell::kSplitsGates)
        write_values(a, a.dgh, at, unit, g == kGates - 1 ? dgh : dgx[g]);
    }
  }
  FUSED_RNN_DEVICE void write_carried(const BackwardLoop<T>& a, int64_t n, int64_t unit,
                                      int64_t end) const {
    each(unit, end, [&](int i, int64_t u) {
      write(a.dh0, n * a.layer.H + u, carried[i][0]);
      if constexpr (kStates == 2) write(a.dc0, n * a.layer.H + u, carried[i][1]);
    });
  }

 private:
  FUSED_RNN_DEVICE static A value(T x) {
    if constexpr (sizeof(T) == 2)
      return to_float(x);
    else
      return x;
  }
  FUSED_RNN_DEVICE static Values zero() {
    Values values;
    FUSED_RNN_UNROLL
    for (int i = 0; i < kWidth; ++i) values[i] = from_float<T>(0);
    return values;
  }
  FUSED_RNN_DEVICE static Values read_values(const BackwardLoop<T>& a, const T* base, int64_t at,
                                             int64_t unit) {
    if (a.wide) return load_vector<kWidth>(base + at);
    Values values = zero();
    each(unit, a.layer.H, [&](int i, int64_t) { values[i] = load(base + at + i); });
    return values;
  }
  FUSED_RNN_DEVICE static void write_values(const BackwardLoop<T>& a, T* base, int64_t at,
                                            int64_t unit, Values values) {
    if (a.wide) return store_vector(base + at, values);
    each(unit, a.layer.H, [&](int i, int64_t) { store(base + at + i, values[i]); });
  }
};

}  // namespace fused_rnn::cuda
