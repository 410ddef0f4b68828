#pragma once

#include <pybind11/pybind11.h>

namespace fused_rnn {

// Adds `plan` to fused_rnn._C.
void bind_plan(pybind11::module_& m);

}  // namespace fused_rnn
