// What ThreadSanitizer is told in the build that has it. The emulator itself is not instrumented:
// the kernel and the driver are, and the emulator says what each primitive reads, writes and
// orders.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
unsigned __tsan_atomic32_load(const volatile void* address, int order);
unsigned __tsan_atomic32_exchange(volatile void* address, unsigned value, int order);
unsigned long __tsan_atomic64_load(const volatile void* address, int order);
unsigned long __tsan_atomic64_exchange(volatile void* address, unsigned long value, int order);
int __tsan_get_report_mop(void* report, unsigned long index, int* thread, void** address,
                          int* bytes, int* write, int* atomic, void** trace, unsigned long frames);
}
#endif

namespace fused_rnn::emulator {

#if defined(EMULATOR_TSAN)

constexpr unsigned kTsanNoSync = 1;
constexpr bool kTsan = true;

// While one lives, what the thread does is not looked at: the emulator's own allocations.
struct TsanQuiet {
  TsanQuiet() { __tsan_ignore_thread_begin(); }
  ~TsanQuiet() { __tsan_ignore_thread_end(); }
};

inline void tsan_acquire(const void* p) { __tsan_acquire(const_cast<void*>(p)); }
inline void tsan_release(const void* p) { __tsan_release(const_cast<void*>(p)); }
inline void tsan_read(const void* p, size_t bytes) {
  __tsan_read_range(const_cast<void*>(p), bytes);
}
inline void tsan_write(const void* p, size_t bytes) {
  __tsan_write_range(const_cast<void*>(p), bytes);
}
// Relaxed: a word orders nothing by itself.
inline uint64_t tsan_load_word(const void* p, size_t bytes) {
  return bytes == 4 ? __tsan_atomic32_load(p, 0) : __tsan_atomic64_load(p, 0);
}
inline void tsan_store_word(void* p, uint64_t value, size_t bytes) {
  if (bytes == 4) {
    __tsan_atomic32_exchange(p, unsigned(value), 0);
  } else {
    __tsan_atomic64_exchange(p, value, 0);
  }
}

#else

constexpr bool kTsan = false;

struct TsanQuiet {
  TsanQuiet() {}  // not trivial, so that a variable of it is no unused one
};

inline void tsan_acquire(const void*) {}
inline void tsan_release(const void*) {}
inline void tsan_read(const void*, size_t) {}
inline void tsan_write(const void*, size_t) {}
inline uint64_t tsan_load_word(const void*, size_t) { return 0; }
inline void tsan_store_word(void*, uint64_t, size_t) {}

#endif

}  // namespace fused_rnn::emulator
