// How long does one block wait for another, and one kernel for the one before? The constants behind
// the CUDA plan (docs/cuda-plan.md).
//
//   nvcc -O3 -std=c++17 -I csrc -gencode arch=compute_90,code=sm_90 \
//       benchmarks/micro/sync_latency.cu -o sync_latency
//
// Prints CSV. A step is one exchange among all blocks of a grid or of a cluster, or one kernel.
// Exchanges are the kernels' own primitives; each row is the median of 7 launches, after one that
// is not counted. What a GPU cannot run is a row with the reason in `note`.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "cuda/primitives.cuh"

namespace fused_rnn {
namespace {

constexpr int kSteps = 2000;
constexpr int kThreads = 256;
constexpr int kLaunches = 7;
// Fewer than the launches that a stream holds before the host has to wait.
constexpr int kKernels = 500;
constexpr int kSlots = 2;

struct alignas(16) Chunk {
  uint32_t word[4];
};

// ---- What runs on the device. The first thread of the first block says how long the loop took.

FUSED_RNN_DEVICE void report(long long start, long long* cycles) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *cycles = clock64() - start;
}

__global__ void grid_sync(long long* cycles) {
  auto grid = cooperative_groups::this_grid();
  grid.sync();
  const long long start = clock64();
  for (int step = 0; step < kSteps; ++step) grid.sync();
  report(start, cycles);
}

// Each block publishes `words` 64-bit words whose upper half is the number of the step, and reads
// all words of all blocks: data that is its own flag. Two slots, since a block writes step s + 2
// only after everyone has published s + 1, and so has read s.
__global__ void l2_words(long long* cycles, uint64_t* slots, int words) {
  const int all = int(gridDim.x) * words;
  const long long start = clock64();
  for (uint32_t step = 1; step <= kSteps; ++step) {
    uint64_t* slot = slots + (step % kSlots) * all;
    for (int k = int(threadIdx.x); k < words; k += int(blockDim.x))
      store_relaxed(slot + blockIdx.x * words + k, uint64_t(step) << 32 | uint32_t(k));
    for (int k = int(threadIdx.x); k < all; k += int(blockDim.x))
      poll_relaxed(slot + k, [=](uint64_t word) { return uint32_t(word >> 32) == step; });
    sync_block();
  }
  report(start, cycles);
}

// One counter that every block adds to and waits for.
__global__ void l2_counter(long long* cycles, uint32_t* counter) {
  const long long start = clock64();
  for (uint32_t step = 1; step <= kSteps; ++step) {
    sync_block();
    if (threadIdx.x == 0) {
      atomic_add_release(counter, 1u);
      poll_acquire(counter, [=](uint32_t count) { return count >= step * gridDim.x; });
    }
    sync_block();
  }
  report(start, cycles);
}

__global__ void cluster_barrier(long long* cycles) {
  cluster_sync();
  const long long start = clock64();
  for (int step = 0; step < kSteps; ++step) cluster_sync();
  report(start, cycles);
}

// Each block stores `payload` bytes into every block of its cluster, itself included, 16 at a time,
// and waits on its own mbarrier until all have come. Two mailboxes, as the slots above.
__global__ void st_async(long long* cycles, int payload) {
  Chunk* boxes = shared_memory<Chunk>();
  __shared__ Mbarrier arrived[kSlots];
  const int size = cluster_size(), rank = cluster_rank();
  const int chunks = payload / int(sizeof(Chunk));
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) mbarrier_init(&arrived[slot], 1);
    fence_mbarrier_init();
  }
  cluster_sync();
  const long long start = clock64();
  for (int step = 0; step < kSteps; ++step) {
    const int slot = step % kSlots;
    Chunk* box = boxes + (slot * size + rank) * chunks;
    if (threadIdx.x == 0) mbarrier_arrive_expect(&arrived[slot], size * payload);
    for (int k = int(threadIdx.x); k < size * chunks; k += int(blockDim.x)) {
      const uint32_t word = uint32_t(step);
      store_async(box + k % chunks, Chunk{{word, word, word, word}}, &arrived[slot], k / chunks);
    }
    mbarrier_wait(&arrived[slot], step / kSlots % 2);
    sync_block();
  }
  report(start, cycles);
  cluster_sync();  // no block leaves while a peer may still store into it
}

__global__ void empty() {}

__global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) continue;
}

// ---- What runs on the host.

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "sync_latency: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

struct Row {
  std::string test;
  int ctas = 0, cluster = 0, threads = kThreads, payload = 0;
};

void print(const Row& row, double ns, double cycles, const std::string& note = "") {
  std::printf("%s,%d,%d,%d,%d,", row.test.c_str(), row.ctas, row.cluster, row.threads, row.payload);
  // A comma would end the column.
  std::string text = note;
  std::replace(text.begin(), text.end(), ',', ';');
  if (ns > 0) std::printf("%.1f", ns);
  std::printf(",");
  if (cycles > 0) std::printf("%.1f", cycles);
  std::printf(",%s\n", text.c_str());
  std::fflush(stdout);
}

template <class T>
T median(std::vector<T> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

class Stopwatch {
  cudaEvent_t start_, stop_;

 public:
  Stopwatch() {
    check(cudaEventCreate(&start_), "an event");
    check(cudaEventCreate(&stop_), "an event");
  }
  void start() { check(cudaEventRecord(start_), "an event"); }
  double stop_ns() {
    float ms = 0;
    check(cudaEventRecord(stop_), "an event");
    check(cudaEventSynchronize(stop_), "waiting for the GPU");
    check(cudaEventElapsedTime(&ms, start_, stop_), "an event");
    return ms * 1e6;
  }
};

struct Gpu {
  cudaDeviceProp properties;
  int clock_khz = 0;
  int alone = 0;  // dynamic shared memory of which only one block fits on a multiprocessor
  long long* cycles = nullptr;
  char* memory = nullptr;
  static constexpr size_t kMemory = 8 << 20;

  Gpu() {
    check(cudaGetDeviceProperties(&properties, 0), "no GPU");
    check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0), "its clock");
    const size_t half = properties.sharedMemPerMultiprocessor / 2 + 1024;
    alone = int(std::min(half, properties.sharedMemPerBlockOptin - 1024));
    check(cudaMalloc(&cycles, sizeof *cycles), "memory");
    check(cudaMalloc(&memory, kMemory), "memory");
  }
  int sms() const { return properties.multiProcessorCount; }
  bool has_clusters() const { return properties.major >= 9; }
};

struct Config {
  cudaLaunchConfig_t launch{};
  cudaLaunchAttribute attribute[2];

  Config(const Row& row, int shared) {
    launch.gridDim = row.ctas;
    launch.blockDim = row.threads;
    launch.dynamicSmemBytes = size_t(shared);
    launch.attrs = attribute;
    auto& only = attribute[launch.numAttrs++];
    if (row.cluster) {
      only.id = cudaLaunchAttributeClusterDimension;
      only.val.clusterDim.x = unsigned(row.cluster);
      only.val.clusterDim.y = only.val.clusterDim.z = 1;
    } else {  // blocks that wait for each other must all be there
      only.id = cudaLaunchAttributeCooperative;
      only.val.cooperative = 1;
    }
  }
  Config(const Config&) = delete;
};

template <class Kernel>
cudaError_t allow(Kernel* kernel, int cluster, int shared) {
  const auto size = cudaFuncAttributeMaxDynamicSharedMemorySize;
  cudaError_t error = cudaFuncSetAttribute(kernel, size, shared);
  if (error == cudaSuccess && cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// The loop of `kernel`, whose first argument is where its cycles go. Memory is zero before each.
template <class Kernel, class... Args>
void time_loop(const Gpu& gpu, const Row& row, Kernel* kernel, Args... args) {
  Stopwatch watch;
  std::vector<double> ns;
  std::vector<long long> cycles;
  for (int launch = -1; launch < kLaunches; ++launch) {
    Config config(row, gpu.alone);
    check(cudaMemset(gpu.memory, 0, Gpu::kMemory), "memory");
    cudaError_t error = allow(kernel, row.cluster, gpu.alone);
    watch.start();
    if (error == cudaSuccess)
      error = cudaLaunchKernelEx(&config.launch, kernel, gpu.cycles, args...);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return print(row, 0, 0, std::string("not launched: ") + cudaGetErrorString(error));
    }
    const double elapsed = watch.stop_ns();
    long long count = 0;
    check(cudaMemcpy(&count, gpu.cycles, sizeof count, cudaMemcpyDeviceToHost), row.test.c_str());
    if (launch < 0) continue;
    ns.push_back(elapsed);
    cycles.push_back(count);
  }
  print(row, median(ns) / kSteps, double(median(cycles)) / kSteps);
}

void time_grids(const Gpu& gpu) {
  auto* words = reinterpret_cast<uint64_t*>(gpu.memory);
  auto* counter = reinterpret_cast<uint32_t*>(gpu.memory);
  for (int ctas : std::set<int>{2, 8, 16, 32, gpu.sms() / 2, gpu.sms()}) {
    if (ctas > gpu.sms()) continue;
    time_loop(gpu, {"grid_sync", ctas}, grid_sync);
    for (int count : {1, 4, 16, 64}) {
      const Row row{"l2_words", ctas, 0, kThreads, count * int(sizeof(uint64_t))};
      time_loop(gpu, row, l2_words, words, count);
    }
    time_loop(gpu, {"l2_counter", ctas, 0, kThreads, 4}, l2_counter, counter);
  }
}

int most_active_clusters(const Gpu& gpu, int size) {
  const Row row{"max_active_clusters", size, size};
  Config config(row, gpu.alone);
  int most = 0;
  cudaError_t error = allow(cluster_barrier, size, gpu.alone);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveClusters(&most, cluster_barrier, &config.launch);
  cudaGetLastError();
  const std::string count = std::to_string(most) + " clusters";
  print(row, 0, 0, error == cudaSuccess ? count : cudaGetErrorString(error));
  return error == cudaSuccess ? most : 0;
}

void time_clusters(const Gpu& gpu) {
  for (int size : {1, 2, 4, 8, 16}) {
    if (!gpu.has_clusters()) {
      print({"max_active_clusters", size, size}, 0, 0, "clusters need sm_90");
      continue;
    }
    const int most = most_active_clusters(gpu, size);
    for (int clusters : std::set<int>{1, (most + 1) / 2, most}) {
      if (size == 1 || clusters < 1 || clusters > most) continue;
      time_loop(gpu, {"cluster_barrier", size * clusters, size}, cluster_barrier);
      for (int payload : {16, 64, 128, 256, 512, 1024, 2048}) {
        const Row row{"st_async", size * clusters, size, kThreads, payload};
        if (kSlots * size * payload <= gpu.alone) time_loop(gpu, row, st_async, payload);
      }
    }
  }
}

// One kernel after the other in a stream, in a graph, and as the host sees it.
void time_launches(const Gpu& gpu, int ctas, int threads) {
  Stopwatch watch;
  std::vector<double> queued, graphed, issued, awaited;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  const auto launch_all = [&](cudaStream_t in) {
    for (int k = 0; k < kKernels; ++k) empty<<<ctas, threads, 0, in>>>();
  };
  const auto host_ns = [](const std::function<void()>& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start)
        .count();
  };
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "a graph");
  launch_all(stream);
  check(cudaStreamEndCapture(stream, &graph), "a graph");
  check(cudaGraphInstantiate(&replay, graph, 0), "a graph");
  for (int launch = -1; launch < kLaunches; ++launch) {
    // While the GPU spins, for 20 ms, the host is ahead of it with all launches.
    spin<<<1, 1>>>(20LL * gpu.clock_khz);
    watch.start();
    const double host = host_ns([&] { launch_all(nullptr); });
    const double stream_ns = watch.stop_ns();
    spin<<<1, 1>>>(2LL * gpu.clock_khz);
    watch.start();
    check(cudaGraphLaunch(replay, nullptr), "a graph");
    const double graph_ns = watch.stop_ns();
    const double wait_ns = host_ns([&] {
      empty<<<ctas, threads>>>();
      check(cudaDeviceSynchronize(), "waiting for the GPU");
    });
    if (launch < 0) continue;
    queued.push_back(stream_ns / kKernels);
    graphed.push_back(graph_ns / kKernels);
    issued.push_back(host / kKernels);
    awaited.push_back(wait_ns);
  }
  check(cudaGetLastError(), "launches");
  print({"kernel_after_kernel_in_stream", ctas, 0, threads}, median(queued), 0);
  print({"kernel_after_kernel_in_graph", ctas, 0, threads}, median(graphed), 0);
  print({"host_issues_launch", ctas, 0, threads}, median(issued), 0);
  print({"host_launches_and_waits", ctas, 0, threads}, median(awaited), 0);
  check(cudaGraphExecDestroy(replay), "a graph");
  check(cudaGraphDestroy(graph), "a graph");
  check(cudaStreamDestroy(stream), "a stream");
}

}  // namespace
}  // namespace fused_rnn

int main() {
  using namespace fused_rnn;
  const Gpu gpu;
  std::printf("test,ctas,cluster,threads,payload_bytes,ns_per_step,cycles_per_step,note\n");
  // Until the clocks are up.
  for (int k = 0; k < 50; ++k) spin<<<gpu.sms(), kThreads>>>(20LL * gpu.clock_khz);
  check(cudaDeviceSynchronize(), "warming up");
  time_grids(gpu);
  time_clusters(gpu);
  time_launches(gpu, 1, 32);
  time_launches(gpu, gpu.sms(), kThreads);
  return 0;
}
