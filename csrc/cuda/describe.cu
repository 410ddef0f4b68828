#include "cuda/describe.h"

#include <cuda_runtime.h>
#include <stdio.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/accelerator.h>

namespace fused_rnn::cuda {

constexpr int kProbeThreads = 256;  // the persistent kernels' CTA

// Stands for a persistent kernel when clusters are counted; is never launched.
__global__ void __launch_bounds__(kProbeThreads, 1) occupy() {}

namespace {

// A failure is reported once: left behind, it would be found by the next one who looks.
bool failed(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error != cudaSuccess;
}

void check(cudaError_t error, int index) {
  if (failed(error))
    throw std::runtime_error("CUDA does not describe device " + std::to_string(index) + ": " +
                             cudaGetErrorString(error));
}

int64_t attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), index);
  return value;
}

// With so much shared memory a CTA has its SM to itself. What the device refuses is 0.
int64_t active_clusters(int size, int64_t shared_bytes) {
  const auto set = [](cudaFuncAttribute which, int64_t value) {
    return !failed(cudaFuncSetAttribute(occupy, which, int(value)));
  };
  constexpr int kPortable = 8;
  if (!set(cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) return 0;
  if (size > kPortable && !set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) return 0;

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(size);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(unsigned(size));
  launch.blockDim = dim3(kProbeThreads);
  launch.dynamicSmemBytes = size_t(shared_bytes);
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  int count = 0;
  return failed(cudaOccupancyMaxActiveClusters(&count, occupy, &launch)) ? 0 : count;
}

Gpu ask(int index) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), index);
  Gpu gpu;
  snprintf(gpu.name, sizeof gpu.name, "%s", properties.name);
  gpu.capability = 10 * properties.major + properties.minor;
  gpu.sms = properties.multiProcessorCount;
  gpu.shared_per_sm = int64_t(properties.sharedMemPerMultiprocessor);
  gpu.shared_per_block = int64_t(properties.sharedMemPerBlockOptin);
  gpu.registers_per_sm = properties.regsPerMultiprocessor;
  gpu.registers_per_block = properties.regsPerBlock;
  gpu.threads_per_block = properties.maxThreadsPerBlock;
  gpu.l2_bytes = properties.l2CacheSize;

  // The clocks are in kHz, the bus in bits; memory moves twice a clock.
  gpu.clock_ghz = 1e-6 * double(attribute(cudaDevAttrClockRate, index));
  gpu.dram_gb_s = 2e-6 * double(attribute(cudaDevAttrMemoryClockRate, index)) *
                  double(attribute(cudaDevAttrGlobalMemoryBusWidth, index)) / 8;

  gpu.clusters[0] = gpu.sms;
  if (gpu.capability < 90) return gpu;
  // torch's, since setting the device back by CUDA's own call would make a context on one that has
  // none yet.
  const torch::stable::accelerator::DeviceGuard guard(index);
  for (int i = 0; i < kClusterSizes; ++i)
    gpu.clusters[i] = active_clusters(1 << i, gpu.shared_per_block);
  return gpu;
}

}  // namespace

const Gpu& describe(int index) {
  static std::mutex mutex;
  static std::map<int, Gpu> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  return found != known.end() ? found->second : known.emplace(index, ask(index)).first->second;
}

}  // namespace fused_rnn::cuda

int fused_rnn_describe(int index, fused_rnn::Gpu* gpu, char* reason, int size) {
  try {
    *gpu = fused_rnn::cuda::describe(index);
    return 0;
  } catch (const std::exception& error) {
    snprintf(reason, size_t(size), "%s", error.what());
    return 1;
  }
}
