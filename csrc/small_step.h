#pragma once

#include <pybind11/pybind11.h>

namespace fused_rnn {

// Adds `small_step` and `connect` to fused_rnn._C.
void bind_small_step(pybind11::module_& m);

}  // namespace fused_rnn
