// Asynchronous copies, mbarriers, and messages to the shared memory of peers. Data arrives at a
// random time: of cp.async until the wait for its group, of a message at the latest when nothing
// else can go on.
#include "machine.h"

namespace fused_rnn::emulator {
namespace {

// Of an mbarrier's count of bytes, as PTX bounds it.
constexpr int64_t kMostBytes = (1 << 20) - 1;

Block& owner(const char* what, const Thread& thread, void* barrier) {
  machine->check(thread, what, barrier, 8, 8);
  Block* block = machine->shared_owner(thread, barrier);
  if (block == nullptr) machine->fail(&thread, what, "the mbarrier is not in shared memory");
  return *block;
}

Mbarrier& find(const char* what, const Thread& thread, void* barrier) {
  auto& mbarriers = owner(what, thread, barrier).mbarriers;
  const auto found = mbarriers.find(static_cast<char*>(barrier));
  if (found == mbarriers.end()) {
    machine->fail(&thread, what,
                  "the mbarrier is not initialised: " + machine->describe(barrier, 8));
  }
  return found->second;
}

void change(const char* what, const Thread& thread, void* barrier, int arrivals, int64_t bytes) {
  Mbarrier& mbarrier = find(what, thread, barrier);
  mbarrier.pending -= arrivals;
  mbarrier.bytes += bytes;
  if (mbarrier.pending < 0) {
    machine->fail(&thread, what,
                  format("more than %d arrivals in a phase of ", mbarrier.count) +
                      machine->describe(barrier, 8));
  }
  if (mbarrier.bytes > kMostBytes || mbarrier.bytes < -kMostBytes) {
    machine->fail(&thread, what, "an mbarrier counts at most 2^20 - 1 bytes");
  }
  if (mbarrier.pending == 0 && mbarrier.bytes == 0) {
    ++mbarrier.phase;
    mbarrier.pending = mbarrier.count;
  }
  machine->progress();
}

bool passed(const Mbarrier& mbarrier, int parity) { return int(mbarrier.phase % 2) != parity; }

}  // namespace

void* peer(const char* what, void* shared, int rank) {
  machine->point(what);
  const Thread& thread = *machine->current;
  const auto& blocks = thread.block->cluster->blocks;
  if (rank < 0 || size_t(rank) >= blocks.size()) misuse(what, "no such rank in the cluster");
  if (machine->shared_owner(thread, shared) != thread.block) {
    misuse(what, "wants an address in the block's own shared memory");
  }
  return blocks[size_t(rank)]->shared + (static_cast<char*>(shared) - thread.block->shared);
}

void copy_start(void* shared, const void* global, int bytes, int valid) {
  machine->point("copy_async");
  Thread& thread = *machine->current;
  if (valid < 0 || valid > bytes) misuse("copy_async", "valid must be between 0 and the size");
  machine->check(thread, "copy_async", shared, size_t(bytes), size_t(bytes));
  machine->check(thread, "copy_async", global, size_t(valid), size_t(bytes));
  if (machine->shared_owner(thread, shared) != thread.block) {
    misuse("copy_async", "wants an address in the block's own shared memory");
  }
  tsan_read(global, size_t(valid));
  tsan_write(shared, size_t(bytes));
  TsanQuiet quiet;
  thread.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes,
                           valid, thread.copy_groups});
}

void Machine::perform(Thread& thread, size_t i) {
  const Copy copy = thread.copies[i];
  TsanQuiet quiet;
  thread.copies.erase(thread.copies.begin() + ptrdiff_t(i));
  progress();
  for (int b = 0; b < copy.bytes; ++b) {
    const volatile char* from = copy.from + b;
    static_cast<volatile char*>(copy.to)[b] = b < copy.valid ? *from : char(0);
  }
}

void copy_group() {
  machine->point("copy_async_commit");
  ++machine->current->copy_groups;
}

void copy_wait(int groups) {
  machine->point("copy_async_wait");
  Thread& thread = *machine->current;
  for (size_t i = 0; i < thread.copies.size();) {
    if (thread.copies[i].group < thread.copy_groups - groups) {
      // Again: who reads between the start and the wait races, too.
      tsan_write(thread.copies[i].to, size_t(thread.copies[i].bytes));
      machine->perform(thread, i);
    } else {
      ++i;
    }
  }
}

void mbarrier_start(void* barrier, int count) {
  machine->point("mbarrier_init");
  Thread& thread = *machine->current;
  if (count < 1 || count > kMostBytes) misuse("mbarrier_init", "counts 1 to 2^20 - 1 arrivals");
  Block& block = owner("mbarrier_init", thread, barrier);
  if (&block != thread.block) misuse("mbarrier_init", "the mbarrier is a peer's");
  TsanQuiet quiet;
  block.mbarriers[static_cast<char*>(barrier)] = {count, count};
}

void mbarrier_update(const char* what, void* barrier, int arrivals, int bytes, Scope scope) {
  machine->point(what);
  Thread& thread = *machine->current;
  if (arrivals > 0) {
    machine->flush(thread, scope);
    tsan_release(barrier);
  }
  // The bytes first: else the arrival could end the phase without them.
  change(what, thread, barrier, 0, bytes);
  if (arrivals > 0) change(what, thread, barrier, arrivals, 0);
}

bool mbarrier_test(void* barrier, int parity) {
  machine->point("mbarrier_try_wait");
  Thread& thread = *machine->current;
  if (machine->shared_owner(thread, barrier) != thread.block) {
    misuse("mbarrier_try_wait", "the mbarrier is not in the block's own shared memory");
  }
  const bool done = passed(find("mbarrier_try_wait", thread, barrier), parity);
  if (done) tsan_acquire(barrier);
  return done;
}

void mbarrier_block(void* barrier, int parity) {
  if (mbarrier_test(barrier, parity)) return;
  Thread& thread = *machine->current;
  thread.what = "mbarrier_wait";
  Mbarrier& mbarrier = find("mbarrier_wait", thread, barrier);
  machine->wait([&] { return passed(mbarrier, parity); },
                [&] {
                  return format(" for parity %d of ", parity) + machine->describe(barrier, 8) +
                         format(": %d of %d arrivals and %lld bytes are missing", mbarrier.pending,
                                mbarrier.count, static_cast<long long>(mbarrier.bytes));
                });
  tsan_acquire(barrier);
}

// The barrier's count orders the message's own bytes only. ThreadSanitizer is told at the time of
// sending, and takes it for a release of everything before: it sees less here than the buffers do.
void send(const char* what, void* to, const void* value, int bytes, void* barrier) {
  machine->point(what);
  Thread& thread = *machine->current;
  machine->check(thread, what, to, size_t(bytes), size_t(bytes));
  tsan_write(to, size_t(bytes));
  tsan_release(barrier);
  Message message{static_cast<char*>(to),      nullptr, {},  bytes,
                  static_cast<char*>(barrier), &thread, what};
  copy_bytes(message.value, value, size_t(bytes));
  TsanQuiet quiet;
  machine->messages.push_back(message);
}

void send_bulk(const char* what, void* to, const void* from, int bytes, void* barrier) {
  machine->point(what);
  Thread& thread = *machine->current;
  if (bytes <= 0 || bytes % 16 != 0) misuse(what, "copies a positive multiple of 16 bytes");
  machine->check(thread, what, to, size_t(bytes), 16);
  machine->check(thread, what, from, size_t(bytes), 16);
  tsan_read(from, size_t(bytes));
  tsan_write(to, size_t(bytes));
  tsan_release(barrier);
  TsanQuiet quiet;
  for (int i = 0; i < bytes; i += 16) {
    machine->messages.push_back({static_cast<char*>(to) + i,
                                 static_cast<const char*>(from) + i,
                                 {},
                                 16,
                                 static_cast<char*>(barrier),
                                 &thread,
                                 what});
  }
}

void Machine::deliver(size_t i) {
  const Message message = messages[i];
  messages[i] = messages.back();
  messages.pop_back();
  // Again, since the peer may have ended by now.
  check(*message.sender, message.what, message.to, size_t(message.bytes), 4);
  copy_bytes(message.to, message.from ? static_cast<const void*>(message.from) : message.value,
             size_t(message.bytes));
  change(message.what, *message.sender, message.barrier, 0, -message.bytes);
}

}  // namespace fused_rnn::emulator
