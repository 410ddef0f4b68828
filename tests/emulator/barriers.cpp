// Barriers of a block and of a cluster, and what the lanes of a warp do together. As on the
// hardware, threads that have ended are not waited for.
#include <string.h>

#include <algorithm>

#include "machine.h"

namespace fused_rnn::emulator {
namespace {

void complete_if_full(Block& block, Barrier& barrier) {
  const size_t expected = barrier.expected > 0 ? size_t(barrier.expected) : size_t(block.live);
  if (barrier.arrived.empty() || barrier.arrived.size() < expected) return;
  for (Thread* thread : barrier.arrived) machine->flush(*thread, Scope::kBlock);
  barrier.arrived.clear();
  barrier.expected = 0;
  ++barrier.phase;
  machine->progress();
}

unsigned live_lanes(const Block& block, size_t warp) {
  unsigned mask = 0;
  for (size_t i = 0; i < 32 && warp * 32 + i < block.threads.size(); ++i) {
    if (block.threads[warp * 32 + i]->state != Thread::kDone) mask |= 1u << i;
  }
  return mask;
}

void complete_if_full(const Block& block, size_t warp, Exchange& exchange) {
  if (exchange.done || (exchange.mask & live_lanes(block, warp) & ~exchange.arrived) != 0) return;
  exchange.done = true;
  machine->progress();
  if (!exchange.orders) return;
  for (size_t i = 0; i < 32; ++i) {
    if (exchange.arrived >> i & 1) machine->flush(*block.threads[warp * 32 + i], Scope::kBlock);
  }
}

void complete_if_full(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.live) return;
  cluster.arrived = 0;
  ++cluster.phase;
  machine->progress();
}

}  // namespace

void Machine::thread_left(Thread& thread) {
  Block& block = *thread.block;
  --block.live;
  --block.cluster->live;
  progress();
  if (thread.cluster_arrived && thread.cluster_phase == block.cluster->phase) {
    --block.cluster->arrived;
  }
  for (Barrier& barrier : block.barriers) {
    if (barrier.expected == 0) complete_if_full(block, barrier);
  }
  complete_if_full(*block.cluster);
  for (size_t warp = 0; warp < block.warps.size(); ++warp) {
    for (const auto& exchange : block.warps[warp]) complete_if_full(block, warp, *exchange);
  }
}

void barrier(const char* what, int id, int threads) {
  machine->point(what);
  Thread& thread = *machine->current;
  Block& block = *thread.block;
  if (id < 0 || id > 15) misuse(what, "a block has barriers 0 to 15");
  if (threads % 32 != 0) misuse(what, "threads must be a multiple of 32");
  Barrier& barrier = block.barriers[id];
  if (!barrier.arrived.empty() && barrier.expected != threads) {
    misuse(what, "other threads wait at this barrier for another number of threads");
  }
  barrier.expected = threads;
  {
    TsanQuiet quiet;
    barrier.arrived.push_back(&thread);
  }
  const uint64_t phase = barrier.phase;
  tsan_release(&barrier.order[phase % 2]);
  complete_if_full(block, barrier);
  machine->wait([&] { return barrier.phase != phase; },
                [&] {
                  return format(" for %zu of %d threads at barrier %d",
                                size_t(threads > 0 ? threads : block.live) - barrier.arrived.size(),
                                threads > 0 ? threads : block.live, id);
                });
  tsan_acquire(&barrier.order[phase % 2]);
}

void cluster_barrier_arrive() {
  machine->point("cluster_arrive");
  Thread& thread = *machine->current;
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrived) misuse("cluster_arrive", "arrived twice without a cluster_wait");
  machine->flush(thread, Scope::kGpu);
  thread.cluster_arrived = true;
  thread.cluster_phase = cluster.phase;
  tsan_release(&cluster.order[cluster.phase % 2]);
  ++cluster.arrived;
  complete_if_full(cluster);
}

void cluster_barrier_wait() {
  machine->point("cluster_wait");
  Thread& thread = *machine->current;
  Cluster& cluster = *thread.block->cluster;
  if (!thread.cluster_arrived) misuse("cluster_wait", "no cluster_arrive before it");
  machine->wait([&] { return cluster.phase != thread.cluster_phase; },
                [&] {
                  return format(" for %d of %d threads of the cluster",
                                cluster.live - cluster.arrived, cluster.live);
                });
  thread.cluster_arrived = false;
  tsan_acquire(&cluster.order[thread.cluster_phase % 2]);
}

void exchange(const char* what, unsigned mask, const void* mine, size_t bytes, void* all,
              bool orders) {
  machine->point(what);
  Thread& thread = *machine->current;
  Block& block = *thread.block;
  const size_t warp = size_t(thread.place.linear_thread) / 32;
  const unsigned lane = unsigned(thread.place.linear_thread) % 32, bit = 1u << lane;
  if ((mask & bit) == 0) misuse(what, "the mask does not name the calling lane");
  auto& open = block.warps[warp];
  Exchange* exchange = nullptr;
  for (const auto& candidate : open) {
    if (candidate->mask == mask && !(candidate->arrived & bit)) exchange = candidate.get();
  }
  if (exchange == nullptr) {
    TsanQuiet quiet;
    open.push_back(std::make_unique<Exchange>());
    exchange = open.back().get();
    exchange->what = what;
    exchange->mask = mask;
    exchange->orders = orders;
    exchange->bytes = bytes;
    memset(exchange->values, kUnwritten, sizeof(exchange->values));
  }
  if (strcmp(exchange->what, what) != 0 || exchange->bytes != bytes) {
    machine->fail(&thread, what,
                  std::string("other lanes of the same mask are in ") + exchange->what);
  }
  exchange->arrived |= bit;
  copy_bytes(exchange->values[lane], mine, bytes);
  if (orders) tsan_release(exchange);
  complete_if_full(block, warp, *exchange);
  machine->wait([&] { return exchange->done; },
                [&] {
                  return format(" for the lanes 0x%08x of warp %zu",
                                mask & live_lanes(block, warp) & ~exchange->arrived, warp);
                });
  if (orders) tsan_acquire(exchange);
  for (size_t i = 0; i < 32; ++i) {
    copy_bytes(static_cast<unsigned char*>(all) + i * bytes, exchange->values[i], bytes);
  }
  exchange->left |= bit;
  if (exchange->left != exchange->arrived) return;
  TsanQuiet quiet;
  const auto mine_at = std::find_if(open.begin(), open.end(),
                                    [&](const auto& other) { return other.get() == exchange; });
  open.erase(mine_at);
}

}  // namespace fused_rnn::emulator
