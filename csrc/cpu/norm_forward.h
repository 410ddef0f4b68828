// A layer with layer norms forward. A norm needs a row's products of all gates before the first
// gate, so a step is passes over its rows: product, its moments, gates, and for an LSTM the norm of
// c. The rest of the way is Forward's.
#pragma once

#include "forward.h"
#include "norm.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::NormForwardArgs;

template <class Cell, class T>
class NormForward : Forward<Cell, T> {
  using Base = Forward<Cell, T>;
  using Base::a, Base::hidden, Base::live, Base::x;
  using Base::kWidth, Base::kGates, Base::kInPlace;
  using typename Base::A;
  using typename Base::Live;
  using typename Base::V;
  using Norm = Norms<Cell>;

  const NormForwardArgs& args;
  const int64_t gate_stride;
  Affine<A> gate_norm, c_norm;
  // By the row's place among the shares:
  A* rows;       // [N][gate_stride] the product, later centred; an LSTM's o stays in its place
  A* centred_c;  // [N][H]
  A* stats;      // [N][kStats]

 public:
  NormForward(const NormForwardArgs& args, const Schedule& schedule, Arena& arena)
      : Base(args, schedule, arena),
        args(args),
        gate_stride(row_distance<A>(kGates * a.H)),
        gate_norm(kGates * a.H, arena),
        c_norm(Cell::kNormsC ? a.H : 0, arena) {
    rows = arena.take<A>(a.N * gate_stride);
    centred_c = arena.take<A>(Cell::kNormsC ? a.N * a.H : 0);
    stats = arena.take<A>(a.N * Norm::kStats);
  }

  void run() {
    this->pack();
    this->start();
    gate_norm.template load<T>(args.gain, args.bias, kGates * a.H);
    if constexpr (Cell::kNormsC) c_norm.template load<T>(args.c_gain, args.c_bias, a.H);
    if (args.stats) memset(args.stats, 0, sizeof(A) * size_t(a.M * Norm::kStats));
    this->run_chunks(
        [&](const Share& share, Member, const Slots& slots) { run_steps(share, slots); });
    this->finish();
  }

 private:
  void run_steps(const Share& share, const Slots& slots) {
    for (int64_t i = 0; i < slots.steps(); ++i) {
      const int64_t step = slots.first_step() + i, begin = share.place;
      const int64_t end = begin + this->find_live(share, slots, step);
      multiply_rows(begin, end, step);
      for (int64_t j = begin; j < end; ++j) centre_gates(j);
      int64_t j = begin;
      for (; j + 1 < end; j += 2)
        each_unit([&](auto full, int64_t unit) { update<2, full>(j, unit); });
      if (j < end) each_unit([&](auto full, int64_t unit) { update<1, full>(j, unit); });
      if constexpr (Cell::kNormsC) show(begin, end);
      if (args.stats)
        for (j = begin; j < end; ++j)
          memcpy(static_cast<A*>(args.stats) + live[j].index * Norm::kStats,
                 stats + j * Norm::kStats, sizeof(A) * Norm::kStats);
      this->carry_on(begin, end);
    }
  }

  void multiply_rows(int64_t begin, int64_t end, int64_t step) {
    alignas(kVectorBytes) A product[kMaxRows * kMaxVectors * kWidth];
    for (int64_t i = 0; i < hidden.count(); ++i) {
      const int64_t p = hidden.in_sweep(Range(hidden.count()), i, step);
      const int vectors = hidden.vectors(p);
      for_each_tile(end - begin, vectors, [&](int64_t first, int count) {
        multiply_panel<A>(vectors, count, hidden.panel_weights(p), hidden.panel_bias(p),
                          x + begin + first, a.R, {product, vectors * kWidth});
        for (int k = 0; k < count; ++k)
          for (int b = 0; b < hidden.block_count(p); ++b) {
            const int64_t unit = (hidden.first_block(p) + b) * kWidth;
            const A* from = product + (k * vectors + b * kGates) * kWidth;
            A* to = rows + (begin + first + k) * gate_stride + unit;
            for (int g = 0; g < kGates; ++g)
              V::load(from + g * kWidth).store(to + g * a.H, a.H - unit);
          }
      });
    }
  }

  void centre_gates(int64_t j) {
    A* row = rows + j * gate_stride;
    if constexpr (Cell::kJoint)
      for (int64_t at = 0; at < kGates * a.H; at += kWidth) {
        const int64_t n = kGates * a.H - at;
        (V::load(row + at, n) + V::load(live[j].gx + at, n)).store(row + at, n);
      }
    for (int i = 0; i < Norm::kGroups; ++i) {
      const int64_t width = Cell::kGroups[i] * a.H;
      stats[j * Norm::kStats + i] = centre(row, row, width, A(args.eps));
      row += width;
    }
  }

  // Calls body(full, unit) for each block of units; full: no lane of the block lies beyond H.
  template <class Body>
  void each_unit(const Body& body) const {
    int64_t unit = 0;
    for (; unit + kWidth <= a.H; unit += kWidth) body(Constant<true>(), unit);
    if (unit < a.H) body(Constant<false>(), unit);
  }

  // Gates and new state of a block of units, in K live rows from the j-th on; of an LSTM c and o.
  template <int K, bool kFull>
  FUSED_RNN_FN void update(int64_t j, int64_t unit) {
    using X = Several<A, K>;
    const int64_t n = kFull ? kWidth : a.H - unit;
    const Live* row = live + j;
    X gx[kGates], gh[kGates], s[Cell::kStates], s1[Cell::kStates], saved[4];
    X::each([&](int k) FUSED_RNN_INLINE {
      const A* from = rows + (j + k) * gate_stride + unit;
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) {
        const A scale = stats[(j + k) * Norm::kStats + Norm::group(g)];
        const V normed = V::load(from + g * a.H, n) * V(scale);
        if (a.save) normed.store(row[k].saved + (Norm::kKept + g) * a.H + unit, n);
        gh[g].part[k] = gate_norm.apply(normed, g * a.H + unit, n);
        gx[g].part[k] = Cell::kJoint ? V(0) : V::load(row[k].gx + g * a.H + unit);
      }
      if constexpr (Cell::kHiddenIsElementwise) s[0].part[k] = V::load(row[k].h + unit, n);
      if constexpr (Cell::kStates == 2) s[1].part[k] = V::load(row[k].c + unit, n);
    });
    if constexpr (Cell::kNormsC)
      Cell::forward_c(gx, gh, s, s1, saved);
    else
      Cell::forward(gx, gh, s, s1, saved);
    X::each([&](int k) FUSED_RNN_INLINE {
      if constexpr (Cell::kNormsC) {
        s1[1].part[k].store(row[k].c1 + unit, n);
        saved[3].part[k].store(rows + (j + k) * gate_stride + 3 * a.H + unit, n);
      } else {
        store_h(row[k], unit, n, s1[0].part[k]);
      }
      if (!a.save) return;
      if constexpr (Cell::kStates == 2) s1[1].part[k].store(row[k].c_out + unit, n);
#pragma GCC unroll 4
      for (int i = 0; i < Norm::kKept; ++i)
        saved[i].part[k].store(row[k].saved + i * a.H + unit, n);
    });
  }

  // An LSTM's h, which the norm of c makes.
  void show(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      stats[j * Norm::kStats + Norm::kGroups] =
          centre(live[j].c1, centred_c + j * a.H, a.H, A(args.eps));
    int64_t j = begin;
    for (; j + 1 < end; j += 2)
      each_unit([&](auto full, int64_t unit) { show_units<2, full>(j, unit); });
    if (j < end) each_unit([&](auto full, int64_t unit) { show_units<1, full>(j, unit); });
  }

  template <int K, bool kFull>
  FUSED_RNN_FN void show_units(int64_t j, int64_t unit) {
    using X = Several<A, K>;
    const int64_t n = kFull ? kWidth : a.H - unit;
    X o, normed;
    X::each([&](int k) FUSED_RNN_INLINE {
      const A scale = stats[(j + k) * Norm::kStats + Norm::kGroups];
      o.part[k] = V::load(rows + (j + k) * gate_stride + 3 * a.H + unit, n);
      const V c = V::load(centred_c + (j + k) * a.H + unit, n) * V(scale);
      if (a.save) c.store(live[j + k].saved + (Cell::kSaved - 1) * a.H + unit, n);
      normed.part[k] = c_norm.apply(c, unit, n);
    });
    const X h = Cell::forward_h(o, normed);
    X::each([&](int k) FUSED_RNN_INLINE { store_h(live[j + k], unit, n, h.part[k]); });
  }

  FUSED_RNN_FN void store_h(const Live& row, int64_t unit, int64_t n, V h) const {
    h.store(row.h1 + unit, n);
    if constexpr (!kInPlace) h.store(row.h_out + unit, n);
  }
};

}  // namespace FUSED_RNN_NAMESPACE
