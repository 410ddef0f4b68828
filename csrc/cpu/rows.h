// How a layer is cut into chunks of steps, slots of live rows and shares of the batch. Forward and
// backward walk through it alike.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace FUSED_RNN_NAMESPACE {

using fused_rnn::kClear;
using fused_rnn::kCut;
using fused_rnn::kHold;
using fused_rnn::kSumRows;
using fused_rnn::Layer;
using fused_rnn::Schedule;

// Calls task(i) for each of `tasks`, in any order, on any thread.
template <class Task>
void parallel(const Schedule& schedule, int64_t tasks, const Task& task) {
  if (schedule.workers == 1 || tasks == 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  } else {
    schedule.parallel(
        tasks, [](const void* context, int64_t i) { (*static_cast<const Task*>(context))(i); },
        &task);
  }
}

// One thread's rows of the batch: first, first + stride, ...; `place` numbers the rows of all
// shares without gaps, for what each row has in workspace.
struct Share {
  int64_t first, stride, count, place;

  Share(const Layer& layer, int64_t shares, int64_t share) {
    const int64_t N = layer.N;
    if (layer.control || layer.rows) {
      // Where rows end at different times, as in packed input sorted by length, dealing them out
      // evens the work.
      first = share;
      stride = shares;
      count = (N - share + shares - 1) / shares;
      place = N / shares * share + (share < N % shares ? share : N % shares);
    } else {
      // Neighbouring rows share cache lines.
      const Range range(N, share, shares);
      first = place = range.begin;
      stride = 1;
      count = range.end - range.begin;
    }
  }
  // All rows, for a member of a team.
  Share(const Layer& layer, int number)
      : first(0), stride(1), count(layer.N), place(number * layer.N) {}

  int64_t row(int64_t i) const { return first + i * stride; }
};

struct Step {
  const Layer& layer;
  int64_t t;

  // The step'th step in the order in which forward runs.
  Step(const Layer& layer, int64_t step)
      : layer(layer), t(layer.reverse ? layer.T - 1 - step : step) {}

  uint8_t control(int64_t n) const { return layer.control ? layer.control[t * layer.N + n] : 0; }
  bool holds(int64_t n) const {
    return (control(n) & kHold) || (layer.rows && layer.rows[t * layer.N + n] < 0);
  }
  // Row of (t, n) in x, h, c, saved; -1 where the step has none.
  int64_t index(int64_t n) const {
    return layer.rows ? layer.rows[t * layer.N + n] : t * layer.N + n;
  }
};

// The live rows of a chunk of steps, of all the batch or of one share, numbered in the order in
// which the loop runs: what stages hand to each other is stored by slot, without gaps.
class Slots {
  Share share_;
  int32_t* slots_;  // [steps][N], -1 where a row holds
  int64_t N_, most_steps_, sum_steps_, first_, steps_;
  bool whole_ = true;

 public:
  int64_t capacity;
  int64_t begin = 0, end = 0;
  int64_t* index;  // [end] row in x, h, c, saved
  // The blocks of slots that sums over the whole batch are made of: the i-th ends where the next
  // one begins.
  int64_t sums = 0;
  int64_t* sum_end;

  Slots(const Layer& layer, const Schedule& schedule, Arena& arena)
      : share_(layer, 0),
        slots_(arena.take<int32_t>(schedule.steps * layer.N)),
        N_(layer.N),
        most_steps_(schedule.steps),
        sum_steps_(schedule.sum_steps),
        capacity(schedule.steps * layer.N),
        index(arena.take<int64_t>(capacity)),
        sum_end(arena.take<int64_t>((schedule.steps / sum_steps_ + 1) * (N_ / kSumRows + 1))) {}

  // A share's own, in a part of the same memory, for a thread that waits for no other.
  Slots part(const Share& share) const {
    Slots own = *this;
    own.share_ = share;
    own.whole_ = false;
    own.begin = most_steps_ * share.place;
    return own;
  }

  // Steps [first, first + steps), numbered from the last one down with `backwards`.
  void open(const Layer& layer, int64_t first, int64_t steps, bool backwards = false) {
    first_ = first;
    steps_ = steps;
    end = begin;
    sums = 0;
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t step = first + (backwards ? steps - 1 - i : i);
      const Step at(layer, step);
      for (int64_t j = 0; j < share_.count; ++j) {
        const int64_t n = share_.row(j);
        if (i % sum_steps_ == 0 && n % kSumRows == 0) end_sum();
        const bool holds = at.holds(n);
        slots_[(step - first) * N_ + share_.place + j] = holds ? -1 : int32_t(end);
        if (!holds) index[end++] = at.index(n);
      }
    }
    end_sum();
  }
  int64_t first_step() const { return first_; }
  int64_t steps() const { return steps_; }
  // Of the i-th row of a share; -1: it holds.
  int64_t at(int64_t step, const Share& share, int64_t i) const {
    return slots_[(step - first_) * N_ + (whole_ ? share.row(i) : share.place + i)];
  }

 private:
  void end_sum() {
    if (whole_ && end > (sums ? sum_end[sums - 1] : 0)) sum_end[sums++] = end;
  }
};

template <class T>
void zero_row(void* base, int64_t index, int64_t width) {
  if (base && index >= 0) memset(static_cast<T*>(base) + index * width, 0, width * sizeof(T));
}

// `count` values into the arithmetic type or out of it.
template <class From, class To>
void copy_row(const From* from, To* to, int64_t count) {
  using V = Vec<typename Arithmetic<From>::type>;
  for (int64_t i = 0; i < count; i += V::kWidth)
    V::load(from + i, count - i).store(to + i, count - i);
}

}  // namespace FUSED_RNN_NAMESPACE
