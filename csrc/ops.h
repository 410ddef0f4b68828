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
};

// What acts inside the loop.
struct Options {
  OptionalTensor control, rows, w_hr, h_mask, keep;
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult run_layer(const Device& device, int64_t cell, const Tensor& gx, const Tensor& w_hh,
                        const OptionalTensor& b_hh, const OptionalTensor& h0,
                        const OptionalTensor& c0, bool reverse, bool save, const Options& options);

// dL/d of what forward returned.
struct OutputGradients {
  OptionalTensor dh, dc, dh_n, dc_n;
};
// What forward left behind.
struct Kept {
  Tensor h, c, saved, w_hh;
  OptionalTensor h0, c0;
};

BackwardResult run_layer_backward(const Device& device, int64_t cell, const OutputGradients& grads,
                                  const Kept& kept, bool reverse, const Options& options);

}  // namespace fused_rnn
