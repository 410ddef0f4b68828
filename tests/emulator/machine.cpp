// The scheduler: which thread runs next, what arrives in between, and who waits where in the end.
#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
#include <iterator>
#include <new>

#if defined(EMULATOR_TSAN)
// ThreadSanitizer calls this for each race, in the thread that found it.
extern "C" void __tsan_on_report(void* report) {
  using namespace fused_rnn::emulator;
  if (machine == nullptr || machine->current == nullptr) return;
  if (machine->race_count == std::size(machine->races)) return;
  int id, bytes = 0, write, atomic;
  void *address = nullptr, *frames[1];
  __tsan_get_report_mop(report, 0, &id, &address, &bytes, &write, &atomic, frames, 1);
  const Thread* thread = machine->current;
  machine->races[machine->race_count++] = {thread, thread->what, address};
}
#endif

namespace fused_rnn::emulator {

Machine* machine = nullptr;

std::string format(const char* pattern, ...) {
  char text[512];
  va_list values;
  va_start(values, pattern);
  vsnprintf(text, sizeof(text), pattern, values);
  va_end(values);
  return text;
}

static std::string triple(const int (&x)[3]) { return format("(%d, %d, %d)", x[0], x[1], x[2]); }

static void fiber_main() {
  Thread& thread = *machine->current;
  try {
    (*machine->body)();
  } catch (const Failure&) {
  }
  thread.state = Thread::kDone;
  tsan_release(machine);
  thread.fiber.suspend();
}

static void unravel(int linear, const Extent& extent, int (&index)[3]) {
  index[0] = linear % extent.x;
  index[1] = linear / extent.x % extent.y;
  index[2] = linear / extent.x / extent.y;
}

Machine::Machine(const Launch& launch) : launch(launch), random(launch.seed) {
  const int block_threads = launch.block.count(), grid_blocks = launch.grid.count();
  shared_end = (launch.shared_bytes + 127) / 128 * 128 + kGuardBytes;
  if (launch.shared_bytes > 0) {
    shared_pieces.push_back({"dynamic shared memory", nullptr, 0, launch.shared_bytes});
  }
  shared_bytes_ = shared_arena_bytes(launch);
  for (int b = 0; b < grid_blocks; ++b) {
    blocks.push_back(std::make_unique<Block>());
    Block& block = *blocks.back();
    if (b % launch.cluster == 0) clusters.push_back(std::make_unique<Cluster>());
    block.index = b;
    block.rank = b % launch.cluster;
    block.cluster = clusters.back().get();
    block.cluster->blocks.push_back(&block);
    block.warps.resize(size_t(block_threads + 31) / 32);
    char* shared = static_cast<char*>(aligned_alloc(128, shared_bytes_));
    fill_guard(shared, shared_bytes_);
    block.shared = shared + kGuardBytes;
    std::fill_n(block.shared, launch.shared_bytes, char(kUnwritten));
    block.live = block_threads;
    block.cluster->live += block_threads;
    for (int i = 0; i < block_threads; ++i) {
      threads.push_back(std::make_unique<Thread>());
      Thread& thread = *threads.back();
      Place& place = thread.place;
      unravel(i, launch.block, place.thread);
      unravel(b, launch.grid, place.block);
      const Extent *size = &launch.block, *grid = &launch.grid;
      place.block_size[0] = size->x, place.block_size[1] = size->y, place.block_size[2] = size->z;
      place.grid_size[0] = grid->x, place.grid_size[1] = grid->y, place.grid_size[2] = grid->z;
      place.linear_thread = i;
      place.cluster_rank = block.rank;
      place.cluster_size = launch.cluster;
      thread.block = &block;
      thread.name = std::string("kernel ") + launch.name + ", block " + triple(place.block) +
                    ", thread " + triple(place.thread);
      block.threads.push_back(&thread);
      ready_.push_back(&thread);
    }
  }
  // A uniform schedule moves all threads at one speed and hides what needs a thread far ahead, so
  // seeds differ in how often threads switch, how long stores stay in buffers, and whose threads
  // are starved for a while: none, a quarter of the blocks, of the warps, or of the threads.
  switch_period_ = size_t(1) << random.below(6);
  drain_period_ = size_t(1) << (1 + random.below(7));
  skew_ = int(random.below(4));

  stacks_bytes_ = threads.size() * Fiber::kStackBytes;
  stacks_ = static_cast<char*>(mmap(nullptr, stacks_bytes_, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks_ == MAP_FAILED) throw std::bad_alloc();
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i]->fiber.start(stacks_ + i * Fiber::kStackBytes, fiber_main, threads[i]->name.c_str());
  }
}

Machine::~Machine() {
  for (const auto& thread : threads) thread->fiber.end();
  munmap(stacks_, stacks_bytes_);
  for (const auto& block : blocks) free(block->shared - kGuardBytes);
}

void Machine::fail(const Thread* thread, const char* what, const std::string& sentence) {
  TsanQuiet quiet;
  report.errors.push_back(thread->name + ", in " + what + ": " + sentence);
  failed = true;
  throw Failure();
}

bool Machine::slow(const Thread& thread) const {
  const int unit = skew_ == 1   ? thread.block->index
                   : skew_ == 2 ? thread.block->index * 64 + thread.place.linear_thread / 32
                                : thread.block->index * 1024 + thread.place.linear_thread;
  return skew_ != 0 && Random(epoch_ ^ (uint64_t(unit) << 20)).one_in(4);
}

size_t Machine::pick() {
  size_t i = random.below(ready_.size());
  for (int tries = 0; tries < 8 && slow(*ready_[i]); ++tries) i = random.below(ready_.size());
  return i;
}

// One thing that may happen at any time: a message arrives, a store leaves a buffer. Looks at
// `most` threads, from a random one on; false when it found nothing under way.
bool Machine::event(size_t most) {
  progress();
  if (!messages.empty() && random.one_in(2)) {
    deliver(random.below(messages.size()));
    return true;
  }
  const size_t first = random.below(threads.size());
  for (size_t i = 0; i < std::min(most, threads.size()); ++i) {
    Thread& thread = *threads[(first + i) % threads.size()];
    if (!thread.stores.empty()) {
      drain(thread, random.below(thread.stores.size()));
      return true;
    }
    if (!thread.block->stores.empty()) {
      drain_block(*thread.block, random.below(thread.block->stores.size()));
      return true;
    }
    if (!thread.copies.empty()) {
      perform(thread, random.below(thread.copies.size()));
      return true;
    }
  }
  if (messages.empty()) return false;
  deliver(random.below(messages.size()));
  return true;
}

void Machine::wake() {
  for (size_t i = 0; i < waiting_.size();) {
    Thread& thread = *waiting_[i];
    if (thread.ready(thread.waiter)) {
      progress();
      thread.state = Thread::kReady;
      ready_.push_back(&thread);
      waiting_[i] = waiting_.back();
      waiting_.pop_back();
    } else {
      ++i;
    }
  }
}

void Machine::schedule() {
  while (!ready_.empty() || !waiting_.empty()) {
    if (random.one_in(256)) epoch_ = random.next();
    if (random.one_in(drain_period_ * 4)) {
      const uint64_t idle = idle_;
      if (!event(64)) idle_ = idle;
    }
    if (ready_.empty() || random.one_in(8 + waiting_.size() / 8)) wake();
    while (ready_.empty()) {
      if (!event(threads.size())) {
        report.deadlock = who_waits_where();
        return;
      }
      // To look who of thousands may go on costs more than an event: it is not done after each.
      size_t more = random.below(1 + waiting_.size() / 128);
      while (more > 0 && event(threads.size())) --more;
      wake();
    }
    if (idle_ > launch.idle_limit) {
      report.deadlock = "Threads run, but nothing changes any more.\n" + who_waits_where();
      return;
    }
    const size_t i = pick();
    Thread& thread = *ready_[i];
    ++report.switches;
    until_switch_ = 1 + random.below(2 * switch_period_);
    current = &thread;
    thread.fiber.resume();
    current = nullptr;
    if (thread.fiber.overflowed()) fail(&thread, thread.what, "its stack overflowed");
    if (thread.state != Thread::kReady) {
      ready_[i] = ready_.back();
      ready_.pop_back();
    }
    if (thread.state == Thread::kWaiting) waiting_.push_back(&thread);
    if (failed) return;
    if (thread.state == Thread::kDone) thread_left(thread);
  }
  for (const auto& thread : threads) {
    while (!thread->copies.empty()) perform(*thread, 0);
    flush(*thread, Scope::kGpu);
  }
  while (!messages.empty()) deliver(random.below(messages.size()));
}

void Machine::point(const char* what) {
  Thread& thread = *current;
  ++report.primitives;
  ++idle_;
  if (!thread.stores.empty() && random.one_in(drain_period_)) {
    drain(thread, random.below(thread.stores.size()));
  }
  if (!thread.copies.empty() && random.one_in(drain_period_)) {
    perform(thread, random.below(thread.copies.size()));
  }
  thread.what = what;
  if (--until_switch_ == 0) thread.fiber.suspend();
}

void Machine::suspend_until(bool (*ready)(void*), void (*describe)(void*, std::string&),
                            void* waiter) {
  Thread& thread = *current;
  thread.ready = ready;
  thread.describe = describe;
  thread.waiter = waiter;
  thread.state = Thread::kWaiting;
  thread.fiber.suspend();
}

// One line for the threads of a block that wait for the same thing.
std::string Machine::who_waits_where() const {
  std::string text;
  for (const auto& block : blocks) {
    std::map<std::string, std::vector<int>> groups;
    for (const Thread* thread : block->threads) {
      std::string state = "ended";
      if (thread->state == Thread::kReady) state = std::string("runs, in ") + thread->what;
      if (thread->state == Thread::kWaiting) {
        std::string detail;
        thread->describe(thread->waiter, detail);
        state = std::string("waits in ") + thread->what + detail;
      }
      groups[state].push_back(thread->place.linear_thread);
    }
    for (const auto& [state, members] : groups) {
      text += std::string("kernel ") + launch.name + ", block " +
              triple(block->threads[0]->place.block) + ", thread";
      for (size_t i = 0, j; i < members.size(); i = j) {
        for (j = i + 1; j < members.size() && members[j] == members[j - 1] + 1;) ++j;
        text += format(j - i > 1 ? " %d-%d" : " %d", members[i], members[j - 1]);
      }
      text += ": " + state + "\n";
    }
  }
  return text;
}

std::string Report::text() const {
  std::string text;
  for (const std::string& error : errors) text += error + "\n";
  if (!deadlock.empty()) text += "deadlock:\n" + deadlock;
  return text;
}

Report run(const Launch& launch, const std::function<void()>& thread) {
  const bool fits = launch.cluster >= 1 && launch.cluster <= 16 &&
                    launch.grid.x % launch.cluster == 0 && launch.block.count() >= 1 &&
                    launch.block.count() <= 1024 && launch.grid.count() >= 1;
  if (!fits) {
    Report report;
    report.errors.push_back(std::string("kernel ") + launch.name +
                            ": no such launch: a block has 1 to 1024 threads, a cluster 1 to 16 "
                            "blocks, and clusters divide the grid's x");
    return report;
  }
  TsanQuiet quiet;
  Machine state(launch);
  state.body = &thread;
  machine = &state;
  try {
    state.schedule();
  } catch (const Failure&) {
  }
  tsan_acquire(machine);
  state.check_guards();
  for (size_t i = 0; i < state.race_count; ++i) {
    const Race& race = state.races[i];
    state.report.errors.push_back(race.thread->name + ", in " + race.what + ": data race on " +
                                  state.describe(race.address, 1));
  }
  machine = nullptr;
  return std::move(state.report);
}

const Place& place() { return machine->current->place; }

void misuse(const char* what, const char* sentence) {
  machine->fail(machine->current, what, sentence);
}

}  // namespace fused_rnn::emulator
