// One fiber a CUDA thread: a stack and a place to continue. Only the scheduler switches to fibers,
// and a fiber only switches back.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fused_rnn::emulator {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 * 1024;

  // `stack` is kStackBytes of zeroed memory; `entry` never returns.
  void start(void* stack, void (*entry)(), const char* name);
  void resume();   // by the scheduler
  void suspend();  // by the fiber itself
  void end();      // by the scheduler, when it will not be resumed again
  bool owns(const void* p) const {
    return p >= stack_ && p < static_cast<char*>(stack_) + kStackBytes;
  }
  bool overflowed() const;

 private:
  void* stack_ = nullptr;
#if defined(__x86_64__)
  void* fiber_ = nullptr;
#else
  ucontext_t fiber_;
#endif
#if defined(EMULATOR_TSAN)
  void* tsan_ = nullptr;
#endif
};

}  // namespace fused_rnn::emulator
