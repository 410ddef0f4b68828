// Streams beside torch's own, for layers of a stack that run at the same time.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ops.h"

namespace fused_rnn::cuda {

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fused_rnn: ", what, ": ", cudaGetErrorString(error));
}

// Streams that nobody uses now. What is still at work there delays the next user, no more; but one
// that a graph is being captured of stays part of that capture to its end.
class FreeStreams {
  std::mutex mutex_;
  std::map<int, std::vector<cudaStream_t>> of_device_;

 public:
  cudaStream_t take(int device) {
    const std::lock_guard lock(mutex_);
    std::vector<cudaStream_t>& streams = of_device_[device];
    for (cudaStream_t& stream : streams) {
      cudaStreamCaptureStatus status{};
      check(cudaStreamIsCapturing(stream, &status), "a stream");
      if (status != cudaStreamCaptureStatusNone) continue;
      std::swap(stream, streams.back());
      const cudaStream_t taken = streams.back();
      streams.pop_back();
      return taken;
    }
    // One that the legacy default stream, which may be torch's, does not wait for by itself.
    cudaStream_t made = nullptr;
    check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "no stream");
    return made;
  }
  void give(int device, cudaStream_t stream) {
    const std::lock_guard lock(mutex_);
    of_device_[device].push_back(stream);
  }
  static FreeStreams& all() {
    static auto* const streams = new FreeStreams;  // CUDA may be gone when the process ends
    return *streams;
  }
};

struct DestroyEvent {
  void operator()(cudaEvent_t event) const { (void)cudaEventDestroy(event); }
};
using Event = std::unique_ptr<CUevent_st, DestroyEvent>;

inline Event record(cudaStream_t stream) {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "no event");
  Event owned(event);
  check(cudaEventRecord(event, stream), "an event was not recorded");
  return owned;
}

class SideStream {
  int device_;
  cudaStream_t stream_;
  std::vector<std::pair<int64_t, Event>> marks_;  // by the first step of a chunk

 public:
  void* workspace;  // of cuBLAS
  size_t bytes;

  SideStream(int device, void* workspace, size_t bytes)
      : device_(device),
        stream_(FreeStreams::all().take(device)),
        workspace(workspace),
        bytes(bytes) {}
  SideStream(SideStream&& other)
      : device_(other.device_),
        stream_(std::exchange(other.stream_, nullptr)),
        marks_(std::move(other.marks_)),
        workspace(other.workspace),
        bytes(other.bytes) {}
  ~SideStream() {
    if (stream_) FreeStreams::all().give(device_, stream_);
  }

  cudaStream_t stream() const { return stream_; }
  // Begins with what `other` has been given so far behind it.
  void wait_for(cudaStream_t other) { let_wait(stream_, record(other)); }
  void mark(int64_t step) { marks_.emplace_back(step, record(stream_)); }
  // `other` goes on when the chunk has ended.
  void let_wait(cudaStream_t other, int64_t step) const {
    for (const auto& [first, event] : marks_)
      if (first == step) return let_wait(other, event);
    STD_TORCH_CHECK(false, "fused_rnn: the layers of a stack have different chunks");
  }
  // The same when all has.
  void let_wait(cudaStream_t other) const { let_wait(other, record(stream_)); }

 private:
  static void let_wait(cudaStream_t waits, const Event& event) {
    check(cudaStreamWaitEvent(waits, event.get(), 0), "a stream does not wait");
  }
};

}  // namespace fused_rnn::cuda
