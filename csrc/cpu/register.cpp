// The CPU implementation of the ops: picks the instruction set, splits the batch over threads.
#include <stdlib.h>
#include <string.h>

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../norm_ops.h"
#include "../ops.h"
#include "../schemas.h"
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

// A call of so much arithmetic forward, some 0.1 ms, has one thread, of twice as much two: waking
// another takes 5-10 us for each section, and up to 100 where it sleeps.
constexpr double kFlopsPerThread = 8e6;

void parallel(int64_t tasks, void (*body)(const void*, int64_t), const void* context) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(context, task);
  });
}

// Of the recurrent product of a step.
double flops_of(const Layer& layer, int64_t gates) {
  return 2.0 * double(layer.N) * double(layer.R) * double(layer.H) * double(gates);
}

// As many threads as so many layers are worth.
int64_t workers_for(const Layer& layer, int64_t gates, int64_t count) {
  const double input = layer.w_ih ? 2.0 * double(layer.N) * double(layer.I * layer.H * gates) : 0;
  const double flops = double(count) * double(layer.T) * (flops_of(layer, gates) + input);
  const double useful = 1 + flops / kFlopsPerThread;
  const int64_t threads = torch::stable::get_num_threads();
  return double(threads) > useful ? int64_t(useful) : threads;
}

// That this thread may use. Where the pool's threads are each bound to one of their own, that is
// one, and there are no teams.
int64_t processors() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::numeric_limits<int64_t>::max();
}

// The most rows of the batch for each thread with which a team was faster than sharing them out;
// and what a step has to have for each member, to be worth a meeting: so much arithmetic, or, as a
// step of few rows takes as long as its weights do to pass, so many weights for each member there
// is (the more there are, the longer a meeting takes). Measured with two.
constexpr int64_t kRowsTogether = 3;
constexpr double kFlopsPerMeeting = 2.5e5, kWeightsPerMeeting = 1e4;

// A pool wakes its threads in some 10 us, and up to 100 if they sleep. To wait as long as the work
// takes, at some 100 GFLOP/s, at most doubles its time.
constexpr double kMostPatience = 1e5, kFlopsPerNs = 100;

// Of a team that shares out the hidden units instead. Threads without a processor would keep the
// others waiting at every step.
int64_t members_of(const Layer& layer, int64_t gates, int64_t workers) {
  const double weights = double(layer.R) * double(layer.H) * double(gates);
  const double worth =
      std::max(flops_of(layer, gates) / kFlopsPerMeeting, std::sqrt(weights / kWeightsPerMeeting));
  if (layer.N > kRowsTogether * workers) return 1;
  return std::min({workers, processors(), worth < 1 ? int64_t(1) : int64_t(worth)});
}

Schedule schedule_of(const Layer& layer, int64_t gates, int64_t workers, int64_t members) {
  const int64_t sum_steps = kSumRows > layer.N ? kSumRows / layer.N : 1;
  // A chunk has one block of a sum for each worker, which should stay in its cache.
  int64_t steps = sum_steps * workers;
  if (steps > layer.T) steps = layer.T;
  const double work = double(layer.T) * flops_of(layer, gates) / kFlopsPerNs;
  return {workers, std::min(workers, layer.N),
          members, int64_t(std::min(work, kMostPatience)),
          steps,   sum_steps,
          parallel};
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

// Where there are layers for all threads, each runs on one of them.
template <class Args>
void run(const Loop<Args>& loop, const Args* layers, int64_t count, const CellShape& cell) {
  const int64_t threads = workers_for(layers[0], cell.gates, count);
  const bool apart = count > 1 && count >= threads;
  const int64_t workers = apart ? 1 : workers_for(layers[0], cell.gates, 1);
  constexpr bool kTeams = std::is_same_v<Args, ForwardArgs> || std::is_same_v<Args, BackwardArgs>;
  const int64_t members = kTeams ? members_of(layers[0], cell.gates, workers) : 1;
  const Schedule schedule = schedule_of(layers[0], cell.gates, workers, members);
  size_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) bytes = std::max(bytes, loop.bytes(layers[i], schedule));
  bytes = (bytes + 63) / 64 * 64;
  const int64_t shares = apart ? threads : 1;
  const Memory memory(bytes * size_t(shares));
  const auto share = [&](int64_t k) {
    for (int64_t i = k * count / shares; i < (k + 1) * count / shares; ++i)
      loop.run(layers[i], schedule, memory.data + bytes * size_t(k));
  };
  using Share = decltype(share);
  if (apart)
    parallel(
        shares, [](const void* run, int64_t k) { (*static_cast<const Share*>(run))(k); }, &share);
  else
    share(0);
}

void forward(Models<ForwardArgs> models, const Tensor& like) {
  const int cell = models.first->cell;
  run(best_kernels(scalar_of(like.scalar_type())).forward[cell], models.first,
      models.count * models.directions, kCellShapes[cell]);
}
void backward(Models<BackwardArgs> models, const Tensor& like) {
  const int cell = models.first->cell;
  run(best_kernels(scalar_of(like.scalar_type())).backward[cell], models.first,
      models.count * models.directions, kCellShapes[cell]);
}
void norm_forward(const NormForwardArgs& args, const Tensor& like) {
  run(best_kernels(scalar_of(like.scalar_type())).norm_forward[args.cell], &args, 1,
      kNormCellShapes[args.cell]);
}
void norm_backward(const NormBackwardArgs& args, const Tensor& like) {
  run(best_kernels(scalar_of(like.scalar_type())).norm_backward[args.cell], &args, 1,
      kNormCellShapes[args.cell]);
}

void run_rows(StepFunction step, const StepArgs& args) {
  // A unit takes some 10 ns of arithmetic; a thread is worth waking for 50 us of it.
  const int64_t rows_per_thread = 1 + 5000 / (args.H ? args.H : 1);
  torch::stable::parallel_for(0, args.N, rows_per_thread,
                              [&](int64_t begin, int64_t end) { step(args, begin, end); });
}

void step(const StepArgs& args, const Tensor& like) {
  run_rows(best_kernels(scalar_of(like.scalar_type())).step[args.cell], args);
}
void step_backward(const StepArgs& args, const Tensor& like) {
  run_rows(best_kernels(scalar_of(like.scalar_type())).step_backward[args.cell], args);
}

constexpr Device kCpu = {forward, backward, step, step_backward, 0};
constexpr NormLoops kCpuNorms = {norm_forward, norm_backward};

}  // namespace
}  // namespace fused_rnn

void fused_rnn_cell(int cell, int scalar, int64_t N, int64_t I, int64_t H, const void* x,
                    const void* h, const void* c, const void* w_ih, const void* w_hh,
                    const void* b_ih, const void* b_hh, void* h1, void* c1) {
  fused_rnn::best_kernels(fused_rnn::Scalar(scalar))
      .cell[cell]({N, I, H, x, h, c, w_ih, w_hh, b_ih, b_hh, h1, c1});
}

STABLE_TORCH_LIBRARY(fused_rnn, library) {
  fused_rnn::define_ops(library);
  fused_rnn::define_stack_ops(library);
  fused_rnn::define_norm_ops(library);
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, library) {
  fused_rnn::implement_ops<fused_rnn::kCpu>(library);
  fused_rnn::implement_norm_ops<fused_rnn::kCpuNorms>(library);
}
