// stepwise, forward: one matrix product and one pointwise kernel a step. It runs every size, dtype
// and option on every architecture; what keeps weights on chip falls back to it. Threads share
// nothing, so nothing waits.
#pragma once

#include "dropout.cuh"

namespace fused_rnn::cuda {

// x times W_ih, for some steps at a time. With rows, a step's rows may lie anywhere among all.
template <class T, class Machine>
class InputProducts {
  using A = arithmetic_t<T>;
  const Layer& a_;
  Machine& machine_;
  const int64_t gates_, chunk_;
  A* gx_;

  int64_t steps(int64_t first) const { return a_.T - first < chunk_ ? a_.T - first : chunk_; }

 public:
  InputProducts(const Layer& a, int64_t gates, Machine& machine)
      : a_(a),
        machine_(machine),
        gates_(gates * a.H),
        chunk_(a.rows || !a.w_ih ? a.T
               : a.chunk         ? a.chunk
                                 : (kInputRows + a.N - 1) / a.N),
        gx_(a.w_ih ? machine.template memory<A>((a.rows ? a.M : steps(0) * a.N) * gates_)
                   : nullptr) {}

  const A* data() const { return gx_; }  // null without W_ih: x is the product
  int64_t chunk() const { return chunk_; }
  // How many steps from `step` on, a multiple of chunk(), have their products now.
  int64_t make(int64_t step) {
    machine_.begin(step);
    if (a_.dropped)
      drop_out_rows<T>(a_, a_.x, a_.dropped, first_row(step), steps(step) * a_.N, machine_);
    const void* const x = a_.dropped ? a_.dropped : a_.x;
    if (a_.w_ih)
      machine_.multiply({a_.rows ? a_.M : steps(step) * a_.N, gates_, a_.I, false, true},
                        static_cast<const T*>(x) + first_row(step) * a_.I,
                        static_cast<const T*>(a_.w_ih), gx_);
    return steps(step);
  }
  // The row of x that the first of the products made at `step` belongs to.
  int64_t first_row(int64_t step) const {
    return a_.rows ? 0 : (a_.reverse ? a_.T - step - steps(step) : step) * a_.N;
  }
};

template <class T>
struct ForwardStep {
  using A = arithmetic_t<T>;
  StepRows now, next;
  const void* keep_share;  // or null
  bool last;
  int64_t N, H, R;
  const A* gx;  // products of the input from row gx_first on, or null: x is the product
  int64_t gx_first;
  const T* x;
  const A* gh;  // [N, G*H]
  const T *b_ih, *b_hh;
  T *h, *c, *saved;  // c, saved: or null
  A *h_n, *c_n;      // the carried states
  const T* h_mask;   // [N, R], or null
  T* operand;        // [N, R] what the next step's product reads
  T* unprojected;    // [N, H], or null without a projection
  const A* projected;

  // A carried state as it enters the step.
  FUSED_RNN_DEVICE A entering(const A* carried, int64_t n, int64_t at) const {
    return now.clears(n) ? A(0) : read(carried, at);
  }
};

// The visible output of a row, its carried state and the operand of the next step's product.
template <class T>
FUSED_RNN_DEVICE void place_state(const ForwardStep<T>& a, int64_t n, int64_t r,
                                  arithmetic_t<T> state) {
  const int64_t index = a.now.index(n), at = n * a.R + r;
  const bool holds = a.now.holds(n);
  if (holds)
    state = read(a.h_n, at);
  else if (a.now.keep || a.keep_share)
    state = a.now.after(a.keep_share, n, r, a.entering(a.h_n, n, at), state);
  write(a.h_n, at, state);
  if (index >= 0) write(a.h, index * a.R + r, holds ? arithmetic_t<T>(0) : state);
  if (a.last) return;
  write(a.operand, at, a.next.clears(n) ? arithmetic_t<T>(0) : masked(a.h_mask, at, state));
}

template <class Cell, class T>
FUSED_RNN_DEVICE void forward_unit(const ForwardStep<T>& a, int64_t n, int64_t unit) {
  using A = arithmetic_t<T>;
  constexpr int G = Cell::kGates;
  const int64_t index = a.now.index(n);
  if (a.now.holds(n)) {
    if (index >= 0 && a.c) write(a.c, index * a.H + unit, A(0));
    if (index >= 0 && a.saved)
      for (int i = 0; i < Cell::kSaved; ++i)
        write(a.saved, (index * Cell::kSaved + i) * a.H + unit, A(0));
    if (!a.unprojected) place_state(a, n, unit, A(0));
    return;
  }
  A gx[G], gh[G], s[Cell::kStates], s1[Cell::kStates], saved[4];
  for (int g = 0; g < G; ++g) {
    const int64_t gate = g * a.H + unit;
    gx[g] = a.gx ? read(a.gx, (index - a.gx_first) * G * a.H + gate)
                 : read(a.x, index * G * a.H + gate);
    gh[g] = read(a.gh, n * G * a.H + gate);
    if (a.b_ih) gx[g] += read(a.b_ih, gate);
    if (a.b_hh) gh[g] += read(a.b_hh, gate);
  }
  const int64_t at = n * a.H + unit;
  if constexpr (Cell::kHiddenIsElementwise) s[0] = a.entering(a.h_n, n, at);
  if constexpr (Cell::kStates == 2) s[1] = a.entering(a.c_n, n, at);

  Cell::forward(gx, gh, s, s1, saved);

  if constexpr (Cell::kStates == 2) {
    const A c = a.now.after(a.keep_share, n, a.R + unit, s[1], s1[1]);
    write(a.c_n, at, c);
    if (a.c) write(a.c, index * a.H + unit, c);
  }
  if (a.saved)
    for (int i = 0; i < Cell::kSaved; ++i)
      write(a.saved, (index * Cell::kSaved + i) * a.H + unit, saved[i]);
  if (a.unprojected)
    write(a.unprojected, at, s1[0]);
  else
    place_state(a, n, unit, s1[0]);
}

template <class Cell, class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1) forward_step(ForwardStep<T> a) {
  const Place place;
  if (place.unit >= a.H) return;
  for (int64_t n = place.first_row; n < a.N; n += place.stride)
    forward_unit<Cell>(a, n, place.unit);
}

template <class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1) place_projected(ForwardStep<T> a) {
  const Place place;
  if (place.unit >= a.R) return;
  for (int64_t n = place.first_row; n < a.N; n += place.stride)
    place_state(a, n, place.unit, read(a.projected, n * a.R + place.unit));
}

template <class T>
struct Start {
  using A = arithmetic_t<T>;
  StepRows first;
  int64_t N, width;
  const A* initial;  // or null: zero
  A* carried;
  const T* h_mask;  // or null
  T* operand;       // or null
};

// A carried state before the first step, and what that step's product reads.
template <class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1) start_state(Start<T> a) {
  using A = arithmetic_t<T>;
  const Place place;
  if (place.unit >= a.width) return;
  for (int64_t n = place.first_row; n < a.N; n += place.stride) {
    const int64_t at = n * a.width + place.unit;
    const A state = a.initial ? read(a.initial, at) : A(0);
    write(a.carried, at, state);
    if (a.operand) write(a.operand, at, a.first.clears(n) ? A(0) : masked(a.h_mask, at, state));
  }
}

// The states before the first step where they are carried, and what its product reads.
template <class Cell, class T, class Machine>
void start_states(const ForwardArgs& a, T* operand, Machine& machine) {
  using A = arithmetic_t<T>;
  const StepRows first = Loop(a, 0).step(0);
  machine.launch(start_state<T>, a.R, a.N,
                 Start<T>{first, a.N, a.R, static_cast<const A*>(a.h0), static_cast<A*>(a.h_n),
                          static_cast<const T*>(a.h_mask), operand});
  if constexpr (Cell::kStates == 2)
    machine.launch(start_state<T>, a.H, a.N,
                   Start<T>{first, a.N, a.H, static_cast<const A*>(a.c0), static_cast<A*>(a.c_n),
                            nullptr, nullptr});
}

template <class Cell, class T, class Machine>
void forward(const ForwardArgs& a, Machine& machine) {
  using A = arithmetic_t<T>;
  constexpr int64_t G = Cell::kGates;
  const int64_t gates = G * a.H;
  const Loop loop(a, Cell::kStates == 2 ? a.R + a.H : a.R);

  ForwardStep<T> step{};
  step.keep_share = a.keep_share;
  step.N = a.N;
  step.H = a.H;
  step.R = a.R;
  step.x = static_cast<const T*>(a.x);
  step.b_ih = static_cast<const T*>(a.b_ih);
  step.b_hh = static_cast<const T*>(a.b_hh);
  step.h = static_cast<T*>(a.h);
  step.c = static_cast<T*>(a.c);
  step.saved = static_cast<T*>(a.saved);
  step.h_n = static_cast<A*>(a.h_n);
  step.c_n = static_cast<A*>(a.c_n);
  InputProducts<T, Machine> input(a, G, machine);
  A* const gh = machine.template memory<A>(a.N * gates);
  step.gx = input.data();
  step.gh = gh;
  step.h_mask = static_cast<const T*>(a.h_mask);
  step.operand = machine.template memory<T>(a.N * a.R);
  A* const projected = a.w_hr ? machine.template memory<A>(a.N * a.R) : nullptr;
  step.unprojected = a.w_hr ? machine.template memory<T>(a.N * a.H) : nullptr;
  step.projected = projected;

  if (a.T == 0) step.operand = nullptr;  // there is no first step to read it
  start_states<Cell, T>(a, step.operand, machine);

  for (int64_t i = 0; i < a.T; ++i) {
    if (i % input.chunk() == 0) {
      input.make(i);
      step.gx_first = input.first_row(i);
    }
    machine.multiply({a.N, gates, a.R, false, true}, static_cast<const T*>(step.operand),
                     static_cast<const T*>(a.w_hh), gh);
    step.now = loop.step(i);
    step.last = i + 1 == a.T;
    step.next = loop.step(step.last ? i : i + 1);
    machine.launch(forward_step<Cell, T>, a.H, a.N, step);
    if (a.w_hr) {
      machine.multiply({a.N, a.R, a.H, false, true}, static_cast<const T*>(step.unprojected),
                       static_cast<const T*>(a.w_hr), projected);
      machine.launch(place_projected<T>, a.R, a.N, step);
    }
    if (step.last || (i + 1) % input.chunk() == 0) machine.end(i / input.chunk() * input.chunk());
  }
}

}  // namespace fused_rnn::cuda
