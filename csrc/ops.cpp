// What is the same for every op on every device: who runs with whom. Operands: prepare.h.
#include "ops.h"

#include <vector>

#include "prepare.h"

namespace fused_rnn {
namespace {

// Runs the directions that are prepared: there is one at least.
template <class Args, class Result>
std::vector<Result> run(void (*on_device)(Models<Args>, const Tensor&), const Tensor& x,
                        const std::vector<Call<Args, Result>>& calls) {
  const Problem& first = calls[0].problem;
  std::vector<Result> results;
  for (const auto& call : calls) {
    const Problem& p = call.problem;
    STD_TORCH_CHECK(p.sizes.H == first.sizes.H && p.sizes.R == first.sizes.R &&
                        !p.w_ih == !first.w_ih && p.operands.models == first.operands.models,
                    "fused_rnn: the weights of both directions must have the same sizes");
    results.push_back(call.result);
  }
  std::vector<Args> all;
  for (size_t model = 0; model < calls[0].models.size(); ++model)
    for (const auto& call : calls) all.push_back(call.models[model]);
  if (first.sizes.N > 0 && !all.empty())
    on_device({all.data(), first.models(), int(calls.size())}, x);
  return results;
}

}  // namespace

std::vector<ForwardResult> run_layer(const Device& device, int64_t cell,
                                     const std::vector<Direction>& directions, bool save) {
  std::vector<Call<ForwardArgs, ForwardResult>> calls;
  for (const Direction& of : directions) calls.push_back(prepare(device, cell, of, save));
  return run(device.forward, directions[0].inputs.x, calls);
}

std::vector<BackwardResult> run_layer_backward(const Device& device, int64_t cell,
                                               const std::vector<DirectionBackward>& directions) {
  std::vector<Call<BackwardArgs, BackwardResult>> calls;
  for (const DirectionBackward& back : directions) calls.push_back(prepare(device, cell, back));
  return run(device.backward, directions[0].of.inputs.x, calls);
}

std::vector<Direction> both_directions(const Tensor& x, const std::vector<OptionalTensor>& forward,
                                       const std::vector<OptionalTensor>& reverse,
                                       const OptionalTensor& rows, int64_t algorithm, bool tf32) {
  const auto direction = [&](const std::vector<OptionalTensor>& own, bool is_reverse) -> Direction {
    STD_TORCH_CHECK(own.size() == 10 && own[2],
                    "fused_rnn: a direction is w_ih, b_ih, w_hh, b_hh, h0, c0, control, w_hr, "
                    "h_mask and keep; all but w_hh may be None");
    return {{x, own[0], own[1], *own[2], own[3], own[4], own[5]},
            is_reverse,
            {own[6], rows, own[7], own[8], own[9], algorithm, tf32}};
  };
  return {direction(forward, false), direction(reverse, true)};
}

namespace {

constexpr size_t kOwn = 10, kGrads = 4, kKept = 4;  // of a layer

// Layer i of a stack, whose input is x.
Direction layer_of(const Tensor& x, const std::vector<OptionalTensor>& operands, size_t i,
                   const StackOptions& options) {
  const OptionalTensor* const own = &operands[i * kOwn];
  STD_TORCH_CHECK(own[0] && own[2] && own[2]->dim() == 2,
                  "fused_rnn: each layer of a stack needs w_ih and w_hh, each with 2 dimensions");
  return {{x, own[0], own[1], *own[2], own[3], own[4], own[5]},
          options.reverse,
          {own[6], std::nullopt, own[7], own[8], own[9], options.algorithm, options.tf32}};
}

size_t layers_of(const Device& device, const std::vector<OptionalTensor>& operands,
                 const StackOptions& options) {
  const size_t layers = operands.size() / kOwn;
  STD_TORCH_CHECK(device.forward_stack, "fused_rnn: this device runs no stacks");
  STD_TORCH_CHECK(layers > 0 && operands.size() % kOwn == 0,
                  "fused_rnn: a layer of a stack is w_ih, b_ih, w_hh, b_hh, h0, c0, control, w_hr, "
                  "h_mask and keep; all but w_ih and w_hh may be None");
  STD_TORCH_CHECK(options.passed.empty() || options.passed.size() == layers - 1,
                  "fused_rnn: passed is empty or has a mask for each layer but the first");
  STD_TORCH_CHECK(options.chunk >= 0, "fused_rnn: chunk must not be negative");
  return layers;
}

// What layer i has in a stack beside what it has alone. Keeps its mask alive in `operands`.
void place_in_stack(const StackOptions& options, size_t i, size_t layers, Problem& problem,
                    Layer& layer) {
  layer.chunk = options.chunk;
  layer.layers = int64_t(layers);
  if (i == 0 || options.passed.empty()) return;
  const Shape shape = problem.rows_of(problem.sizes.I);
  layer.passed = static_cast<const uint8_t*>(
      problem.operands.get("passed", options.passed[i - 1], shape, ScalarType::Byte).at(0));
  layer.passed_scale = options.scale;
}

}  // namespace

std::vector<Tensor> run_stack(const Device& device, int64_t cell, const Tensor& x,
                              const std::vector<OptionalTensor>& operands,
                              const StackOptions& options, bool save) {
  const size_t layers = layers_of(device, operands, options);
  std::vector<Call<ForwardArgs, ForwardResult>> calls;
  std::vector<ForwardArgs> all;
  std::vector<Tensor> results;
  for (size_t i = 0; i < layers; ++i) {
    const Tensor below = i ? std::get<0>(calls[i - 1].result) : x;
    calls.push_back(prepare(device, cell, layer_of(below, operands, i, options), save));
    all.push_back(calls[i].models[0]);
    place_in_stack(options, i, layers, calls[i].problem, all[i]);
    const Problem& problem = calls[i].problem;
    const bool drops = i > 0 && !options.passed.empty();
    const Made dropped = problem.make(drops, problem.rows_of(problem.sizes.I), problem.io);
    all[i].dropped = dropped.data;
    results.push_back(dropped.tensor);
    std::apply([&](const auto&... y) { (results.push_back(y), ...); }, calls[i].result);
  }
  if (all[0].N > 0) device.forward_stack({all.data(), int(layers), options.side_by_side}, x);
  return results;
}

std::vector<Tensor> run_stack_backward(const Device& device, int64_t cell,
                                       const std::vector<int64_t>& wanted,
                                       const std::vector<OptionalTensor>& grads,
                                       const std::vector<Tensor>& kept, const Tensor& x,
                                       const std::vector<OptionalTensor>& operands,
                                       const StackOptions& options) {
  const size_t layers = layers_of(device, operands, options);
  STD_TORCH_CHECK(
      wanted.size() == layers && grads.size() == layers * kGrads && kept.size() == layers * kKept,
      "fused_rnn: stack_backward takes of each layer 1 wanted, 4 grads and 4 kept");
  std::vector<Call<BackwardArgs, BackwardResult>> calls;  // from the last layer
  std::vector<BackwardArgs> all;
  for (size_t i = layers; i-- > 0;) {
    const OptionalTensor* const dy = &grads[i * kGrads];
    const Tensor* const y = &kept[i * kKept];
    const bool drops = i > 0 && !options.passed.empty();
    const Tensor below = i == 0 ? x : drops ? y[0] : kept[(i - 1) * kKept + 1];
    STD_TORCH_CHECK(calls.empty() || !dy[0],
                    "fused_rnn: only the last layer of a stack has an output of its own");
    OutputGradients of_outputs{dy[0], dy[1], dy[2], dy[3]};
    if (!calls.empty()) of_outputs.dh = std::get<0>(calls.back().result);
    calls.push_back(prepare(device, cell,
                            {wanted[i] | (i > 0 ? int64_t(kInput) : 0),
                             of_outputs,
                             {y[1], y[2], y[3]},
                             layer_of(below, operands, i, options)}));
    all.push_back(calls.back().models[0]);
    place_in_stack(options, i, layers, calls.back().problem, all.back());
    STD_TORCH_CHECK(!all.back().dh_norm, "fused_rnn: a stack lacks dh_norm");
  }
  if (all[0].N > 0) device.backward_stack({all.data(), int(layers), options.side_by_side}, x);
  std::vector<Tensor> results;
  for (auto call = calls.rbegin(); call != calls.rend(); ++call)
    std::apply([&](const auto&... g) { (results.push_back(g), ...); }, call->result);
  return results;
}

StepResult run_step(const Device& device, int64_t cell, const Tensor& gx, const Tensor& gh,
                    const Tensor& h, const OptionalTensor& c, bool save) {
  const CellShape& shape = shape_of(cell);
  const ScalarType io = io_type("gx", gx);
  STD_TORCH_CHECK(h.dim() == 2, "fused_rnn: h has size ",
                  to_string(h.sizes().data(), h.sizes().size()), ", expected [N, H]");
  STD_TORCH_CHECK(shape.states == 1 || c, "fused_rnn: c is missing");
  const int64_t N = h.size(0), H = h.size(1);
  const bool has_c = shape.states == 2;
  Operands operands("gx", gx);
  const Placed gx_ = operands.get("gx", gx, {N, shape.gates * H}, io);
  const Placed gh_ = operands.get("gh", gh, {N, shape.gates * H}, io);
  const Placed h_ = operands.get("h", h, {N, H}, io);
  const Placed c_ = has_c ? operands.get("c", c, {N, H}, io) : Placed();
  const Tensor h1 = allocate(gx, {N, H}, io);
  const Tensor c1 = allocate(gx, has_c ? Shape{N, H} : Shape{0}, io);
  const Tensor saved = allocate(gx, save && shape.saved ? Shape{N, shape.saved * H} : Shape{0}, io);

  StepArgs args{};
  args.cell = int(cell);
  args.N = N;
  args.H = H;
  args.gx = gx_.at(0);
  args.gh = gh_.at(0);
  args.h = h_.at(0);
  args.c = c_.at(0);
  args.h1 = h1.mutable_data_ptr();
  args.c1 = has_c ? c1.mutable_data_ptr() : nullptr;
  args.saved = save && shape.saved ? saved.mutable_data_ptr() : nullptr;
  if (N > 0) device.step(args, gx);
  return {h1, c1, saved};
}

StepBackwardResult run_step_backward(const Device& device, int64_t cell,
                                     const OutputGradients& grads, const Kept& kept,
                                     const Tensor& before, const OptionalTensor& c_before) {
  const CellShape& shape = shape_of(cell);
  const ScalarType io = io_type("h1", kept.h);
  STD_TORCH_CHECK(kept.h.dim() == 2, "fused_rnn: h1 has size ",
                  to_string(kept.h.sizes().data(), kept.h.sizes().size()), ", expected [N, H]");
  STD_TORCH_CHECK(shape.states == 1 || c_before, "fused_rnn: c is missing");
  const int64_t N = kept.h.size(0), H = kept.h.size(1);
  const bool has_c = shape.states == 2;
  Operands operands("h1", kept.h);
  const Placed dh1 = operands.get("dh1", grads.dh, {N, H}, io);
  const Placed dc1 = has_c ? operands.get("dc1", grads.dc, {N, H}, io) : Placed();
  const Placed c = has_c ? operands.get("c", c_before, {N, H}, io) : Placed();
  const Placed h = operands.get("h", before, {N, H}, io);
  const Placed h1 = operands.get("h1", kept.h, {N, H}, io);
  const Placed c1 = has_c ? operands.get("c1", kept.c, {N, H}, io) : Placed();
  const Shape gates = {N, shape.saved * H};
  const Placed saved = shape.saved ? operands.get("saved", kept.saved, gates, io) : Placed();
  const Tensor dgx = allocate(kept.h, {N, shape.gates * H}, io);
  const Tensor dgh =
      allocate(kept.h, shape.splits_gates ? Shape{N, shape.gates * H} : Shape{0}, io);
  const Tensor dh = allocate(kept.h, shape.splits_gates ? Shape{N, H} : Shape{0}, io);
  const Tensor dc = allocate(kept.h, has_c ? Shape{N, H} : Shape{0}, io);

  StepArgs args{};
  args.cell = int(cell);
  args.N = N;
  args.H = H;
  args.h = h.at(0);
  args.c = c.at(0);
  // What a forward writes.
  args.h1 = const_cast<void*>(h1.at(0));
  args.c1 = const_cast<void*>(c1.at(0));
  args.saved = const_cast<void*>(saved.at(0));
  args.dh1 = dh1.at(0);
  args.dc1 = dc1.at(0);
  args.dgx = dgx.mutable_data_ptr();
  args.dgh = shape.splits_gates ? dgh.mutable_data_ptr() : nullptr;
  args.dh = shape.splits_gates ? dh.mutable_data_ptr() : nullptr;
  args.dc = has_c ? dc.mutable_data_ptr() : nullptr;
  if (N > 0) device.step_backward(args, kept.h);
  return {dgx, dgh, dh, dc};
}

}  // namespace fused_rnn
