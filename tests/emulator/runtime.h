// What the stand-ins for the primitives call. Each call is a preemption point. `what` names the
// primitive in reports.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fused_rnn::emulator {

struct Place {
  int thread[3], block[3], block_size[3], grid_size[3];
  int linear_thread, cluster_rank, cluster_size;
};
const Place& place();

[[noreturn]] void misuse(const char* what, const char* sentence);

// Memory.
enum class Order { kRelaxed, kAcquire, kRelease };
enum class Scope { kBlock, kGpu };
enum class Update { kAdd, kOr, kMax, kExchange, kCompareExchange };

void read(const char* what, const void* p, void* value, size_t bytes, size_t alignment);
void write(const char* what, void* p, const void* value, size_t bytes, size_t alignment);
uint64_t read_word(const char* what, const void* p, size_t bytes, Order order);
void write_word(const char* what, void* p, uint64_t value, size_t bytes, Order order);
uint64_t update_word(const char* what, void* p, Update update, uint64_t value, uint64_t expected,
                     size_t bytes, Order order);
// Waits until the word at p is another than `seen`.
void wait_for_change(const char* what, const void* p, uint64_t seen, size_t bytes);
void fence(const char* what, Scope scope);

// Fails for an address that is not in global memory.
void want_global(const char* what, const void* p);

void* dynamic_shared();
// `site` is one address for each declaration.
void* static_shared(const void* site, const char* name, size_t bytes, size_t alignment);
// The place of `shared`, which must be the block's own, in the block of that rank.
void* peer(const char* what, void* shared, int rank);

// Barriers and warps.
void barrier(const char* what, int id, int threads);  // threads 0: the block
void cluster_barrier_arrive();
void cluster_barrier_wait();
// Every lane of the mask brings `bytes` and takes what all 32 brought, of a lane that is not there
// kUnwritten. `orders`: stores before are seen after.
void exchange(const char* what, unsigned mask, const void* mine, size_t bytes, void* all,
              bool orders = false);

// cp.async.
void copy_start(void* shared, const void* global, int bytes, int valid);
void copy_group();
void copy_wait(int groups);

// mbarriers and what completes on them.
void mbarrier_start(void* barrier, int count);
void mbarrier_update(const char* what, void* barrier, int arrivals, int bytes, Scope scope);
bool mbarrier_test(void* barrier, int parity);
void mbarrier_block(void* barrier, int parity);
void send(const char* what, void* to, const void* value, int bytes, void* barrier);
void send_bulk(const char* what, void* to, const void* from, int bytes, void* barrier);

}  // namespace fused_rnn::emulator
