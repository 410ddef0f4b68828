// What is the same for every op on every device: checks, allocation, arguments.
#include "ops.h"

#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace fused_rnn {
namespace {

using Shape = std::vector<int64_t>;

std::string to_string(const int64_t* sizes, size_t dim) {
  std::string text = "[";
  for (size_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

ScalarType carry_type(ScalarType io) {
  return io == ScalarType::BFloat16 || io == ScalarType::Half ? ScalarType::Float : io;
}

// Where an operand lies for each model.
struct Placed {
  const void* data = nullptr;
  int64_t stride = 0;  // bytes from one model to the next

  bool operator!() const { return !data; }
  const void* at(int64_t model) const {
    return data ? static_cast<const char*>(data) + model * stride : nullptr;
  }
};

// A result, and where it lies for each model.
struct Made {
  Tensor tensor;
  void* data = nullptr;  // null where there is none: the tensor is empty
  int64_t stride = 0;

  void* at(int64_t model) const {
    return data ? static_cast<char*>(data) + model * stride : nullptr;
  }
};

int64_t product(const Shape& shape) {
  int64_t size = 1;
  for (const int64_t n : shape) size *= n;
  return size;
}

int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return 8;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Byte: return 1;
    default: return 4;
  }
}

// Checks one operand and makes it contiguous; empty stays empty. Where models are stacked, an
// operand has their dimension first, and one that is expanded there is not copied. Keeps what it
// gives alive.
class Operands {
  const char* name_;
  Tensor like_;
  ScalarType io_;
  std::vector<Tensor> alive_;

 public:
  std::optional<int64_t> models;

  // All must be where `like`, called `name`, is.
  Operands(const char* name, const Tensor& like, std::optional<int64_t> models = std::nullopt)
      : name_(name), like_(like), io_(like.scalar_type()), models(models) {}

  const Tensor& like() const { return like_; }

  // The shape of all models' together.
  Shape stacked(Shape shape) const {
    if (models) shape.insert(shape.begin(), *models);
    return shape;
  }

  // A state may come in the dtype of x or in the carry dtype, anything else only in its own.
  Placed get(const char* name, const OptionalTensor& x, const Shape& shape, ScalarType type,
             bool state = false) {
    if (!x) return {};
    const Shape expected = stacked(shape);
    const auto sizes = x->sizes();
    bool fits = sizes.size() == expected.size();
    for (size_t i = 0; fits && i < expected.size(); ++i) fits = sizes[i] == expected[i];
    STD_TORCH_CHECK(fits, "fused_rnn: ", name, " has size ", to_string(sizes.data(), sizes.size()),
                    ", expected ", to_string(expected.data(), expected.size()));
    STD_TORCH_CHECK(x->device() == like_.device(), "fused_rnn: ", name,
                    " is on another device than ", name_, "; move it there with .to(", name_,
                    ".device)");
    const ScalarType given = x->scalar_type();
    STD_TORCH_CHECK(
        given == type || (state && (given == io_ || given == carry_type(io_))), "fused_rnn: ", name,
        " has another dtype than expected; ", name_,
        ", the weights and the states must agree, control and keep are uint8 and rows is int32");
    const bool shared = models && *models > 0 && x->stride(0) == 0;
    const int64_t stride = models && !shared ? product(shape) * bytes_of(type) : 0;
    alive_.push_back(or_out_of_memory(
        [&] {
          const Tensor one = shared ? torch::stable::select(*x, 0, 0) : *x;
          const Tensor typed = given == type ? one : torch::stable::to(one, type);
          return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
        },
        [&] { return name; }));
    const void* const data = alive_.back().const_data_ptr();
    STD_TORCH_CHECK(data || x->numel() == 0, "fused_rnn: ", name,
                    " has no memory: its storage was freed, as FSDP does between calls");
    return {data, stride};
  }
};

Tensor allocate(const Tensor& like, const Shape& shape, ScalarType type) {
  return or_out_of_memory(
      [&] { return torch::stable::new_empty(like, shape, type); },
      [&] { return "a tensor of size " + to_string(shape.data(), shape.size()); });
}

// Every row of the compact tensors belongs to just one step, and no step points outside of them.
void check_rows(const int32_t* row, int64_t steps, int64_t count) {
  std::vector<bool> seen(static_cast<size_t>(count), false);
  int64_t used = 0;
  for (int64_t i = 0; i < steps; ++i) {
    if (row[i] < 0) continue;
    STD_TORCH_CHECK(row[i] < count && !seen[static_cast<size_t>(row[i])],
                    "fused_rnn: rows names row ", row[i], " twice, or it is outside of the ", count,
                    " rows of x");
    seen[static_cast<size_t>(row[i])] = true;
    ++used;
  }
  STD_TORCH_CHECK(used == count, "fused_rnn: rows names ", used, " of the ", count,
                  " rows of x; each must belong to one step");
}

const CellShape& shape_of(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell < kCellCount, "fused_rnn: no cell has number ", cell);
  return kCellShapes[cell];
}

ScalarType io_type(const char* name, const Tensor& x) {
  const ScalarType io = x.scalar_type();
  STD_TORCH_CHECK(io == ScalarType::Float || io == ScalarType::Double ||
                      io == ScalarType::BFloat16 || io == ScalarType::Half,
                  "fused_rnn: ", name, " must be float32, float64, bfloat16 or float16");
  return io;
}

// The sizes and operands that forward and backward read the same way.
struct Problem {
  CellShape cell;
  ScalarType io, carry;
  Shape lead;  // [T, N], or [M] with rows
  Layer sizes{};
  Operands operands;
  Placed x, w_ih, w_hh, w_hr, control, rows, h_mask, keep, keep_share;

  Problem(const Device& device, int64_t cell_id, const Direction& of) : operands("x", of.inputs.x) {
    const Inputs& inputs = of.inputs;
    const Options& options = of.options;
    const Tensor& w = inputs.w_hh;
    STD_TORCH_CHECK(options.algorithm >= 0 && options.algorithm <= device.algorithms,
                    "fused_rnn: this device has no algorithm ", options.algorithm);
    cell = shape_of(cell_id);
    io = io_type("x", inputs.x);
    carry = carry_type(io);
    // The weights say whether models are stacked; then a model's own dimensions begin at 1.
    const int64_t first = w.dim() == 3 ? 1 : 0;
    if (first) operands.models = w.size(0);
    const int64_t dims = first + (options.rows ? 2 : 3);
    STD_TORCH_CHECK(inputs.x.dim() == dims, "fused_rnn: x must have ", dims, " dimensions, got ",
                    inputs.x.dim());
    STD_TORCH_CHECK(w.dim() == first + 2 && w.size(first) > 0 && w.size(first) % cell.gates == 0,
                    "fused_rnn: w_hh must be [", cell.gates, "*H, R], got ",
                    to_string(w.sizes().data(), w.sizes().size()));
    sizes.cell = int(cell_id);
    sizes.reverse = of.reverse;
    sizes.algorithm = options.algorithm;
    sizes.tf32 = options.tf32;
    sizes.H = w.size(first) / cell.gates;
    sizes.R = w.size(first + 1);
    sizes.I = inputs.w_ih ? inputs.x.size(dims - 1) : gates();
    const Tensor& time = options.rows ? *options.rows : inputs.x;
    STD_TORCH_CHECK(time.dim() >= first + 2, "fused_rnn: rows must be [T, N]");
    sizes.T = time.size(first);
    sizes.N = time.size(first + 1);
    lead = options.rows ? Shape{inputs.x.size(first)} : Shape{sizes.T, sizes.N};
    STD_TORCH_CHECK(sizes.R > 0 && sizes.I > 0, "fused_rnn: w_hh and w_ih must not be empty");
    sizes.M = product(lead);
    STD_TORCH_CHECK(!options.w_hr || cell.states == 2, "fused_rnn: only LSTM has a projection");
    STD_TORCH_CHECK(options.w_hr || sizes.R == sizes.H, "fused_rnn: w_hh must be [", gates(), ", ",
                    sizes.H, "] without a projection");

    const Shape steps = {sizes.T, sizes.N};
    const int64_t states = sizes.R + (cell.states - 1) * sizes.H;
    x = operands.get("x", inputs.x, rows_of(sizes.I), io);
    w_ih = operands.get("w_ih", inputs.w_ih, {gates(), sizes.I}, io);
    w_hh = operands.get("w_hh", w, {gates(), sizes.R}, io);
    w_hr = operands.get("w_hr", options.w_hr, {sizes.R, sizes.H}, io);
    control = operands.get("control", options.control, steps, ScalarType::Byte);
    rows = operands.get("rows", options.rows, steps, ScalarType::Int);
    h_mask = operands.get("h_mask", options.h_mask, {sizes.N, sizes.R}, io);
    if (options.keep && options.keep->scalar_type() != ScalarType::Byte)
      keep_share = operands.get("keep", options.keep, {states}, carry, true);
    else
      keep = operands.get("keep", options.keep, {sizes.T, sizes.N, states}, ScalarType::Byte);
    if (options.rows && options.rows->is_cpu())
      for (int64_t model = 0; model < models(); ++model) {
        if (model && !rows.stride) break;
        check_rows(static_cast<const int32_t*>(rows.at(model)), product(steps), sizes.M);
      }
  }

  int64_t models() const { return operands.models.value_or(1); }
  int64_t gates() const { return cell.gates * sizes.H; }
  bool has_c() const { return cell.states == 2; }

  Shape rows_of(int64_t width) const {
    Shape shape = lead;
    shape.push_back(width);
    return shape;
  }

  // A result; empty where there is none. A batch of none has gradients too: zeros.
  Made make(bool exists, const Shape& shape, ScalarType type, bool zero = false) const {
    const Tensor& like = operands.like();
    if (!exists) return {allocate(like, {0}, type)};
    const Shape all = operands.stacked(shape);
    const Tensor made =
        zero ? torch::stable::new_zeros(like, all, type) : allocate(like, all, type);
    return {made, made.mutable_data_ptr(), product(shape) * bytes_of(type)};
  }

  Layer layer(int64_t model) const {
    Layer layer = sizes;
    layer.x = x.at(model);
    layer.w_ih = w_ih.at(model);
    layer.w_hh = w_hh.at(model);
    layer.w_hr = w_hr.at(model);
    layer.control = static_cast<const uint8_t*>(control.at(model));
    layer.rows = static_cast<const int32_t*>(rows.at(model));
    layer.h_mask = h_mask.at(model);
    layer.keep = static_cast<const uint8_t*>(keep.at(model));
    layer.keep_share = keep_share.at(model);
    return layer;
  }
};

// The arguments of a device for each model and the results behind them, and what keeps the operands
// alive.
template <class Args, class Result>
struct Call {
  Problem problem;
  std::vector<Args> models;
  Result result;
};

Call<ForwardArgs, ForwardResult> prepare(const Device& device, int64_t cell, const Direction& of,
                                         bool save) {
  Problem p(device, cell, of);
  const Inputs& inputs = of.inputs;
  const int64_t N = p.sizes.N, H = p.sizes.H, R = p.sizes.R;
  const bool saves_c = save && p.has_c(), saves_gates = save && p.cell.saved;
  STD_TORCH_CHECK(inputs.w_ih || !inputs.b_ih, "fused_rnn: b_ih needs w_ih");
  const Placed b_ih = p.operands.get("b_ih", inputs.b_ih, {p.gates()}, p.io);
  const Placed b_hh = p.operands.get("b_hh", inputs.b_hh, {p.gates()}, p.io);
  const Placed h0 = p.operands.get("h0", inputs.h0, {N, R}, p.carry, true);
  const Placed c0 = p.has_c() ? p.operands.get("c0", inputs.c0, {N, H}, p.carry, true) : Placed();

  const Made h = p.make(true, p.rows_of(R), p.io);
  const Made c = p.make(saves_c, p.rows_of(H), p.io);
  const Made h_n = p.make(true, {N, R}, p.carry);
  const Made c_n = p.make(p.has_c(), {N, H}, p.carry);
  const Made saved = p.make(saves_gates, p.rows_of(p.cell.saved * H), p.io);

  std::vector<ForwardArgs> models(static_cast<size_t>(p.models()));
  for (size_t i = 0; i < models.size(); ++i) {
    const auto model = static_cast<int64_t>(i);
    ForwardArgs& args = models[i];
    static_cast<Layer&>(args) = p.layer(model);
    args.save = save;
    args.b_ih = b_ih.at(model);
    args.b_hh = b_hh.at(model);
    args.h0 = h0.at(model);
    args.c0 = c0.at(model);
    args.h = h.at(model);
    args.c = c.at(model);
    args.h_n = h_n.at(model);
    args.c_n = c_n.at(model);
    args.saved = saved.at(model);
  }
  return {
      std::move(p), std::move(models), {h.tensor, c.tensor, h_n.tensor, c_n.tensor, saved.tensor}};
}

Call<BackwardArgs, BackwardResult> prepare(const Device& device, int64_t cell,
                                           const DirectionBackward& back) {
  const Inputs& inputs = back.of.inputs;
  const OutputGradients& grads = back.grads;
  const Kept& kept = back.kept;
  Problem p(device, cell, back.of);
  STD_TORCH_CHECK(!p.keep_share,
                  "fused_rnn: there is no backward where keep is a share of each state");
  const int64_t N = p.sizes.N, H = p.sizes.H, R = p.sizes.R, I = p.sizes.I;
  Operands& operands = p.operands;
  const bool has_c = p.has_c(), saves = p.cell.saved > 0;
  const Shape h_state = {N, R}, c_state = {N, H}, over_time = p.rows_of(H);

  const Placed dh = operands.get("dh", grads.dh, p.rows_of(R), p.io);
  const Placed dc = has_c ? operands.get("dc", grads.dc, over_time, p.io) : Placed();
  const Placed dh_n = operands.get("dh_n", grads.dh_n, h_state, p.carry, true);
  const Placed dc_n = has_c ? operands.get("dc_n", grads.dc_n, c_state, p.carry, true) : Placed();
  const Placed h = operands.get("h", kept.h, p.rows_of(R), p.io);
  const Placed c = has_c ? operands.get("c", kept.c, over_time, p.io) : Placed();
  const Shape gates = p.rows_of(p.cell.saved * H);
  const Placed saved = saves ? operands.get("saved", kept.saved, gates, p.io) : Placed();
  const Placed h0 = operands.get("h0", inputs.h0, h_state, p.io, true);
  const Placed c0 = has_c ? operands.get("c0", inputs.c0, c_state, p.io, true) : Placed();

  const auto result = [&](int64_t bit, bool exists, const Shape& shape, ScalarType type) {
    return p.make((back.wanted & bit) && exists, shape, type, N == 0);
  };
  const auto gradient = [&](int64_t bit, bool exists, const Shape& shape) {
    return result(bit, exists, shape, p.io);
  };
  const bool has_w_ih = inputs.w_ih.has_value();
  const Made dx = gradient(kInput, true, p.rows_of(I));
  const Made dw_ih = gradient(kWeightIh, has_w_ih, {p.gates(), I});
  const Made db_ih = gradient(kBiasIh, has_w_ih, {p.gates()});
  const Made dw_hh = gradient(kWeightHh, true, {p.gates(), R});
  const Made db_hh = gradient(kBiasHh, true, {p.gates()});
  const Made dw_hr = gradient(kWeightHr, back.of.options.w_hr.has_value(), {R, H});
  const Made dh_norm = result(kHiddenNorm, true, p.lead, p.carry);
  const Made dh0 = p.make(true, h_state, p.carry);
  const Made dc0 = p.make(has_c, c_state, p.carry);

  std::vector<BackwardArgs> models(static_cast<size_t>(p.models()));
  for (size_t i = 0; i < models.size(); ++i) {
    const auto model = static_cast<int64_t>(i);
    BackwardArgs& args = models[i];
    static_cast<Layer&>(args) = p.layer(model);
    args.dh = dh.at(model);
    args.dc = dc.at(model);
    args.dh_n = dh_n.at(model);
    args.dc_n = dc_n.at(model);
    args.h = h.at(model);
    args.c = c.at(model);
    args.saved = saved.at(model);
    args.h0 = h0.at(model);
    args.c0 = c0.at(model);
    args.dx = dx.at(model);
    args.dw_ih = dw_ih.at(model);
    args.db_ih = db_ih.at(model);
    args.dw_hh = dw_hh.at(model);
    args.db_hh = db_hh.at(model);
    args.dw_hr = dw_hr.at(model);
    args.dh_norm = dh_norm.at(model);
    args.dh0 = dh0.at(model);
    args.dc0 = dc0.at(model);
  }
  return {std::move(p),
          std::move(models),
          {dx.tensor, dw_ih.tensor, db_ih.tensor, dw_hh.tensor, db_hh.tensor, dh0.tensor,
           dc0.tensor, dw_hr.tensor, dh_norm.tensor}};
}

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
    const bool drops = i > 0 && !options.passed.empty();
    const Tensor below = i ? std::get<0>(calls[i - 1].result) : x;
    const Tensor own = drops ? torch::stable::empty_like(below) : below;
    calls.push_back(prepare(device, cell, layer_of(own, operands, i, options), save));
    all.push_back(calls[i].models[0]);
    place_in_stack(options, i, layers, calls[i].problem, all[i]);
    if (drops) all[i].below = below.const_data_ptr();
    results.push_back(drops ? own : allocate(x, {0}, x.scalar_type()));
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
    const OptionalTensor dh = calls.empty() ? dy[0] : std::get<0>(calls.back().result);
    calls.push_back(prepare(device, cell,
                            {wanted[i] | (i > 0 ? int64_t(kInput) : 0),
                             {dh, dy[1], dy[2], dy[3]},
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
