// The CUDA run time as far as csrc/cuda/streams.cuh asks it: streams are queues of work, and who
// synchronises does it in an order that a seed draws.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <deque>
#include <functional>
#include <memory>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorNotReady = 600 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

struct CUstream_st {
  struct Work {
    std::shared_ptr<bool> waits_for;  // or null
    std::function<void()> run;
  };
  std::deque<Work> work;
  bool captures = false;

  void push(std::function<void()> run) { work.push_back({nullptr, std::move(run)}); }
};
struct CUevent_st {
  std::shared_ptr<bool> happened;  // of the last record; null: there was none
};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;

namespace fused_rnn::emulator {

inline std::vector<std::unique_ptr<CUstream_st>>& streams() {
  static std::vector<std::unique_ptr<CUstream_st>> all;
  return all;
}

// False where streams wait for each other.
bool synchronize(uint64_t seed);

}  // namespace fused_rnn::emulator

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  fused_rnn::emulator::streams().push_back(std::make_unique<CUstream_st>());
  *stream = fused_rnn::emulator::streams().back().get();
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream->captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->happened = std::make_shared<bool>(false);
  stream->push([happened = event->happened] { *happened = true; });
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  stream->work.push_back({event->happened, [] {}});
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
