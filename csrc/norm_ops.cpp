// Checks, allocation and arguments of the ops of the cells with layer norms.
#include "norm_ops.h"

#include <exception>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace fused_rnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

template <class Sizes>
std::string to_string(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// One call: its sizes, and the operands that forward and backward read the same way. `like` is the
// operand by which the others are checked: gx, or h in a backward.
class Call {
  const char* name_;
  Tensor like_;
  std::vector<Tensor> alive_;  // operands made contiguous

 public:
  NormCellShape cell;
  ScalarType io, carry;
  Shape lead;  // [T, N], or [M] with rows
  Layer layer{};

  Call(int64_t cell_id, const char* name, const Tensor& like, const Tensor& w_hh,
       const NormOptions& options)
      : name_(name), like_(like) {
    STD_TORCH_CHECK(cell_id >= 0 && cell_id < kNormCellCount, "fused_rnn: no cell has number ",
                    cell_id);
    cell = kNormCellShapes[cell_id];
    io = like.scalar_type();
    STD_TORCH_CHECK(io == ScalarType::Float || io == ScalarType::Double ||
                        io == ScalarType::BFloat16 || io == ScalarType::Half,
                    "fused_rnn: ", name, " must be float32, float64, bfloat16 or float16");
    carry = io == ScalarType::Double ? io : ScalarType::Float;
    const int64_t dims = options.rows ? 2 : 3;
    STD_TORCH_CHECK(like.dim() == dims, "fused_rnn: ", name, " must have ", dims,
                    " dimensions, got ", like.dim());
    STD_TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(1) > 0, "fused_rnn: w_hh must be [", cell.gates,
                    "*H, H], got ", to_string(w_hh.sizes()));
    const Tensor& time = options.rows ? *options.rows : like;
    STD_TORCH_CHECK(time.dim() >= 2, "fused_rnn: rows must be [T, N]");
    layer.cell = int(cell_id);
    layer.reverse = options.reverse;
    layer.T = time.size(0);
    layer.N = time.size(1);
    layer.H = layer.R = w_hh.size(1);
    layer.I = cell.gates * layer.H;
    lead = options.rows ? Shape{like.size(0)} : Shape{layer.T, layer.N};
    layer.M = options.rows ? like.size(0) : layer.T * layer.N;
    layer.w_hh = get("w_hh", w_hh, {layer.I, layer.H}, io);
    layer.control = static_cast<const uint8_t*>(
        get("control", options.control, {layer.T, layer.N}, ScalarType::Byte));
    layer.rows =
        static_cast<const int32_t*>(get("rows", options.rows, {layer.T, layer.N}, ScalarType::Int));
    if (layer.rows) check_rows();
    layer.h_mask = get("h_mask", options.h_mask, {layer.N, layer.R}, io);
  }

  bool has_c() const { return cell.states == 2; }

  Shape rows_of(int64_t width) const {
    Shape shape = lead;
    shape.push_back(width);
    return shape;
  }

  // A state may come in the dtype of gx or in the carry dtype, anything else only in its own.
  const void* get(const char* name, const Optional& x, const Shape& shape, ScalarType type,
                  bool state = false) {
    if (!x) return nullptr;
    bool fits = size_t(x->dim()) == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = x->size(int64_t(i)) == shape[i];
    STD_TORCH_CHECK(fits, "fused_rnn: ", name, " has size ", to_string(x->sizes()), ", expected ",
                    to_string(shape));
    STD_TORCH_CHECK(x->device() == like_.device(), "fused_rnn: ", name,
                    " is on another device than ", name_, "; move it there with .to(", name_,
                    ".device)");
    const ScalarType given = x->scalar_type();
    STD_TORCH_CHECK(given == type || (state && (given == io || given == carry)),
                    "fused_rnn: ", name, " has another dtype than expected; ", name_,
                    ", the weights, the norms and the states must agree, control is uint8 and rows "
                    "is int32");
    const Tensor typed = given == type ? *x : torch::stable::to(*x, type);
    alive_.push_back(typed.is_contiguous() ? typed : torch::stable::contiguous(typed));
    const void* const data = alive_.back().const_data_ptr();
    STD_TORCH_CHECK(data || x->numel() == 0, "fused_rnn: ", name,
                    " has no memory: its storage was freed, as FSDP does between calls");
    return data;
  }

  Tensor make(bool exists, Shape shape, ScalarType type, bool zero = false) const {
    if (!exists) shape = {0};
    try {
      return zero ? torch::stable::new_zeros(like_, shape, type)
                  : torch::stable::new_empty(like_, shape, type);
    } catch (const std::exception&) {
      STD_TORCH_CHECK(false, "fused_rnn: out of memory: there is no room for a tensor of size ",
                      to_string(shape));
    }
  }

  template <class Args>
  void read(const NormParameters& norm, Args& args) {
    STD_TORCH_CHECK(norm.c_gain.has_value() == has_c(), "fused_rnn: ", cell.name,
                    has_c() ? " needs c_gain" : " has no c to normalise");
    STD_TORCH_CHECK(norm.c_gain || !norm.c_bias, "fused_rnn: c_bias needs c_gain");
    args.gain = get("gain", norm.gain, {layer.I}, io);
    args.bias = get("bias", norm.bias, {layer.I}, io);
    args.c_gain = get("c_gain", norm.c_gain, {layer.H}, io);
    args.c_bias = get("c_bias", norm.c_bias, {layer.H}, io);
  }

 private:
  // Every row of the compact tensors belongs to just one step, and no step points outside of them.
  void check_rows() const {
    std::vector<bool> seen(size_t(layer.M), false);
    int64_t used = 0;
    for (int64_t i = 0; i < layer.T * layer.N; ++i) {
      const int32_t row = layer.rows[i];
      if (row < 0) continue;
      STD_TORCH_CHECK(row < layer.M && !seen[size_t(row)], "fused_rnn: rows names row ", row,
                      " twice, or it is outside of the ", layer.M, " rows of ", name_);
      seen[size_t(row)] = true;
      ++used;
    }
    STD_TORCH_CHECK(used == layer.M, "fused_rnn: rows names ", used, " of the ", layer.M,
                    " rows of ", name_, "; each must belong to one step");
  }
};

void* data(const Tensor& x) { return x.numel() ? x.mutable_data_ptr() : nullptr; }

}  // namespace

NormResult run_norm_layer(const NormLoops& loops, int64_t cell, double eps, const Tensor& gx,
                          const Tensor& w_hh, const NormParameters& norm, const NormStates& initial,
                          bool save, const NormOptions& options) {
  Call p(cell, "gx", gx, w_hh, options);
  const int64_t N = p.layer.N, H = p.layer.H;
  NormForwardArgs args{};
  p.layer.x = p.get("gx", gx, p.rows_of(p.layer.I), p.io);
  p.read(norm, args);
  args.h0 = p.get("h0", initial.h, {N, H}, p.carry, true);
  args.c0 = p.has_c() ? p.get("c0", initial.c, {N, H}, p.carry, true) : nullptr;
  static_cast<Layer&>(args) = p.layer;
  args.eps = eps;
  args.save = save;

  const Tensor h = p.make(true, p.rows_of(H), p.io);
  const Tensor c = p.make(save && p.has_c(), p.rows_of(H), p.io);
  const Tensor h_n = p.make(true, {N, H}, p.carry);
  const Tensor c_n = p.make(p.has_c(), {N, H}, p.carry);
  const Tensor saved = p.make(save, p.rows_of(p.cell.saved * H), p.io);
  const Tensor stats = p.make(save, p.rows_of(p.cell.stats), p.carry);
  args.h = data(h);
  args.c = data(c);
  args.h_n = data(h_n);
  args.c_n = data(c_n);
  args.saved = data(saved);
  args.stats = data(stats);
  if (N > 0) loops.forward(args, gx);
  return {h, c, h_n, c_n, saved, stats};
}

NormBackwardResult run_norm_layer_backward(const NormLoops& loops, int64_t cell, int64_t wanted,
                                           const NormOutputGradients& grads, const NormKept& kept,
                                           const Tensor& w_hh, const NormParameters& norm,
                                           const NormStates& initial, const NormOptions& options) {
  Call p(cell, "h", kept.h, w_hh, options);
  const int64_t N = p.layer.N, H = p.layer.H, gates = p.layer.I;
  NormBackwardArgs args{};
  p.read(norm, args);
  args.dh = p.get("dh", grads.dh, p.rows_of(H), p.io);
  args.dh_n = p.get("dh_n", grads.dh_n, {N, H}, p.carry, true);
  args.h = p.get("h", kept.h, p.rows_of(H), p.io);
  args.h0 = p.get("h0", initial.h, {N, H}, p.io, true);
  if (p.has_c()) {
    args.dc = p.get("dc", grads.dc, p.rows_of(H), p.io);
    args.dc_n = p.get("dc_n", grads.dc_n, {N, H}, p.carry, true);
    args.c = p.get("c", kept.c, p.rows_of(H), p.io);
    args.c0 = p.get("c0", initial.c, {N, H}, p.io, true);
  }
  args.saved = p.get("saved", kept.saved, p.rows_of(p.cell.saved * H), p.io);
  args.stats = p.get("stats", kept.stats, p.rows_of(p.cell.stats), p.carry);
  static_cast<Layer&>(args) = p.layer;

  // Empty where it is not wanted. A batch of none has gradients too: zeros.
  const bool zero = N == 0, norms = wanted & kNormParameters;
  const Tensor dgx = p.make(wanted & kNormInput, p.rows_of(gates), p.io, zero);
  const Tensor dw_hh = p.make(wanted & kNormWeight, {gates, H}, p.io, zero);
  const Tensor dgain = p.make(norms, {gates}, p.io, zero);
  const Tensor dbias = p.make(norms, {gates}, p.io, zero);
  const Tensor dc_gain = p.make(norms && p.has_c(), {H}, p.io, zero);
  const Tensor dc_bias = p.make(norms && p.has_c(), {H}, p.io, zero);
  const Tensor dh0 = p.make(true, {N, H}, p.carry);
  const Tensor dc0 = p.make(p.has_c(), {N, H}, p.carry);
  args.dx = data(dgx);
  args.dw_hh = data(dw_hh);
  args.dgain = data(dgain);
  args.dbias = data(dbias);
  args.dc_gain = data(dc_gain);
  args.dc_bias = data(dc_bias);
  args.dh0 = data(dh0);
  args.dc0 = data(dc0);
  if (N > 0) loops.backward(args, kept.h);
  return {dgx, dw_hh, dgain, dbias, dc_gain, dc_bias, dh0, dc0};
}

}  // namespace fused_rnn
