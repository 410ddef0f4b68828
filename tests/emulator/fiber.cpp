#include "fiber.h"

#include <stdint.h>
#include <string.h>

#include "thread_sanitizer.h"

namespace fused_rnn::emulator {
namespace {

constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11;

#if defined(EMULATOR_TSAN)
void* scheduler_tsan;
#endif

}  // namespace

#if defined(__x86_64__)

// ucontext's swap makes a system call; this is ten times faster. What the ABI wants kept is pushed,
// the stacks are exchanged, the other side's registers are popped.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace {
void* scheduler;
}

static void prepare(void** fiber, void* stack, void (*entry)()) {
  // Six registers, the entry as return address, and one word: on entry the stack pointer must be
  // 8 past a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + Fiber::kStackBytes);
  memcpy(top - 2, &entry, sizeof(entry));
  *fiber = top - 8;
}
static void enter(void** fiber) { emulator_switch(&scheduler, *fiber); }
static void leave(void** fiber) { emulator_switch(fiber, scheduler); }

#else

namespace {
ucontext_t scheduler;
}

static void prepare(ucontext_t* fiber, void* stack, void (*entry)()) {
  getcontext(fiber);
  fiber->uc_stack.ss_sp = stack;
  fiber->uc_stack.ss_size = Fiber::kStackBytes;
  fiber->uc_link = nullptr;
  makecontext(fiber, entry, 0);
}
static void enter(ucontext_t* fiber) { swapcontext(&scheduler, fiber); }
static void leave(ucontext_t* fiber) { swapcontext(fiber, &scheduler); }

#endif

void Fiber::start(void* stack, void (*entry)(), [[maybe_unused]] const char* name) {
  stack_ = stack;
  memcpy(stack, &kCanary, sizeof(kCanary));
  prepare(&fiber_, stack, entry);
#if defined(EMULATOR_TSAN)
  tsan_ = __tsan_create_fiber(0);
  __tsan_set_fiber_name(tsan_, name);
#endif
}

// The switches are told to order nothing: only what the CUDA program orders may hide a race.
void Fiber::resume() {
#if defined(EMULATOR_TSAN)
  scheduler_tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, kTsanNoSync);
#endif
  enter(&fiber_);
}

void Fiber::suspend() {
#if defined(EMULATOR_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan, kTsanNoSync);
#endif
  leave(&fiber_);
}

void Fiber::end() {
#if defined(EMULATOR_TSAN)
  __tsan_destroy_fiber(tsan_);
#endif
}

bool Fiber::overflowed() const { return memcmp(stack_, &kCanary, sizeof(kCanary)) != 0; }

}  // namespace fused_rnn::emulator
