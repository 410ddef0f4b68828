// The ops of a device from the algorithms: run-time cell and dtype become template arguments here.
#pragma once

#include <algorithm>
#include <iterator>
#include <memory>
#include <type_traits>
#include <vector>

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
std::shared_ptr<const Choice> plan_layer(Directions<Args> directions, bool backward, const Gpu& gpu,
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
  problem.layers = a.layers ? a.layers : 1;
  return remembered_plan(problem, gpu, algorithm);
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

// The Steps of a loop that has run.
inline bool has_run() { return false; }

// By itself the device chooses stepwise: nothing else has run on a GPU yet.
template <class Cell, class T, class Machine>
Steps run_forward(Directions<ForwardArgs> directions, Machine& machine) {
  const ForwardArgs& a = directions[0];
  if (a.algorithm <= 1 || a.T == 0) {
    each_launch(directions, 1, machine,
                [&](Directions<ForwardArgs> one) { forward<Cell, T>(one[0], machine); });
    return has_run;
  }
  const char* const name = kAlgorithms[a.algorithm - 1].name;
  const auto choice = plan_layer<T>(directions, false, machine.gpu(), name);
  const Plan& plan = choice->plans[int(choice->runs)];
  if constexpr (sizeof(T) < 8) {
    if (choice->runs == Algorithm::kGrid) {
      with_grid<Cell, T>(directions, false, plan, machine,
                         [&](auto of_launch, auto shape, auto cut, auto exact) {
                           forward_grid<Cell, T, exact.value>(of_launch, shape, cut, machine);
                         });
      return has_run;
    }
    const WarpShape shape = warp_shape(Cell::kGates, Cell::kStates, Cell::kSaved, sizeof(T), a.H,
                                       plan.team, plan.batch_tile);
    const ClusterCut cut = cluster_cut(shape, a.H, plan.team, machine.gpu().shared_of_cta());
    return forward_cluster<Cell, T>(directions, shape, cut, machine);
  }
  return has_run;
}

// A forward that was asked for by name may have a backward that does not fit; stepwise reads what
// any forward has saved.
template <class Cell, class T, class Machine>
Steps run_backward(Directions<BackwardArgs> directions, Machine& machine) {
  const BackwardArgs& a = directions[0];
  const auto stepwise = [&] {
    each_launch(directions, 1, machine,
                [&](Directions<BackwardArgs> one) { backward<Cell, T>(one[0], machine); });
    return has_run;
  };
  if (a.algorithm <= 1 || a.T == 0) return stepwise();
  const auto choice = plan_layer<T>(directions, true, machine.gpu(), "auto");
  const int asked = int(a.algorithm - 1);
  if constexpr (sizeof(T) < 8) {
    const Plan& plan = choice->plans[asked];
    if (choice->refusals[asked].empty()) {
      if (asked == int(Algorithm::kGrid)) {
        with_grid<Cell, T>(directions, true, plan, machine,
                           [&](auto of_launch, auto shape, auto cut, auto exact) {
                             backward_grid<Cell, T, exact.value>(of_launch, shape, cut, machine);
                           });
        return has_run;
      }
      const BackwardShape shape = backward_shape(Cell::kGates, Cell::kStates, Cell::kSaved,
                                                 sizeof(T), a.H, plan.batch_tile);
      return backward_cluster<Cell, T>(directions, shape, backward_cut(shape, a.H, plan.team),
                                       machine);
    }
  }
  return stepwise();
}

// The layers of a stack, run(layer) for the loop of each. Side by side the host gives out a chunk
// of each layer in turn, of the last ones first: what they wait for was given before.
template <class Args, class Machine, class Run>
void each_layer(Stack<Args> stack, Machine& machine, Run run) {
  if (!stack.side_by_side) {
    for (int i = 0; i < stack.count; ++i) {
      run_all(run(Directions<Args>(stack[i])));
      machine.forget();
    }
    return;
  }
  machine.fork(stack.count);
  std::vector<Steps> layers;
  for (int i = 0; i < stack.count; ++i) {
    machine.on(i);
    layers.push_back(run(Directions<Args>(stack[i])));
  }
  for (int turn = 0, running = stack.count; running > 0; ++turn)
    for (int i = std::min(turn, stack.count - 1); i >= 0; --i) {
      if (!layers[size_t(i)]) continue;
      machine.on(i);
      if (layers[size_t(i)]()) continue;
      layers[size_t(i)] = nullptr;
      --running;
    }
  machine.join();
}

template <class Machine>
struct Ops {
  static void forward(Directions<ForwardArgs> directions, const Tensor& like) {
    Machine machine(like, directions[0].tf32);
    dispatch(directions[0].cell, like.scalar_type(), [&](auto cell, auto scalar) {
      run_all(run_forward<decltype(cell), decltype(scalar)>(directions, machine));
    });
  }
  static void backward(Directions<BackwardArgs> directions, const Tensor& like) {
    for (const BackwardArgs& args : directions)
      STD_TORCH_CHECK(!args.dh_norm, "fused_rnn: the CUDA kernels lack dh_norm");
    Machine machine(like, directions[0].tf32);
    dispatch(directions[0].cell, like.scalar_type(), [&](auto cell, auto scalar) {
      run_all(run_backward<decltype(cell), decltype(scalar)>(directions, machine));
    });
  }
  static void forward_stack(Stack<ForwardArgs> stack, const Tensor& like) {
    Machine machine(like, stack[0].tf32);
    dispatch(stack[0].cell, like.scalar_type(), [&](auto cell, auto scalar) {
      each_layer(stack, machine, [&](Directions<ForwardArgs> layer) {
        return run_forward<decltype(cell), decltype(scalar)>(layer, machine);
      });
    });
  }
  static void backward_stack(Stack<BackwardArgs> stack, const Tensor& like) {
    Machine machine(like, stack[0].tf32);
    dispatch(stack[0].cell, like.scalar_type(), [&](auto cell, auto scalar) {
      each_layer(stack, machine, [&](Directions<BackwardArgs> layer) {
        return run_backward<decltype(cell), decltype(scalar)>(layer, machine);
      });
    });
  }
  template <bool kBackward>
  static void step(const StepArgs& args, const Tensor& like) {
    Machine machine(like, false);
    dispatch(args.cell, like.scalar_type(), [&](auto cell, auto scalar) {
      machine.launch(one_step<decltype(cell), decltype(scalar), kBackward>, args.H, args.N, args);
    });
  }
  static constexpr Device kDevice = {in_turn<ForwardArgs, forward>,
                                     in_turn<BackwardArgs, backward>,
                                     step<false>,
                                     step<true>,
                                     std::size(kAlgorithms),
                                     forward_stack,
                                     backward_stack};
};

}  // namespace fused_rnn::cuda
