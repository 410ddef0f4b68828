// What an instruction-set build offers to the code that chooses among them: plain data and
// function pointers, so that nothing compiled for one build is called by another.
#pragma once

#include <stddef.h>

#include "../layer.h"

namespace fused_rnn {

inline constexpr int64_t kSumRows = 256;  // in a block of a sum over rows, at most

// How a call is cut up. A chunk of steps goes through all stages before the next one starts, so
// that what one stage leaves for the next is still in the cache.
struct Schedule {
  int64_t workers;   // threads that stages without an order in time are cut for
  int64_t shares;    // of the batch, each one thread's: no more than rows
  int64_t members;   // of a team that takes each step together, where the units can be shared; or 1
  int64_t patience;  // of a team for members that have not come, ns
  int64_t steps;     // in a chunk: all, or a multiple of sum_steps
  // Sums over rows are made of the sums over blocks of so many steps, whatever workers and chunks.
  int64_t sum_steps;
  // Runs body(context, task) for each task, in any order, on any thread.
  void (*parallel)(int64_t tasks, void (*body)(const void* context, int64_t task),
                   const void* context);
};

template <class Args>
struct Loop {
  size_t (*bytes)(const Args&, const Schedule&);
  void (*run)(const Args&, const Schedule&, char* memory);
};

// Runs rows [begin, end).
using StepFunction = void (*)(const StepArgs&, int64_t begin, int64_t end);

// Of one dtype, by CellId.
struct Kernels {
  Loop<ForwardArgs> forward[kCellCount];
  Loop<BackwardArgs> backward[kCellCount];
  StepFunction step[kCellCount], step_backward[kCellCount];
  void (*cell[kCellCount])(const CellArgs&);
  // By NormCellId.
  Loop<NormForwardArgs> norm_forward[kNormCellCount];
  Loop<NormBackwardArgs> norm_backward[kNormCellCount];
};

enum Scalar : int { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3, kScalarCount = 4 };

}  // namespace fused_rnn

// One step of a cell for a caller that has checked everything: contiguous CPU tensors of one dtype
// and of the right sizes.
extern "C" __attribute__((visibility("default"))) void fused_rnn_cell(
    int cell, int scalar, int64_t N, int64_t I, int64_t H, const void* x, const void* h,
    const void* c, const void* w_ih, const void* w_hh, const void* b_ih, const void* b_hh, void* h1,
    void* c1);
