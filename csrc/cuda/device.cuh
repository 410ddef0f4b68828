// The ops of a device from the algorithms: run-time cell and dtype become template arguments here.
#pragma once

#include "../ops.h"
#include "step.cuh"
#include "stepwise_backward.cuh"
#include "stepwise_forward.cuh"

namespace fused_rnn::cuda {

// run(Cell(), T()) with the cell and the dtype.
template <class Run>
void dispatch(int cell, ScalarType io, Run run) {
  const auto with_cell = [&](auto scalar) {
    switch (cell) {
      case kRnnTanh: return run(RnnTanh(), scalar);
      case kRnnRelu: return run(RnnRelu(), scalar);
      case kLstm: return run(Lstm(), scalar);
      default: return run(Gru(), scalar);
    }
  };
  switch (io) {
    case ScalarType::Double: return with_cell(double());
    case ScalarType::BFloat16: return with_cell(bf16());
    case ScalarType::Half: return with_cell(fp16());
    default: return with_cell(float());
  }
}

template <class Machine>
struct Ops {
  static void forward(const ForwardArgs& args, const Tensor& like) {
    Machine machine(like, args.tf32);
    dispatch(args.cell, like.scalar_type(), [&](auto cell, auto scalar) {
      cuda::forward<decltype(cell), decltype(scalar)>(args, machine);
    });
  }
  static void backward(const BackwardArgs& args, const Tensor& like) {
    Machine machine(like, args.tf32);
    dispatch(args.cell, like.scalar_type(), [&](auto cell, auto scalar) {
      cuda::backward<decltype(cell), decltype(scalar)>(args, machine);
    });
  }
  template <bool kBackward>
  static void step(const StepArgs& args, const Tensor& like) {
    Machine machine(like, false);
    dispatch(args.cell, like.scalar_type(), [&](auto cell, auto scalar) {
      machine.launch(one_step<decltype(cell), decltype(scalar), kBackward>, args.H, args.N, args);
    });
  }
  static constexpr Device kDevice = {forward, backward, step<false>, step<true>, true, 1};
};

}  // namespace fused_rnn::cuda
