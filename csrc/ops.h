// The ops as every backend registers them: a device supplies the two functions that run the time
// loop, ops.cpp does the checking and the allocation around them.
#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

#include "layer.h"

namespace fused_rnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Device {
  void (*forward)(const ForwardArgs&, ScalarType io);
  void (*backward)(const BackwardArgs&, ScalarType io);
  void (*step)(const StepArgs&, ScalarType io);
  void (*step_backward)(const StepArgs&, ScalarType io);
};

// What acts inside the loop.
struct Options {
  OptionalTensor control, rows, w_hr, h_mask, keep;
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

enum class Save { kNothing, kInNewMemory, kInPlaceOfGx };

ForwardResult run_layer(const Device& device, int64_t cell, const Tensor& gx, const Tensor& w_hh,
                        const OptionalTensor& b_hh, const OptionalTensor& h0,
                        const OptionalTensor& c0, bool reverse, Save save, const Options& options);

// dL/d of what forward returned.
struct OutputGradients {
  OptionalTensor dh, dc, dh_n, dc_n;
};
// What forward left behind. A step has no w_hh.
struct Kept {
  Tensor h, c, saved;
  std::optional<Tensor> w_hh, h0, c0;
};

BackwardResult run_layer_backward(const Device& device, int64_t cell, const OutputGradients& grads,
                                  const Kept& kept, bool reverse, const Options& options);

using StepResult = std::tuple<Tensor, Tensor, Tensor>;
using StepBackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

StepResult run_step(const Device& device, int64_t cell, const Tensor& gx, const Tensor& gh,
                    const Tensor& h, const OptionalTensor& c, bool save);

StepBackwardResult run_step_backward(const Device& device, int64_t cell,
                                     const OutputGradients& grads, const Kept& kept);

}  // namespace fused_rnn
