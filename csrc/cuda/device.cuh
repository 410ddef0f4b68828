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
template <class T, class Args>
Choice plan_layer(Directions<Args> directions, bool backward, const Gpu& gpu,
                  const char* algorithm) {
  const Layer& a = directions[0];
  PlanProblem problem;
  problem.cell = a.cell;
  problem.arithmetic = sizeof(T) == 8            ? Arithmetic::kFp64
                       : sizeof(T) == 4          ? (a.tf32 ? Arithmetic::kTf32 : Arithmetic::kFp32)
                       : std::is_same_v<T, bf16> ? Arithmetic::kBf16
                                                 : Arithmetic::kFp16;
  problem.T = a.T, problem.N = a.N, problem.H = a.H, problem.P = a.w_hr ? a.R : 0;
  problem.backward = backward;
  problem.directions = directions.count;
  return make_plan(problem, gpu, algorithm, true);
}

// run(those of one launch after the other).
template <class Args, class Machine, class Run>
void each_launch(Directions<Args> directions, int64_t of_launch, Machine& machine, Run run) {
  for (int i = 0; i < directions.count; i += int(of_launch)) {
    run(Directions<Args>(directions.first + i, int(of_launch)));
    machine.forget();
  }
}

// The grid's kernels for a plan: run(directions of a launch, shape, cut, exact).
template <class Cell, class T, class Args, class Machine, class Run>
void with_grid(Directions<Args> directions, bool backward, const Plan& plan, Machine& machine,
               Run run) {
  const Layer& a = directions[0];
  const auto of = [&](auto exact) {
    const GridShape shape = grid_shape(Cell::kGates, Cell::kStates, Cell::kSaved, sizeof(T), exact,
                                       backward, plan.units, plan.line, plan.batch_tile);
    const GridCut cut =
        grid_cut(shape, a.H, plan.team, plan.teams, plan.line, plan.overlaid, plan.granule);
    each_launch(directions, plan.directions, machine,
                [&](Directions<Args> of_launch) { run(of_launch, shape, cut, exact); });
  };
  if constexpr (sizeof(T) == 4)
    if (!a.tf32) return of(std::true_type());
  of(std::false_type());
}

// By itself the device chooses stepwise: nothing else has run on a GPU yet.
template <class Cell, class T, class Machine>
void run_forward(Directions<ForwardArgs> directions, Machine& machine) {
  const ForwardArgs& a = directions[0];
  if (a.algorithm <= 1 || a.T == 0)
    return each_launch(directions, 1, machine,
                       [&](Directions<ForwardArgs> one) { forward<Cell, T>(one[0], machine); });
  const char* const name = kAlgorithms[a.algorithm - 1].name;
  const Choice choice = plan_layer<T>(directions, false, machine.gpu(), name);
  const Plan& plan = choice.plans[int(choice.runs)];
  if constexpr (sizeof(T) < 8) {
    if (choice.runs == Algorithm::kGrid)
      return with_grid<Cell, T>(
          directions, false, plan, machine, [&](auto of_launch, auto shape, auto cut, auto exact) {
            forward_grid<Cell, T, exact.value>(of_launch, shape, cut, machine);
          });
    const WarpShape shape = warp_shape(Cell::kGates, Cell::kStates, Cell::kSaved, sizeof(T), a.H,
                                       plan.team, plan.batch_tile);
    const ClusterCut cut = cluster_cut(shape, a.H, plan.team, machine.gpu().shared_of_cta());
    forward_cluster<Cell, T>(directions, shape, cut, machine);
  }
}

// A forward that was asked for by name may have a backward that does not fit; stepwise reads what
// any forward has saved.
template <class Cell, class T, class Machine>
void run_backward(Directions<BackwardArgs> directions, Machine& machine) {
  const BackwardArgs& a = directions[0];
  const auto stepwise = [&] {
    each_launch(directions, 1, machine,
                [&](Directions<BackwardArgs> one) { backward<Cell, T>(one[0], machine); });
  };
  if (a.algorithm <= 1 || a.T == 0) return stepwise();
  const Choice choice = plan_layer<T>(directions, true, machine.gpu(), "auto");
  const int asked = int(a.algorithm - 1);
  if constexpr (sizeof(T) < 8) {
    const Plan& plan = choice.plans[asked];
    if (choice.refusals[asked].empty()) {
      if (asked == int(Algorithm::kGrid))
        return with_grid<Cell, T>(
            directions, true, plan, machine, [&](auto of_launch, auto shape, auto cut, auto exact) {
              backward_grid<Cell, T, exact.value>(of_launch, shape, cut, machine);
            });
      const BackwardShape shape = backward_shape(Cell::kGates, Cell::kStates, Cell::kSaved,
                                                 sizeof(T), a.H, plan.batch_tile);
      return backward_cluster<Cell, T>(directions, shape, backward_cut(shape, a.H, plan.team),
                                       machine);
    }
  }
  stepwise();
}

template <class Machine>
struct Ops {
  static void forward(Directions<ForwardArgs> directions, const Tensor& like) {
    Machine machine(like, directions[0].tf32);
    dispatch(directions[0].cell, like.scalar_type(), [&](auto cell, auto scalar) {
      run_forward<decltype(cell), decltype(scalar)>(directions, machine);
    });
  }
  static void backward(Directions<BackwardArgs> directions, const Tensor& like) {
    for (const BackwardArgs& args : directions)
      STD_TORCH_CHECK(!args.dh_norm, "fused_rnn: the CUDA kernels lack dh_norm");
    Machine machine(like, directions[0].tf32);
    dispatch(directions[0].cell, like.scalar_type(), [&](auto cell, auto scalar) {
      run_backward<decltype(cell), decltype(scalar)>(directions, machine);
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
