// The ops of a device from the algorithms: run-time cell and dtype become template arguments here.
#pragma once

#include <iterator>
#include <type_traits>

#include "../ops.h"
#include "../plan.h"
#include "cluster_backward.cuh"
#include "cluster_forward.cuh"
#include "grid_backward.cuh"
#include "grid_forward.cuh"
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

// What the plan says of a problem, for each algorithm.
template <class T>
Choice plan_layer(const Layer& a, bool backward, const Gpu& gpu, const char* algorithm) {
  PlanProblem problem;
  problem.cell = a.cell;
  problem.arithmetic = sizeof(T) == 8            ? Arithmetic::kFp64
                       : sizeof(T) == 4          ? (a.tf32 ? Arithmetic::kTf32 : Arithmetic::kFp32)
                       : std::is_same_v<T, bf16> ? Arithmetic::kBf16
                                                 : Arithmetic::kFp16;
  problem.T = a.T, problem.N = a.N, problem.H = a.H, problem.P = a.w_hr ? a.R : 0;
  problem.backward = backward;
  return make_plan(problem, gpu, algorithm, true);
}

// The grid's kernels for a plan: run(shape, cut, exact).
template <class Cell, class T, class Run>
void with_grid(const Layer& a, bool backward, const Plan& plan, Run run) {
  const auto of = [&](auto exact) {
    const GridShape shape = grid_shape(Cell::kGates, Cell::kStates, Cell::kSaved, sizeof(T), exact,
                                       backward, plan.units, plan.line, plan.batch_tile);
    const GridCut cut =
        grid_cut(shape, a.H, plan.team, plan.teams, plan.line, plan.overlaid, plan.granule);
    run(shape, cut, exact);
  };
  if constexpr (sizeof(T) == 4)
    if (!a.tf32) return of(std::true_type());
  of(std::false_type());
}

// By itself the device chooses stepwise: nothing else has run on a GPU yet.
template <class Cell, class T, class Machine>
void run_forward(const ForwardArgs& a, Machine& machine) {
  if (a.algorithm <= 1 || a.T == 0) return forward<Cell, T>(a, machine);
  const char* const name = kAlgorithms[a.algorithm - 1].name;
  const Choice choice = plan_layer<T>(a, false, machine.gpu(), name);
  const Plan& plan = choice.plans[int(choice.runs)];
  if constexpr (sizeof(T) < 8) {
    if (choice.runs == Algorithm::kGrid)
      return with_grid<Cell, T>(a, false, plan, [&](auto shape, auto cut, auto exact) {
        forward_grid<Cell, T, exact.value>(a, shape, cut, machine);
      });
    const WarpShape shape = warp_shape(Cell::kGates, Cell::kStates, Cell::kSaved, sizeof(T), a.H,
                                       plan.team, plan.batch_tile);
    forward_cluster<Cell, T>(a, shape, cluster_cut(shape, a.H, plan.team), machine);
  }
}

// A forward that was asked for by name may have a backward that does not fit; stepwise reads what
// any forward has saved.
template <class Cell, class T, class Machine>
void run_backward(const BackwardArgs& a, Machine& machine) {
  if (a.algorithm <= 1 || a.T == 0) return backward<Cell, T>(a, machine);
  const Choice choice = plan_layer<T>(a, true, machine.gpu(), "auto");
  const int asked = int(a.algorithm - 1);
  if constexpr (sizeof(T) < 8) {
    const Plan& plan = choice.plans[asked];
    if (choice.refusals[asked].empty()) {
      if (asked == int(Algorithm::kGrid))
        return with_grid<Cell, T>(a, true, plan, [&](auto shape, auto cut, auto exact) {
          backward_grid<Cell, T, exact.value>(a, shape, cut, machine);
        });
      const BackwardShape shape = backward_shape(Cell::kGates, Cell::kStates, Cell::kSaved,
                                                 sizeof(T), a.H, plan.batch_tile);
      return backward_cluster<Cell, T>(a, shape, backward_cut(shape, a.H, plan.team), machine);
    }
  }
  backward<Cell, T>(a, machine);
}

template <class Machine>
struct Ops {
  static void forward(const ForwardArgs& args, const Tensor& like) {
    Machine machine(like, args.tf32);
    dispatch(args.cell, like.scalar_type(), [&](auto cell, auto scalar) {
      run_forward<decltype(cell), decltype(scalar)>(args, machine);
    });
  }
  static void backward(const BackwardArgs& args, const Tensor& like) {
    Machine machine(like, args.tf32);
    dispatch(args.cell, like.scalar_type(), [&](auto cell, auto scalar) {
      run_backward<decltype(cell), decltype(scalar)>(args, machine);
    });
  }
  template <bool kBackward>
  static void step(const StepArgs& args, const Tensor& like) {
    Machine machine(like, false);
    dispatch(args.cell, like.scalar_type(), [&](auto cell, auto scalar) {
      machine.launch(one_step<decltype(cell), decltype(scalar), kBackward>, args.H, args.N, args);
    });
  }
  static constexpr Device kDevice = {in_turn<ForwardArgs, forward>, in_turn<BackwardArgs, backward>,
                                     step<false>, step<true>, std::size(kAlgorithms)};
};

}  // namespace fused_rnn::cuda
