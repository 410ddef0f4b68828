// planted_errors TOOL: a kernel with the error that this tool of compute-sanitizer is there to
// find. A tool that passes this program would pass everything. The namespace is that of the kernels
// that are checked, so that the tool's filter for them is tried too.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace fused_rnn {

constexpr int kThreads = 96;
constexpr long long kAWhile = 1 << 22;  // clock cycles: some milliseconds

__global__ void past_the_end(int* memory) { memory[threadIdx.x + 1] = 1; }

__global__ void without_barrier(int* memory) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = int(threadIdx.x);
  memory[threadIdx.x] = shared[(threadIdx.x + 32) % kThreads];
}

// One warp and a half at the barrier. An exited thread is not waited for, so the others must live
// on meanwhile. They exit in the end, by themselves: what reconverges with threads at a barrier
// that it does not reach waits for ever.
__global__ void half_a_block_at_a_barrier(int* memory) {
  if (threadIdx.x < kThreads / 2) {
    memory[threadIdx.x] = 1;
    __syncthreads();
  } else {
    const long long start = clock64();
    do __nanosleep(1000);
    while (clock64() - start < kAWhile);
    memory[threadIdx.x] = 2;
    asm volatile("exit;");
  }
}

}  // namespace fused_rnn

int main(int argc, char** argv) {
  const char* tool = argc == 2 ? argv[1] : "";
  int* memory = nullptr;
  if (cudaMalloc(&memory, fused_rnn::kThreads * sizeof *memory) != cudaSuccess) {
    std::fprintf(stderr, "planted_errors: no memory on a GPU\n");
    return 2;
  }
  const auto launch = [&](auto* kernel) { kernel<<<1, fused_rnn::kThreads>>>(memory); };
  if (!std::strcmp(tool, "memcheck")) {
    launch(fused_rnn::past_the_end);
  } else if (!std::strcmp(tool, "racecheck")) {
    launch(fused_rnn::without_barrier);
  } else if (!std::strcmp(tool, "synccheck")) {
    launch(fused_rnn::half_a_block_at_a_barrier);
  } else {
    std::fprintf(stderr, "planted_errors: memcheck, racecheck or synccheck\n");
    return 2;
  }
  cudaDeviceSynchronize();  // what comes of it is the tool's to say
  return 0;
}
