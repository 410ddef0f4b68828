// The ops as every backend registers them: a device supplies the functions that run a layer
// or a step, ops.cpp does the checking and the allocation around them.
#pragma once

#include <exception>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "layer.h"

namespace fused_rnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What one call runs: the directions of each model, one after the other. All have the same sizes.
template <class Args>
struct Models {
  const Args* first;
  int64_t count;
  int directions;

  Directions<Args> operator[](int64_t model) const {
    return {first + model * directions, directions};
  }
};

// `like` is of the io dtype, and where the call runs: what needs workspace allocates it there.
struct Device {
  void (*forward)(Models<ForwardArgs>, const Tensor& like);
  void (*backward)(Models<BackwardArgs>, const Tensor& like);
  void (*step)(const StepArgs&, const Tensor& like);
  void (*step_backward)(const StepArgs&, const Tensor& like);
  int64_t algorithms;  // how many there are to choose among by number, from 1 on
  // Null where layers always run one after the other.
  void (*forward_stack)(Stack<ForwardArgs>, const Tensor& like) = nullptr;
  void (*backward_stack)(Stack<BackwardArgs>, const Tensor& like) = nullptr;
};

// For a device that runs one model after the other.
template <class Args, void (*kRun)(Directions<Args>, const Tensor&)>
void in_turn(Models<Args> models, const Tensor& like) {
  for (int64_t model = 0; model < models.count; ++model) kRun(models[model], like);
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
// A layer in one direction.
struct Direction {
  Inputs inputs;
  bool reverse;
  Options options;
};
// dL/d of what forward returned.
struct OutputGradients {
  OptionalTensor dh, dc, dh_n, dc_n;
};
// What forward left behind.
struct Kept {
  Tensor h, c, saved;
};

// The backward of a layer in one direction.
struct DirectionBackward {
  int64_t wanted;
  OutputGradients grads;
  Kept kept;
  Direction of;
};

// Which gradients a backward is asked for, bit by bit. The states' are a by-product.
enum WantedBits : int64_t {
  kInput = 1,
  kWeightIh = 2,
  kBiasIh = 4,
  kWeightHh = 8,
  kBiasHh = 16,
  kWeightHr = 32,
  kHiddenNorm = 64
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// One direction of a layer, or both in one call of the device.
std::vector<ForwardResult> run_layer(const Device& device, int64_t cell,
                                     const std::vector<Direction>& directions, bool save);

std::vector<BackwardResult> run_layer_backward(const Device& device, int64_t cell,
                                               const std::vector<DirectionBackward>& directions);

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
  const Direction only{{x, w_ih, b_ih, w_hh, b_hh, h0, c0},
                       reverse,
                       {control, rows, w_hr, h_mask, keep, algorithm, tf32}};
  return run_layer(kDevice, cell, {only}, save)[0];
}

template <const Device& kDevice>
BackwardResult layer_backward_op(int64_t cell, int64_t wanted, OptionalTensor dh, OptionalTensor dc,
                                 OptionalTensor dh_n, OptionalTensor dc_n, Tensor h, Tensor c,
                                 Tensor saved, Tensor x, OptionalTensor w_ih, Tensor w_hh,
                                 OptionalTensor h0, OptionalTensor c0, bool reverse,
                                 OptionalTensor control, OptionalTensor rows, OptionalTensor w_hr,
                                 OptionalTensor h_mask, OptionalTensor keep, int64_t algorithm,
                                 bool tf32) {
  const Direction only{{x, w_ih, std::nullopt, w_hh, std::nullopt, h0, c0},
                       reverse,
                       {control, rows, w_hr, h_mask, keep, algorithm, tf32}};
  return run_layer_backward(kDevice, cell,
                            {{wanted, {dh, dc, dh_n, dc_n}, {h, c, saved}, only}})[0];
}

// A direction's own arguments come as a list, in the order in which `layer` has them.
std::vector<Direction> both_directions(const Tensor& x, const std::vector<OptionalTensor>& forward,
                                       const std::vector<OptionalTensor>& reverse,
                                       const OptionalTensor& rows, int64_t algorithm, bool tf32);

// How the layers of a stack run; what is between them.
struct StackOptions {
  std::vector<Tensor> passed;  // what dropout let pass below each layer but the first, or empty
  double scale;                // of that
  bool reverse;
  int64_t chunk;
  bool side_by_side;
  int64_t algorithm;
  bool tf32;
};

// Of each layer its x, empty where that is x or the h below, and what run_layer returns.
std::vector<Tensor> run_stack(const Device& device, int64_t cell, const Tensor& x,
                              const std::vector<OptionalTensor>& operands,
                              const StackOptions& options, bool save);

// `grads` as OutputGradients has them, of each layer; `kept` as run_stack left x, h, c and saved.
std::vector<Tensor> run_stack_backward(const Device& device, int64_t cell,
                                       const std::vector<int64_t>& wanted,
                                       const std::vector<OptionalTensor>& grads,
                                       const std::vector<Tensor>& kept, const Tensor& x,
                                       const std::vector<OptionalTensor>& operands,
                                       const StackOptions& options);

// Results of the forward direction, then those of the reverse one.
template <class Result>
std::vector<Tensor> in_one_list(const std::vector<Result>& results) {
  std::vector<Tensor> all;
  for (const Result& result : results)
    std::apply([&](const auto&... x) { (all.push_back(x), ...); }, result);
  return all;
}

template <const Device& kDevice>
std::vector<Tensor> bidirectional_op(int64_t cell, Tensor x, std::vector<OptionalTensor> forward,
                                     std::vector<OptionalTensor> reverse, bool save,
                                     OptionalTensor rows, int64_t algorithm, bool tf32) {
  const auto directions = both_directions(x, forward, reverse, rows, algorithm, tf32);
  return in_one_list(run_layer(kDevice, cell, directions, save));
}

template <const Device& kDevice>
std::vector<Tensor> bidirectional_backward_op(int64_t cell, std::vector<int64_t> wanted,
                                              std::vector<OptionalTensor> grads,
                                              std::vector<Tensor> kept, Tensor x,
                                              std::vector<OptionalTensor> forward,
                                              std::vector<OptionalTensor> reverse,
                                              OptionalTensor rows, int64_t algorithm, bool tf32) {
  STD_TORCH_CHECK(wanted.size() == 2 && grads.size() == 8 && kept.size() == 6,
                  "fused_rnn: bidirectional_backward takes 2 wanted, 8 grads and 6 kept");
  const auto directions = both_directions(x, forward, reverse, rows, algorithm, tf32);
  std::vector<DirectionBackward> all;
  for (size_t i = 0; i < 2; ++i) {
    const OptionalTensor* const dy = &grads[4 * i];
    const Tensor* const y = &kept[3 * i];
    all.push_back({wanted[i], {dy[0], dy[1], dy[2], dy[3]}, {y[0], y[1], y[2]}, directions[i]});
  }
  return in_one_list(run_layer_backward(kDevice, cell, all));
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

template <const Device& kDevice>
std::vector<Tensor> stack_op(int64_t cell, Tensor x, std::vector<OptionalTensor> operands,
                             std::vector<Tensor> passed, double scale, bool reverse, bool save,
                             int64_t chunk, bool side_by_side, int64_t algorithm, bool tf32) {
  const StackOptions options{passed, scale, reverse, chunk, side_by_side, algorithm, tf32};
  return run_stack(kDevice, cell, x, operands, options, save);
}

template <const Device& kDevice>
std::vector<Tensor> stack_backward_op(int64_t cell, std::vector<int64_t> wanted,
                                      std::vector<OptionalTensor> grads, std::vector<Tensor> kept,
                                      Tensor x, std::vector<OptionalTensor> operands,
                                      std::vector<Tensor> passed, double scale, bool reverse,
                                      int64_t chunk, bool side_by_side, int64_t algorithm,
                                      bool tf32) {
  const StackOptions options{passed, scale, reverse, chunk, side_by_side, algorithm, tf32};
  return run_stack_backward(kDevice, cell, wanted, grads, kept, x, operands, options);
}

// Registers all for the dispatch key of `library`.
template <const Device& kDevice, class Library>
void implement_ops(Library& library) {
  library.impl("layer", TORCH_BOX(&layer_op<kDevice>));
  library.impl("layer_backward", TORCH_BOX(&layer_backward_op<kDevice>));
  library.impl("bidirectional", TORCH_BOX(&bidirectional_op<kDevice>));
  library.impl("bidirectional_backward", TORCH_BOX(&bidirectional_backward_op<kDevice>));
  library.impl("step", TORCH_BOX(&step_op<kDevice>));
  library.impl("step_backward", TORCH_BOX(&step_backward_op<kDevice>));
}

template <const Device& kDevice, class Library>
void implement_stack_ops(Library& library) {
  library.impl("stack", TORCH_BOX(&stack_op<kDevice>));
  library.impl("stack_backward", TORCH_BOX(&stack_backward_op<kDevice>));
}

}  // namespace fused_rnn
