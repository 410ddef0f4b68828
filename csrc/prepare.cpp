#include "prepare.h"

#include <utility>

namespace fused_rnn {
namespace {

ScalarType carry_type(ScalarType io) {
  return io == ScalarType::BFloat16 || io == ScalarType::Half ? ScalarType::Float : io;
}

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

}  // namespace

std::string to_string(const int64_t* sizes, size_t dim) {
  std::string text = "[";
  for (size_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

Placed Operands::get(const char* name, const OptionalTensor& x, const Shape& shape, ScalarType type,
                     bool state) {
  if (!x) return {};
  const Shape expected = stacked(shape);
  const auto sizes = x->sizes();
  bool fits = sizes.size() == expected.size();
  for (size_t i = 0; fits && i < expected.size(); ++i) fits = sizes[i] == expected[i];
  STD_TORCH_CHECK(fits, "fused_rnn: ", name, " has size ", to_string(sizes.data(), sizes.size()),
                  ", expected ", to_string(expected.data(), expected.size()));
  STD_TORCH_CHECK(x->device() == like_.device(), "fused_rnn: ", name, " is on another device than ",
                  name_, "; move it there with .to(", name_, ".device)");
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

Tensor allocate(const Tensor& like, const Shape& shape, ScalarType type) {
  return or_out_of_memory(
      [&] { return torch::stable::new_empty(like, shape, type); },
      [&] { return "a tensor of size " + to_string(shape.data(), shape.size()); });
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

Problem::Problem(const Device& device, int64_t cell_id, const Direction& of)
    : operands("x", of.inputs.x) {
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

Made Problem::make(bool exists, const Shape& shape, ScalarType type, bool zero) const {
  const Tensor& like = operands.like();
  if (!exists) return {allocate(like, {0}, type)};
  const Shape all = operands.stacked(shape);
  const Tensor made = zero ? torch::stable::new_zeros(like, all, type) : allocate(like, all, type);
  return {made, made.mutable_data_ptr(), product(shape) * bytes_of(type)};
}

Layer Problem::layer(int64_t model) const {
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

}  // namespace fused_rnn
