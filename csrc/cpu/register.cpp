// The CPU implementation of the ops: picks the instruction set, splits the batch over threads.
#include <stdlib.h>
#include <string.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../ops.h"
#include "isa.h"
#include "kernels.h"

#define FUSED_RNN_DECLARE_ISA(isa)                \
  namespace fused_rnn_##isa {                     \
    const fused_rnn::Kernels& kernels_float();    \
    const fused_rnn::Kernels& kernels_double();   \
    const fused_rnn::Kernels& kernels_bfloat16(); \
    const fused_rnn::Kernels& kernels_half();     \
  }

FUSED_RNN_DECLARE_ISA(baseline)
FUSED_RNN_DECLARE_ISA(avx2)
FUSED_RNN_DECLARE_ISA(avx512)

namespace fused_rnn {
namespace {

Scalar scalar_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return kDouble;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kHalf;
    default: return kFloat;
  }
}

#define FUSED_RNN_KERNELS(isa)                                      \
  {fused_rnn_##isa::kernels_float, fused_rnn_##isa::kernels_double, \
   fused_rnn_##isa::kernels_bfloat16, fused_rnn_##isa::kernels_half}

const Kernels& (*const kKernels[][kScalarCount])() = {
#ifdef FUSED_RNN_HAS_AVX512
    FUSED_RNN_KERNELS(avx512),
#endif
#ifdef FUSED_RNN_HAS_AVX2
    FUSED_RNN_KERNELS(avx2),
#endif
    FUSED_RNN_KERNELS(baseline),
};

const Kernels& best_kernels(Scalar scalar) { return kKernels[&best_isa() - kIsas][scalar](); }

// Below this much arithmetic a second thread costs more than it brings: waking one takes 5-10 us.
constexpr double kFlopsPerThread = 1e6;

int64_t thread_count(const Layer& layer) {
  const double flops = 2.0 * double(layer.T) * double(layer.N) * double(layer.R) * double(layer.H) *
                       double(kCellShapes[layer.cell].gates);
  int64_t threads = torch::stable::get_num_threads();
  if (threads > layer.N) threads = layer.N;
  if (double(threads) > 1 + flops / kFlopsPerThread) threads = 1 + int64_t(flops / kFlopsPerThread);
  return threads;
}

// Neighbouring rows share cache lines, so a thread takes a run of them; but where rows end at
// different times, as in packed input sorted by length, dealing them out evens the work.
Share share_of(const Layer& layer, int64_t thread, int64_t threads) {
  if (layer.control || layer.rows)
    return {thread, threads, (layer.N - thread + threads - 1) / threads};
  const int64_t first = thread * layer.N / threads;
  return {first, 1, (thread + 1) * layer.N / threads - first};
}

struct Memory {
  char* data = nullptr;
  explicit Memory(size_t bytes) {
    if (bytes == 0) return;
    data = static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
    STD_TORCH_CHECK(data, "fused_rnn: out of memory, ", bytes, " bytes of workspace");
  }
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

template <class Args>
void run(const Loop<Args>& loop, const Args& args) {
  const int64_t threads = thread_count(args);
  // The first share is a largest one or one row short of it.
  const size_t per_thread = loop.scratch_bytes(args, {0, 1, (args.N + threads - 1) / threads}) + 64;
  const size_t weight_bytes = (loop.weight_bytes(args) + 63) / 64 * 64;
  const Memory memory(weight_bytes + size_t(threads) * ((per_thread + 63) / 64 * 64));
  char* scratch = memory.data + weight_bytes;
  loop.pack(args, memory.data);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      loop.run(args, share_of(args, thread, threads), memory.data,
               scratch + size_t(thread) * ((per_thread + 63) / 64 * 64));
  });
}

void forward(const ForwardArgs& args, ScalarType io) {
  run(best_kernels(scalar_of(io)).forward[args.cell], args);
}
void backward(const BackwardArgs& args, ScalarType io) {
  run(best_kernels(scalar_of(io)).backward[args.cell], args);
}

void run_rows(StepFunction step, const StepArgs& args) {
  // A unit takes some 10 ns of arithmetic; a thread is worth waking for 50 us of it.
  const int64_t rows_per_thread = 1 + 5000 / (args.H ? args.H : 1);
  torch::stable::parallel_for(0, args.N, rows_per_thread,
                              [&](int64_t begin, int64_t end) { step(args, begin, end); });
}

void step(const StepArgs& args, ScalarType io) {
  run_rows(best_kernels(scalar_of(io)).step[args.cell], args);
}
void step_backward(const StepArgs& args, ScalarType io) {
  run_rows(best_kernels(scalar_of(io)).step_backward[args.cell], args);
}

constexpr Device kCpu = {forward, backward, step, step_backward};

ForwardResult layer_op(int64_t cell, Tensor gx, Tensor w_hh, OptionalTensor b_hh, OptionalTensor h0,
                       OptionalTensor c0, bool reverse, bool save, OptionalTensor control,
                       OptionalTensor rows, OptionalTensor w_hr, OptionalTensor h_mask,
                       OptionalTensor keep) {
  return run_layer(kCpu, cell, gx, w_hh, b_hh, h0, c0, reverse,
                   save ? Save::kInNewMemory : Save::kNothing, {control, rows, w_hr, h_mask, keep});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_in_place_op(
    int64_t cell, Tensor gx, Tensor w_hh, OptionalTensor b_hh, OptionalTensor h0, OptionalTensor c0,
    bool reverse, OptionalTensor control, OptionalTensor rows, OptionalTensor w_hr,
    OptionalTensor h_mask, OptionalTensor keep) {
  auto [h, c, h_n, c_n, saved] = run_layer(kCpu, cell, gx, w_hh, b_hh, h0, c0, reverse,
                                           Save::kInPlaceOfGx, {control, rows, w_hr, h_mask, keep});
  return {h, c, h_n, c_n};
}

BackwardResult layer_backward_op(int64_t cell, OptionalTensor dh, OptionalTensor dc,
                                 OptionalTensor dh_n, OptionalTensor dc_n, Tensor h, Tensor c,
                                 Tensor saved, Tensor w_hh, OptionalTensor h0, OptionalTensor c0,
                                 bool reverse, OptionalTensor control, OptionalTensor rows,
                                 OptionalTensor w_hr, OptionalTensor h_mask, OptionalTensor keep) {
  return run_layer_backward(kCpu, cell, {dh, dc, dh_n, dc_n}, {h, c, saved, w_hh, h0, c0}, reverse,
                            {control, rows, w_hr, h_mask, keep});
}

StepResult step_op(int64_t cell, Tensor gx, Tensor gh, Tensor h, OptionalTensor c, bool save) {
  return run_step(kCpu, cell, gx, gh, h, c, save);
}

StepBackwardResult step_backward_op(int64_t cell, OptionalTensor dh1, OptionalTensor dc1, Tensor h1,
                                    Tensor c1, Tensor saved, Tensor h, OptionalTensor c) {
  return run_step_backward(kCpu, cell, {dh1, dc1, std::nullopt, std::nullopt},
                           {h1, c1, saved, std::nullopt, h, c});
}

}  // namespace
}  // namespace fused_rnn

void fused_rnn_cell(int cell, int scalar, int64_t N, int64_t I, int64_t H, const void* x,
                    const void* h, const void* c, const void* w_ih, const void* w_hh,
                    const void* b_ih, const void* b_hh, void* h1, void* c1) {
  fused_rnn::best_kernels(fused_rnn::Scalar(scalar))
      .cell[cell]({N, I, H, x, h, c, w_ih, w_hh, b_ih, b_hh, h1, c1});
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, library) {
  library.impl("layer", TORCH_BOX(&fused_rnn::layer_op));
  library.impl("layer_", TORCH_BOX(&fused_rnn::layer_in_place_op));
  library.impl("layer_backward", TORCH_BOX(&fused_rnn::layer_backward_op));
  library.impl("step", TORCH_BOX(&fused_rnn::step_op));
  library.impl("step_backward", TORCH_BOX(&fused_rnn::step_backward_op));
}
