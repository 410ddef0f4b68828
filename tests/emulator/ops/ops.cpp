// The CUDA ops on the emulator, as torch ops for CPU tensors: fused_rnn_emulated::layer and the
// others. So every test of the ops can run the kernels' own source. Products are plain loops with
// sums in double: cuBLAS' rounding is not what is tested.
#include <string.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cuda/device.cuh"
#include "cuda/streams.cuh"
#include "cuda_runtime.h"
#include "emulator.h"
#include "schemas.h"

namespace fused_rnn::cuda {
namespace {

uint64_t seed = 0;
int64_t cluster_launches = 0, grid_launches = 0;
int64_t overlaps = 0;  // chunks that a layer ended while the one before it had more to do

// What the planner is told of the machine: an H200, whose clusters a test may restrict.
Gpu h200() {
  Gpu gpu;
  gpu.capability = 90, gpu.sms = 132;
  gpu.shared_per_sm = 228 * 1024, gpu.shared_per_block = 227 * 1024;
  gpu.registers_per_sm = gpu.registers_per_block = 65536;
  gpu.threads_per_block = 1024;
  gpu.l2_bytes = 50 << 20;
  gpu.clock_ghz = 1.98, gpu.dram_gb_s = 4800;
  return gpu;
}
Gpu emulated = h200();

class EmulatedMachine {
  struct Loan {
    void *outside, *inside;
    size_t bytes;
  };
  std::vector<std::unique_ptr<emulator::Allocation>> memory_;
  std::vector<Loan> written_;
  std::map<std::pair<const void*, size_t>, void*> lent_;
  size_t borrowed_ = 0;  // of memory_, the first ones
  bool tf32_;
  Streams streams_;
  std::vector<cudaStream_t> layers_;  // streams of, between fork and join
  size_t layer_ = 0;

  // As torch's, it is there before and after the call.
  static cudaStream_t torchs_stream() {
    static cudaStream_t stream = nullptr;
    if (!stream) check(cudaStreamCreateWithFlags(&stream, 0), "no stream");
    return stream;
  }
  // On torch's stream, as what made the operands and what reads the results.
  void copy(void* to, const void* from, size_t bytes) {
    streams_.current()->push([=] { memcpy(to, from, bytes); });
  }
  void synchronize() {
    STD_TORCH_CHECK(emulator::synchronize(seed), "emulator: streams wait for each other");
  }

  void* take(const char* name, size_t bytes) {
    memory_.push_back(std::make_unique<emulator::Allocation>(name, bytes));
    return memory_.back()->data();
  }

  template <class... Parameters, class... Args>
  void run(emulator::Launch launch, void (*kernel)(Parameters...), const Args&... args) {
    launch.seed = seed;
    streams_.current()->push([=] {
      const emulator::Report report = emulator::run(launch, kernel, args...);
      STD_TORCH_CHECK(report.ok(), "emulator: ", report.text());
    });
  }

  template <class Argument>
  void launch_blocks(void (*kernel)(Argument), int blocks, int cluster, int threads, int64_t bytes,
                     const Argument& argument) {
    emulator::Launch launch;
    launch.grid = {blocks};
    launch.block = {threads};
    launch.cluster = cluster;
    launch.shared_bytes = size_t(bytes);
    run(launch, kernel, argument);
  }

 public:
  explicit EmulatedMachine(bool tf32 = false) : tf32_(tf32), streams_(0, torchs_stream()) {}
  // After an exception nobody wants the results.
  ~EmulatedMachine() {
    for (const auto& stream : emulator::streams()) stream->work.clear();
  }

  // Puts a copy in place of what `pointer` points at, where the emulator sees every access. What
  // layers share they share there, too.
  template <class P>
  void borrow(const char* name, P*& pointer, int64_t bytes) {
    if (!pointer) return;
    void*& inside = lent_[{pointer, size_t(bytes)}];
    if (inside) {
      pointer = static_cast<P*>(inside);
      return;
    }
    inside = take(name, size_t(bytes));
    borrowed_ = memory_.size();
    if constexpr (std::is_const_v<P>)
      copy(inside, pointer, size_t(bytes));
    else
      written_.push_back({pointer, inside, size_t(bytes)});
    pointer = static_cast<P*>(inside);
  }
  void give_back() {
    for (const Loan& loan : written_) copy(loan.outside, loan.inside, loan.bytes);
    synchronize();
  }

  template <class T>
  T* memory(int64_t count) {
    streams_.catch_up();
    return static_cast<T*>(take("memory", size_t(count) * sizeof(T)));
  }

  void forget() {
    if (streams_.forked()) return;
    // Torch may use it again for what comes next on its stream.
    auto freed = std::make_shared<decltype(memory_)>();
    std::move(memory_.begin() + ptrdiff_t(borrowed_), memory_.end(), std::back_inserter(*freed));
    memory_.resize(borrowed_);
    streams_.current()->push([freed] { freed->clear(); });
  }

  void fork(int layers) { streams_.fork(layers); }
  void on(int layer) {
    streams_.on(layer);
    layer_ = size_t(layer);
    if (layers_.size() == layer_) layers_.push_back(streams_.current());
  }
  void begin(int64_t step) { streams_.begin(step); }
  void end(int64_t step) {
    streams_.end(step);
    if (layer_ > 0)
      streams_.current()->push(
          [before = layers_[layer_ - 1]] { overlaps += !before->work.empty(); });
  }
  void join() {
    streams_.join();
    layers_.clear();
    layer_ = 0;
    forget();
  }

  template <class... Parameters, class... Args>
  void launch(void (*kernel)(Parameters...), int64_t units, int64_t rows, const Args&... args) {
    if (units == 0 || rows == 0) return;
    constexpr int64_t kMostRows = 3;  // of a grid in y: so that threads have several
    emulator::Launch launch;
    launch.grid = {int((units + kThreads - 1) / kThreads),
                   int(rows < kMostRows ? rows : kMostRows)};
    launch.block = {kThreads};
    run(launch, kernel, args...);
  }

  const Gpu& gpu() const { return emulated; }

  template <class Argument>
  void launch_clusters(void (*kernel)(Argument), int team, int64_t clusters, int threads,
                       int64_t bytes, const Argument& argument) {
    ++cluster_launches;
    launch_blocks(kernel, int(team * clusters), team, threads, bytes, argument);
  }
  template <class Argument>
  void launch_together(void (*kernel)(Argument), int blocks, int threads, int64_t bytes,
                       const Argument& argument) {
    ++grid_launches;
    launch_blocks(kernel, blocks, 1, threads, bytes, argument);
  }
  void clear(void* memory, int64_t bytes) {
    streams_.current()->push([=] { memset(memory, 0, size_t(bytes)); });
  }

  template <class T, class Out>
  void multiply(Sizes s, const T* a, const T* b, Out* out) {
    streams_.current()->push([=, tf32 = tf32_] { multiply_now(s, a, b, out, tf32); });
  }

 private:
  template <class T, class Out>
  static void multiply_now(Sizes s, const T* a, const T* b, Out* out, bool tf32) {
    const auto value = [tf32](auto x) {
      if constexpr (sizeof(x) == 2)
        return double(to_float(x));
      else if constexpr (sizeof(x) == 4)
        return double(tf32 ? std::bit_cast<float>(to_tf32(x)) : x);
      else
        return double(x);
    };
    // As cuBLAS does it, from what cuBLAS is given.
    const ColumnMajor c(s);
    const auto entry = [&](const T* matrix, int64_t stride, bool transposed, int64_t i, int64_t j) {
      return value(matrix[transposed ? j + i * stride : i + j * stride]);
    };
    for (int64_t i = 0; i < c.m; ++i)
      for (int64_t j = 0; j < c.n; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < c.k; ++k)
          sum += entry(b, c.first_stride, c.first_transposed, i, k) *
                 entry(a, c.second_stride, c.second_transposed, k, j);
        Out& to = out[i + j * c.out_stride];
        if constexpr (sizeof(Out) == 2)
          to = from_float<Out>(float(sum));
        else
          to = Out(sum);
      }
  }
};

struct Bytes {
  int64_t io, carry;
  explicit Bytes(const Tensor& like) : io(int64_t(like.element_size())), carry(io == 8 ? 8 : 4) {}
};

void borrow(EmulatedMachine& machine, Layer& a, Bytes bytes) {
  const int64_t gates = kCellShapes[a.cell].gates * a.H;
  machine.borrow("x", a.x, a.M * a.I * bytes.io);
  machine.borrow("what dropout leaves of x", a.dropped, a.M * a.I * bytes.io);
  machine.borrow("passed", a.passed, a.M * a.I);
  machine.borrow("w_ih", a.w_ih, gates * a.I * bytes.io);
  machine.borrow("w_hh", a.w_hh, gates * a.R * bytes.io);
  machine.borrow("w_hr", a.w_hr, a.R * a.H * bytes.io);
  machine.borrow("control", a.control, a.T * a.N);
  machine.borrow("rows", a.rows, a.T * a.N * 4);
  machine.borrow("h_mask", a.h_mask, a.N * a.R * bytes.io);
  const int64_t states = a.R + (kCellShapes[a.cell].states - 1) * a.H;
  machine.borrow("keep", a.keep, a.T * a.N * states);
  machine.borrow("keep_share", a.keep_share, states * bytes.carry);
}

void borrow(EmulatedMachine& machine, ForwardArgs& a, Bytes bytes) {
  const int64_t gates = kCellShapes[a.cell].gates * a.H;
  borrow(machine, static_cast<Layer&>(a), bytes);
  machine.borrow("b_ih", a.b_ih, gates * bytes.io);
  machine.borrow("b_hh", a.b_hh, gates * bytes.io);
  machine.borrow("h0", a.h0, a.N * a.R * bytes.carry);
  machine.borrow("c0", a.c0, a.N * a.H * bytes.carry);
  machine.borrow("h", a.h, a.M * a.R * bytes.io);
  machine.borrow("c", a.c, a.M * a.H * bytes.io);
  machine.borrow("h_n", a.h_n, a.N * a.R * bytes.carry);
  machine.borrow("c_n", a.c_n, a.N * a.H * bytes.carry);
  machine.borrow("saved", a.saved, a.M * kCellShapes[a.cell].saved * a.H * bytes.io);
}

void borrow(EmulatedMachine& machine, BackwardArgs& a, Bytes bytes) {
  const int64_t gates = kCellShapes[a.cell].gates * a.H;
  borrow(machine, static_cast<Layer&>(a), bytes);
  machine.borrow("dh", a.dh, a.M * a.R * bytes.io);
  machine.borrow("dc", a.dc, a.M * a.H * bytes.io);
  machine.borrow("dh_n", a.dh_n, a.N * a.R * bytes.carry);
  machine.borrow("dc_n", a.dc_n, a.N * a.H * bytes.carry);
  machine.borrow("h", a.h, a.M * a.R * bytes.io);
  machine.borrow("c", a.c, a.M * a.H * bytes.io);
  machine.borrow("saved", a.saved, a.M * kCellShapes[a.cell].saved * a.H * bytes.io);
  machine.borrow("h0", a.h0, a.N * a.R * bytes.io);
  machine.borrow("c0", a.c0, a.N * a.H * bytes.io);
  machine.borrow("dh0", a.dh0, a.N * a.R * bytes.carry);
  machine.borrow("dc0", a.dc0, a.N * a.H * bytes.carry);
  machine.borrow("dx", a.dx, a.M * a.I * bytes.io);
  machine.borrow("dw_ih", a.dw_ih, gates * a.I * bytes.io);
  machine.borrow("db_ih", a.db_ih, gates * bytes.io);
  machine.borrow("dw_hh", a.dw_hh, gates * a.R * bytes.io);
  machine.borrow("db_hh", a.db_hh, gates * bytes.io);
  machine.borrow("dw_hr", a.dw_hr, a.R * a.H * bytes.io);
}

// run(the directions, in the emulator's memory, cell, scalar, machine).
template <class Args, class Run>
void on_emulator(Directions<Args> directions, const Tensor& like, Run run) {
  std::vector<Args> all(directions.begin(), directions.end());
  EmulatedMachine machine(all[0].tf32);
  for (Args& a : all) borrow(machine, a, Bytes(like));
  const Directions<Args> inside(all.data(), directions.count);
  dispatch(all[0].cell, like.scalar_type(),
           [&](auto cell, auto scalar) { run(inside, cell, scalar, machine); });
  machine.give_back();
}

void forward(Directions<ForwardArgs> directions, const Tensor& like) {
  on_emulator(directions, like, [](auto inside, auto cell, auto scalar, auto& machine) {
    run_all(run_forward<decltype(cell), decltype(scalar)>(inside, machine));
  });
}

void backward(Directions<BackwardArgs> directions, const Tensor& like) {
  on_emulator(directions, like, [](auto inside, auto cell, auto scalar, auto& machine) {
    run_all(run_backward<decltype(cell), decltype(scalar)>(inside, machine));
  });
}

// run(layers in the emulator's memory, cell, scalar, machine).
template <class Args, class Run>
void stack_on_emulator(Stack<Args> stack, const Tensor& like, Run run) {
  std::vector<Args> all(stack.first, stack.first + stack.count);
  EmulatedMachine machine(all[0].tf32);
  for (Args& a : all) borrow(machine, a, Bytes(like));
  dispatch(all[0].cell, like.scalar_type(), [&](auto cell, auto scalar) {
    each_layer(Stack<Args>{all.data(), stack.count, stack.side_by_side}, machine,
               [&](Directions<Args> layer) { return run(layer, cell, scalar, machine); });
  });
  machine.give_back();
}

void forward_stack(Stack<ForwardArgs> stack, const Tensor& like) {
  stack_on_emulator(stack, like, [](auto layer, auto cell, auto scalar, auto& machine) {
    return run_forward<decltype(cell), decltype(scalar)>(layer, machine);
  });
}

void backward_stack(Stack<BackwardArgs> stack, const Tensor& like) {
  stack_on_emulator(stack, like, [](auto layer, auto cell, auto scalar, auto& machine) {
    return run_backward<decltype(cell), decltype(scalar)>(layer, machine);
  });
}

template <bool kBackward>
void step(const StepArgs& args, const Tensor& like) {
  StepArgs a = args;
  EmulatedMachine machine;
  const CellShape& shape = kCellShapes[a.cell];
  const int64_t states = a.N * a.H * Bytes(like).io, gates = states * shape.gates;
  machine.borrow("h", a.h, states);
  machine.borrow("c", a.c, states);
  machine.borrow("gx", a.gx, gates);
  machine.borrow("gh", a.gh, gates);
  machine.borrow("dh1", a.dh1, states);
  machine.borrow("dc1", a.dc1, states);
  // What forward writes backward reads.
  const auto kept = [&](const char* name, void*& pointer, int64_t bytes) {
    if constexpr (kBackward) {
      const void* read = pointer;
      machine.borrow(name, read, bytes);
      pointer = const_cast<void*>(read);
    } else {
      machine.borrow(name, pointer, bytes);
    }
  };
  kept("h1", a.h1, states);
  kept("c1", a.c1, states);
  kept("saved", a.saved, states * shape.saved);
  machine.borrow("dgx", a.dgx, gates);
  machine.borrow("dgh", a.dgh, gates);
  machine.borrow("dh", a.dh, states);
  machine.borrow("dc", a.dc, states);
  dispatch(a.cell, like.scalar_type(), [&](auto cell, auto scalar) {
    machine.launch(one_step<decltype(cell), decltype(scalar), kBackward>, a.H, a.N, a);
  });
  machine.give_back();
}

constexpr Device kEmulated = {in_turn<ForwardArgs, forward>,
                              in_turn<BackwardArgs, backward>,
                              step<false>,
                              step<true>,
                              std::size(kAlgorithms),
                              forward_stack,
                              backward_stack};

}  // namespace
}  // namespace fused_rnn::cuda

extern "C" __attribute__((visibility("default"))) void fused_rnn_emulator_seed(uint64_t value) {
  fused_rnn::cuda::seed = value;
}

// Launches of clusters since the last time somebody asked.
extern "C" __attribute__((visibility("default"))) int64_t fused_rnn_emulator_cluster_launches() {
  return std::exchange(fused_rnn::cuda::cluster_launches, 0);
}

// The same of launches whose blocks all run together.
extern "C" __attribute__((visibility("default"))) int64_t fused_rnn_emulator_grid_launches() {
  return std::exchange(fused_rnn::cuda::grid_launches, 0);
}

// How many blocks run together.
extern "C" __attribute__((visibility("default"))) void fused_rnn_emulator_sms(int64_t count) {
  fused_rnn::cuda::emulated.sms = count;
}

// How many clusters of 1, 2, 4, 8 and 16 blocks fit.
extern "C" __attribute__((visibility("default"))) void fused_rnn_emulator_clusters(
    const int64_t* active) {
  for (int i = 0; i < fused_rnn::kClusterSizes; ++i)
    fused_rnn::cuda::emulated.clusters[i] = active[i];
}

// Chunks that layers of a stack ended beside the layers before them, since the last time.
extern "C" __attribute__((visibility("default"))) int64_t fused_rnn_emulator_overlaps() {
  return std::exchange(fused_rnn::cuda::overlaps, 0);
}

// How many streams there are, and whether graphs are being captured of them.
extern "C" __attribute__((visibility("default"))) int64_t fused_rnn_emulator_streams(int captures) {
  for (const auto& stream : fused_rnn::emulator::streams()) stream->captures = captures;
  return int64_t(fused_rnn::emulator::streams().size());
}

STABLE_TORCH_LIBRARY(fused_rnn_emulated, library) {
  fused_rnn::define_ops(library);
  fused_rnn::define_stack_ops(library);
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_emulated, CPU, library) {
  fused_rnn::implement_ops<fused_rnn::cuda::kEmulated>(library);
  fused_rnn::implement_stack_ops<fused_rnn::cuda::kEmulated>(library);
}
