// What the CUDA run time says of a GPU, in the planner's terms.
#pragma once

#include "../plan.h"

namespace fused_rnn::cuda {

// Asked once a process and device. Leaves the current device as it was.
// Throws std::runtime_error with the reason.
const Gpu& describe(int index);

}  // namespace fused_rnn::cuda

// describe() for ctypes: 0, or 1 and the reason in words.
extern "C" __attribute__((visibility("default"))) int fused_rnn_describe(int index,
                                                                         fused_rnn::Gpu* gpu,
                                                                         char* reason, int size);
