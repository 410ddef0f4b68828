// Streams beside torch's own, for layers of a stack that run at the same time. Tests run this over
// a run time of their own.
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
    // One that the legacy default stream, which may be torch's, does not wait for by itself. To
    // make it is no part of a capture.
    cudaStream_t made = nullptr;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "a capture's mode");
    const cudaError_t error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
    check(cudaThreadExchangeStreamCaptureMode(&mode), "a capture's mode");
    check(error, "no stream");
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

// The streams of a call: torch's, and between fork and join one for each layer.
class Streams {
  struct Side {
    cudaStream_t stream;
    std::vector<std::pair<int64_t, Event>> ended;  // chunks, by their first steps
  };
  const int device_;
  const cudaStream_t torchs_;
  std::vector<Side> sides_;
  size_t layer_ = 0;

  static void let_wait(cudaStream_t waits, const Event& event) {
    check(cudaStreamWaitEvent(waits, event.get(), 0), "a stream does not wait");
  }

 public:
  Streams(int device, cudaStream_t torchs) : device_(device), torchs_(torchs) {}
  // After an exception, too, memory goes back to torch behind what the other streams still do.
  ~Streams() {
    try {
      join();
    } catch (const std::exception&) {  // the one on its way says more
    }
  }
  Streams(const Streams&) = delete;

  bool forked() const { return !sides_.empty(); }
  cudaStream_t torchs() const { return torchs_; }
  // Where everything goes now.
  cudaStream_t current() const { return forked() ? sides_[layer_].stream : torchs_; }

  void fork(int layers) {
    const Event so_far = record(torchs_);
    sides_.reserve(size_t(layers));
    for (int i = 0; i < layers; ++i) {
      sides_.push_back({FreeStreams::all().take(device_), {}});
      let_wait(sides_.back().stream, so_far);
    }
  }
  void on(int layer) { layer_ = size_t(layer); }
  // With what torch's stream has been given by now: memory may come from another thread there.
  void catch_up() {
    if (forked()) let_wait(current(), record(torchs_));
  }
  void begin(int64_t step) {
    if (!forked() || layer_ == 0) return;
    const auto& ended = sides_[layer_ - 1].ended;
    for (auto chunk = ended.rbegin(); chunk != ended.rend(); ++chunk)
      if (chunk->first == step) return let_wait(current(), chunk->second);
    STD_TORCH_CHECK(false, "fused_rnn: the layers of a stack have different chunks");
  }
  void end(int64_t step) {
    if (forked()) sides_[layer_].ended.emplace_back(step, record(current()));
  }
  void join() {
    for (const Side& side : sides_) let_wait(torchs_, record(side.stream));
    for (const Side& side : sides_) FreeStreams::all().give(device_, side.stream);
    sides_.clear();
  }
};

}  // namespace fused_rnn::cuda
