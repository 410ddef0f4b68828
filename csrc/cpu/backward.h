// A layer backward, chunk after chunk from the end: its steps, each thread with its share of the
// batch; then, while the gates' gradients are in the cache, the gradients of input and weights.
#pragma once

#include "team.h"
#include "weight_gradient.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::BackwardArgs;

template <class Cell, class T>
class Backward {
 protected:
  using A = typename Arithmetic<T>::type;
  using V = Vec<A>;
  static constexpr int64_t kWidth = V::kWidth;
  static constexpr int kGates = Cell::kGates;
  static constexpr bool kSplits = Cell::kSplitsGates;
  static constexpr bool kProjects = Cell::kStates == 2;  // may have a projection
  // Only the last gate of a cell that splits them has two gradients: dgh's comes after dgx's.
  static constexpr int kBlockGates = kGates + kSplits;
  static constexpr int kSplitFrom = kSplits ? kGates - 1 : -1, kSplitTo = kSplits ? kGates : -1;
  // Where the state before a row lies, if not in a row of h.
  static constexpr int64_t kInitial = -1, kZero = -2;

  struct Live {
    int64_t slot, index;  // index: in h, c, saved
    int64_t previous;     // row of h and c with the state before, or kInitial, kZero
    int64_t n;            // in the batch
    const T* before;      // the hidden state that enters the step
    bool passes;          // a gradient reaches the incoming state
    const uint8_t* keep;  // of h, then of c; or null
  };

  const BackwardArgs& a;
  const Schedule& schedule;
  Panels<A> hidden, input, projection;
  Slots slots;
  const int64_t members;  // of the team that takes each step; 1: each thread has its own rows
  WeightGradient<A> ih, hh, hr;
  const int64_t unit_blocks, gate_stride;
  Blocks<A> gates;     // dgx and dgh as the weights' gradients read them
  Blocks<A> dh_sums;   // dL/dh of the projected states, for w_hr
  A* dgx;              // [slots][gate_stride], for dx
  A* bias_sums;        // [kBlockGates * unit blocks][kWidth]
  const T** before;    // [slots] the hidden state that entered the step
  const T** masks;     // [slots] what it was multiplied by, with h_mask
  A* computed_c;       // [slots][H] before zoneout, for w_hr
  const A** dgx_rows;  // [slots]
  int64_t* previous;   // [T][N], only with control or rows
  T* zeros;            // [max(H, R)]
  // By place among the shares:
  A* dgh;             // [N][gate_stride] of the current step; [2][N][gate_stride] of a team's
  A* dh_total;        // [N][R], with a projection
  A* dh_unprojected;  // [N][H], with a projection
  Live* live;
  const A** x;
  int64_t* who;  // index into live of each row of x

 public:
  Backward(const BackwardArgs& a, const Schedule& schedule, Arena& arena)
      : a(a),
        schedule(schedule),
        hidden(1, a.R, kGates * a.H),
        input(1, a.w_ih && a.dx ? a.I : 0, kGates * a.H),
        projection(1, a.w_hr ? a.H : 0, a.R),
        slots(a, schedule, arena),
        members(a.dh_norm ? 1 : members_for(a, schedule, hidden.count())),
        ih(a.dw_ih ? kGates : 0, a.H, a.I, slots.capacity, arena),
        hh(a.dw_hh ? kGates : 0, a.H, a.R, slots.capacity, arena, kSplitFrom, kSplitTo),
        hr(a.dw_hr ? 1 : 0, a.R, a.H, slots.capacity, arena),
        unit_blocks(padded<A>(a.H) / kWidth),
        gate_stride(row_distance<A>(kGates * a.H)),
        gates(kBlockGates * unit_blocks, slots.capacity, arena),
        dh_sums(a.dw_hr ? padded<A>(a.R) / kWidth : 0, slots.capacity, arena) {
    hidden.take(arena, false);
    input.take(arena, false);
    projection.take(arena, false);
    dgx = arena.take<A>(a.dx ? slots.capacity * gate_stride : 0);
    bias_sums = arena.take<A>(kBlockGates * unit_blocks * kWidth);
    before = arena.take<const T*>(slots.capacity);
    masks = arena.take<const T*>(a.h_mask ? slots.capacity : 0);
    computed_c = arena.take<A>(a.keep && a.dw_hr ? slots.capacity * a.H : 0);
    dgx_rows = arena.take<const A*>(slots.capacity);
    previous = arena.take<int64_t>(has_holes() ? a.T * a.N : 0);
    zeros = arena.take<T>(a.H > a.R ? a.H : a.R);
    dgh = arena.take<A>((members == 1 ? 1 : 2) * a.N * gate_stride);
    dh_total = arena.take<A>(a.w_hr ? a.N * a.R : 0);
    dh_unprojected = arena.take<A>(a.w_hr ? a.N * a.H : 0);
    live = arena.take<Live>(members * a.N);
    x = arena.take<const A*>(members * a.N);
    who = arena.take<int64_t>(members * a.N);
  }

  void run() {
    pack();
    start();
    for (int64_t end = a.T; end > 0; end -= schedule.steps) {
      const int64_t first = end < schedule.steps ? 0 : end - schedule.steps;
      slots.open(a, first, end - first, true);
      if (members == 1)
        parallel(schedule, schedule.shares,
                 [&](int64_t i) { run_steps(Share(a, schedule.shares, i), Member()); });
      else
        together(schedule, members,
                 [&](Member member) { run_steps(Share(a, member.number), member); });
      input_gradient_and_factors();
      weight_gradients();
    }
    finish();
  }

 protected:
  bool has_holes() const { return a.control || a.rows; }
  bool projects() const { return kProjects && a.w_hr; }
  A* dh0(int64_t n) const { return static_cast<A*>(a.dh0) + n * a.R; }
  A* dc0(int64_t n) const { return static_cast<A*>(a.dc0) + n * a.H; }
  const T* mask(int64_t n) const { return static_cast<const T*>(a.h_mask) + n * a.R; }

  void pack() {
    const int64_t hiddens = hidden.count(), inputs = input.count();
    parallel(schedule, hiddens + inputs + projection.count(), [&](int64_t i) {
      if (i < hiddens)
        hidden.pack_transposed(i, static_cast<const T*>(a.w_hh));
      else if (i < hiddens + inputs)
        input.pack_transposed(i - hiddens, static_cast<const T*>(a.w_ih));
      else
        projection.pack_transposed(i - hiddens - inputs, static_cast<const T*>(a.w_hr));
    });
  }

  void start() {
    memset(static_cast<void*>(zeros), 0, sizeof(T) * size_t(a.H > a.R ? a.H : a.R));
    memset(bias_sums, 0, sizeof(A) * size_t(kBlockGates * unit_blocks * kWidth));
    ih.clear();
    hh.clear();
    hr.clear();
    for (int64_t n = 0; n < a.N; ++n) {
      copy_or_zero(dh0(n), a.dh_n, n, a.R);
      if constexpr (Cell::kStates == 2) copy_or_zero(dc0(n), a.dc_n, n, a.H);
      if (has_holes()) trace_back(n);
    }
  }

  static void copy_or_zero(A* to, const void* from, int64_t n, int64_t width) {
    if (from)
      memcpy(to, static_cast<const A*>(from) + n * width, sizeof(A) * size_t(width));
    else
      memset(to, 0, sizeof(A) * size_t(width));
  }

  // For every step of row n, where the state before it lies.
  void trace_back(int64_t n) {
    int64_t last = kInitial;
    for (int64_t step = 0; step < a.T; ++step) {
      const Step at(a, step);
      previous[step * a.N + n] = (at.control(n) & kClear) ? kZero : last;
      if (!at.holds(n)) last = at.index(n);
    }
  }

  void run_steps(Share share, Member member) {
    const Range panels = member.part(hidden.count());
    const Range units = units_of(panels);
    for (int64_t step = slots.first_step() + slots.steps() - 1; step >= slots.first_step();
         --step) {
      const int64_t end = share.place + find_live(share, step, member.first());
      if (a.dh_norm) find_norms(share.place, end);
      if (projects()) unproject(share.place, end, step);
      int64_t j = share.place;
      // With zoneout row by row: compiled for two rows, its sums may be rounded otherwise.
      for (; !a.keep && j + 1 < end; j += 2) update_units<2>(j, units, step);
      for (; j < end; ++j) update_units<1>(j, units, step);
      member.meet();
      propagate(member, panels, share.place, end, step);
    }
  }

  // What a member updates is what it propagates into.
  Range units_of(Range panels) const {
    Range units(a.H);
    if (members == 1) return units;
    const int64_t width = hidden.blocks * kWidth;
    units.begin = panels.begin * width;
    if (panels.end * width < a.H) units.end = panels.end * width;
    return units;
  }

  // A team's next step writes while some still read this one's.
  A* dgh_row(int64_t j, int64_t step) const {
    return dgh + ((members > 1 && step & 1 ? a.N : 0) + j % a.N) * gate_stride;
  }

  int64_t find_live(Share share, int64_t step, bool fills = true) {
    const Step at(a, step);
    int64_t count = share.place;
    for (int64_t i = 0; i < share.count; ++i) {
      const int64_t n = share.row(i), slot = slots.at(step, share, i);
      if (slot < 0) {
        if (!fills) continue;
        zero_row<T>(a.dx, at.index(n), a.I);
        zero_row<A>(a.dh_norm, at.index(n), 1);
        continue;
      }
      const int64_t index = slots.index[slot];
      const int64_t last = has_holes() ? previous[step * a.N + n]
                           : step == 0 ? kInitial
                                       : index + (a.reverse ? a.N : -a.N);
      const int64_t states = a.R + (Cell::kStates - 1) * a.H;
      const uint8_t* const keep = a.keep ? a.keep + (at.t * a.N + n) * states : nullptr;
      Live& row = live[count++];
      row = {slot, index, last, n, nullptr, !(at.control(n) & (kClear | kCut)), keep};
      row.before = state_before(a.h, a.h0, row, a.R);
      if (!fills) continue;
      if (a.h_mask) masks[slot] = mask(n);
      before[slot] = row.before;
    }
    return count - share.place;
  }

  const T* state_before(const void* states, const void* initial, const Live& row,
                        int64_t width) const {
    if (row.previous >= 0) return static_cast<const T*>(states) + row.previous * width;
    if (row.previous == kInitial && initial) return static_cast<const T*>(initial) + row.n * width;
    return zeros;
  }

  // Of dL/dh, before anything is done with it. Squares of what has nearly vanished are no floats.
  void find_norms(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const A* const carried = dh0(live[j].n);
      double sums[kWidth] = {};
      for (int64_t unit = 0; unit < a.R; unit += kWidth) {
        const int64_t n = a.R - unit;
        A lanes[kWidth];
        add(V::load(carried + unit, n), a.dh, live[j].index * a.R + unit, n).store(lanes);
        for (int64_t i = 0; i < kWidth; ++i) sums[i] += double(lanes[i]) * double(lanes[i]);
      }
      double sum = 0;
      for (const double part : sums) sum += part;
      static_cast<A*>(a.dh_norm)[live[j].index] = A(__builtin_sqrt(sum));
    }
  }

  // dL/dh of the projected state, then of the state before the projection.
  void unproject(int64_t begin, int64_t end, int64_t step) {
    for (int64_t j = begin; j < end; ++j) {
      A* total = dh_total + j * a.R;
      x[j] = total;
      for (int64_t unit = 0; unit < a.R; unit += kWidth) {
        const int64_t n = a.R - unit;
        A* const carried = dh0(live[j].n) + unit;
        V dh = add(V::load(carried, n), a.dh, live[j].index * a.R + unit, n), past(0);
        if (live[j].keep) keep(live[j].keep + unit, n, dh, past);
        dh.store(total + unit, n);
        if (a.dw_hr) dh.store(dh_sums.at(unit / kWidth, live[j].slot));
        (live[j].passes ? past : V(0)).store(carried, n);
      }
    }
    multiply(projection, Range(projection.count()), x + begin, end - begin, step,
             [&](int64_t j, int64_t unit, int64_t n, V dh) {
               dh.store(dh_unprojected + (begin + j) * a.H + unit, n);
             });
  }

  // Of a kept state (zoneout) the gradient goes past the step: from `ds1` into `past`.
  static FUSED_RNN_FN auto keep(const uint8_t* which, int64_t n, V& ds1, V& past) {
    A lanes[kWidth] = {};
    for (int64_t i = 0; i < kWidth && i < n; ++i) lanes[i] = which[i];
    const auto kept = V::load(lanes) > V(0);
    past = select(kept, ds1, V(0));
    ds1 = select(kept, V(0), ds1);
    return kept;
  }

  template <int K>
  void update_units(int64_t j, Range units, int64_t step) {
    int64_t unit = units.begin;
    for (; unit + kWidth <= units.end; unit += kWidth) update<K, true>(j, unit, step);
    if (unit < units.end) update<K, false>(j, unit, step);
  }

  // Gradients of a block of units in K live rows from the j-th on. kFull: no lane of the block
  // lies beyond H.
  template <int K, bool kFull>
  FUSED_RNN_FN void update(int64_t j, int64_t unit, int64_t step) {
    using X = Several<A, K>;
    const int64_t n = kFull ? kWidth : a.H - unit;
    const Live* row = live + j;
    X s[Cell::kStates], s1[Cell::kStates], ds1[Cell::kStates], ds[Cell::kStates], saved[4],
        dx[kGates], dh[kGates], past[Cell::kStates];
    X::each([&](int k) FUSED_RNN_INLINE {
      const int64_t index = row[k].index;
      if (projects()) {
        ds1[0].part[k] = V::load(dh_unprojected + (j + k) * a.H + unit, n);
      } else {
        ds1[0].part[k] = add(V::load(dh0(row[k].n) + unit, n), a.dh, index * a.R + unit, n);
        s1[0].part[k] = V::load(static_cast<const T*>(a.h) + index * a.R + unit, n);
      }
      if constexpr (Cell::kHiddenIsElementwise) s[0].part[k] = V::load(row[k].before + unit, n);
      if constexpr (Cell::kStates == 2) {
        ds1[1].part[k] = add(V::load(dc0(row[k].n) + unit, n), a.dc, index * a.H + unit, n);
        s[1].part[k] = V::load(state_before(a.c, a.c0, row[k], a.H) + unit, n);
        s1[1].part[k] = V::load(static_cast<const T*>(a.c) + index * a.H + unit, n);
      }
      const T* saved_at = static_cast<const T*>(a.saved) + index * Cell::kSaved * a.H + unit;
#pragma GCC unroll 4
      for (int i = 0; i < Cell::kSaved; ++i) saved[i].part[k] = V::load(saved_at + i * a.H, n);
      prefetch(row[k], unit);
    });

    if constexpr (K == 1) {
      for (X& x : past) x = X(0);
      if (a.keep) keep_back(row, unit, n, saved, s, s1, ds1, past);
    }
    Cell::backward(ds1, saved, s, s1, dx, dh, ds);
    if constexpr (K == 1)
      for (int i = 0; a.keep && i < Cell::kStates; ++i) ds[i] = ds[i] + past[i];

    X::each([&](int k) FUSED_RNN_INLINE {
      const int64_t slot = row[k].slot, block = unit / kWidth;
      A* to = dgh_row(j + k, step) + unit;
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) {
        dh[g].part[k].store(to + g * a.H, n);
        dx[g].part[k].store(gates.at(g * unit_blocks + block, slot));
      }
      if (a.dx) {
        to = dgx + slot * gate_stride + unit;
#pragma GCC unroll 4
        for (int g = 0; g < kGates; ++g) dx[g].part[k].store(to + g * a.H, n);
      }
      if constexpr (kSplits)
        dh[kSplitFrom].part[k].store(gates.at(kSplitTo * unit_blocks + block, slot));
      const V zero(0);
      if (!projects()) (row[k].passes ? ds[0].part[k] : zero).store(dh0(row[k].n) + unit, n);
      if constexpr (Cell::kStates == 2)
        (row[k].passes ? ds[1].part[k] : zero).store(dc0(row[k].n) + unit, n);
    });
  }

  // What the row's next step will read. It was written long ago, and the hardware, which looks for
  // the next line of memory, does not expect the last row before. Where there are holes, that one's
  // c is elsewhere: then this is no help, and no harm.
  FUSED_RNN_FN void prefetch(const Live& row, int64_t unit) const {
    if (row.previous < 0) return;
    const T* saved = static_cast<const T*>(a.saved) + row.previous * Cell::kSaved * a.H + unit;
#pragma GCC unroll 4
    for (int i = 0; i < Cell::kSaved; ++i) __builtin_prefetch(saved + i * a.H);
    __builtin_prefetch(static_cast<const T*>(a.h) + row.previous * a.R + unit);
    if (a.dh) __builtin_prefetch(static_cast<const T*>(a.dh) + row.previous * a.R + unit);
    const int64_t before = 2 * row.previous - row.index;
    if constexpr (Cell::kStates == 2)
      if (before >= 0) __builtin_prefetch(static_cast<const T*>(a.c) + before * a.H + unit);
  }

  // The units of a live row that zoneout has kept; of an LSTM's c, what was computed instead.
  template <class X>
  void keep_back(const Live* row, int64_t unit, int64_t n, const X* saved, const X* s, X* s1,
                 X* ds1, X* past) const {
    if (!projects()) keep(row->keep + unit, n, ds1[0].part[0], past[0].part[0]);
    if constexpr (Cell::kStates == 2) {
      const auto kept = keep(row->keep + a.R + unit, n, ds1[1].part[0], past[1].part[0]);
      V& c = s1[1].part[0];
      c = select(kept, Cell::next_c(saved, s[1]).part[0], c);
      if (a.dw_hr) c.store(computed_c + row->slot * a.H + unit, n);
    }
  }

  // x + gradient[at...], where there is one.
  static FUSED_RNN_FN V add(V x, const void* gradient, int64_t at, int64_t n) {
    return gradient ? x + V::load(static_cast<const T*>(gradient) + at, n) : x;
  }

  // Through the recurrent product into the state before.
  void propagate(Member member, Range panels, int64_t begin, int64_t end, int64_t step) {
    int64_t passing = begin;
    for (int64_t j = begin; j < end; ++j) {
      if (!live[j].passes) continue;
      x[passing] = dgh_row(j, step);
      who[passing++] = live[j].n;
    }
    member.fetch(x + begin, passing - begin, kGates * a.H);
    multiply(hidden, panels, x + begin, passing - begin, step,
             [&](int64_t j, int64_t unit, int64_t n, V dh) {
               A* to = dh0(who[begin + j]) + unit;
               if (a.h_mask) dh = dh * V::load(mask(who[begin + j]) + unit, n);
               (dh + V::load(to, n)).store(to, n);
             });
  }

  // dx of the chunk, and the factors that its gate gradients meet in the weights' gradients. Every
  // worker has its part of each: whoever had one kind alone would be waited for.
  void input_gradient_and_factors() {
    const int64_t factors = ih.panels() + hh.panels() + hr.panels(), workers = schedule.workers;
    if (!a.dx && !factors) return;
    parallel(schedule, workers, [&](int64_t i) {
      if (a.dx) input_gradient(Range(slots.end, i, workers));
      const Range own(factors, i, workers);
      for (int64_t panel = own.begin; panel < own.end; ++panel) pack_factors(panel);
    });
  }

  // One of all weights' panels.
  void pack_factors(int64_t i) {
    const int64_t ihs = ih.panels(), hhs = hh.panels();
    if (i < ihs)
      ih.pack(i, slots.end, [&](int64_t slot, int64_t column, int64_t n) {
        return V::load(static_cast<const T*>(a.x) + slots.index[slot] * a.I + column, n);
      });
    else if (i < ihs + hhs)
      hh.pack(i - ihs, slots.end, [&](int64_t slot, int64_t column, int64_t n) {
        const V h = V::load(before[slot] + column, n);
        return a.h_mask ? h * V::load(masks[slot] + column, n) : h;
      });
    else if constexpr (kProjects)
      hr.pack(i - ihs - hhs, slots.end, [&](int64_t slot, int64_t column, int64_t n) {
        const int64_t index = slots.index[slot];
        const T* o = static_cast<const T*>(a.saved) + (index * Cell::kSaved + 3) * a.H;
        const V c = a.keep ? V::load(computed_c + slot * a.H + column, n)
                           : V::load(static_cast<const T*>(a.c) + index * a.H + column, n);
        return V::load(o + column, n) * tanh(c);
      });
  }

  void input_gradient(Range range) {
    T* to = static_cast<T*>(a.dx);
    for (int64_t slot = range.begin; slot < range.end; ++slot) {
      dgx_rows[slot] = dgx + slot * gate_stride;
      if (!a.w_ih) copy_row(dgx_rows[slot], to + slots.index[slot] * a.I, a.I);
    }
    multiply(input, Range(input.count()), dgx_rows + range.begin, range.end - range.begin, 0,
             [&](int64_t j, int64_t unit, int64_t n, V dx) {
               dx.store(to + slots.index[range.begin + j] * a.I + unit, n);
             });
  }

  void weight_gradients() {
    const int64_t workers = schedule.workers;
    const bool biases = a.db_ih || a.db_hh;
    if (!ih.panels() && !hh.panels() && !hr.panels() && !biases) return;
    parallel(schedule, workers, [&](int64_t i) {
      // A small weight has fewer blocks than there are workers: others have those of the next one.
      const int64_t other = (i + workers / 2) % workers;
      const Range own(biases ? kBlockGates * unit_blocks : 0, i, workers);
      for (int64_t sum = 0, begin = 0; sum < slots.sums; begin = slots.sum_end[sum++]) {
        const int64_t end = slots.sum_end[sum];
        ih.add(gates, begin, end, i, workers);
        hh.add(gates, begin, end, other, workers);
        hr.add(dh_sums, begin, end, i, workers);
        sum_gates(own, begin, end);
      }
    });
  }

  void sum_gates(Range blocks, int64_t begin, int64_t end) {
    // An addition waits four cycles for the one before: four sums side by side.
    constexpr int kSums = 4;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      V sum[kSums] = {V(0), V(0), V(0), V(0)};
      const A* from = gates.at(block);
      int64_t slot = begin;
      for (; slot + kSums <= end; slot += kSums)
#pragma GCC unroll 4
        for (int i = 0; i < kSums; ++i) sum[i] = sum[i] + V::load(from + (slot + i) * kWidth);
      for (; slot < end; ++slot) sum[0] = sum[0] + V::load(from + slot * kWidth);
      A* to = bias_sums + block * kWidth;
      (V::load(to) + ((sum[0] + sum[1]) + (sum[2] + sum[3]))).store(to);
    }
  }

  void finish() {
    const int64_t ihs = ih.panels(), hhs = hh.panels();
    parallel(schedule, ihs + hhs + hr.panels(), [&](int64_t i) {
      if (i < ihs)
        ih.store(i, static_cast<T*>(a.dw_ih));
      else if (i < ihs + hhs)
        hh.store(i - ihs, static_cast<T*>(a.dw_hh));
      else
        hr.store(i - ihs - hhs, static_cast<T*>(a.dw_hr));
    });
    for (int g = 0; g < kGates; ++g) {
      store_bias(g, g, a.db_ih);
      store_bias(g == kSplitFrom ? kSplitTo : g, g, a.db_hh);
    }
  }

  void store_bias(int64_t from, int64_t to, void* bias) const {
    if (bias)
      copy_row(bias_sums + from * unit_blocks * kWidth, static_cast<T*>(bias) + to * a.H, a.H);
  }
};

}  // namespace FUSED_RNN_NAMESPACE
