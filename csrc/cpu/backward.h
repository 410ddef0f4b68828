// The backward time loop over one thread's share of the batch: at each step the gates' gradients
// of the live rows, then the product that carries them to the step before.
#pragma once

#include "rows.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::BackwardArgs;

template <class Cell, class T>
struct BackwardWeights {
  using A = typename Arithmetic<T>::type;
  Panels<A> hidden, projection;

  BackwardWeights(const BackwardArgs& a, Arena& arena)
      : hidden(1, a.R, Cell::kGates * a.H), projection(1, a.w_hr ? a.H : 0, a.R) {
    hidden.weights = arena.take<A>(hidden.size());
    projection.weights = arena.take<A>(projection.size());
    hidden.bias = projection.bias = nullptr;
  }
  void pack(const BackwardArgs& a) {
    hidden.pack_transposed(static_cast<const T*>(a.w_hh));
    if (a.w_hr) projection.pack_transposed(static_cast<const T*>(a.w_hr));
  }
};

template <class Cell, class T>
class Backward {
  using A = typename Arithmetic<T>::type;
  using V = Vec<A>;
  static constexpr int64_t kWidth = V::kWidth;
  static constexpr int kGates = Cell::kGates;
  // Where gradients are stored in the type they are computed in, the product reads the output.
  static constexpr bool kReadsOutput = sizeof(T) == sizeof(A);
  // Where the state before a row lies, if not in a row of h.
  static constexpr int64_t kInitial = -1, kZero = -2;

  struct Live {
    int64_t index;     // in dgx, h, c, saved
    int64_t previous;  // row of h and c with the state before, or kInitial, kZero
    int64_t n;         // in the batch
    A* dgh;            // [G*H] what the product reads
    bool passes;       // a gradient reaches the incoming state
  };

  const BackwardArgs& a;
  const BackwardWeights<Cell, T>& weights;
  const Share share;
  int64_t* previous;  // [T][count], only with control or rows
  A* gates;           // [count][G*H] where the output cannot be read back
  A* dh_total;        // [count][R], with a projection
  A* dh_unprojected;  // [count][H], with a projection
  T* zeros;           // [max(H, R)]
  Live* live;         // [count]
  const A** x;        // [count]
  int64_t* who;       // [count] index into live of each row of x

 public:
  Backward(const BackwardArgs& a, const BackwardWeights<Cell, T>& weights, Share share,
           Arena& arena)
      : a(a), weights(weights), share(share) {
    previous = arena.take<int64_t>(has_holes() ? a.T * share.count : 0);
    gates = arena.take<A>(kReadsOutput ? 0 : share.count * kGates * a.H);
    dh_total = arena.take<A>(a.w_hr ? share.count * a.R : 0);
    dh_unprojected = arena.take<A>(a.w_hr ? share.count * a.H : 0);
    zeros = arena.take<T>(a.H > a.R ? a.H : a.R);
    live = arena.take<Live>(share.count);
    x = arena.take<const A*>(share.count);
    who = arena.take<int64_t>(share.count);
  }

  void run() {
    start();
    for (int64_t step = a.T - 1; step >= 0; --step) {
      const int64_t count = find_live(step);
      if (projects()) unproject(count);
      int64_t j = 0;
      for (; j + 1 < count; j += 2) update_units<2>(j);
      if (j < count) update_units<1>(j);
      propagate(count);
    }
  }

 private:
  bool has_holes() const { return a.control || a.rows; }
  bool projects() const { return Cell::kStates == 2 && a.w_hr; }
  A* dh0(int64_t n) const { return static_cast<A*>(a.dh0) + n * a.R; }
  A* dc0(int64_t n) const { return static_cast<A*>(a.dc0) + n * a.H; }

  void start() {
    memset(static_cast<void*>(zeros), 0, sizeof(T) * size_t(a.H > a.R ? a.H : a.R));
    for (int64_t i = 0; i < share.count; ++i) {
      const int64_t n = row_of(share, i);
      copy_or_zero(dh0(n), a.dh_n, n, a.R);
      if constexpr (Cell::kStates == 2) copy_or_zero(dc0(n), a.dc_n, n, a.H);
      if (has_holes()) trace_back(i, n);
    }
  }

  static void copy_or_zero(A* to, const void* from, int64_t n, int64_t width) {
    if (from)
      memcpy(to, static_cast<const A*>(from) + n * width, sizeof(A) * size_t(width));
    else
      memset(to, 0, sizeof(A) * size_t(width));
  }

  // For every step of row n, where the state before it lies.
  void trace_back(int64_t i, int64_t n) {
    int64_t last = kInitial;
    for (int64_t step = 0; step < a.T; ++step) {
      const Step at(a, step);
      previous[step * share.count + i] = (at.control(n) & kClear) ? kZero : last;
      if (!at.holds(n)) last = at.index(n);
    }
  }

  int64_t find_live(int64_t step) {
    const Step at(a, step);
    int64_t count = 0;
    for (int64_t i = 0; i < share.count; ++i) {
      const int64_t n = row_of(share, i), index = at.index(n);
      if (at.holds(n)) {
        zero_row<T>(a.dgx, index, kGates * a.H);
        zero_row<T>(a.dgh, index, kGates * a.H);
        zero_row<T>(a.h_in, index, a.R);
        zero_row<T>(a.dh_total, index, a.R);
        continue;
      }
      const int64_t before = has_holes() ? previous[step * share.count + i]
                             : step == 0 ? kInitial
                                         : index + (a.reverse ? a.N : -a.N);
      live[count] = {index, before, n, product_input(index, count),
                     !(at.control(n) & (kClear | kCut))};
      if (a.h_in) {
        T* to = static_cast<T*>(a.h_in) + index * a.R;
        memcpy(static_cast<void*>(to), state_before(a.h, a.h0, live[count], a.R),
               sizeof(T) * size_t(a.R));
      }
      ++count;
    }
    return count;
  }

  // dL/d(recurrent product) of the j-th live row, in the arithmetic type.
  A* product_input(int64_t index, int64_t j) const {
    if constexpr (kReadsOutput)
      return static_cast<A*>(Cell::kSplitsGates ? a.dgh : a.dgx) + index * kGates * a.H;
    return gates + j * kGates * a.H;
  }

  const T* state_before(const void* states, const void* initial, const Live& row,
                        int64_t width) const {
    if (row.previous >= 0) return static_cast<const T*>(states) + row.previous * width;
    if (row.previous == kInitial && initial) return static_cast<const T*>(initial) + row.n * width;
    return zeros;
  }

  // dL/dh of the projected state, then of the state before the projection.
  void unproject(int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      A* total = dh_total + j * a.R;
      x[j] = total;
      for (int64_t unit = 0; unit < a.R; unit += kWidth) {
        const int64_t n = a.R - unit;
        const V dh = add(V::load(dh0(live[j].n) + unit, n), a.dh, live[j].index * a.R + unit, n);
        dh.store(total + unit, n);
        dh.store(static_cast<T*>(a.dh_total) + live[j].index * a.R + unit, n);
      }
      memset(dh0(live[j].n), 0, sizeof(A) * size_t(a.R));
    }
    multiply(weights.projection, x, count, [&](int64_t j, int64_t unit, int64_t n, V dh) {
      dh.store(dh_unprojected + j * a.H + unit, n);
    });
  }

  template <int K>
  void update_units(int64_t j) {
    int64_t unit = 0;
    for (; unit + kWidth <= a.H; unit += kWidth) update<K, true>(j, unit);
    if (unit < a.H) update<K, false>(j, unit);
  }

  // Gradients of a block of units in K live rows from the j-th on. kFull: no lane of the block
  // lies beyond H.
  template <int K, bool kFull>
  FUSED_RNN_FN void update(int64_t j, int64_t unit) {
    using X = Several<A, K>;
    const int64_t n = kFull ? kWidth : a.H - unit;
    const Live* row = live + j;
    X s[Cell::kStates], s1[Cell::kStates], ds1[Cell::kStates], ds[Cell::kStates], saved[4],
        dgx[kGates], dgh[kGates];
    X::each([&](int k) {
      const int64_t index = row[k].index;
      if (projects()) {
        ds1[0].part[k] = V::load(dh_unprojected + (j + k) * a.H + unit, n);
      } else {
        ds1[0].part[k] = add(V::load(dh0(row[k].n) + unit, n), a.dh, index * a.R + unit, n);
        s1[0].part[k] = V::load(static_cast<const T*>(a.h) + index * a.R + unit, n);
      }
      if constexpr (Cell::kHiddenIsElementwise)
        s[0].part[k] = V::load(state_before(a.h, a.h0, row[k], a.R) + unit, n);
      if constexpr (Cell::kStates == 2) {
        ds1[1].part[k] = add(V::load(dc0(row[k].n) + unit, n), a.dc, index * a.H + unit, n);
        s[1].part[k] = V::load(state_before(a.c, a.c0, row[k], a.H) + unit, n);
        s1[1].part[k] = V::load(static_cast<const T*>(a.c) + index * a.H + unit, n);
      }
      const T* saved_at = static_cast<const T*>(a.saved) + index * Cell::kSaved * a.H + unit;
#pragma GCC unroll 4
      for (int i = 0; i < Cell::kSaved; ++i) saved[i].part[k] = V::load(saved_at + i * a.H, n);
    });

    Cell::backward(ds1, saved, s, s1, dgx, dgh, ds);

    X::each([&](int k) {
      const int64_t at = row[k].index * kGates * a.H + unit;
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) {
        dgx[g].part[k].store(static_cast<T*>(a.dgx) + at + g * a.H, n);
        if constexpr (Cell::kSplitsGates)
          dgh[g].part[k].store(static_cast<T*>(a.dgh) + at + g * a.H, n);
        if constexpr (!kReadsOutput) dgh[g].part[k].store(row[k].dgh + g * a.H + unit, n);
      }
      const V zero(0);
      if (!projects()) (row[k].passes ? ds[0].part[k] : zero).store(dh0(row[k].n) + unit, n);
      if constexpr (Cell::kStates == 2)
        (row[k].passes ? ds[1].part[k] : zero).store(dc0(row[k].n) + unit, n);
    });
  }

  // x + gradient[at...], where there is one.
  static FUSED_RNN_FN V add(V x, const void* gradient, int64_t at, int64_t n) {
    return gradient ? x + V::load(static_cast<const T*>(gradient) + at, n) : x;
  }

  // Through the recurrent product into the state before.
  void propagate(int64_t count) {
    int64_t passing = 0;
    for (int64_t j = 0; j < count; ++j) {
      if (!live[j].passes) continue;
      x[passing] = live[j].dgh;
      who[passing++] = live[j].n;
    }
    multiply(weights.hidden, x, passing, [&](int64_t j, int64_t unit, int64_t n, V dh) {
      A* to = dh0(who[j]) + unit;
      (dh + V::load(to, n)).store(to, n);
    });
  }
};

}  // namespace FUSED_RNN_NAMESPACE
