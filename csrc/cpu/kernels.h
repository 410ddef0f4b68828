// What an instruction-set build offers to the code that chooses among them: plain data and
// function pointers, so that nothing compiled for one build is called by another.
#pragma once

#include <stddef.h>

#include "../layer.h"

namespace fused_rnn {

// Rows first, first + stride, ... of the batch: what one thread runs.
struct Share {
  int64_t first, stride, count;
};

template <class Args>
struct Loop {
  size_t (*weight_bytes)(const Args&);
  size_t (*scratch_bytes)(const Args&, Share);
  void (*pack)(const Args&, char* weights);
  void (*run)(const Args&, Share, char* weights, char* scratch);
};

// Runs rows [begin, end).
using StepFunction = void (*)(const StepArgs&, int64_t begin, int64_t end);

// Of one dtype, by CellId.
struct Kernels {
  Loop<ForwardArgs> forward[kCellCount];
  Loop<BackwardArgs> backward[kCellCount];
  StepFunction step[kCellCount], step_backward[kCellCount];
  void (*cell[kCellCount])(const CellArgs&);
};

enum Scalar : int { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3, kScalarCount = 4 };

}  // namespace fused_rnn

// One step of a cell for a caller that has checked everything: contiguous CPU tensors of one dtype
// and of the right sizes.
extern "C" __attribute__((visibility("default"))) void fused_rnn_cell(
    int cell, int scalar, int64_t N, int64_t I, int64_t H, const void* x, const void* h,
    const void* c, const void* w_ih, const void* w_hh, const void* b_ih, const void* b_hh, void* h1,
    void* c1);
