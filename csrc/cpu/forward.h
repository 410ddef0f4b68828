// The forward time loop over one thread's share of the batch. Rows never wait for each other, so
// threads meet only at the end.
#pragma once

#include "rows.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::ForwardArgs;

// Weights packed for forward: one copy, read by all threads.
template <class Cell, class T>
struct ForwardWeights {
  using A = typename Arithmetic<T>::type;
  Panels<A> hidden, projection;

  ForwardWeights(const ForwardArgs& a, Arena& arena)
      : hidden(Cell::kGates, a.H, a.R), projection(1, a.w_hr ? a.R : 0, a.H) {
    hidden.weights = arena.take<A>(hidden.size());
    hidden.bias = a.b_hh ? arena.take<A>(hidden.bias_size()) : nullptr;
    projection.weights = arena.take<A>(projection.size());
    projection.bias = nullptr;
  }
  void pack(const ForwardArgs& a) {
    hidden.pack(static_cast<const T*>(a.w_hh), static_cast<const T*>(a.b_hh));
    if (a.w_hr) projection.pack(static_cast<const T*>(a.w_hr), static_cast<const T*>(nullptr));
  }
};

template <class Cell, class T>
class Forward {
  using A = typename Arithmetic<T>::type;
  using V = Vec<A>;
  static constexpr int64_t kWidth = V::kWidth;
  // Where h is stored in the type it is computed in, the loop reads it back from the output.
  static constexpr bool kReadsOutput = sizeof(T) == sizeof(A);

  // One row that takes part in the current step.
  struct Live {
    int64_t index;  // in gx, h, c, saved
    const T* gx;
    const A* c;  // cell state before the step
    A* c1;       // and after
    A* h1;       // new hidden state, before a projection
    T* h_out;    // where it is also wanted in the dtype of gx, or null
    T* c_out;    // only to save
    T* saved;
  };

  const ForwardArgs& a;
  const ForwardWeights<Cell, T>& weights;
  const Share share;
  const A** state;  // [count] each row's hidden state, of R
  A* carry;         // [2][count][R] where the output cannot be read back
  bool* flip;       // [count] which half of carry holds the state
  A* zeros;         // [max(H, R)]
  A* unprojected;   // [count][H]
  Live* live;       // [count]
  const A** x;      // [count] states of the live rows, as the product reads them
  int64_t* who;     // [count] which row of the share is live

 public:
  Forward(const ForwardArgs& a, const ForwardWeights<Cell, T>& weights, Share share, Arena& arena)
      : a(a), weights(weights), share(share) {
    state = arena.take<const A*>(share.count);
    carry = arena.take<A>(kReadsOutput ? 0 : 2 * share.count * a.R);
    flip = arena.take<bool>(share.count);
    zeros = arena.take<A>(a.H > a.R ? a.H : a.R);
    unprojected = arena.take<A>(a.w_hr ? share.count * a.H : 0);
    live = arena.take<Live>(share.count);
    x = arena.take<const A*>(share.count);
    who = arena.take<int64_t>(share.count);
  }

  void run() {
    start();
    for (int64_t step = 0; step < a.T; ++step) {
      const int64_t count = find_live(Step(a, step));
      for (int64_t p = 0; p < weights.hidden.count(); ++p) {
        const int vectors = weights.hidden.vectors(p);
        for_each_tile(count, vectors,
                      [&](int64_t first, int rows) { run_tile(p, vectors, first, rows); });
      }
      if (a.w_hr) project(count);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t i = who[j];
        state[i] = state_after(i, live[j].index);
        if constexpr (!kReadsOutput) flip[i] = !flip[i];
      }
    }
    finish();
  }

 private:
  A* state_after(int64_t i, int64_t index) const {
    if constexpr (kReadsOutput) return static_cast<A*>(a.h) + index * a.R;
    return carry + ((flip[i] ? 0 : share.count) + i) * a.R;
  }

  void start() {
    memset(zeros, 0, sizeof(A) * size_t(a.H > a.R ? a.H : a.R));
    for (int64_t i = 0; i < share.count; ++i) {
      const int64_t n = row_of(share, i);
      state[i] = a.h0 ? static_cast<const A*>(a.h0) + n * a.R : zeros;
      flip[i] = false;
      if constexpr (Cell::kStates == 2) {
        A* c = static_cast<A*>(a.c_n) + n * a.H;
        if (a.c0)
          memcpy(c, static_cast<const A*>(a.c0) + n * a.H, sizeof(A) * size_t(a.H));
        else
          memset(c, 0, sizeof(A) * size_t(a.H));
      }
    }
  }

  int64_t find_live(Step step) {
    int64_t count = 0;
    for (int64_t i = 0; i < share.count; ++i) {
      const int64_t n = row_of(share, i), index = step.index(n);
      if (step.holds(n)) {
        zero_row<T>(a.h, index, a.R);
        zero_row<T>(a.c, index, a.H);
        zero_row<T>(a.saved, index, Cell::kSaved * a.H);
        continue;
      }
      const bool clear = step.control(n) & kClear;
      A* c = Cell::kStates == 2 ? static_cast<A*>(a.c_n) + n * a.H : nullptr;
      who[count] = i;
      x[count] = clear ? zeros : state[i];
      Live& row = live[count++];
      row.index = index;
      row.gx = static_cast<const T*>(a.gx) + index * Cell::kGates * a.H;
      row.c = clear ? zeros : c;
      row.c1 = c;
      row.h1 = a.w_hr ? unprojected + i * a.H : state_after(i, index);
      row.h_out = kReadsOutput || a.w_hr ? nullptr : static_cast<T*>(a.h) + index * a.R;
      row.c_out = static_cast<T*>(a.c) + index * a.H;
      row.saved = static_cast<T*>(a.saved) + index * Cell::kSaved * a.H;
    }
    return count;
  }

  void run_tile(int64_t p, int vectors, int64_t first, int rows) {
    const Panels<A>& panels = weights.hidden;
    alignas(kVectorBytes) A product[kMaxRows * kMaxVectors * kWidth];
    find_tile<A>(vectors, rows)(panels.panel_weights(p), panels.panel_bias(p), x + first, a.R,
                                product);
    for (int b = 0; b < panels.block_count(p); ++b) {
      const Block block{product + b * Cell::kGates * kWidth, vectors * kWidth,
                        (panels.first_block(p) + b) * kWidth};
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
    X input[Cell::kGates], hidden[Cell::kGates], s[Cell::kStates], s1[Cell::kStates], saved[4];
    X::each([&](int k) {
      const A* product = block.product + (j + k) * block.stride;
#pragma GCC unroll 4
      for (int g = 0; g < Cell::kGates; ++g) {
        input[g].part[k] = V::load(row[k].gx + g * a.H + unit, n);
        hidden[g].part[k] = V::load(product + g * kWidth);
      }
      if constexpr (Cell::kHiddenIsElementwise) s[0].part[k] = V::load(x[first + k] + unit, n);
      if constexpr (Cell::kStates == 2) s[1].part[k] = V::load(row[k].c + unit, n);
    });
    Cell::forward(input, hidden, s, s1, saved);
    X::each([&](int k) {
      s1[0].part[k].store(row[k].h1 + unit, n);
      if constexpr (!kReadsOutput)
        if (row[k].h_out) s1[0].part[k].store(row[k].h_out + unit, n);
      if constexpr (Cell::kStates == 2) s1[1].part[k].store(row[k].c1 + unit, n);
      if (!a.save) return;
      if constexpr (Cell::kStates == 2) s1[1].part[k].store(row[k].c_out + unit, n);
#pragma GCC unroll 4
      for (int i = 0; i < Cell::kSaved; ++i)
        saved[i].part[k].store(row[k].saved + i * a.H + unit, n);
    });
  }

  void project(int64_t count) {
    for (int64_t j = 0; j < count; ++j) x[j] = unprojected + who[j] * a.H;
    multiply(weights.projection, x, count, [&](int64_t j, int64_t unit, int64_t n, V h) {
      h.store(state_after(who[j], live[j].index) + unit, n);
      if constexpr (!kReadsOutput) h.store(static_cast<T*>(a.h) + live[j].index * a.R + unit, n);
    });
  }

  void finish() {
    for (int64_t i = 0; i < share.count; ++i)
      memcpy(static_cast<A*>(a.h_n) + row_of(share, i) * a.R, state[i], sizeof(A) * size_t(a.R));
  }
};

}  // namespace FUSED_RNN_NAMESPACE
