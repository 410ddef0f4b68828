// The ops of the cells with layer norms. A device that has their loops supplies them; norm_ops.cpp
// does the checking and the allocation around them.
#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "layer.h"

namespace fused_rnn {

// `like` is of the io dtype.
struct NormLoops {
  void (*forward)(const NormForwardArgs&, const torch::stable::Tensor& like);
  void (*backward)(const NormBackwardArgs&, const torch::stable::Tensor& like);
};

// Gains and biases: of the gates, and of an LSTM's c.
struct NormParameters {
  torch::stable::Tensor gain;
  std::optional<torch::stable::Tensor> bias, c_gain, c_bias;
};

// What acts inside the loop.
struct NormOptions {
  bool reverse;
  std::optional<torch::stable::Tensor> control, rows, h_mask;
};

struct NormStates {
  std::optional<torch::stable::Tensor> h, c;
};

struct NormOutputGradients {
  std::optional<torch::stable::Tensor> dh, dc, dh_n, dc_n;
};

struct NormKept {
  torch::stable::Tensor h, c, saved, stats;
};

// Which gradients a backward is asked for, bit by bit. The states' are a by-product.
enum NormWantedBits : int64_t { kNormInput = 1, kNormWeight = 2, kNormParameters = 4 };

using NormResult = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
                              torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;
using NormBackwardResult =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor>;

NormResult run_norm_layer(const NormLoops& loops, int64_t cell, double eps,
                          const torch::stable::Tensor& gx, const torch::stable::Tensor& w_hh,
                          const NormParameters& norm, const NormStates& initial, bool save,
                          const NormOptions& options);

NormBackwardResult run_norm_layer_backward(const NormLoops& loops, int64_t cell, int64_t wanted,
                                           const NormOutputGradients& grads, const NormKept& kept,
                                           const torch::stable::Tensor& w_hh,
                                           const NormParameters& norm, const NormStates& initial,
                                           const NormOptions& options);

// The ops as torch calls them, for one device.
template <const NormLoops& kLoops>
struct NormOps {
  using Tensor = torch::stable::Tensor;
  using Optional = std::optional<Tensor>;

  static NormResult forward(int64_t cell, double eps, Tensor gx, Tensor w_hh, Tensor gain,
                            Optional bias, Optional c_gain, Optional c_bias, Optional h0,
                            Optional c0, bool reverse, bool save, Optional control, Optional rows,
                            Optional h_mask) {
    return run_norm_layer(kLoops, cell, eps, gx, w_hh, {gain, bias, c_gain, c_bias}, {h0, c0}, save,
                          {reverse, control, rows, h_mask});
  }

  static NormBackwardResult backward(int64_t cell, int64_t wanted, Optional dh, Optional dc,
                                     Optional dh_n, Optional dc_n, Tensor h, Tensor c, Tensor saved,
                                     Tensor stats, Tensor w_hh, Tensor gain, Optional bias,
                                     Optional c_gain, Optional c_bias, Optional h0, Optional c0,
                                     bool reverse, Optional control, Optional rows,
                                     Optional h_mask) {
    return run_norm_layer_backward(kLoops, cell, wanted, {dh, dc, dh_n, dc_n}, {h, c, saved, stats},
                                   w_hh, {gain, bias, c_gain, c_bias}, {h0, c0},
                                   {reverse, control, rows, h_mask});
  }
};

// Registers both for the dispatch key of `library`.
template <const NormLoops& kLoops, class Library>
void implement_norm_ops(Library& library) {
  library.impl("norm_layer", TORCH_BOX(&NormOps<kLoops>::forward));
  library.impl("norm_layer_backward", TORCH_BOX(&NormOps<kLoops>::backward));
}

}  // namespace fused_rnn
