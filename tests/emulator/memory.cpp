// Memory: what kernels may touch, and what is stored but not yet seen by everyone.
//
// A plain store goes to its thread's buffer. Stores to the block's own shared memory go from there
// to memory; others to the block's buffer, where the block's threads see them, and then to memory.
// Each store takes each of these steps at a random time, at the latest when a barrier (of the
// block: the first step) or a release or fence (of the GPU: both) asks. A thread sees its own
// stores at once. Under ThreadSanitizer stores are not buffered: it finds what is not ordered
// whenever it happens.
#include <string.h>

#include <algorithm>

#include "machine.h"

namespace fused_rnn::emulator {
namespace {

// As float, half or bfloat16 it is NaN, and it is not kUnwritten: a kernel's -1 shows.
constexpr unsigned char kGuard[2] = {0xa5, 0xff};
constexpr size_t kStaticSharedBytes = 48 * 1024;
constexpr size_t kThreadStores = 16, kBlockStores = 32;

std::vector<Region>& regions() {
  static std::vector<Region> all;  // in the order of addresses
  return all;
}

bool overlap(const Store& a, const void* p, size_t bytes) {
  const char* q = static_cast<const char*>(p);
  return a.to < q + bytes && q < a.to + a.bytes;
}

const Region* find(const void* p) {
  const char* q = static_cast<const char*>(p);
  const auto after = std::upper_bound(regions().begin(), regions().end(), q + kGuardBytes,
                                      [](const char* a, const Region& b) { return a < b.data; });
  if (after == regions().begin()) return nullptr;
  const Region& region = *(after - 1);
  return q < region.data + region.bytes + kGuardBytes ? &region : nullptr;
}

std::string within(const std::string& name, ptrdiff_t offset, size_t bytes, size_t size) {
  const std::string of = name + format(" (%zu bytes)", size);
  if (offset < 0) return format("%zd bytes before ", -offset) + of;
  if (size_t(offset) >= size) return format("%zu bytes past the end of ", offset - size) + of;
  if (size_t(offset) + bytes > size) return format("byte %zd, across the end of ", offset) + of;
  return format("byte %zd of ", offset) + of;
}

void check_guard(Report& report, const std::string& name, const char* guard, bool before) {
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (guard[i] != char(kGuard[i % 2])) {
      const size_t distance = before ? kGuardBytes - i : i;
      report.errors.push_back(
          format("guard zone overwritten, by code that bypasses store(): %zu bytes %s ", distance,
                 before ? "before" : "past the end of") +
          name);
      return;
    }
  }
}

void insert(Thread& thread, const Store& store) {
  if (store.own_shared) {
    copy_bytes(store.to, store.value, store.bytes);
    return;
  }
  std::vector<Store>& stores = thread.block->stores;
  for (size_t i = 0; i < stores.size();) {
    if (overlap(stores[i], store.to, store.bytes)) {
      machine->drain_block(*thread.block, i);
    } else {
      ++i;
    }
  }
  stores.push_back(store);
  if (stores.size() > kBlockStores) {
    machine->drain_block(*thread.block, machine->random.below(stores.size()));
  }
}

// Own stores to these bytes leave the buffers, oldest first: the new access comes after them.
void flush_overlapping(Thread& thread, const void* p, size_t bytes, bool to_memory) {
  for (size_t i = 0; i < thread.stores.size();) {
    if (overlap(thread.stores[i], p, bytes)) {
      machine->drain(thread, i);
    } else {
      ++i;
    }
  }
  for (size_t i = 0; to_memory && i < thread.block->stores.size();) {
    if (overlap(thread.block->stores[i], p, bytes)) {
      machine->drain_block(*thread.block, i);
    } else {
      ++i;
    }
  }
}

void overlay(const std::vector<Store>& stores, const void* p, void* value, size_t bytes) {
  const char* from = static_cast<const char*>(p);
  for (const Store& store : stores) {
    if (!overlap(store, p, bytes)) continue;
    for (size_t i = 0; i < store.bytes; ++i) {
      const ptrdiff_t at = store.to + i - from;
      if (at >= 0 && size_t(at) < bytes) static_cast<unsigned char*>(value)[at] = store.value[i];
    }
  }
}

uint64_t peek(Thread& thread, const void* p, size_t bytes) {
  uint64_t value = 0;
  if (kTsan) return tsan_load_word(p, bytes);
  copy_bytes(&value, p, bytes);
  overlay(thread.block->stores, p, &value, bytes);
  overlay(thread.stores, p, &value, bytes);
  return value;
}

// Before: a release publishes what came before. After: an acquire sees what the writer published.
void order_before(Thread& thread, const void* p, Order order) {
  if (order == Order::kRelease) machine->flush(thread, Scope::kGpu);
  if (order == Order::kRelease || thread.fenced) tsan_release(p);
}
void order_after_read(Thread& thread, const void* p, Order order) {
  if (!kTsan) return;
  if (order == Order::kAcquire) {
    tsan_acquire(p);
  } else if (std::find(thread.relaxed_reads.begin(), thread.relaxed_reads.end(), p) ==
             thread.relaxed_reads.end()) {
    TsanQuiet quiet;
    thread.relaxed_reads.push_back(p);
  }
}

}  // namespace

// Sizes known to the compiler: a call of memcpy would be seen by ThreadSanitizer as the kernel's.
void copy_bytes(void* to, const void* from, size_t bytes) {
  switch (bytes) {
    case 2: __builtin_memcpy(to, from, 2); return;
    case 4: __builtin_memcpy(to, from, 4); return;
    case 8: __builtin_memcpy(to, from, 8); return;
    case 16: __builtin_memcpy(to, from, 16); return;
    default:
      for (size_t i = 0; i < bytes; ++i) {
        static_cast<volatile char*>(to)[i] = static_cast<const volatile char*>(from)[i];
      }
  }
}

void fill_guard(char* p, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) p[i] = char(kGuard[i % 2]);
}

size_t shared_arena_bytes(const Launch& launch) {
  return (launch.shared_bytes + 127) / 128 * 128 + 3 * kGuardBytes + kStaticSharedBytes;
}

Allocation::Allocation(const char* name, size_t bytes) {
  // Rounded up, so that the guard zone's bytes do not depend on the size's last bit.
  const size_t total = (2 * kGuardBytes + bytes + 255) / 128 * 128;
  char* all = static_cast<char*>(aligned_alloc(128, total));
  fill_guard(all, kGuardBytes);
  char* data = all + kGuardBytes;
  fill_guard(data + bytes, total - kGuardBytes - bytes);
  memset(data, kUnwritten, bytes);
  data_ = data;
  const auto after = std::find_if(regions().begin(), regions().end(),
                                  [&](const Region& region) { return region.data > data; });
  regions().insert(after, {name, data, bytes});
}

Allocation::~Allocation() {
  const auto mine = std::find_if(regions().begin(), regions().end(),
                                 [&](const Region& region) { return region.data == data_; });
  regions().erase(mine);
  free(static_cast<char*>(data_) - kGuardBytes);
}

Block* Machine::shared_owner(const Thread& thread, const void* p) const {
  const char* q = static_cast<const char*>(p);
  const auto holds = [&](const Block& block) {
    return q >= block.shared - kGuardBytes && q < block.shared - kGuardBytes + shared_bytes_;
  };
  if (holds(*thread.block)) return thread.block;
  for (Block* block : thread.block->cluster->blocks) {
    if (holds(*block)) return block;
  }
  return nullptr;
}

std::string Machine::describe(const void* p, size_t bytes) const {
  const char* q = static_cast<const char*>(p);
  if (const Region* region = find(p)) {
    return within(region->name, q - region->data, bytes, region->bytes);
  }
  for (const auto& block : blocks) {
    const ptrdiff_t offset = q - block->shared;
    if (offset < -ptrdiff_t(kGuardBytes) || offset >= ptrdiff_t(shared_bytes_)) continue;
    const SharedPiece* nearest = nullptr;
    for (const SharedPiece& piece : shared_pieces) {
      if (ptrdiff_t(piece.offset) <= offset || nearest == nullptr) nearest = &piece;
    }
    if (nearest == nullptr) return "shared memory, of which the launch has none";
    return within(nearest->name + format(" of block %d", block->index),
                  offset - ptrdiff_t(nearest->offset), bytes, nearest->bytes);
  }
  return format("address %p, which is in no memory of this launch", p);
}

void Machine::check(const Thread& thread, const char* what, const void* p, size_t bytes,
                    size_t alignment) {
  const char* q = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    fail(&thread, what,
         format("misaligned: %zu bytes want an address that is a multiple of %zu, got ", bytes,
                alignment) +
             describe(p, bytes));
  }
  if (thread.fiber.owns(p)) return;
  if (const Block* owner = shared_owner(thread, p)) {
    if (owner->live == 0) {
      fail(&thread, what, "a peer that has ended: " + describe(p, bytes));
    }
    const size_t offset = size_t(q - owner->shared);
    for (const SharedPiece& piece : shared_pieces) {
      if (offset >= piece.offset && offset + bytes <= piece.offset + piece.bytes) return;
    }
  } else if (const Region* region = find(p)) {
    if (q >= region->data && q + bytes <= region->data + region->bytes) return;
  }
  fail(&thread, what, format("out of range: %zu bytes at ", bytes) + describe(p, bytes));
}

void Machine::drain(Thread& thread, size_t i) {
  const Store store = thread.stores[i];
  thread.stores[i] = thread.stores.back();
  thread.stores.pop_back();
  progress();
  insert(thread, store);
}

void Machine::drain_block(Block& block, size_t i) {
  const Store store = block.stores[i];
  block.stores[i] = block.stores.back();
  block.stores.pop_back();
  progress();
  copy_bytes(store.to, store.value, store.bytes);
}

void Machine::flush(Thread& thread, Scope scope) {
  while (!thread.stores.empty()) drain(thread, random.below(thread.stores.size()));
  if (scope == Scope::kBlock) return;
  std::vector<Store>& stores = thread.block->stores;
  while (!stores.empty()) drain_block(*thread.block, random.below(stores.size()));
}

void Machine::check_guards() {
  for (const Region& region : regions()) {
    check_guard(report, region.name, region.data - kGuardBytes, true);
    check_guard(report, region.name, region.data + region.bytes, false);
  }
  for (const auto& block : blocks) {
    const std::string of = format(" of block %d", block->index);
    check_guard(report, "the shared memory" + of, block->shared - kGuardBytes, true);
    for (const SharedPiece& piece : shared_pieces) {
      // The pattern was laid from the arena's start: it begins at even places.
      const size_t end = (piece.offset + piece.bytes + 1) / 2 * 2;
      check_guard(report, piece.name + of, block->shared + end, false);
    }
  }
}

void read(const char* what, const void* p, void* value, size_t bytes, size_t alignment) {
  machine->point(what);
  Thread& thread = *machine->current;
  machine->check(thread, what, p, bytes, alignment);
  if (!thread.fiber.owns(p)) tsan_read(p, bytes);
  copy_bytes(value, p, bytes);
  if (!thread.block->stores.empty()) overlay(thread.block->stores, p, value, bytes);
  if (!thread.stores.empty()) overlay(thread.stores, p, value, bytes);
}

void write(const char* what, void* p, const void* value, size_t bytes, size_t alignment) {
  machine->point(what);
  Thread& thread = *machine->current;
  machine->check(thread, what, p, bytes, alignment);
  machine->progress();
  // ThreadSanitizer has no fences. Ours holds for the words written next, until a plain store
  // comes.
  thread.fenced = false;
  if (kTsan || thread.fiber.owns(p)) {
    if (!thread.fiber.owns(p)) tsan_write(p, bytes);
    copy_bytes(p, value, bytes);
    return;
  }
  flush_overlapping(thread, p, bytes, false);
  Store store{
      static_cast<char*>(p), uint8_t(bytes), machine->shared_owner(thread, p) == thread.block, {}};
  copy_bytes(store.value, value, bytes);
  thread.stores.push_back(store);
  if (thread.stores.size() > kThreadStores) {
    machine->drain(thread, machine->random.below(thread.stores.size()));
  }
}

uint64_t read_word(const char* what, const void* p, size_t bytes, Order order) {
  machine->point(what);
  Thread& thread = *machine->current;
  machine->check(thread, what, p, bytes, bytes);
  const uint64_t value = peek(thread, p, bytes);
  order_after_read(thread, p, order);
  return value;
}

void write_word(const char* what, void* p, uint64_t value, size_t bytes, Order order) {
  // A relaxed store may be seen before or after its thread's plain stores.
  if (!kTsan && order == Order::kRelaxed && machine->random.one_in(2)) {
    write(what, p, &value, bytes, bytes);
    return;
  }
  machine->point(what);
  Thread& thread = *machine->current;
  machine->check(thread, what, p, bytes, bytes);
  machine->progress();
  flush_overlapping(thread, p, bytes, true);
  order_before(thread, p, order);
  if (kTsan) {
    tsan_store_word(p, value, bytes);
  } else {
    copy_bytes(p, &value, bytes);
  }
}

uint64_t update_word(const char* what, void* p, Update update, uint64_t value, uint64_t expected,
                     size_t bytes, Order order) {
  machine->point(what);
  Thread& thread = *machine->current;
  machine->check(thread, what, p, bytes, bytes);
  machine->progress();
  flush_overlapping(thread, p, bytes, true);
  order_before(thread, p, order);
  const uint64_t old = peek(thread, p, bytes);
  uint64_t next = old;
  switch (update) {
    case Update::kAdd: next = old + value; break;
    case Update::kOr: next = old | value; break;
    case Update::kMax: next = std::max(old, value); break;
    case Update::kExchange: next = value; break;
    case Update::kCompareExchange: next = old == expected ? value : old; break;
  }
  if (kTsan) {
    tsan_store_word(p, next, bytes);
  } else {
    copy_bytes(p, &next, bytes);
  }
  order_after_read(thread, p, Order::kRelaxed);
  return old;
}

void wait_for_change(const char* what, const void* p, uint64_t seen, size_t bytes) {
  machine->point(what);
  Thread& thread = *machine->current;
  machine->wait(
      [&] {
        uint64_t now = 0;
        copy_bytes(&now, p, bytes);
        overlay(thread.block->stores, p, &now, bytes);
        overlay(thread.stores, p, &now, bytes);
        return now != seen;
      },
      [&] {
        return " for a change of " + machine->describe(p, bytes) +
               format(", which holds 0x%llx", static_cast<unsigned long long>(seen));
      });
}

void fence(const char* what, Scope scope) {
  machine->point(what);
  Thread& thread = *machine->current;
  machine->flush(thread, scope);
  if (!kTsan) return;
  for (const void* p : thread.relaxed_reads) tsan_acquire(p);
  thread.relaxed_reads.clear();
  thread.fenced = true;
}

void want_global(const char* what, const void* p) {
  if (find(p) != nullptr) return;
  machine->fail(machine->current, what, "wants global memory, got " + machine->describe(p, 1));
}

void* dynamic_shared() { return machine->current->block->shared; }

void* static_shared(const void* site, const char* name, size_t bytes, size_t alignment) {
  std::vector<SharedPiece>& pieces = machine->shared_pieces;
  Thread& thread = *machine->current;
  for (const SharedPiece& piece : pieces) {
    if (piece.site == site) return thread.block->shared + piece.offset;
  }
  TsanQuiet quiet;
  // In every block at the same place, as the compiler does.
  const size_t offset = (machine->shared_end + alignment - 1) / alignment * alignment;
  const size_t end = offset + bytes + 1 + kGuardBytes;
  if (end + kGuardBytes > shared_arena_bytes(machine->launch)) {
    misuse(name, "static shared memory takes more than 48 KiB, guard zones included");
  }
  pieces.push_back({name, site, offset, bytes});
  machine->shared_end = end;
  for (const auto& block : machine->blocks) {
    volatile char* array = block->shared + offset;  // volatile: no memset, see copy_bytes
    for (size_t i = 0; i < bytes; ++i) array[i] = char(kUnwritten);
  }
  return thread.block->shared + offset;
}

}  // namespace fused_rnn::emulator
