// The state of a launch: its threads, blocks and clusters, and what is on its way in memory.
#pragma once

#include <stdint.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "runtime.h"
#include "thread_sanitizer.h"

namespace fused_rnn::emulator {

struct Failure {};
struct Thread;

// What ThreadSanitizer found, kept as it is called: its hook must not allocate.
struct Race {
  const Thread* thread;
  const char* what;
  const void* address;
};

// SplitMix64: the same on every machine, unlike the standard library's distributions.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return next() % n; }
  bool one_in(size_t n) { return next() % n == 0; }

 private:
  uint64_t state_;
};

struct Store {
  char* to;
  uint8_t bytes;
  bool own_shared;  // else global memory, or shared memory of a peer
  unsigned char value[16];
};

struct Copy {  // a cp.async
  char* to;
  const char* from;
  int bytes, valid, group;
};

struct Block;

struct Thread {
  Place place;
  Block* block;
  Fiber fiber;
  std::string name;
  const char* what = "its first primitive";
  enum { kReady, kWaiting, kDone } state = kReady;
  // While waiting: both belong to the waiter's frame.
  bool (*ready)(void*) = nullptr;
  void (*describe)(void*, std::string&) = nullptr;
  void* waiter = nullptr;

  std::vector<Store> stores;  // no two overlap, so they may drain in any order
  std::vector<Copy> copies;
  int copy_groups = 0;
  uint64_t cluster_phase = 0;  // the phase arrived at
  bool cluster_arrived = false;
  // For ThreadSanitizer: a fence turns later relaxed writes into releases and earlier relaxed reads
  // into acquires.
  bool fenced = false;
  std::vector<const void*> relaxed_reads;
};

struct Barrier {
  std::vector<Thread*> arrived;
  int expected = 0;  // 0: the block's threads that still live
  uint64_t phase = 0;
  char order[2];  // addresses that stand for even and odd phases
};

struct Exchange {
  const char* what;
  unsigned mask, arrived = 0, left = 0;
  bool done = false;
  bool orders;
  size_t bytes;
  unsigned char values[32][64];
};

struct Mbarrier {
  int count, pending;
  int64_t bytes = 0;
  uint64_t phase = 0;
};

struct Cluster {
  std::vector<Block*> blocks;
  int live = 0, arrived = 0;
  uint64_t phase = 0;
  char order[2];
};

struct Block {
  int index, rank;
  Cluster* cluster;
  std::vector<Thread*> threads;
  int live = 0;
  char* shared = nullptr;
  Barrier barriers[16];
  std::vector<std::vector<std::unique_ptr<Exchange>>> warps;
  std::map<const char*, Mbarrier> mbarriers;
  // Stores to memory outside the block that its threads see and others may not yet.
  std::vector<Store> stores;
};

// A store or a piece of a bulk copy that will arrive at some time.
struct Message {
  char* to;
  const char* from;  // null: `value`
  unsigned char value[16];
  int bytes;
  char* barrier;
  const Thread* sender;
  const char* what;
};

// Memory that kernels may touch. Before and after it stand guard zones.
struct Region {
  std::string name;
  char* data;
  size_t bytes;
};
constexpr size_t kGuardBytes = 512;

struct SharedPiece {
  std::string name;
  const void* site;
  size_t offset, bytes;
};

class Machine {
 public:
  explicit Machine(const Launch& launch);
  ~Machine();

  const Launch& launch;
  Random random;
  Report report;
  const std::function<void()>* body = nullptr;
  Thread* current = nullptr;  // null: the scheduler itself
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Message> messages;
  std::vector<SharedPiece> shared_pieces;
  size_t shared_end = 0;  // where the next static array goes
  bool failed = false;
  Race races[16];
  size_t race_count = 0;

  void schedule();
  void point(const char* what);
  void progress() { idle_ = 0; }
  [[noreturn]] void fail(const Thread* thread, const char* what, const std::string& sentence);

  template <class Ready, class Describe>
  void wait(Ready ready, Describe describe) {
    if (ready()) return;
    struct Waiter {
      Ready& ready;
      Describe& describe;
    } waiter{ready, describe};
    suspend_until([](void* w) { return static_cast<Waiter*>(w)->ready(); },
                  [](void* w, std::string& text) { text = static_cast<Waiter*>(w)->describe(); },
                  &waiter);
  }

  // Memory (memory.cpp).
  Block* shared_owner(const Thread& thread, const void* p) const;
  void check(const Thread& thread, const char* what, const void* p, size_t bytes, size_t alignment);
  std::string describe(const void* p, size_t bytes) const;
  void drain(Thread& thread, size_t i);
  void drain_block(Block& block, size_t i);
  void flush(Thread& thread, Scope scope);
  void perform(Thread& thread, size_t copy);
  void check_guards();

  // Barriers (barriers.cpp), clusters and messages (cluster.cpp).
  void thread_left(Thread& thread);
  void deliver(size_t message);

 private:
  void suspend_until(bool (*ready)(void*), void (*describe)(void*, std::string&), void* waiter);
  void wake();
  bool event(size_t most);
  size_t pick();
  bool slow(const Thread& thread) const;
  std::string who_waits_where() const;

  std::vector<Thread*> ready_, waiting_;
  uint64_t idle_ = 0;
  size_t until_switch_ = 1, switch_period_, drain_period_;
  uint64_t epoch_ = 0;
  int skew_;
  char* stacks_ = nullptr;
  size_t stacks_bytes_ = 0, shared_bytes_ = 0;
};

extern Machine* machine;

size_t shared_arena_bytes(const Launch& launch);
void fill_guard(char* p, size_t bytes);
void copy_bytes(void* to, const void* from, size_t bytes);
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

}  // namespace fused_rnn::emulator
