// The schema of every op, and what is the same on every device: checks, allocation, arguments.
#include "ops.h"

#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace fused_rnn {
namespace {

constexpr const char* kLayerSchema =
    "layer(int cell, Tensor gx, Tensor w_hh, Tensor? b_hh, Tensor? h0, Tensor? c0, bool reverse, "
    "bool save, Tensor? control, Tensor? rows, Tensor? w_hr, Tensor? h_mask, Tensor? keep) "
    "-> (Tensor h, Tensor c, Tensor h_n, Tensor c_n, Tensor saved)";

// layer() with save, where what is saved takes the place of gx: of the same size, it needs no
// memory of its own. Only for a cell that saves as many values as it has gates.
constexpr const char* kLayerInPlaceSchema =
    "layer_(int cell, Tensor(a!) gx, Tensor w_hh, Tensor? b_hh, Tensor? h0, Tensor? c0, "
    "bool reverse, Tensor? control, Tensor? rows, Tensor? w_hr, Tensor? h_mask, Tensor? keep) "
    "-> (Tensor h, Tensor c, Tensor h_n, Tensor c_n)";

constexpr const char* kLayerBackwardSchema =
    "layer_backward(int cell, Tensor? dh, Tensor? dc, Tensor? dh_n, Tensor? dc_n, Tensor h, "
    "Tensor c, Tensor saved, Tensor w_hh, Tensor? h0, Tensor? c0, bool reverse, Tensor? control, "
    "Tensor? rows, Tensor? w_hr, Tensor? h_mask, Tensor? keep) "
    "-> (Tensor dgx, Tensor dgh, Tensor dh0, Tensor dc0, Tensor h_in, Tensor dh_total)";

constexpr const char* kStepSchema =
    "step(int cell, Tensor gx, Tensor gh, Tensor h, Tensor? c, bool save) "
    "-> (Tensor h1, Tensor c1, Tensor saved)";

constexpr const char* kStepBackwardSchema =
    "step_backward(int cell, Tensor? dh1, Tensor? dc1, Tensor h1, Tensor c1, Tensor saved, "
    "Tensor h, Tensor? c) -> (Tensor dgx, Tensor dgh, Tensor dh, Tensor dc)";

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
  const Tensor& like_;

 public:
  explicit Operands(const Tensor& like) : like_(like) {}

  // A state may come in the dtype of gx or in the carry dtype, anything else only in its own.
  Tensor get(const char* name, const Tensor& x, const Shape& shape, ScalarType type,
             bool state = false) const {
    const auto sizes = x.sizes();
    bool fits = sizes.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = sizes[i] == shape[i];
    STD_TORCH_CHECK(fits, "fused_rnn: ", name, " has size ", to_string(sizes.data(), sizes.size()),
                    ", expected ", to_string(shape.data(), shape.size()));
    STD_TORCH_CHECK(x.device() == like_.device(), "fused_rnn: ", name,
                    " is on another device than gx; move it there with .to(gx.device)");
    const ScalarType given = x.scalar_type();
    STD_TORCH_CHECK(
        given == type || (state && (carry_type(given) == type || carry_type(type) == given)),
        "fused_rnn: ", name,
        " has another dtype than expected; gx, the weights and "
        "the states must agree, control is uint8 and rows is int32");
    const Tensor typed = given == type ? x : torch::stable::to(x, type);
    return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
  }

  OptionalTensor get(const char* name, const OptionalTensor& x, const Shape& shape, ScalarType type,
                     bool state = false) const {
    if (!x) return std::nullopt;
    return get(name, *x, shape, type, state);
  }
};

const void* pointer(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

Tensor allocate(const Tensor& like, const Shape& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
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
                    " rows of gx");
    seen[static_cast<size_t>(row[i])] = true;
    ++used;
  }
  STD_TORCH_CHECK(used == count, "fused_rnn: rows names ", used, " of the ", count,
                  " rows of gx; each must belong to one step");
}

const CellShape& shape_of(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell < kCellCount, "fused_rnn: no cell has number ", cell);
  return kCellShapes[cell];
}

ScalarType io_type(const Tensor& gx) {
  const ScalarType io = gx.scalar_type();
  STD_TORCH_CHECK(io == ScalarType::Float || io == ScalarType::Double ||
                      io == ScalarType::BFloat16 || io == ScalarType::Half,
                  "fused_rnn: gx must be float32, float64, bfloat16 or float16");
  return io;
}

// The sizes and options that forward and backward read the same way. `sequence` is any tensor laid
// out as gx; it gives T and N, or with `rows` the number of compact rows.
struct Problem {
  CellShape cell;
  ScalarType io, carry;
  Shape lead;  // [T, N], or [M] with rows
  int64_t M;
  Layer layer{};
  std::vector<Tensor> keep_alive;

  Problem(int64_t cell_id, const Tensor& sequence, const Tensor& w_hh, bool reverse,
          const Options& options) {
    STD_TORCH_CHECK(!options.h_mask && !options.keep,
                    "fused_rnn: h_mask and keep are not implemented for this device");
    cell = shape_of(cell_id);
    io = io_type(sequence);
    carry = carry_type(io);
    STD_TORCH_CHECK(sequence.dim() == (options.rows ? 2 : 3), "fused_rnn: gx must have ",
                    options.rows ? 2 : 3, " dimensions, got ", sequence.dim());
    STD_TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) > 0 && w_hh.size(0) % cell.gates == 0,
                    "fused_rnn: w_hh must be [", cell.gates, "*H, R], got ",
                    to_string(w_hh.sizes().data(), w_hh.sizes().size()));
    const Operands operands(sequence);
    layer.cell = int(cell_id);
    layer.reverse = reverse;
    layer.H = w_hh.size(0) / cell.gates;
    layer.R = w_hh.size(1);
    const Tensor& time = options.rows ? *options.rows : sequence;
    STD_TORCH_CHECK(time.dim() >= 2, "fused_rnn: rows must be [T, N]");
    layer.T = time.size(0);
    layer.N = time.size(1);
    lead = options.rows ? Shape{sequence.size(0)} : Shape{layer.T, layer.N};
    M = options.rows ? sequence.size(0) : layer.T * layer.N;
    STD_TORCH_CHECK(!options.w_hr || cell.states == 2, "fused_rnn: only LSTM has a projection");
    STD_TORCH_CHECK(options.w_hr || layer.R == layer.H, "fused_rnn: w_hh must be [",
                    cell.gates * layer.H, ", ", layer.H, "] without a projection");

    layer.w_hh = hold(operands.get("w_hh", w_hh, {cell.gates * layer.H, layer.R}, io));
    layer.w_hr = hold(operands.get("w_hr", options.w_hr, {layer.R, layer.H}, io));
    layer.control = static_cast<const uint8_t*>(
        hold(operands.get("control", options.control, {layer.T, layer.N}, ScalarType::Byte)));
    const auto rows = operands.get("rows", options.rows, {layer.T, layer.N}, ScalarType::Int);
    if (rows) check_rows(*rows, M);
    layer.rows = static_cast<const int32_t*>(hold(rows));
  }

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

}  // namespace

ForwardResult run_layer(const Device& device, int64_t cell, const Tensor& gx, const Tensor& w_hh,
                        const OptionalTensor& b_hh, const OptionalTensor& h0,
                        const OptionalTensor& c0, bool reverse, Save save, const Options& options) {
  Problem p(cell, gx, w_hh, reverse, options);
  const int64_t N = p.layer.N, H = p.layer.H, R = p.layer.R;
  const bool has_c = p.cell.states == 2;
  const Operands operands(gx);

  const Tensor h = allocate(gx, p.rows_of(R), p.io);
  const Tensor c = allocate(gx, has_c && save != Save::kNothing ? p.rows_of(H) : Shape{0}, p.io);
  const Tensor h_n = allocate(gx, {N, R}, p.carry);
  const Tensor c_n = allocate(gx, has_c ? Shape{N, H} : Shape{0}, p.carry);
  const bool saves = save != Save::kNothing, in_place = save == Save::kInPlaceOfGx;
  STD_TORCH_CHECK(!in_place || (p.cell.saved == p.cell.gates && gx.is_contiguous()),
                  "fused_rnn: layer_ needs a contiguous gx, and a cell that saves all its gates");
  const Tensor saved =
      in_place ? gx
               : allocate(gx, saves && p.cell.saved ? p.rows_of(p.cell.saved * H) : Shape{0}, p.io);

  ForwardArgs args{};
  static_cast<Layer&>(args) = p.layer;
  args.save = saves;
  args.gx = p.hold(operands.get("gx", gx, p.rows_of(p.cell.gates * H), p.io));
  args.b_hh = p.hold(operands.get("b_hh", b_hh, {p.cell.gates * H}, p.io));
  args.h0 = p.hold(operands.get("h0", h0, {N, R}, p.carry, true));
  args.c0 = has_c ? p.hold(operands.get("c0", c0, {N, H}, p.carry, true)) : nullptr;
  args.h = h.mutable_data_ptr();
  args.c = has_c && saves ? c.mutable_data_ptr() : nullptr;
  args.h_n = h_n.mutable_data_ptr();
  args.c_n = has_c ? c_n.mutable_data_ptr() : nullptr;
  args.saved = saves && p.cell.saved ? saved.mutable_data_ptr() : nullptr;
  if (N > 0) device.forward(args, p.io);
  return {h, c, h_n, c_n, saved};
}

BackwardResult run_layer_backward(const Device& device, int64_t cell, const OutputGradients& grads,
                                  const Kept& kept, bool reverse, const Options& options) {
  Problem p(cell, kept.h, *kept.w_hh, reverse, options);
  const int64_t N = p.layer.N, H = p.layer.H, R = p.layer.R;
  const bool has_c = p.cell.states == 2, has_holes = options.control || options.rows;
  const Operands operands(kept.h);

  const Shape gates = p.rows_of(p.cell.gates * H);
  const Tensor dgx = allocate(kept.h, gates, p.io);
  const Tensor dgh = allocate(kept.h, p.cell.splits_gates ? gates : Shape{0}, p.io);
  const Tensor dh0 = allocate(kept.h, {N, R}, p.carry);
  const Tensor dc0 = allocate(kept.h, has_c ? Shape{N, H} : Shape{0}, p.carry);
  const Tensor h_in = allocate(kept.h, has_holes ? p.rows_of(R) : Shape{0}, p.io);
  const Tensor dh_total = allocate(kept.h, options.w_hr ? p.rows_of(R) : Shape{0}, p.io);

  BackwardArgs args{};
  static_cast<Layer&>(args) = p.layer;
  args.dh = p.hold(operands.get("dh", grads.dh, p.rows_of(R), p.io));
  args.dc = has_c ? p.hold(operands.get("dc", grads.dc, p.rows_of(H), p.io)) : nullptr;
  args.dh_n = p.hold(operands.get("dh_n", grads.dh_n, {N, R}, p.carry, true));
  args.dc_n = has_c ? p.hold(operands.get("dc_n", grads.dc_n, {N, H}, p.carry, true)) : nullptr;
  args.h = p.hold(operands.get("h", kept.h, p.rows_of(R), p.io));
  args.c = has_c ? p.hold(operands.get("c", kept.c, p.rows_of(H), p.io)) : nullptr;
  if (p.cell.saved)
    args.saved = p.hold(operands.get("saved", kept.saved, p.rows_of(p.cell.saved * H), p.io));
  args.h0 = p.hold(operands.get("h0", kept.h0, {N, R}, p.io, true));
  args.c0 = has_c ? p.hold(operands.get("c0", kept.c0, {N, H}, p.io, true)) : nullptr;
  args.dgx = dgx.mutable_data_ptr();
  args.dgh = p.cell.splits_gates ? dgh.mutable_data_ptr() : nullptr;
  args.dh0 = dh0.mutable_data_ptr();
  args.dc0 = has_c ? dc0.mutable_data_ptr() : nullptr;
  args.h_in = has_holes ? h_in.mutable_data_ptr() : nullptr;
  args.dh_total = options.w_hr ? dh_total.mutable_data_ptr() : nullptr;
  if (N > 0) device.backward(args, p.io);
  return {dgx, dgh, dh0, dc0, h_in, dh_total};
}

StepResult run_step(const Device& device, int64_t cell, const Tensor& gx, const Tensor& gh,
                    const Tensor& h, const OptionalTensor& c, bool save) {
  const CellShape& shape = shape_of(cell);
  const ScalarType io = io_type(gx);
  STD_TORCH_CHECK(h.dim() == 2, "fused_rnn: h has size ",
                  to_string(h.sizes().data(), h.sizes().size()), ", expected [N, H]");
  STD_TORCH_CHECK(shape.states == 1 || c, "fused_rnn: c is missing");
  const int64_t N = h.size(0), H = h.size(1);
  const bool has_c = shape.states == 2;
  const Operands operands(gx);
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
  if (N > 0) device.step(args, io);
  return {h1, c1, saved};
}

StepBackwardResult run_step_backward(const Device& device, int64_t cell,
                                     const OutputGradients& grads, const Kept& kept) {
  const CellShape& shape = shape_of(cell);
  const ScalarType io = io_type(kept.h);
  STD_TORCH_CHECK(kept.h.dim() == 2, "fused_rnn: h1 has size ",
                  to_string(kept.h.sizes().data(), kept.h.sizes().size()), ", expected [N, H]");
  STD_TORCH_CHECK(kept.h0 && (shape.states == 1 || kept.c0), "fused_rnn: c is missing");
  const int64_t N = kept.h.size(0), H = kept.h.size(1);
  const bool has_c = shape.states == 2;
  const Operands operands(kept.h);
  const OptionalTensor dh1 = operands.get("dh1", grads.dh, {N, H}, io);
  const OptionalTensor dc1 = has_c ? operands.get("dc1", grads.dc, {N, H}, io) : std::nullopt;
  const OptionalTensor c = has_c ? operands.get("c", kept.c0, {N, H}, io) : std::nullopt;
  const Tensor h = operands.get("h", *kept.h0, {N, H}, io);
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
  if (N > 0) device.step_backward(args, io);
  return {dgx, dgh, dh, dc};
}

}  // namespace fused_rnn

STABLE_TORCH_LIBRARY(fused_rnn, library) {
  library.def(fused_rnn::kLayerSchema);
  library.def(fused_rnn::kLayerInPlaceSchema);
  library.def(fused_rnn::kLayerBackwardSchema);
  library.def(fused_rnn::kStepSchema);
  library.def(fused_rnn::kStepBackwardSchema);
}
