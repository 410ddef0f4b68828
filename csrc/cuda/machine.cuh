// The machine of a GPU: torch's memory and stream, and cuBLAS on torch's own handle, whose stream
// and workspace torch has set. Nothing here waits for the device.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <limits>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/describe.h"
#include "cuda/layer.cuh"
#include "cuda/streams.cuh"
#include "ops.h"

namespace fused_rnn::cuda {

// cuBLAS' C interface, as far as it is used. The library comes with torch; its headers need not
// be there to build.
namespace cublas {
enum Operation : int { kPlain = 0, kTransposed = 1 };
enum Type : int { kFloat = 0, kDouble = 1, kHalf = 2, kBFloat16 = 14 };
enum Compute : int { kCompute32 = 68, kCompute64 = 70 };
// Sums are never rounded to a half type on the way, also where parts of K are summed apart.
enum Math : int { kFullSums = 16, kTf32 = 3 };
constexpr int kDefaultAlgorithm = -1;
using Gemm = int (*)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
                     const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
                     const void* beta, void* c, int c_type, int ldc, int compute, int algorithm);

using SetMathMode = int (*)(void* handle, int mode);
using SetStream = int (*)(void* handle, cudaStream_t stream);
using SetWorkspace = int (*)(void* handle, void* workspace, size_t bytes);

// Found through libtorch, which this library needs and which brings cuBLAS.
template <class Function>
Function find(const char* name) {
  const auto function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  STD_TORCH_CHECK(function, "fused_rnn: this torch comes without cuBLAS (", name,
                  " was not found)");
  return function;
}

template <class T>
constexpr Type type_of() {
  if (sizeof(T) == 8) return kDouble;
  if (sizeof(T) == 4) return kFloat;
  return std::is_same_v<T, bf16> ? kBFloat16 : kHalf;
}
}  // namespace cublas

class CudaMachine {
  const Tensor& like_;
  const bool tf32_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* blas_ = nullptr;
  std::vector<Tensor> memory_;     // torch frees it in the order of its stream
  std::vector<void*> workspaces_;  // cuBLAS', of each layer between fork and join
  Streams streams_;                // gone before memory is

  static cudaStream_t torchs_stream(int device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  // As torch's own, unless CUBLAS_WORKSPACE_CONFIG says otherwise.
  size_t workspace_bytes() const {
    return gpu().capability >= 90 ? size_t(32) << 20 : 2 * (size_t(4096) << 10) + 8 * (16 << 10);
  }
  int set_blas_stream(cudaStream_t stream) {
    static const auto set_stream = cublas::find<cublas::SetStream>("cublasSetStream_v2");
    return set_stream(handle(), stream);
  }

 public:
  CudaMachine(const Tensor& like, bool tf32)
      : like_(like),
        tf32_(tf32),
        guard_(like.get_device_index()),
        streams_(like.get_device_index(), torchs_stream(like.get_device_index())) {}
  ~CudaMachine() {  // after an exception
    if (streams_.forked() && blas_) (void)set_blas_stream(streams_.torchs());
  }

  void fork(int layers) {
    for (int i = 0; i < layers; ++i)
      workspaces_.push_back(memory<char>(int64_t(workspace_bytes())));
    streams_.fork(layers);
  }
  // Products at the same time need a workspace each.
  void on(int layer) {
    static const auto set_workspace = cublas::find<cublas::SetWorkspace>("cublasSetWorkspace_v2");
    streams_.on(layer);
    int status = set_blas_stream(streams_.current());
    if (!status) status = set_workspace(handle(), workspaces_[size_t(layer)], workspace_bytes());
    STD_TORCH_CHECK(status == 0, "fused_rnn: cuBLAS answered ", status, " to another stream");
  }
  void begin(int64_t step) { streams_.begin(step); }
  void end(int64_t step) { streams_.end(step); }
  // cuBLAS goes back to torch's stream, and so to a workspace of its own; torch sets its own
  // whenever it takes the handle.
  void join() {
    streams_.join();
    const int status = set_blas_stream(streams_.torchs());
    STD_TORCH_CHECK(status == 0, "fused_rnn: cuBLAS answered ", status, " to torch's stream");
    workspaces_.clear();
    forget();
  }

  template <class T>
  T* memory(int64_t count) {
    memory_.push_back(or_out_of_memory(
        [&] {
          return torch::stable::new_empty(like_, {count * int64_t(sizeof(T))}, ScalarType::Byte);
        },
        [] { return "what a loop needs beside its results"; }));
    streams_.catch_up();
    return static_cast<T*>(memory_.back().mutable_data_ptr());
  }

  // What memory() has given so far is no longer used.
  void forget() {
    if (!streams_.forked()) memory_.clear();
  }

  template <class Kernel, class... Args>
  void launch(Kernel* kernel, int64_t units, int64_t rows, const Args&... args) {
    if (units == 0 || rows == 0) return;
    constexpr int64_t kMostRows = 65535;  // of a grid in y
    const dim3 grid(unsigned((units + kThreads - 1) / kThreads),
                    unsigned(rows < kMostRows ? rows : kMostRows));
    kernel<<<grid, kThreads, 0, streams_.current()>>>(args...);
    check(cudaGetLastError(), "a kernel was not launched");
  }

  const Gpu& gpu() const { return describe(like_.get_device_index()); }

  // `clusters` of `team` blocks each.
  template <class Argument>
  void launch_clusters(void (*kernel)(Argument), int team, int64_t clusters, int threads,
                       int64_t bytes, const Argument& argument) {
    constexpr int kPortable = 8;
    const auto set = [&](cudaFuncAttribute which, int64_t value) {
      check(cudaFuncSetAttribute(kernel, which, int(value)), "a kernel's shared memory");
    };
    // The most there is: another thread may launch the same kernel with another size.
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, gpu().shared_per_block);
    if (team > kPortable) set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(team);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(unsigned(team * clusters));
    launch.blockDim = dim3(unsigned(threads));
    launch.dynamicSmemBytes = size_t(bytes);
    launch.stream = streams_.current();
    launch.attrs = &cluster;
    launch.numAttrs = team > 1;  // before sm_90 there are no clusters
    check(cudaLaunchKernelEx(&launch, kernel, argument), "a kernel was not launched");
  }

  void clear(void* memory, int64_t bytes) {
    check(cudaMemsetAsync(memory, 0, size_t(bytes), streams_.current()), "memory not cleared");
  }

  // Blocks that wait for each other: all run at the same time, or CUDA refuses.
  template <class Argument>
  void launch_together(void (*kernel)(Argument), int blocks, int threads, int64_t bytes,
                       const Argument& argument) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(gpu().shared_per_block)),
          "a kernel's shared memory");
    cudaLaunchAttribute together{};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(unsigned(blocks));
    launch.blockDim = dim3(unsigned(threads));
    launch.dynamicSmemBytes = size_t(bytes);
    launch.stream = streams_.current();
    launch.attrs = &together;
    launch.numAttrs = 1;
    check(cudaLaunchKernelEx(&launch, kernel, argument), "a kernel was not launched");
  }

  template <class T, class Out>
  void multiply(Sizes s, const T* a, const T* b, Out* out) {
    if (s.m == 0 || s.n == 0) return;
    constexpr int64_t kMost = std::numeric_limits<int>::max();
    STD_TORCH_CHECK(s.m <= kMost && s.n <= kMost && s.k <= kMost, "fused_rnn: a product of sizes ",
                    s.m, ", ", s.n, ", ", s.k, " is beyond cuBLAS; make T or N smaller");
    if (s.k == 0)  // cuBLAS may leave the result as it was
      return clear(out, s.m * s.n * int64_t(sizeof(Out)));
    using A = arithmetic_t<T>;
    const A one = 1, zero = 0;
    const ColumnMajor c(s);
    const auto operation = [](bool transposed) {
      return transposed ? cublas::kTransposed : cublas::kPlain;
    };
    static const auto gemm = cublas::find<cublas::Gemm>("cublasGemmEx");
    const int status = gemm(
        handle(), operation(c.first_transposed), operation(c.second_transposed), int(c.m), int(c.n),
        int(c.k), &one, b, cublas::type_of<T>(), int(c.first_stride), a, cublas::type_of<T>(),
        int(c.second_stride), &zero, out, cublas::type_of<Out>(), int(c.out_stride),
        sizeof(T) == 8 ? cublas::kCompute64 : cublas::kCompute32, cublas::kDefaultAlgorithm);
    STD_TORCH_CHECK(status == 0, "fused_rnn: cuBLAS answered ", status, " to a product of sizes ",
                    s.m, ", ", s.n, ", ", s.k);
  }

 private:
  // With the products' arithmetic set: torch sets its own whenever it takes the handle.
  void* handle() {
    if (blas_) return blas_;
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&blas_));
    static const auto set_math = cublas::find<cublas::SetMathMode>("cublasSetMathMode");
    const int status = set_math(blas_, cublas::kFullSums | (tf32_ ? cublas::kTf32 : 0));
    STD_TORCH_CHECK(status == 0, "fused_rnn: cuBLAS answered ", status, " to cublasSetMathMode");
    return blas_;
  }
};

}  // namespace fused_rnn::cuda
