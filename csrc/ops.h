// The ops as every backend registers them: a device supplies the functions that run a layer
// or a step, ops.cpp does the checking and the allocation around them.
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

// What a layer reads. Without w_ih, x is gx: the product itself.
struct Inputs {
  Tensor x;
  OptionalTensor w_ih, b_ih;
  Tensor w_hh;
  OptionalTensor b_hh, h0, c0;
};
// dL/d of what forward returned.
struct OutputGradients {
  OptionalTensor dh, dc, dh_n, dc_n;
};
// What forward left behind.
struct Kept {
  Tensor h, c, saved;
};

// Which gradients a backward is asked for, bit by bit. The states' are a by-product.
enum WantedBits : int64_t {
  kInput = 1,
  kWeightIh = 2,
  kBiasIh = 4,
  kWeightHh = 8,
  kBiasHh = 16,
  kWeightHr = 32
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult run_layer(const Device& device, int64_t cell, const Inputs& inputs, bool reverse,
                        bool save, const Options& options);

BackwardResult run_layer_backward(const Device& device, int64_t cell, int64_t wanted,
                                  const OutputGradients& grads, const Kept& kept,
                                  const Inputs& inputs, bool reverse, const Options& options);

using StepResult = std::tuple<Tensor, Tensor, Tensor>;
using StepBackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

StepResult run_step(const Device& device, int64_t cell, const Tensor& gx, const Tensor& gh,
                    const Tensor& h, const OptionalTensor& c, bool save);

StepBackwardResult run_step_backward(const Device& device, int64_t cell,
                                     const OutputGradients& grads, const Kept& kept,
                                     const Tensor& h, const OptionalTensor& c);

}  // namespace fused_rnn
