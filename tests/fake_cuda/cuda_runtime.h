// A CUDA run time without a GPU, as far as csrc/cuda/describe.cu asks it: three devices that are
// made up, and a count of what was asked. tests/test_describe.py compiles the source against it.
#pragma once

#include <stddef.h>
#include <string.h>

#define __global__
#define __launch_bounds__(threads, blocks)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr {
  cudaDevAttrClockRate,
  cudaDevAttrMemoryClockRate,
  cudaDevAttrGlobalMemoryBusWidth
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeClusterDimension };

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t sharedMemPerMultiprocessor, sharedMemPerBlockOptin;
  int regsPerMultiprocessor, regsPerBlock, maxThreadsPerBlock, l2CacheSize;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// Each number is another one, so that no two fields can be taken for each other.
struct FakeDevice {
  cudaDeviceProp properties;
  int clock_khz, memory_khz, bus_bits;
  int largest_cluster, processors_of_part;  // a cluster does not leave its part
};
inline const FakeDevice kFakeDevices[] = {
    {{"Ampere", 8, 6, 21, 102400, 101376, 65536, 65535, 1024, 4 << 20},
     1500000,
     7001000,
     192,
     0,
     0},
    {{"Hopper", 9, 0, 66, 233472, 232448, 65536, 65535, 1024, 50 << 20},
     1980000,
     2619000,
     5120,
     16,
     22},
    {{"Small", 12, 0, 20, 102400, 101376, 65536, 65535, 1024, 5 << 20}, 2100000, 0, 128, 8, 10},
};
inline struct {
  int device = 0;  // the current one
  cudaError_t last_error = cudaSuccess;
  int described = 0;  // how often properties were asked for
  int shared_bytes = 0;
  bool beyond_portable = false;
} fake;

inline cudaError_t fake_answer(bool valid, cudaError_t otherwise = cudaErrorInvalidValue) {
  if (!valid) fake.last_error = otherwise;
  return valid ? cudaSuccess : otherwise;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = fake.last_error;
  fake.last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  ++fake.described;
  if (index < 0 || index >= 3) return fake_answer(false, cudaErrorInvalidDevice);
  *properties = kFakeDevices[index].properties;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int index) {
  const FakeDevice& device = kFakeDevices[index];
  *value = which == cudaDevAttrClockRate         ? device.clock_khz
           : which == cudaDevAttrMemoryClockRate ? device.memory_khz
                                                 : device.bus_bits;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute which, int value) {
  const FakeDevice& device = kFakeDevices[fake.device];
  if (which == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    fake.beyond_portable = value;
    return fake_answer(device.largest_cluster > 8);
  }
  fake.shared_bytes = value;
  return fake_answer(size_t(value) <= device.properties.sharedMemPerBlockOptin);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel*, const cudaLaunchConfig_t* launch) {
  const FakeDevice& device = kFakeDevices[fake.device];
  const size_t most = device.properties.sharedMemPerBlockOptin;
  const auto& cluster = *launch->attrs;
  const int size = int(cluster.val.clusterDim.x);
  *count = -1;  // nothing that could be used
  if (launch->numAttrs != 1 || cluster.id != cudaLaunchAttributeClusterDimension ||
      cluster.val.clusterDim.y != 1 || cluster.val.clusterDim.z != 1 ||
      launch->gridDim.x % cluster.val.clusterDim.x || launch->blockDim.x != 256 ||
      launch->dynamicSmemBytes != most || size_t(fake.shared_bytes) != most ||
      size > device.largest_cluster || (size > 8 && !fake.beyond_portable))
    return fake_answer(false);
  const int processors = device.properties.multiProcessorCount, part = device.processors_of_part;
  *count = processors / part * (part / size);
  return cudaSuccess;
}

// For the test.
#define FAKE_EXPORT extern "C" inline __attribute__((used, visibility("default")))
FAKE_EXPORT int fake_described() { return fake.described; }
FAKE_EXPORT int fake_last_error() { return fake.last_error; }
FAKE_EXPORT int fake_device() { return fake.device; }
