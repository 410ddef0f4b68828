// The schema of every op; docs/architecture.md says what each argument means.
#pragma once

namespace fused_rnn {

inline constexpr const char* kLayerSchema =
    "layer(int cell, Tensor x, Tensor? w_ih, Tensor? b_ih, Tensor w_hh, Tensor? b_hh, Tensor? h0, "
    "Tensor? c0, bool reverse, bool save, Tensor? control, Tensor? rows, Tensor? w_hr, "
    "Tensor? h_mask, Tensor? keep, int algorithm, bool tf32) "
    "-> (Tensor h, Tensor c, Tensor h_n, Tensor c_n, Tensor saved)";

inline constexpr const char* kLayerBackwardSchema =
    "layer_backward(int cell, int wanted, Tensor? dh, Tensor? dc, Tensor? dh_n, Tensor? dc_n, "
    "Tensor h, Tensor c, Tensor saved, Tensor x, Tensor? w_ih, Tensor w_hh, Tensor? h0, "
    "Tensor? c0, bool reverse, Tensor? control, Tensor? rows, Tensor? w_hr, Tensor? h_mask, "
    "Tensor? keep, int algorithm, bool tf32) -> (Tensor dx, Tensor dw_ih, Tensor db_ih, Tensor "
    "dw_hh, Tensor db_hh, "
    "Tensor dh0, Tensor dc0, Tensor dw_hr, Tensor dh_norm)";

inline constexpr const char* kBidirectionalSchema =
    "bidirectional(int cell, Tensor x, Tensor?[] forward, Tensor?[] reverse, bool save, "
    "Tensor? rows, int algorithm, bool tf32) -> Tensor[]";

inline constexpr const char* kBidirectionalBackwardSchema =
    "bidirectional_backward(int cell, int[] wanted, Tensor?[] grads, Tensor[] kept, Tensor x, "
    "Tensor?[] forward, Tensor?[] reverse, Tensor? rows, int algorithm, bool tf32) -> Tensor[]";

// Of layers in one direction; operands come as the directions' do, for one layer after the other.
inline constexpr const char* kStackSchema =
    "stack(int cell, Tensor x, Tensor?[] operands, Tensor[] passed, float scale, bool reverse, "
    "bool save, int chunk, bool side_by_side, int algorithm, bool tf32) -> Tensor[]";

inline constexpr const char* kStackBackwardSchema =
    "stack_backward(int cell, int[] wanted, Tensor?[] grads, Tensor[] kept, Tensor x, "
    "Tensor?[] operands, Tensor[] passed, float scale, bool reverse, int chunk, "
    "bool side_by_side, int algorithm, bool tf32) -> Tensor[]";

inline constexpr const char* kStepSchema =
    "step(int cell, Tensor gx, Tensor gh, Tensor h, Tensor? c, bool save) "
    "-> (Tensor h1, Tensor c1, Tensor saved)";

inline constexpr const char* kStepBackwardSchema =
    "step_backward(int cell, Tensor? dh1, Tensor? dc1, Tensor h1, Tensor c1, Tensor saved, "
    "Tensor h, Tensor? c) -> (Tensor dgx, Tensor dgh, Tensor dh, Tensor dc)";

// With layer norms, of the CPU alone. `gx` is the input's half of the gates, normalised but for a
// joint norm.
inline constexpr const char* kNormLayerSchema =
    "norm_layer(int cell, float eps, Tensor gx, Tensor w_hh, Tensor gain, Tensor? bias, "
    "Tensor? c_gain, Tensor? c_bias, Tensor? h0, Tensor? c0, bool reverse, bool save, "
    "Tensor? control, Tensor? rows, Tensor? h_mask) "
    "-> (Tensor h, Tensor c, Tensor h_n, Tensor c_n, Tensor saved, Tensor stats)";

inline constexpr const char* kNormLayerBackwardSchema =
    "norm_layer_backward(int cell, int wanted, Tensor? dh, Tensor? dc, Tensor? dh_n, Tensor? dc_n, "
    "Tensor h, Tensor c, Tensor saved, Tensor stats, Tensor w_hh, Tensor gain, Tensor? bias, "
    "Tensor? c_gain, Tensor? c_bias, Tensor? h0, Tensor? c0, bool reverse, Tensor? control, "
    "Tensor? rows, Tensor? h_mask) -> (Tensor dgx, Tensor dw_hh, Tensor dgain, Tensor dbias, "
    "Tensor dc_gain, Tensor dc_bias, Tensor dh0, Tensor dc0)";

// Defines those that every device has in a library of torch's.
template <class Library>
void define_ops(Library& library) {
  library.def(kLayerSchema);
  library.def(kLayerBackwardSchema);
  library.def(kBidirectionalSchema);
  library.def(kBidirectionalBackwardSchema);
  library.def(kStepSchema);
  library.def(kStepBackwardSchema);
}

// Of devices that can run layers side by side.
template <class Library>
void define_stack_ops(Library& library) {
  library.def(kStackSchema);
  library.def(kStackBackwardSchema);
}

template <class Library>
void define_norm_ops(Library& library) {
  library.def(kNormLayerSchema);
  library.def(kNormLayerBackwardSchema);
}

}  // namespace fused_rnn
