// The ops as every backend registers them: a device supplies the functions that run a layer
// or a step, ops.cpp does the checking and the allocation around them.
#pragma once

#include <exception>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "layer.h"

namespace fused_rnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `like` is of the io dtype, and where the call runs: what needs workspace allocates it there. A
// layer runs for so many models of the same sizes.
struct Device {
  void (*forward)(const ForwardArgs* models, int64_t count, const Tensor& like);
  void (*backward)(const BackwardArgs* models, int64_t count, const Tensor& like);
  void (*step)(const StepArgs&, const Tensor& like);
  void (*step_backward)(const StepArgs&, const Tensor& like);
  int64_t algorithms;  // how many there are to choose among by number, from 1 on
};

// For a device that runs one model after the other.
template <class Args, void (*kRun)(const Args&, const Tensor&)>
void in_turn(const Args* models, int64_t count, const Tensor& like) {
  for (int64_t model = 0; model < count; ++model) kRun(models[model], like);
}

// What `make` allocates; where that fails, a sentence with words() that autograd.py knows.
template <class Make, class Words>
Tensor or_out_of_memory(Make make, Words words) {
  try {
    return make();
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, "fused_rnn: out of memory: there is no room for ", words());
  }
}

// What acts inside the loop.
struct Options {
  OptionalTensor control, rows, w_hr, h_mask, keep;
  int64_t algorithm;  // 0: the device chooses
  bool tf32;
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

// The ops as torch calls them, for one device.
template <const Device& kDevice>
ForwardResult layer_op(int64_t cell, Tensor x, OptionalTensor w_ih, OptionalTensor b_ih,
                       Tensor w_hh, OptionalTensor b_hh, OptionalTensor h0, OptionalTensor c0,
                       bool reverse, bool save, OptionalTensor control, OptionalTensor rows,
                       OptionalTensor w_hr, OptionalTensor h_mask, OptionalTensor keep,
                       int64_t algorithm, bool tf32) {
  return run_layer(kDevice, cell, {x, w_ih, b_ih, w_hh, b_hh, h0, c0}, reverse, save,
                   {control, rows, w_hr, h_mask, keep, algorithm, tf32});
}

template <const Device& kDevice>
BackwardResult layer_backward_op(int64_t cell, int64_t wanted, OptionalTensor dh, OptionalTensor dc,
                                 OptionalTensor dh_n, OptionalTensor dc_n, Tensor h, Tensor c,
                                 Tensor saved, Tensor x, OptionalTensor w_ih, Tensor w_hh,
                                 OptionalTensor h0, OptionalTensor c0, bool reverse,
                                 OptionalTensor control, OptionalTensor rows, OptionalTensor w_hr,
                                 OptionalTensor h_mask, OptionalTensor keep, int64_t algorithm,
                                 bool tf32) {
  return run_layer_backward(kDevice, cell, wanted, {dh, dc, dh_n, dc_n}, {h, c, saved},
                            {x, w_ih, std::nullopt, w_hh, std::nullopt, h0, c0}, reverse,
                            {control, rows, w_hr, h_mask, keep, algorithm, tf32});
}

template <const Device& kDevice>
StepResult step_op(int64_t cell, Tensor gx, Tensor gh, Tensor h, OptionalTensor c, bool save) {
  return run_step(kDevice, cell, gx, gh, h, c, save);
}

template <const Device& kDevice>
StepBackwardResult step_backward_op(int64_t cell, OptionalTensor dh1, OptionalTensor dc1, Tensor h1,
                                    Tensor c1, Tensor saved, Tensor h, OptionalTensor c) {
  return run_step_backward(kDevice, cell, {dh1, dc1, std::nullopt, std::nullopt}, {h1, c1, saved},
                           h, c);
}

// Registers all for the dispatch key of `library`.
template <const Device& kDevice, class Library>
void implement_ops(Library& library) {
  library.impl("layer", TORCH_BOX(&layer_op<kDevice>));
  library.impl("layer_backward", TORCH_BOX(&layer_backward_op<kDevice>));
  library.impl("step", TORCH_BOX(&step_op<kDevice>));
  library.impl("step_backward", TORCH_BOX(&step_backward_op<kDevice>));
}

}  // namespace fused_rnn
