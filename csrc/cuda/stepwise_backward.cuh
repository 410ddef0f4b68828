// stepwise, backward: the loop of stepwise_forward.cuh from its end, then the gradients of input
// and weights, each one product over all rows. No atomics: every sum has one order.
#pragma once

#include <vector>

#include "dropout.cuh"

namespace fused_rnn::cuda {

// Where the state before a row lies, if not in a row of h.
inline constexpr int64_t kInitial = -1, kZero = -2;

template <class T>
struct BackwardLayer {
  using A = arithmetic_t<T>;
  Loop loop;
  int64_t N, H, R;
  const T *h, *c, *saved, *h0, *c0;  // h0, c0: or null, zero
  const T* h_mask;                   // [N, R], or null
  const int64_t* previous;           // [T, N], or null: the step before of the same sequence

  FUSED_RNN_DEVICE StepRows step(int64_t step) const { return loop.step(step); }
  FUSED_RNN_DEVICE int64_t before(int64_t step, int64_t n, int64_t index) const {
    if (previous) return load(previous + step * N + n);
    return step == 0 ? kInitial : index + (loop.reverse ? N : -N);
  }
  FUSED_RNN_DEVICE A state(const T* states, const T* initial, int64_t before, int64_t n,
                           int64_t width, int64_t unit) const {
    if (before >= 0) return read(states, before * width + unit);
    return before == kInitial && initial ? read(initial, n * width + unit) : A(0);
  }
};

// One row of the batch a thread: for each of its steps, where the state before it lies.
template <class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1)
    trace_back(BackwardLayer<T> a, int64_t* previous) {
  const int64_t n = Place().unit;
  if (n >= a.N) return;
  int64_t last = kInitial;
  for (int64_t step = 0; step < a.loop.T; ++step) {
    const StepRows now = a.step(step);
    store(previous + step * a.N + n, now.clears(n) ? kZero : last);
    if (!now.holds(n)) last = now.index(n);
  }
}

template <class T>
struct BackwardStep {
  using A = arithmetic_t<T>;
  BackwardLayer<T> layer;
  int64_t step;
  bool last;         // no step comes after this one
  const T *dh, *dc;  // [M, R], [M, H], or null
  const A* product;  // [N, R] dgh w_hh of the step after
  A *dh0, *dc0;      // carried gradients
  // With a projection:
  T* dh_step;             // [N, R] of the projected states, or null: there is none
  T* dh_all;              // [M, R] the same of all rows, or null
  const A* dh_projected;  // [N, H] of the states before it
  T *dgx, *dgh;           // [M, G*H]; dgh is null where it equals dgx
  T* dgh_step;            // [N, G*H], with rows
};

// What the steps after this one send into the carried hidden state.
template <class T>
FUSED_RNN_DEVICE arithmetic_t<T> carried_gradient(const BackwardStep<T>& a, int64_t n, int64_t r) {
  const int64_t at = n * a.layer.R + r;
  if (a.last || !a.layer.step(a.step + 1).passes(n)) return read(a.dh0, at);
  return read(a.dh0, at) + masked(a.layer.h_mask, at, read(a.product, at));
}

// dL/dh of the projected states of a step.
template <class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1) gather_projected(BackwardStep<T> a) {
  using A = arithmetic_t<T>;
  const Place place;
  const int64_t r = place.unit, R = a.layer.R;
  if (r >= R) return;
  const StepRows now = a.layer.step(a.step);
  for (int64_t n = place.first_row; n < a.layer.N; n += place.stride) {
    A dh = carried_gradient(a, n, r), past = 0;  // past: what does not pass through the products
    const int64_t index = now.index(n);
    const bool holds = now.holds(n);
    if (!holds && a.dh) dh += read(a.dh, index * R + r);
    if (holds || now.keeps(n, r)) {
      past = holds || now.passes(n) ? dh : A(0);
      dh = A(0);
    }
    write(a.dh0, n * R + r, past);
    write(a.dh_step, n * R + r, dh);
    if (a.dh_all && index >= 0) write(a.dh_all, index * R + r, dh);
  }
}

// Of one unit and row: from dL/ds1 the gradients of its gates, and of the state before what does
// not pass through the products. A kept state (zoneout) is the one before, whatever was computed.
template <class Cell, class A>
FUSED_RNN_DEVICE void unit_gradients(bool keeps_h, bool keeps_c, bool passes, A* ds1,
                                     const A* saved, const A* s, A* s1, A* dgx, A* dgh, A* ds) {
  A past[Cell::kStates] = {};
  if (keeps_h) past[0] = ds1[0], ds1[0] = A(0);
  if constexpr (Cell::kStates == 2) {
    if (keeps_c) {
      past[1] = ds1[1], ds1[1] = A(0);
      s1[1] = Cell::next_c(saved, s[1]);
    }
  }
  Cell::backward(ds1, saved, s, s1, dgx, dgh, ds);
  for (int i = 0; i < Cell::kStates; ++i) ds[i] = passes ? ds[i] + past[i] : A(0);
}

template <class Cell, class T>
FUSED_RNN_DEVICE void backward_unit(const BackwardStep<T>& a, int64_t n, int64_t unit) {
  using A = arithmetic_t<T>;
  constexpr int G = Cell::kGates;
  const BackwardLayer<T>& layer = a.layer;
  const StepRows now = layer.step(a.step);
  const int64_t H = layer.H, index = now.index(n), at = n * H + unit;
  A dgx[G], dgh[G];
  if (now.holds(n)) {
    if (!a.dh_step) write(a.dh0, at, carried_gradient(a, n, unit));
    if (index < 0) return;
    for (int g = 0; g < G; ++g) dgx[g] = dgh[g] = A(0);
  } else {
    A ds1[Cell::kStates], ds[Cell::kStates], s[Cell::kStates], s1[Cell::kStates] = {}, saved[4];
    bool keeps_h = false, keeps_c = false;
    const int64_t before = layer.before(a.step, n, index);
    for (int i = 0; i < Cell::kSaved; ++i)
      saved[i] = read(layer.saved, (index * Cell::kSaved + i) * H + unit);
    if (a.dh_step) {
      ds1[0] = read(a.dh_projected, at);
    } else {
      ds1[0] = carried_gradient(a, n, unit);
      if (a.dh) ds1[0] += read(a.dh, index * H + unit);
      s1[0] = read(layer.h, index * H + unit);
      keeps_h = now.keeps(n, unit);
    }
    if constexpr (Cell::kHiddenIsElementwise)
      s[0] = layer.state(layer.h, layer.h0, before, n, H, unit);
    if constexpr (Cell::kStates == 2) {
      ds1[1] = read(a.dc0, at);
      if (a.dc) ds1[1] += read(a.dc, index * H + unit);
      s[1] = layer.state(layer.c, layer.c0, before, n, H, unit);
      s1[1] = read(layer.c, index * H + unit);
      keeps_c = now.keeps(n, layer.R + unit);
    }
    unit_gradients<Cell>(keeps_h, keeps_c, now.passes(n), ds1, saved, s, s1, dgx, dgh, ds);
    if (!a.dh_step) write(a.dh0, at, ds[0]);
    if constexpr (Cell::kStates == 2) write(a.dc0, at, ds[1]);
  }
  for (int g = 0; g < G; ++g) {
    const int64_t gate = g * H + unit;
    write(a.dgx, index * G * H + gate, dgx[g]);
    if (a.dgh) write(a.dgh, index * G * H + gate, dgh[g]);
    if (a.dgh_step) write(a.dgh_step, n * G * H + gate, dgh[g]);
  }
}

template <class Cell, class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1) backward_step(BackwardStep<T> a) {
  const Place place;
  if (place.unit >= a.layer.H) return;
  for (int64_t n = place.first_row; n < a.layer.N; n += place.stride)
    backward_unit<Cell>(a, n, place.unit);
}

template <class T>
struct Carried {
  using A = arithmetic_t<T>;
  int64_t N, width;
  const A* final;  // gradient of the final state, or null: zero
  A* carried;
};

template <class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1) start_gradient(Carried<T> a) {
  const Place place;
  if (place.unit >= a.width) return;
  for (int64_t n = place.first_row; n < a.N; n += place.stride) {
    const int64_t at = n * a.width + place.unit;
    write(a.carried, at, a.final ? read(a.final, at) : arithmetic_t<T>(0));
  }
}

// The first step's product goes where no step before it takes it: a.step is -1.
template <class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1) finish_gradient(BackwardStep<T> a) {
  const Place place;
  if (place.unit >= a.layer.R) return;
  for (int64_t n = place.first_row; n < a.layer.N; n += place.stride)
    write(a.dh0, n * a.layer.R + place.unit, carried_gradient(a, n, place.unit));
}

// For all rows: the hidden state that entered the recurrent product (unit < R), zero in held rows.
template <class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1)
    gather_operands(BackwardLayer<T> a, T* operands) {
  const Place place;
  if (place.unit >= a.R) return;
  for (int64_t i = place.first_row; i < a.loop.T * a.N; i += place.stride) {
    const int64_t step = i / a.N, n = i % a.N;
    const StepRows now = a.step(step);
    const int64_t index = now.index(n);
    if (index < 0) continue;
    const int64_t before = now.holds(n) ? kZero : a.before(step, n, index);
    const arithmetic_t<T> h = a.state(a.h, a.h0, before, n, a.R, place.unit);
    write(operands, index * a.R + place.unit, masked(a.h_mask, n * a.R + place.unit, h));
  }
}

// For all rows: o tanh(c), what the projection read; zero in held rows, whose c and o are.
template <class Cell, class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1)
    gather_unprojected(BackwardLayer<T> a, T* unprojected) {
  const Place place;
  const int64_t unit = place.unit, H = a.H;
  if (unit >= H) return;
  for (int64_t i = place.first_row; i < a.loop.T * a.N; i += place.stride) {
    const int64_t step = i / a.N, n = i % a.N;
    const StepRows now = a.step(step);
    const int64_t index = now.index(n);
    if (index < 0) continue;
    arithmetic_t<T> saved[Cell::kSaved], c = read(a.c, index * H + unit);
    for (int k = 0; k < Cell::kSaved; ++k)
      saved[k] = read(a.saved, (index * Cell::kSaved + k) * H + unit);
    if (!now.holds(n) && now.keeps(n, a.R + unit))
      c = Cell::next_c(saved, a.state(a.c, a.c0, a.before(step, n, index), n, H, unit));
    write(unprojected, index * H + unit, saved[3] * tanh(c));
  }
}

inline constexpr int64_t kSumRows = 256;  // in one chain of a sum over rows

// Blocks of rows that are summed one by one; one where there are no rows, whose sum is zero.
FUSED_RNN_FN int64_t sum_blocks(int64_t rows) {
  return rows > kSumRows ? (rows + kSumRows - 1) / kSumRows : 1;
}

// Of a matrix [rows, width], the sums of its blocks: [sum_blocks(rows), width].
template <class From, class To>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1)
    sum_rows(const From* from, int64_t rows, int64_t width, To* to) {
  const Place place;
  if (place.unit >= width) return;
  for (int64_t block = place.first_row; block < sum_blocks(rows); block += place.stride) {
    const int64_t end = (block + 1) * kSumRows < rows ? (block + 1) * kSumRows : rows;
    arithmetic_t<From> sum = 0;
    for (int64_t row = block * kSumRows; row < end; ++row)
      sum += read(from, row * width + place.unit);
    write(to, block * width + place.unit, sum);
  }
}

// A bias' gradient: sums of sums, until there is one.
template <class From, class T, class Machine>
void sum_all_rows(const From* from, int64_t rows, int64_t width, T* to, Machine& machine) {
  using A = arithmetic_t<From>;
  const int64_t blocks = sum_blocks(rows);
  if (blocks == 1) return machine.launch(sum_rows<From, T>, width, 1, from, rows, width, to);
  A* const sums = machine.template memory<A>(blocks * width);
  machine.launch(sum_rows<From, A>, width, blocks, from, rows, width, sums);
  sum_all_rows(static_cast<const A*>(sums), blocks, width, to, machine);
}

// What comes before the loop, the same for all algorithms: what a step reads of the layer.
template <class Cell, class T, class Machine>
BackwardStep<T> start_backward(const BackwardArgs& a, Machine& machine) {
  using A = arithmetic_t<T>;
  const int64_t gates = Cell::kGates * a.H;
  const auto matrix = [](const void* x) { return static_cast<const T*>(x); };

  BackwardLayer<T> layer{Loop(a, Cell::kStates == 2 ? a.R + a.H : a.R),
                         a.N,
                         a.H,
                         a.R,
                         matrix(a.h),
                         matrix(a.c),
                         matrix(a.saved),
                         matrix(a.h0),
                         matrix(a.c0),
                         matrix(a.h_mask),
                         nullptr};
  if (a.control || a.rows) {
    auto* const previous = machine.template memory<int64_t>(a.T * a.N);
    machine.launch(trace_back<T>, a.N, 1, layer, previous);
    layer.previous = previous;
  }

  BackwardStep<T> step{};
  step.layer = layer;
  step.dh = matrix(a.dh);
  step.dc = matrix(a.dc);
  step.dh0 = static_cast<A*>(a.dh0);
  step.dc0 = static_cast<A*>(a.dc0);
  // Without w_ih, dgx is what the caller calls dx.
  step.dgx = !a.w_ih && a.dx ? static_cast<T*>(a.dx) : machine.template memory<T>(a.M * gates);
  step.dgh = Cell::kSplitsGates ? machine.template memory<T>(a.M * gates) : nullptr;
  step.dh_all = a.dw_hr ? machine.template memory<T>(a.M * a.R) : nullptr;

  machine.launch(start_gradient<T>, a.R, a.N,
                 Carried<T>{a.N, a.R, static_cast<const A*>(a.dh_n), step.dh0});
  if constexpr (Cell::kStates == 2)
    machine.launch(start_gradient<T>, a.H, a.N,
                   Carried<T>{a.N, a.H, static_cast<const A*>(a.dc_n), step.dc0});
  return step;
}

// The gradient of the input of some steps.
template <class Cell, class T, class Machine>
void input_gradient(const BackwardArgs& a, const T* dgx, int64_t step, int64_t steps,
                    Machine& machine) {
  if (!a.w_ih || !a.dx) return;
  const int64_t gates = Cell::kGates * a.H;
  const int64_t first = a.rows ? 0 : (a.reverse ? a.T - step - steps : step) * a.N;
  const int64_t rows = a.rows ? a.M : steps * a.N;
  T* const dx = static_cast<T*>(a.dx);
  machine.multiply({rows, a.I, gates}, dgx + first * gates, static_cast<const T*>(a.w_ih),
                   dx + first * a.I);
  if (a.passed) drop_out_rows<T>(a, dx, dx, first, rows, machine);
}

// And what comes after it.
template <class Cell, class T, class Machine>
void finish_backward(const BackwardArgs& a, const BackwardStep<T>& step, Machine& machine) {
  const int64_t gates = Cell::kGates * a.H;
  const auto matrix = [](const void* x) { return static_cast<const T*>(x); };
  const BackwardLayer<T>& layer = step.layer;
  const T *const dgx = step.dgx, *const dgh = step.dgh ? step.dgh : dgx;
  if (a.dw_ih)
    machine.multiply({gates, a.I, a.M, true}, dgx, matrix(a.x), static_cast<T*>(a.dw_ih));
  if (a.dw_hh) {
    T* const operands = machine.template memory<T>(a.M * a.R);
    machine.launch(gather_operands<T>, a.R, a.T * a.N, layer, operands);
    machine.multiply({gates, a.R, a.M, true}, dgh, static_cast<const T*>(operands),
                     static_cast<T*>(a.dw_hh));
  }
  if (a.db_ih) sum_all_rows(dgx, a.M, gates, static_cast<T*>(a.db_ih), machine);
  if (a.db_hh) sum_all_rows(dgh, a.M, gates, static_cast<T*>(a.db_hh), machine);
  if constexpr (Cell::kStates == 2) {
    if (a.dw_hr) {
      T* const unprojected = machine.template memory<T>(a.M * a.H);
      machine.launch(gather_unprojected<Cell, T>, a.H, a.T * a.N, layer, unprojected);
      machine.multiply({a.R, a.H, a.M, true}, static_cast<const T*>(step.dh_all),
                       static_cast<const T*>(unprojected), static_cast<T*>(a.dw_hr));
    }
  }
}

// run_loop(steps, first, count) makes dgx and dgh of these steps' rows, dh_all where there is a
// projection, and of the gradients of the states after them in dh0 and dc0 those of the states
// before, in each direction; `chunk` steps at a time, from the last on.
template <class Cell, class T, class Machine, class RunLoop>
Steps backward_of(Directions<BackwardArgs> directions, int64_t chunk, Machine& machine,
                  RunLoop run_loop) {
  std::vector<BackwardStep<T>> steps;
  for (const BackwardArgs& a : directions) steps.push_back(start_backward<Cell, T>(a, machine));
  int64_t end = directions[0].T;
  return [=, &machine]() mutable {
    const int64_t first = end > chunk ? end - chunk : 0;
    machine.begin(first);
    run_loop(steps, first, end - first);
    for (int i = 0; i < directions.count; ++i)
      input_gradient<Cell>(directions[i], steps[size_t(i)].dgx, first, end - first, machine);
    machine.end(first);
    end = first;
    if (end > 0) return true;
    for (int i = 0; i < directions.count; ++i)
      finish_backward<Cell, T>(directions[i], steps[size_t(i)], machine);
    return false;
  };
}

template <class Cell, class T, class Machine>
void backward(const BackwardArgs& a, Machine& machine) {
  using A = arithmetic_t<T>;
  const int64_t gates = Cell::kGates * a.H;
  const auto matrix = [](const void* x) { return static_cast<const T*>(x); };
  run_all(backward_of<Cell, T>(a, a.T, machine, [&](const auto& steps, int64_t, int64_t) {
    BackwardStep<T> step = steps[0];
    A* const product = machine.template memory<A>(a.N * a.R);
    step.product = product;
    step.dgh_step = a.rows ? machine.template memory<T>(a.N * gates) : nullptr;
    A* dh_projected = nullptr;
    if (a.w_hr) {
      step.dh_step = machine.template memory<T>(a.N * a.R);
      step.dh_projected = dh_projected = machine.template memory<A>(a.N * a.H);
    }
    const T* const dgh = step.dgh ? step.dgh : step.dgx;
    for (step.step = a.T - 1; step.step >= 0; --step.step) {
      step.last = step.step + 1 == a.T;
      if (a.w_hr) {
        machine.launch(gather_projected<T>, a.R, a.N, step);
        machine.multiply({a.N, a.H, a.R}, static_cast<const T*>(step.dh_step), matrix(a.w_hr),
                         dh_projected);
      }
      machine.launch(backward_step<Cell, T>, a.H, a.N, step);
      const T* const of_step =
          step.dgh_step ? step.dgh_step : dgh + step.layer.step(step.step).first * gates;
      machine.multiply({a.N, a.R, gates}, of_step, matrix(a.w_hh), product);
    }
    step.last = a.T == 0;
    machine.launch(finish_gradient<T>, a.R, a.N, step);
  }));
}

}  // namespace fused_rnn::cuda
