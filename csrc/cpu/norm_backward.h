// A layer with layer norms backward. Through a norm a gradient needs two sums over the row, so a
// step is passes over its rows, last first: for an LSTM the norm of c, gates, the norm of the
// product. The rest of the way is Backward's; the gains' and biases' gradients are sums over slots.
#pragma once

#include "backward.h"
#include "norm.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::NormBackwardArgs;

template <class Cell, class T>
class NormBackward : Backward<Cell, T> {
  using Base = Backward<Cell, T>;
  using Base::a, Base::schedule, Base::slots, Base::live, Base::before, Base::unit_blocks;
  using Base::gate_stride, Base::dgh, Base::dgx;
  using Base::kWidth, Base::kGates;
  using typename Base::A;
  using typename Base::Live;
  using typename Base::V;
  using Norm = Norms<Cell>;

  const NormBackwardArgs& args;
  Affine<A> gate_norm, c_norm;
  const int64_t norm_blocks;  // of units, of all norms
  Blocks<A> outer;            // gradients of what the norms put out: of each gate, then of c
  A *gain_sums, *bias_sums;   // [norm_blocks][kWidth]
  A* dc_norm;                 // [N][H] by place: of c, through its norm

 public:
  NormBackward(const NormBackwardArgs& args, const Schedule& schedule, Arena& arena)
      : Base(args, schedule, arena),
        args(args),
        gate_norm(kGates * a.H, arena),
        c_norm(Cell::kNormsC ? a.H : 0, arena),
        norm_blocks((kGates + Cell::kNormsC) * unit_blocks),
        outer(args.dgain ? norm_blocks : 0, slots.capacity, arena),
        gain_sums(arena.take<A>(norm_blocks * kWidth)),
        bias_sums(arena.take<A>(norm_blocks * kWidth)),
        dc_norm(arena.take<A>(Cell::kNormsC ? a.N * a.H : 0)) {}

  void run() {
    this->pack();
    this->start();
    gate_norm.template load<T>(args.gain, args.bias, kGates * a.H);
    if constexpr (Cell::kNormsC) c_norm.template load<T>(args.c_gain, args.c_bias, a.H);
    memset(gain_sums, 0, sizeof(A) * size_t(norm_blocks * kWidth));
    memset(bias_sums, 0, sizeof(A) * size_t(norm_blocks * kWidth));
    for (int64_t end = a.T; end > 0; end -= schedule.steps) {
      const int64_t first = end < schedule.steps ? 0 : end - schedule.steps;
      slots.open(a, first, end - first, true);
      parallel(schedule, schedule.shares,
               [&](int64_t i) { run_steps(Share(a, schedule.shares, i)); });
      this->input_gradient_and_factors();
      this->weight_gradients();
      if (args.dgain)
        parallel(schedule, schedule.workers,
                 [&](int64_t i) { sum_norms(Range(norm_blocks, i, schedule.workers)); });
    }
    this->finish();
    if (!args.dgain) return;
    for (int g = 0; g < kGates; ++g) store_norm(g, args.dgain, args.dbias, g * a.H);
    if constexpr (Cell::kNormsC) store_norm(kGates, args.dc_gain, args.dc_bias, 0);
  }

 private:
  const A* stats(int64_t index) const {
    return static_cast<const A*>(args.stats) + index * Norm::kStats;
  }
  const T* saved_row(int64_t index) const {
    return static_cast<const T*>(a.saved) + index * Cell::kSaved * a.H;
  }
  // What was normalised in a row: the product, then c.
  const T* normed_row(int64_t index) const { return saved_row(index) + Norm::kKept * a.H; }
  void run_steps(Share share) {
    for (int64_t step = slots.first_step() + slots.steps() - 1; step >= slots.first_step();
         --step) {
      const int64_t begin = share.place, end = begin + this->find_live(share, step);
      if constexpr (Cell::kNormsC)
        for (int64_t j = begin; j < end; ++j) through_c_norm(j);
      int64_t j = begin;
      for (; j + 1 < end; j += 2) update_units<2>(j);
      if (j < end) update_units<1>(j);
      for (j = begin; j < end; ++j) through_gate_norms(j);
      this->propagate(Member(), Range(this->hidden.count()), begin, end, step);
    }
  }

  // Through h' = o tanh(norm(c')): dL/do to the gate's place, what reaches c' into dc_norm.
  void through_c_norm(int64_t j) {
    const Live& row = live[j];
    A *d_o = dgh + j * gate_stride + 3 * a.H, *dc = dc_norm + j * a.H;
    const T *o = saved_row(row.index) + 3 * a.H, *c = normed_row(row.index) + kGates * a.H;
    V sum(0), product(0);
    for (int64_t unit = 0; unit < a.H; unit += kWidth) {
      const int64_t n = a.H - unit;
      const V dh = this->add(V::load(this->dh0(row.n) + unit, n), a.dh, row.index * a.R + unit, n);
      const V normed = V::load(c + unit, n);
      V dnorm, do_gate;
      Cell::backward_h(dh, V::load(o + unit, n), c_norm.apply(normed, unit, n), dnorm, do_gate);
      do_gate.store(d_o + unit, n);
      if (args.dgain) dnorm.store(outer.at(kGates * unit_blocks + unit / kWidth, row.slot));
      const V d = dnorm * V::load(c_norm.gain + unit, n);
      d.store(dc + unit, n);
      sum = sum + d;
      product = product + d * normed;
    }
    const V scale(stats(row.index)[Norm::kGroups]);
    const V mean(total(sum) / A(a.H)), slope(total(product) / A(a.H));
    for (int64_t unit = 0; unit < a.H; unit += kWidth) {
      const int64_t n = a.H - unit;
      const V d = V::load(dc + unit, n) - mean - V::load(c + unit, n) * slope;
      (d * scale).store(dc + unit, n);
    }
  }

  static A total(V sum) {
    return sum_of<A>(kWidth, [&](int64_t, int64_t) { return sum; });
  }

  template <int K>
  void update_units(int64_t j) {
    int64_t unit = 0;
    for (; unit + kWidth <= a.H; unit += kWidth) update<K, true>(j, unit);
    if (unit < a.H) update<K, false>(j, unit);
  }

  // Gradients of the gates, as the norms put them out, of a block of units in K live rows from the
  // j-th on.
  template <int K, bool kFull>
  FUSED_RNN_FN void update(int64_t j, int64_t unit) {
    using X = Several<A, K>;
    const int64_t n = kFull ? kWidth : a.H - unit;
    const Live* row = live + j;
    X s[Cell::kStates], ds[Cell::kStates], saved[4], dx[kGates], dh[kGates], of_state, of_gate;
    X::each([&](int k) FUSED_RNN_INLINE {
      const int64_t index = row[k].index;
      if constexpr (Cell::kNormsC) {
        const V dc = this->add(V::load(this->dc0(row[k].n) + unit, n), a.dc, index * a.H + unit, n);
        of_state.part[k] = dc + V::load(dc_norm + (j + k) * a.H + unit, n);
        of_gate.part[k] = V::load(dgh + (j + k) * gate_stride + 3 * a.H + unit, n);
        s[1].part[k] = V::load(this->state_before(a.c, a.c0, row[k], a.H) + unit, n);
      } else {
        const V normed = V::load(normed_row(index) + 2 * a.H + unit, n);
        of_state.part[k] =
            this->add(V::load(this->dh0(row[k].n) + unit, n), a.dh, index * a.R + unit, n);
        of_gate.part[k] = gate_norm.apply(normed, 2 * a.H + unit, n);
        s[0].part[k] = V::load(before[row[k].slot] + unit, n);
      }
#pragma GCC unroll 4
      for (int i = 0; i < Norm::kKept; ++i)
        saved[i].part[k] = V::load(saved_row(index) + i * a.H + unit, n);
    });
    if constexpr (Cell::kNormsC)
      Cell::backward_c(of_state, of_gate, saved, s, dx, dh, ds);
    else
      Cell::backward(of_state, of_gate, saved, s, dx, dh, ds);
    X::each([&](int k) FUSED_RNN_INLINE {
      const int64_t slot = row[k].slot, block = unit / kWidth;
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) {
        dh[g].part[k].store(dgh + (j + k) * gate_stride + g * a.H + unit, n);
        if (args.dgain) dh[g].part[k].store(outer.at(g * unit_blocks + block, slot));
        if (!Cell::kJoint && a.dx)
          dx[g].part[k].store(dgx + slot * gate_stride + g * a.H + unit, n);
      }
      const V zero(0);
      (row[k].passes ? ds[0].part[k] : zero).store(this->dh0(row[k].n) + unit, n);
      if constexpr (Cell::kStates == 2)
        (row[k].passes ? ds[1].part[k] : zero).store(this->dc0(row[k].n) + unit, n);
    });
  }

  // From what the norms of the gates put out to what they took in: the product.
  void through_gate_norms(int64_t j) {
    const Live& row = live[j];
    A* const of_row = dgh + j * gate_stride;
    int64_t first = 0;
    for (int i = 0; i < Norm::kGroups; ++i) {
      const int64_t width = Cell::kGroups[i] * a.H;
      A* const d = of_row + first;
      const T* const normed = normed_row(row.index) + first;
      const A* const gain = gate_norm.gain + first;
      V product(0);
      const A sum = sum_of<A>(width, [&](int64_t at, int64_t n) {
        const V x = V::load(d + at, n) * V::load(gain + at, n);
        x.store(d + at, n);
        product = product + x * V::load(normed + at, n);
        return x;
      });
      const V mean(sum / A(width)), slope(total(product) / A(width));
      const V scale(stats(row.index)[i]);
      for (int64_t at = 0; at < width; at += kWidth) {
        const int64_t n = width - at;
        const V x = V::load(d + at, n) - mean - V::load(normed + at, n) * slope;
        (x * scale).store(d + at, n);
      }
      first += width;
    }
    if (Cell::kJoint && a.dx)
      memcpy(dgx + row.slot * gate_stride, of_row, sizeof(A) * size_t(kGates * a.H));
    for (int g = 0; a.dw_hh && g < kGates; ++g)
      for (int64_t unit = 0; unit < a.H; unit += kWidth)
        V::load(of_row + g * a.H + unit, a.H - unit)
            .store(Base::gates.at(g * unit_blocks + unit / kWidth, row.slot));
  }

  // The gains' and biases' sums of a range of blocks.
  void sum_norms(Range range) {
    for (int64_t block = range.begin; block < range.end; ++block) {
      const int64_t gate = block / unit_blocks, unit = block % unit_blocks * kWidth;
      for (int64_t sum = 0, begin = 0; sum < slots.sums; begin = slots.sum_end[sum++])
        add_slots(block, gate, unit, begin, slots.sum_end[sum]);
    }
  }

  void add_slots(int64_t block, int64_t gate, int64_t unit, int64_t begin, int64_t end) {
    constexpr int kSums = 2;  // pairs of sums side by side, as in sum_gates
    const int64_t n = a.H - unit;
    V gain[kSums] = {V(0), V(0)}, bias[kSums] = {V(0), V(0)};
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t index = slots.index[slot];
      const V d = V::load(outer.at(block, slot));
      const V normed = V::load(normed_row(index) + gate * a.H + unit, n);
      const int64_t i = (slot - begin) % kSums;
      gain[i] = gain[i] + d * normed;
      bias[i] = bias[i] + d;
    }
    A *to_gain = gain_sums + block * kWidth, *to_bias = bias_sums + block * kWidth;
    (V::load(to_gain) + (gain[0] + gain[1])).store(to_gain);
    (V::load(to_bias) + (bias[0] + bias[1])).store(to_bias);
  }

  void store_norm(int64_t gate, void* gain, void* bias, int64_t at) const {
    const int64_t from = gate * unit_blocks * kWidth;
    copy_row(gain_sums + from, static_cast<T*>(gain) + at, a.H);
    if (bias) copy_row(bias_sums + from, static_cast<T*>(bias) + at, a.H);
  }
};

}  // namespace FUSED_RNN_NAMESPACE
