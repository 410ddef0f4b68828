// A layer forward, chunk after chunk: the input's product for the rows of the chunk, then its
// steps, each thread with its share of the batch.
#pragma once

#include "team.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::ForwardArgs;

template <class Cell, class T>
class Forward {
 protected:
  using A = typename Arithmetic<T>::type;
  using V = Vec<A>;
  static constexpr int64_t kWidth = V::kWidth;
  static constexpr int kGates = Cell::kGates;
  // Where x and h are stored in the type they are computed in, they are read in place.
  static constexpr bool kInPlace = sizeof(T) == sizeof(A);

  // One row that takes part in the current step.
  struct Live {
    int64_t index;  // in h, c, saved
    const A* gx;
    const A *h, *c;  // states before the step
    A* c1;           // cell state after it
    A* h1;           // new hidden state, before a projection
    T* h_out;        // where it is also wanted in the dtype of x, or null
    T* c_out;        // only to save
    T* saved;
    const uint8_t* keep;  // of h, then of c; or null
  };

  const ForwardArgs& a;
  const Schedule& schedule;
  Panels<A> input, hidden, projection;
  Slots slots;
  const int64_t members;  // of the team that takes each step; 1: each thread has its own rows
  const int64_t gx_stride;
  const A** input_rows;  // [slots] rows of x, as the product reads them
  A* converted;          // [slots][I], where x cannot be read in place
  A* gx;                 // [slots][gx_stride]
  A* zeros;              // [max(H, R)]
  // By the row's place among the shares:
  const A** state;  // hidden state, of R
  A* carry;         // [2][N][R], where the output cannot be read back
  bool* flip;       // which half of carry holds the state
  A* unprojected;   // [N][H]
  A* masked;        // [N][R] what the product reads, with h_mask
  A* c_before;      // [N][H] where c may be kept, which is overwritten
  Live* live;       // of the current step, from the share's place on; so are x and who
  const A** x;      // states of the live rows, as the product reads them
  int64_t* who;     // which row of the share is live

 public:
  Forward(const ForwardArgs& a, const Schedule& schedule, Arena& arena)
      : a(a),
        schedule(schedule),
        input(1, a.w_ih ? kGates * a.H : 0, a.I),
        hidden(kGates, a.H, a.R),
        projection(1, a.w_hr ? a.R : 0, a.H),
        slots(a, schedule, arena),
        members(members_for(a, schedule, hidden.count())),
        gx_stride(row_distance<A>(kGates * a.H)) {
    input.take(arena, a.b_ih);
    hidden.take(arena, a.b_hh);
    projection.take(arena, false);
    input_rows = arena.take<const A*>(slots.capacity);
    converted = arena.take<A>(kInPlace || !a.w_ih ? 0 : slots.capacity * a.I);
    gx = arena.take<A>(slots.capacity * gx_stride + kWidth);  // whole vectors of the last units
    zeros = arena.take<A>(a.H > a.R ? a.H : a.R);
    state = arena.take<const A*>(members * a.N);
    carry = arena.take<A>(kInPlace ? 0 : 2 * a.N * a.R);
    flip = arena.take<bool>(members * a.N);
    unprojected = arena.take<A>(a.w_hr ? a.N * a.H : 0);
    masked = arena.take<A>(a.h_mask ? a.N * a.R : 0);
    c_before = arena.take<A>(keeps() && Cell::kStates == 2 ? a.N * a.H : 0);
    live = arena.take<Live>(members * a.N);
    x = arena.take<const A*>(members * a.N);
    who = arena.take<int64_t>(members * a.N);
  }

  void run() {
    pack();
    start();
    run_chunks([&](const Share& share, Member member, const Slots& slots) {
      run_steps(share, member, slots);
    });
    finish();
  }

 protected:
  // Calls task(share, member, slots) for the steps of each chunk, once the input's product is
  // there.
  template <class Task>
  void run_chunks(const Task& task) {
    if (members == 1 && are_even()) {  // nobody waits for anybody
      parallel(schedule, schedule.shares, [&](int64_t i) {
        const Share share(a, schedule.shares, i);
        Slots own = slots.part(share);
        for (int64_t first = 0; first < a.T; first += schedule.steps) {
          open(own, first);
          project_input(own, Range(own.end - own.begin));
          task(share, Member(), own);
        }
      });
      return;
    }
    for (int64_t first = 0; first < a.T; first += schedule.steps) {
      open(slots, first);
      parallel(schedule, schedule.workers,
               [&](int64_t i) { project_input(slots, Range(slots.end, i, schedule.workers)); });
      if (members == 1) {
        parallel(schedule, schedule.shares,
                 [&](int64_t i) { task(Share(a, schedule.shares, i), Member(), slots); });
      } else {
        together(schedule, members,
                 [&](Member member) { task(Share(a, member.number), member, slots); });
        tell_all();
      }
    }
  }

  // Whether shares of the batch are shares of the work, or nearly.
  bool are_even() const {
    return schedule.shares == schedule.workers &&
           (a.N % schedule.workers == 0 || a.N >= 4 * schedule.workers);
  }

  void open(Slots& slots, int64_t first) const {
    const int64_t left = a.T - first;
    slots.open(a, first, left < schedule.steps ? left : schedule.steps);
  }

  void pack() {
    const int64_t inputs = input.count(), hiddens = hidden.count();
    parallel(schedule, inputs + hiddens + projection.count(), [&](int64_t i) {
      if (i < inputs)
        input.pack(i, static_cast<const T*>(a.w_ih), static_cast<const T*>(a.b_ih));
      else if (i < inputs + hiddens)
        hidden.pack(i - inputs, static_cast<const T*>(a.w_hh), static_cast<const T*>(a.b_hh));
      else
        projection.pack(i - inputs - hiddens, static_cast<const T*>(a.w_hr),
                        static_cast<const T*>(nullptr));
    });
  }

  void start() {
    memset(zeros, 0, sizeof(A) * size_t(a.H > a.R ? a.H : a.R));
    for (int64_t i = 0; i < shares(); ++i) {
      const Share share(a, shares(), i);
      for (int64_t j = 0; j < share.count; ++j) start_row(share.row(j), share.place + j);
    }
    tell_all();
  }

  int64_t shares() const { return members == 1 ? schedule.shares : 1; }

  // Where the states are is known to a team's first member; the next team may be another one.
  void tell_all() {
    for (int64_t i = a.N; i < members * a.N; ++i) {
      state[i] = state[i - a.N];
      flip[i] = flip[i - a.N];
    }
  }

  void start_row(int64_t n, int64_t place) {
    state[place] = a.h0 ? static_cast<const A*>(a.h0) + n * a.R : zeros;
    flip[place] = false;
    if constexpr (Cell::kStates == 2) {
      A* c = static_cast<A*>(a.c_n) + n * a.H;
      if (a.c0)
        memcpy(c, static_cast<const A*>(a.c0) + n * a.H, sizeof(A) * size_t(a.H));
      else
        memset(c, 0, sizeof(A) * size_t(a.H));
    }
  }

  // gx of a range of slots, counted from the first one.
  void project_input(const Slots& slots, Range range) {
    range.begin += slots.begin;
    range.end += slots.begin;
    for (int64_t slot = range.begin; slot < range.end; ++slot) {
      const T* row = static_cast<const T*>(a.x) + slots.index[slot] * a.I;
      if (!a.w_ih) {
        copy_row(row, gx + slot * gx_stride, a.I);
      } else if constexpr (kInPlace) {
        input_rows[slot] = row;
      } else {
        copy_row(row, converted + slot * a.I, a.I);
        input_rows[slot] = converted + slot * a.I;
      }
    }
    const int64_t count = range.end - range.begin;
    for (int64_t p = 0; p < input.count(); ++p) {
      const int vectors = input.vectors(p);
      for_each_tile(count, vectors, [&](int64_t first, int rows) {
        const int64_t slot = range.begin + first;
        if (p == 0 && kInPlace) prefetch_inputs(slot + rows, range.end);
        A* to = gx + slot * gx_stride + input.first_block(p) * kWidth;
        multiply_panel<A>(vectors, rows, input.panel_weights(p), input.panel_bias(p),
                          input_rows + slot, a.I, {to, gx_stride});
      });
    }
  }

  // The rows of x of the next tile, which may be far from the cache.
  void prefetch_inputs(int64_t slot, int64_t end) const {
    for (int64_t last = slot + kMaxRows; slot < end && slot < last; ++slot)
      for (int64_t k = 0; k < a.I; k += kWidth) __builtin_prefetch(input_rows[slot] + k);
  }

  void run_steps(const Share& share, Member member, const Slots& slots) {
    const Range panels = member.part(hidden.count());
    for (int64_t i = 0; i < slots.steps(); ++i) {
      const int64_t step = slots.first_step() + i,
                    count = find_live(share, slots, step, member.first());
      member.fetch(x + share.place, count, a.R);
      for (int64_t j = 0; j < panels.size(); ++j) {
        const int64_t p = hidden.in_sweep(panels, j, step);
        const int vectors = hidden.vectors(p);
        for_each_tile(count, vectors, [&](int64_t first, int rows) {
          run_tile(p, vectors, share.place + first, rows);
        });
      }
      if (a.w_hr) project(share.place, count, step);
      for (int64_t j = share.place; keeps() && j < share.place + count; ++j) keep_states(j);
      carry_on(share.place, share.place + count);
      member.meet();
    }
  }

  // The states after the step are those before the next one.
  void carry_on(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      state[who[j]] = state_after(who[j], live[j].index);
      if constexpr (!kInPlace) flip[who[j]] = !flip[who[j]];
    }
  }

  A* state_after(int64_t place, int64_t index) const {
    if constexpr (kInPlace) return static_cast<A*>(a.h) + index * a.R;
    return carry + ((flip[place] ? 0 : a.N) + place % a.N) * a.R;
  }

  int64_t find_live(const Share& share, const Slots& slots, int64_t step, bool fills = true) {
    const Step at(a, step);
    int64_t count = share.place;
    for (int64_t i = 0; i < share.count; ++i) {
      const int64_t n = share.row(i), slot = slots.at(step, share, i);
      if (slot < 0) {
        if (!fills) continue;
        const int64_t index = at.index(n);
        zero_row<T>(a.h, index, a.R);
        zero_row<T>(a.c, index, a.H);
        zero_row<T>(a.saved, index, Cell::kSaved * a.H);
        continue;
      }
      const int64_t place = share.place + i, index = slots.index[slot];
      const bool clear = at.control(n) & kClear;
      A* c = Cell::kStates == 2 ? static_cast<A*>(a.c_n) + n * a.H : nullptr;
      who[count] = place;
      Live& row = live[count];
      row.index = index;
      row.gx = gx + slot * gx_stride;
      row.h = clear ? zeros : state[place];
      row.c = clear ? zeros : c;
      row.keep = a.keep ? a.keep + (at.t * a.N + n) * kept_states() : nullptr;
      if constexpr (Cell::kStates == 2)
        if (keeps() && !clear) row.c = copy(c, c_before + place * a.H, a.H);
      x[count++] = a.h_mask ? mask(row.h, n, masked + place * a.R) : row.h;
      row.c1 = c;
      row.h1 = a.w_hr ? unprojected + place * a.H : state_after(place, index);
      row.h_out = kInPlace || a.w_hr ? nullptr : static_cast<T*>(a.h) + index * a.R;
      row.c_out = static_cast<T*>(a.c) + index * a.H;
      row.saved = static_cast<T*>(a.saved) + index * Cell::kSaved * a.H;
    }
    return count - share.place;
  }

  bool keeps() const { return a.keep || a.keep_share; }
  int64_t kept_states() const { return a.R + (Cell::kStates - 1) * a.H; }

  static const A* copy(const A* from, A* to, int64_t width) {
    memcpy(to, from, sizeof(A) * size_t(width));
    return to;
  }

  // A hidden state on its way into the product.
  const A* mask(const A* h, int64_t n, A* to) const {
    const T* by = static_cast<const T*>(a.h_mask) + n * a.R;
    for (int64_t i = 0; i < a.R; i += kWidth)
      (V::load(h + i, a.R - i) * V::load(by + i, a.R - i)).store(to + i, a.R - i);
    return to;
  }

  // What zoneout keeps of the states before a live row's step.
  void keep_states(int64_t j) const {
    const Live& row = live[j];
    T* const h_out = kInPlace ? nullptr : static_cast<T*>(a.h) + row.index * a.R;
    keep(row.keep, 0, row.h, state_after(who[j], row.index), h_out, a.R);
    if constexpr (Cell::kStates == 2)
      keep(row.keep, a.R, row.c, row.c1, a.save ? row.c_out : nullptr, a.H);
  }
  // `first` is the state's place among all states of a row.
  void keep(const uint8_t* which, int64_t first, const A* before, A* state, T* out,
            int64_t width) const {
    const A* share = static_cast<const A*>(a.keep_share) + first;
    if (which)
      for (int64_t i = 0; i < width; ++i) state[i] = which[first + i] ? before[i] : state[i];
    else
      for (int64_t i = 0; i < width; i += kWidth) {
        const int64_t n = width - i;
        const V now = V::load(state + i, n);
        (V::load(share + i, n) * (V::load(before + i, n) - now) + now).store(state + i, n);
      }
    if (out) copy_row(state, out, width);
  }

  void run_tile(int64_t p, int vectors, int64_t first, int rows) {
    alignas(kVectorBytes) A product[kMaxRows * kMaxVectors * kWidth];
    multiply_panel<A>(vectors, rows, hidden.panel_weights(p), hidden.panel_bias(p), x + first, a.R,
                      {product, vectors * kWidth});
    for (int b = 0; b < hidden.block_count(p); ++b) {
      const Block block{product + b * kGates * kWidth, vectors * kWidth,
                        (hidden.first_block(p) + b) * kWidth};
      if (block.unit + kWidth <= a.H)
        update_rows<true>(first, rows, block);
      else
        update_rows<false>(first, rows, block);
    }
  }

  // The products of one block of units: `stride` from row to row.
  struct Block {
    const A* product;
    int64_t stride, unit;
  };

  template <bool kFull>
  void update_rows(int64_t first, int rows, Block block) {
    // What the input has given to the gates went out of the cache while the weights passed.
    for (int64_t i = first; i < first + rows; ++i)
      for (int g = 0; g < kGates; ++g) __builtin_prefetch(live[i].gx + g * a.H + block.unit);
    int j = 0;
    for (; j + 1 < rows; j += 2) update<2, kFull>(first + j, block, j);
    if (j < rows) update<1, kFull>(first + j, block, j);
  }

  // Gates and new state of a block of units, in K live rows from `first` on. kFull: no lane of the
  // block lies beyond H.
  template <int K, bool kFull>
  FUSED_RNN_FN void update(int64_t first, const Block& block, int j) {
    using X = Several<A, K>;
    const int64_t unit = block.unit, n = kFull ? kWidth : a.H - unit;
    const Live* row = live + first;
    X input[kGates], product[kGates], s[Cell::kStates], s1[Cell::kStates], saved[4];
    X::each([&](int k) FUSED_RNN_INLINE {
      const A* from = block.product + (j + k) * block.stride;
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) {
        input[g].part[k] = V::load(row[k].gx + g * a.H + unit);
        product[g].part[k] = V::load(from + g * kWidth);
      }
      if constexpr (Cell::kHiddenIsElementwise) s[0].part[k] = V::load(row[k].h + unit, n);
      if constexpr (Cell::kStates == 2) s[1].part[k] = V::load(row[k].c + unit, n);
    });
    Cell::forward(input, product, s, s1, saved);
    X::each([&](int k) FUSED_RNN_INLINE {
      s1[0].part[k].store(row[k].h1 + unit, n);
      if constexpr (!kInPlace)
        if (row[k].h_out) s1[0].part[k].store(row[k].h_out + unit, n);
      if constexpr (Cell::kStates == 2) s1[1].part[k].store(row[k].c1 + unit, n);
      if (!a.save) return;
      if constexpr (Cell::kStates == 2) s1[1].part[k].store(row[k].c_out + unit, n);
#pragma GCC unroll 4
      for (int i = 0; i < Cell::kSaved; ++i)
        saved[i].part[k].store(row[k].saved + i * a.H + unit, n);
      prefetch(row[k], unit);
    });
  }

  // Where the row's next step will write; with `rows` only about there, which does no harm. Else
  // each store waits for its line of memory.
  FUSED_RNN_FN void prefetch(const Live& row, int64_t unit) const {
    const int64_t next = a.reverse ? -a.N : a.N;
#pragma GCC unroll 4
    for (int i = 0; i < Cell::kSaved; ++i)
      __builtin_prefetch(row.saved + (next * Cell::kSaved + i) * a.H + unit, 1);
    if constexpr (Cell::kStates == 2) __builtin_prefetch(row.c_out + next * a.H + unit, 1);
    if constexpr (kInPlace)
      __builtin_prefetch(row.h1 + next * a.R + unit, 1);
    else if (row.h_out)
      __builtin_prefetch(row.h_out + next * a.R + unit, 1);
  }

  void project(int64_t place, int64_t count, int64_t step) {
    for (int64_t j = place; j < place + count; ++j) x[j] = unprojected + who[j] * a.H;
    multiply(projection, Range(projection.count()), x + place, count, step,
             [&](int64_t j, int64_t unit, int64_t n, V h) {
               const Live& row = live[place + j];
               h.store(state_after(who[place + j], row.index) + unit, n);
               if constexpr (!kInPlace) h.store(static_cast<T*>(a.h) + row.index * a.R + unit, n);
             });
  }

  void finish() {
    for (int64_t i = 0; i < shares(); ++i) {
      const Share share(a, shares(), i);
      for (int64_t j = 0; j < share.count; ++j)
        memcpy(static_cast<A*>(a.h_n) + share.row(j) * a.R, state[share.place + j],
               sizeof(A) * size_t(a.R));
    }
  }
};

}  // namespace FUSED_RNN_NAMESPACE
