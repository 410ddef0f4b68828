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

// Checks one operand and makes it contiguous; empty stays empty.
class Operands {
  const char* name_;
  const Tensor& like_;
  ScalarType io_;

 public:
  // All must be where `like`, called `name`, is.
  Operands(const char* name, const Tensor& like)
      : name_(name), like_(like), io_(like.scalar_type()) {}

  // A state may come in the dtype of x or in the carry dtype, anything else only in its own.
  Tensor get(const char* name, const Tensor& x, const Shape& shape, ScalarType type,
             bool state = false) const {
    const auto sizes = x.sizes();
    bool fits = sizes.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = sizes[i] == shape[i];
    STD_TORCH_CHECK(fits, "fused_rnn: ", name, " has size ", to_string(sizes.data(), sizes.size()),
                    ", expected ", to_string(shape.data(), shape.size()));
    STD_TORCH_CHECK(x.device() == like_.device(), "fused_rnn: ", name,
                    " is on another device than ", name_, "; move it there with .to(", name_,
                    ".device)");
    const ScalarType given = x.scalar_type();
    STD_TORCH_CHECK(
        given == type || (state && (given == io_ || given == carry_type(io_))), "fused_rnn: ", name,
        " has another dtype than expected; ", name_,
        ", the weights and the states must agree, control and keep are uint8 and rows is int32");
    if (given == type && x.is_contiguous()) return x;
    return or_out_of_memory(
        [&] {
          const Tensor typed = given == type ? x : torch::stable::to(x, type);
          return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
        },
        [&] { return name; });
  }

  OptionalTensor get(const char* name, const OptionalTensor& x, const Shape& shape, ScalarType type,
                     bool state = false) const {
    if (!x) return std::nullopt;
    return get(name, *x, shape, type, state);
  }
};

const void* pointer(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

Tensor allocate(const Tensor& like, const Shape& shape, ScalarType type) {
  return or_out_of_memory(
      [&] { return torch::stable::new_empty(like, shape, type); },
      [&] { return "a tensor of size " + to_string(shape.data(), shape.size()); });
}

// Every row of the compact tensors belongs to just one step, and no step points outside of them.
void check_rows(const Tensor& rows, int64_t count) {
  if (!rows.is_cpu()) return;
  std::vector<bool> seen(static_cast<size_t>(count), false);
  const auto* row = static_cast<const int32_t*>(rows.const_data_ptr());
  int64_t used = 0;
  for (int64_t i = 0; i < rows.numel(); ++i) {
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
  Layer layer{};
  Operands operands;
  std::vector<Tensor> keep_alive;

  Problem(const Device& device, int64_t cell_id, const Direction& of) : operands("x", of.inputs.x) {
    const Inputs& inputs = of.inputs;
    const Options& options = of.options;
    const Tensor &x = inputs.x, &w_hh = inputs.w_hh;
    STD_TORCH_CHECK(options.algorithm >= 0 && options.algorithm <= device.algorithms,
                    "fused_rnn: this device has no algorithm ", options.algorithm);
    cell = shape_of(cell_id);
    io = io_type("x", x);
    carry = carry_type(io);
    STD_TORCH_CHECK(x.dim() == (options.rows ? 2 : 3), "fused_rnn: x must have ",
                    options.rows ? 2 : 3, " dimensions, got ", x.dim());
    STD_TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) > 0 && w_hh.size(0) % cell.gates == 0,
                    "fused_rnn: w_hh must be [", cell.gates, "*H, R], got ",
                    to_string(w_hh.sizes().data(), w_hh.sizes().size()));
    layer.cell = int(cell_id);
    layer.reverse = of.reverse;
    layer.algorithm = options.algorithm;
    layer.tf32 = options.tf32;
    layer.H = w_hh.size(0) / cell.gates;
    layer.R = w_hh.size(1);
    layer.I = inputs.w_ih ? x.size(x.dim() - 1) : gates();
    const Tensor& time = options.rows ? *options.rows : x;
    STD_TORCH_CHECK(time.dim() >= 2, "fused_rnn: rows must be [T, N]");
    layer.T = time.size(0);
    layer.N = time.size(1);
    lead = options.rows ? Shape{x.size(0)} : Shape{layer.T, layer.N};
    STD_TORCH_CHECK(layer.R > 0 && layer.I > 0, "fused_rnn: w_hh and w_ih must not be empty");
    layer.M = options.rows ? x.size(0) : layer.T * layer.N;
    STD_TORCH_CHECK(!options.w_hr || cell.states == 2, "fused_rnn: only LSTM has a projection");
    STD_TORCH_CHECK(options.w_hr || layer.R == layer.H, "fused_rnn: w_hh must be [", gates(), ", ",
                    layer.H, "] without a projection");

    layer.x = hold(operands.get("x", x, rows_of(layer.I), io));
    layer.w_ih = hold(operands.get("w_ih", inputs.w_ih, {gates(), layer.I}, io));
    layer.w_hh = hold(operands.get("w_hh", w_hh, {gates(), layer.R}, io));
    layer.w_hr = hold(operands.get("w_hr", options.w_hr, {layer.R, layer.H}, io));
    layer.control = static_cast<const uint8_t*>(
        hold(operands.get("control", options.control, {layer.T, layer.N}, ScalarType::Byte)));
    const auto rows = operands.get("rows", options.rows, {layer.T, layer.N}, ScalarType::Int);
    if (rows) check_rows(*rows, layer.M);
    layer.rows = static_cast<const int32_t*>(hold(rows));
    layer.h_mask = hold(operands.get("h_mask", options.h_mask, {layer.N, layer.R}, io));
    const int64_t states = layer.R + (cell.states - 1) * layer.H;
    if (options.keep && options.keep->scalar_type() != ScalarType::Byte)
      layer.keep_share = hold(operands.get("keep", options.keep, {states}, carry, true));
    else
      layer.keep = static_cast<const uint8_t*>(
          hold(operands.get("keep", options.keep, {layer.T, layer.N, states}, ScalarType::Byte)));
  }

  int64_t gates() const { return cell.gates * layer.H; }
  bool has_c() const { return cell.states == 2; }

  const void* hold(const OptionalTensor& x) {
    if (x) keep_alive.push_back(*x);
    return pointer(x);
  }

  Shape rows_of(int64_t width) const {
    Shape shape = lead;
    shape.push_back(width);
    return shape;
  }
};

// The arguments of a device and the results behind them, and what keeps the operands alive.
template <class Args, class Result>
struct Call {
  Problem problem;
  Args args;
  Result result;
};

Call<ForwardArgs, ForwardResult> prepare(const Device& device, int64_t cell, const Direction& of,
                                         bool save) {
  Problem p(device, cell, of);
  const Inputs& inputs = of.inputs;
  const Tensor& x = inputs.x;
  const int64_t N = p.layer.N, H = p.layer.H, R = p.layer.R;
  const bool saves_c = save && p.has_c(), saves_gates = save && p.cell.saved;
  STD_TORCH_CHECK(inputs.w_ih || !inputs.b_ih, "fused_rnn: b_ih needs w_ih");

  const Tensor h = allocate(x, p.rows_of(R), p.io);
  const Tensor c = allocate(x, saves_c ? p.rows_of(H) : Shape{0}, p.io);
  const Tensor h_n = allocate(x, {N, R}, p.carry);
  const Tensor c_n = allocate(x, p.has_c() ? Shape{N, H} : Shape{0}, p.carry);
  const Tensor saved = allocate(x, saves_gates ? p.rows_of(p.cell.saved * H) : Shape{0}, p.io);

  ForwardArgs args{};
  static_cast<Layer&>(args) = p.layer;
  args.save = save;
  args.b_ih = p.hold(p.operands.get("b_ih", inputs.b_ih, {p.gates()}, p.io));
  args.b_hh = p.hold(p.operands.get("b_hh", inputs.b_hh, {p.gates()}, p.io));
  args.h0 = p.hold(p.operands.get("h0", inputs.h0, {N, R}, p.carry, true));
  args.c0 = p.has_c() ? p.hold(p.operands.get("c0", inputs.c0, {N, H}, p.carry, true)) : nullptr;
  args.h = h.mutable_data_ptr();
  args.c = saves_c ? c.mutable_data_ptr() : nullptr;
  args.h_n = h_n.mutable_data_ptr();
  args.c_n = p.has_c() ? c_n.mutable_data_ptr() : nullptr;
  args.saved = saves_gates ? saved.mutable_data_ptr() : nullptr;
  return {std::move(p), args, {h, c, h_n, c_n, saved}};
}

Call<BackwardArgs, BackwardResult> prepare(const Device& device, int64_t cell,
                                           const DirectionBackward& back) {
  const Inputs& inputs = back.of.inputs;
  const OutputGradients& grads = back.grads;
  const Kept& kept = back.kept;
  Problem p(device, cell, back.of);
  const int64_t N = p.layer.N, H = p.layer.H, R = p.layer.R, I = p.layer.I;
  const Operands& operands = p.operands;
  STD_TORCH_CHECK(!p.layer.keep_share,
                  "fused_rnn: there is no backward where keep is a share of each state");

  BackwardArgs args{};
  static_cast<Layer&>(args) = p.layer;
  args.dh = p.hold(operands.get("dh", grads.dh, p.rows_of(R), p.io));
  args.dc = p.has_c() ? p.hold(operands.get("dc", grads.dc, p.rows_of(H), p.io)) : nullptr;
  args.dh_n = p.hold(operands.get("dh_n", grads.dh_n, {N, R}, p.carry, true));
  args.dc_n = p.has_c() ? p.hold(operands.get("dc_n", grads.dc_n, {N, H}, p.carry, true)) : nullptr;
  args.h = p.hold(operands.get("h", kept.h, p.rows_of(R), p.io));
  args.c = p.has_c() ? p.hold(operands.get("c", kept.c, p.rows_of(H), p.io)) : nullptr;
  if (p.cell.saved)
    args.saved = p.hold(operands.get("saved", kept.saved, p.rows_of(p.cell.saved * H), p.io));
  args.h0 = p.hold(operands.get("h0", inputs.h0, {N, R}, p.io, true));
  args.c0 = p.has_c() ? p.hold(operands.get("c0", inputs.c0, {N, H}, p.io, true)) : nullptr;

  // Empty where it is not wanted. A batch of none has gradients too: zeros.
  const auto result = [&](int64_t bit, bool exists, Shape shape, ScalarType type, void*& data) {
    const bool given = (back.wanted & bit) && exists;
    if (!given) shape = {0};
    Tensor x =
        N > 0 ? allocate(inputs.x, shape, type) : torch::stable::new_zeros(inputs.x, shape, type);
    data = given ? x.mutable_data_ptr() : nullptr;
    return x;
  };
  const auto gradient = [&](int64_t bit, bool exists, const Shape& shape, void*& data) {
    return result(bit, exists, shape, p.io, data);
  };
  const bool has_w_ih = inputs.w_ih.has_value();
  const Tensor dx = gradient(kInput, true, p.rows_of(I), args.dx);
  const Tensor dw_ih = gradient(kWeightIh, has_w_ih, {p.gates(), I}, args.dw_ih);
  const Tensor db_ih = gradient(kBiasIh, has_w_ih, {p.gates()}, args.db_ih);
  const Tensor dw_hh = gradient(kWeightHh, true, {p.gates(), R}, args.dw_hh);
  const Tensor db_hh = gradient(kBiasHh, true, {p.gates()}, args.db_hh);
  const Tensor dw_hr = gradient(kWeightHr, back.of.options.w_hr.has_value(), {R, H}, args.dw_hr);
  const Tensor dh_norm = result(kHiddenNorm, true, p.lead, p.carry, args.dh_norm);
  const Tensor dh0 = allocate(inputs.x, {N, R}, p.carry);
  const Tensor dc0 = allocate(inputs.x, p.has_c() ? Shape{N, H} : Shape{0}, p.carry);
  args.dh0 = dh0.mutable_data_ptr();
  args.dc0 = p.has_c() ? dc0.mutable_data_ptr() : nullptr;
  return {std::move(p), args, {dx, dw_ih, db_ih, dw_hh, db_hh, dh0, dc0, dw_hr, dh_norm}};
}

// Runs the directions that are prepared: there is one at least.
template <class Args, class Result>
std::vector<Result> run(void (*on_device)(Directions<Args>, const Tensor&), const Tensor& x,
                        const std::vector<Call<Args, Result>>& calls) {
  std::vector<Args> all;
  std::vector<Result> results;
  for (const auto& call : calls) {
    const Layer &a = call.args, &first = calls[0].args;
    STD_TORCH_CHECK(a.H == first.H && a.R == first.R && !a.w_ih == !first.w_ih,
                    "fused_rnn: the weights of both directions must have the same sizes");
    all.push_back(call.args);
    results.push_back(call.result);
  }
  if (all[0].N > 0) on_device(Directions<Args>(all.data(), int(all.size())), x);
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

StepResult run_step(const Device& device, int64_t cell, const Tensor& gx, const Tensor& gh,
                    const Tensor& h, const OptionalTensor& c, bool save) {
  const CellShape& shape = shape_of(cell);
  const ScalarType io = io_type("gx", gx);
  STD_TORCH_CHECK(h.dim() == 2, "fused_rnn: h has size ",
                  to_string(h.sizes().data(), h.sizes().size()), ", expected [N, H]");
  STD_TORCH_CHECK(shape.states == 1 || c, "fused_rnn: c is missing");
  const int64_t N = h.size(0), H = h.size(1);
  const bool has_c = shape.states == 2;
  const Operands operands("gx", gx);
  const Tensor gx_ = operands.get("gx", gx, {N, shape.gates * H}, io);
  const Tensor gh_ = operands.get("gh", gh, {N, shape.gates * H}, io);
  const Tensor h_ = operands.get("h", h, {N, H}, io);
  const OptionalTensor c_ = has_c ? operands.get("c", c, {N, H}, io) : std::nullopt;
  const Tensor h1 = allocate(gx, {N, H}, io);
  const Tensor c1 = allocate(gx, has_c ? Shape{N, H} : Shape{0}, io);
  const Tensor saved = allocate(gx, save && shape.saved ? Shape{N, shape.saved * H} : Shape{0}, io);

  StepArgs args{};
  args.cell = int(cell);
  args.N = N;
  args.H = H;
  args.gx = gx_.const_data_ptr();
  args.gh = gh_.const_data_ptr();
  args.h = h_.const_data_ptr();
  args.c = pointer(c_);
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
  const Operands operands("h1", kept.h);
  const OptionalTensor dh1 = operands.get("dh1", grads.dh, {N, H}, io);
  const OptionalTensor dc1 = has_c ? operands.get("dc1", grads.dc, {N, H}, io) : std::nullopt;
  const OptionalTensor c = has_c ? operands.get("c", c_before, {N, H}, io) : std::nullopt;
  const Tensor h = operands.get("h", before, {N, H}, io);
  const Tensor h1 = operands.get("h1", kept.h, {N, H}, io);
  const Tensor c1 = has_c ? operands.get("c1", kept.c, {N, H}, io) : kept.c;
  const Tensor saved =
      shape.saved ? operands.get("saved", kept.saved, {N, shape.saved * H}, io) : kept.saved;
  const Tensor dgx = allocate(kept.h, {N, shape.gates * H}, io);
  const Tensor dgh =
      allocate(kept.h, shape.splits_gates ? Shape{N, shape.gates * H} : Shape{0}, io);
  const Tensor dh = allocate(kept.h, shape.splits_gates ? Shape{N, H} : Shape{0}, io);
  const Tensor dc = allocate(kept.h, has_c ? Shape{N, H} : Shape{0}, io);

  StepArgs args{};
  args.cell = int(cell);
  args.N = N;
  args.H = H;
  args.h = h.const_data_ptr();
  args.c = pointer(c);
  args.h1 = h1.mutable_data_ptr();
  args.c1 = has_c ? c1.mutable_data_ptr() : nullptr;
  args.saved = shape.saved ? saved.mutable_data_ptr() : nullptr;
  args.dh1 = pointer(dh1);
  args.dc1 = pointer(dc1);
  args.dgx = dgx.mutable_data_ptr();
  args.dgh = shape.splits_gates ? dgh.mutable_data_ptr() : nullptr;
  args.dh = shape.splits_gates ? dh.mutable_data_ptr() : nullptr;
  args.dc = has_c ? dc.mutable_data_ptr() : nullptr;
  if (N > 0) device.step_backward(args, kept.h);
  return {dgx, dgh, dh, dc};
}

}  // namespace fused_rnn
