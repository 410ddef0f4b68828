// Kernels written wrong on purpose. Each must be caught under some seed of a few, by what
// test_emulator.py expects of it.
#include "case.h"
#include "cuda/primitives.cuh"

namespace fused_rnn::emulator {
namespace {

// Runs a kernel on ints; out[i] must be i afterwards.
template <class... Rest>
Outcome on_ints(Launch launch, int count, void (*kernel)(int*, Rest...), Rest... rest) {
  Memory<int> out("out", size_t(count));
  return Outcome().add(run(launch, kernel, out.data(), rest...)).compare("out", out, [](int i) {
    return i;
  });
}
Launch blocks(const char* name, int grid, int block, uint64_t seed, int cluster = 1) {
  return {.name = name,
          .grid = {grid},
          .block = {block},
          .shared_bytes = 1024,
          .cluster = cluster,
          .seed = seed};
}
int me() { return block_index().x * block_size().x + thread_index().x; }

// ---- Something that orders is missing.

FUSED_RNN_KERNEL no_barrier(int* out) {
  int* shared = shared_memory<int>();
  const int i = thread_index().x, n = block_size().x;
  store(shared + i, n - 1 - i);
  store(out + i, load(shared + n - 1 - i));
}
Outcome missing_barrier(uint64_t seed) {
  return on_ints(blocks("no_barrier", 1, 64, seed), 64, no_barrier);
}

// One buffer and one barrier a step: a fast thread overwrites what a slow one still reads.
FUSED_RNN_KERNEL one_buffer(int* out) {
  int* shared = shared_memory<int>();
  const int i = thread_index().x, n = block_size().x;
  int mine = i;
  for (int step = 0; step < n; ++step) {
    store(shared + i, mine);
    sync_block();
    mine = load(shared + (i + 1) % n);
  }
  store(out + i, mine);
}
Outcome missing_second_barrier(uint64_t seed) {
  return on_ints(blocks("one_buffer", 1, 12, seed), 12, one_buffer);
}

FUSED_RNN_KERNEL no_sync_warp(int* out) {
  int* shared = shared_memory<int>();
  store(shared + lane(), lane() ^ 1);
  ballot(true);  // meets, but orders no memory
  store(out + lane(), load(shared + (lane() ^ 1)));
}
Outcome missing_sync_warp(uint64_t seed) {
  return on_ints(blocks("no_sync_warp", 1, 32, seed), 32, no_sync_warp);
}

FUSED_RNN_DEVICE void receive(int* out, const int* data, unsigned* flag) {
  poll_acquire(flag, [](unsigned seen) { return seen == 1; });
  store(out + thread_index().x, load(data + thread_index().x));
}
// The flag is up before the data is stored; `relaxed`: after, but it orders nothing.
FUSED_RNN_KERNEL send_early(int* out, int* data, unsigned* flags, bool relaxed) {
  const int i = thread_index().x;
  if (block_index().x == 1) {
    receive(out, data, flags + i);
  } else if (relaxed) {
    store(data + i, i);
    store_relaxed(flags + i, 1u);
  } else {
    store_release(flags + i, 1u);
    store(data + i, i);
  }
}
Outcome send(uint64_t seed, bool relaxed) {
  Memory<int> data("data", 8);
  Memory<unsigned> flags("flags", 8);
  flags.fill(0);
  return on_ints(blocks("send_early", 2, 8, seed), 8, send_early, data.data(), flags.data(),
                 relaxed);
}
Outcome early_flag(uint64_t seed) { return send(seed, false); }
Outcome relaxed_flag(uint64_t seed) { return send(seed, true); }

// Sent rightly, but the flag is read without acquire. Loads of the emulator are never early, so the
// result is right; ThreadSanitizer knows.
FUSED_RNN_KERNEL no_acquire(int* out, int* data, unsigned* flags) {
  const int i = thread_index().x;
  if (block_index().x == 0) {
    store(data + i, i);
    store_release(flags + i, 1u);
  } else {
    poll_relaxed(flags + i, [](unsigned seen) { return seen == 1; });
    store(out + i, load(data + i));
  }
}
Outcome missing_acquire(uint64_t seed) {
  Memory<int> data("data", 8);
  Memory<unsigned> flags("flags", 8);
  flags.fill(0);
  return on_ints(blocks("no_acquire", 2, 8, seed), 8, no_acquire, data.data(), flags.data());
}

// The block's barrier orders its threads, not what other blocks see.
FUSED_RNN_KERNEL no_fence(int* out, int* data, unsigned* flag) {
  const int i = thread_index().x;
  if (block_index().x == 1) return receive(out, data, flag);
  store(data + i, i);
  sync_block();
  if (i == 0) store_relaxed(flag, 1u);
}
Outcome missing_fence(uint64_t seed) {
  Memory<int> data("data", 16);
  Memory<unsigned> flag("flag", 1);
  flag.fill(0);
  return on_ints(blocks("no_fence", 2, 16, seed), 16, no_fence, data.data(), flag.data());
}

FUSED_RNN_KERNEL no_cluster_sync(int* out) {
  int* shared = shared_memory<int>();
  const int i = thread_index().x, rank = cluster_rank(), n = block_size().x;
  store(map_shared(shared, 1 - rank) + i, (1 - rank) * n + i);
  sync_block();
  store(out + me(), load(shared + i));
  cluster_sync();
}
Outcome missing_cluster_sync(uint64_t seed) {
  return on_ints(blocks("no_cluster_sync", 2, 8, seed, 2), 16, no_cluster_sync);
}

FUSED_RNN_KERNEL no_copy_wait(int* out, const int* in) {
  int* shared = shared_memory<int>();
  const int i = thread_index().x;
  copy_async<4>(shared + i, in + i);
  copy_async_commit();
  copy_async_wait<1>();  // allows the one group to be under way
  store(out + i, load(shared + i));
}
Outcome missing_copy_wait(uint64_t seed) {
  Memory<int> in("in", 32);
  for (int i = 0; i < 32; ++i) in[size_t(i)] = i;
  return on_ints(blocks("no_copy_wait", 1, 32, seed), 32, no_copy_wait,
                 static_cast<const int*>(in.data()));
}

// Sends to the peer; `expected` bytes are waited for, `waits` or not.
FUSED_RNN_KERNEL exchange_async(int* out, int expected, bool waits, bool initialises) {
  int* shared = shared_memory<int>();
  FUSED_RNN_SHARED(Mbarrier, full, 1);
  const int i = thread_index().x, n = block_size().x, rank = cluster_rank();
  if (i == 0 && initialises) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, expected);
  }
  cluster_sync();
  store_async(shared + i, (1 - rank) * n + i, full, 1 - rank);
  if (waits) mbarrier_wait(full, 0);
  store(out + me(), load(shared + i));
  if (waits) cluster_sync();
}
Outcome missing_mbarrier_wait(uint64_t seed) {
  return on_ints(blocks("exchange_async", 2, 8, seed, 2), 16, exchange_async, 32, false, true);
}
Outcome too_few_bytes(uint64_t seed) {
  return on_ints(blocks("exchange_async", 2, 8, seed, 2), 16, exchange_async, 16, true, true);
}
Outcome too_many_bytes(uint64_t seed) {
  return on_ints(blocks("exchange_async", 2, 8, seed, 2), 16, exchange_async, 36, true, true);
}
Outcome no_mbarrier_init(uint64_t seed) {
  return on_ints(blocks("exchange_async", 2, 8, seed, 2), 16, exchange_async, 32, true, false);
}

// Sends after the last step, when the peer may have ended.
FUSED_RNN_KERNEL send_last(int* out) {
  int* shared = shared_memory<int>();
  FUSED_RNN_SHARED(Mbarrier, full, 1);
  if (thread_index().x == 0) mbarrier_init(full, 1);
  cluster_sync();
  store(out + me(), me());
  store_async(shared + thread_index().x, 1, full, 1 - cluster_rank());
}
Outcome peer_ended(uint64_t seed) {
  return on_ints(blocks("send_last", 2, 4, seed, 2), 8, send_last);
}

// ---- Addresses.

FUSED_RNN_KERNEL touch(int* out, int kind) {
  int* shared = shared_memory<int>();
  FUSED_RNN_SHARED(int, fixed, 4);
  const int i = thread_index().x;
  store(out + i, i);
  if (i != 5 || block_index().x != 0) return;
  switch (kind) {
    case 0: store(out + 8, 1); break;
    case 1: store(out, load(out - 1)); break;
    case 2: store(shared + 256, 1); break;
    case 3: store(fixed + 4, 1); break;
    case 4: load_vector<4>(out + 1); break;
    case 5: load_vector<4>(out + 8); break;
    case 6: out[9] = 7; break;
    case 7: shared[257] = 7; break;
    case 8: atomic_add(reinterpret_cast<unsigned*>(out) + 8, 1u); break;
    case 9: store(static_cast<int*>(nullptr), 1); break;
    case 10: copy_async<16>(shared + 2, out); break;
    case 11: load_read_only(shared); break;
    case 12: copy_async<4>(shared, shared + 4); break;
  }
}
template <int kKind>
Outcome touches(uint64_t seed) {
  return on_ints(blocks("touch", 1, 8, seed), 8, touch, kKind);
}

// ---- Threads that wait for ever, and misuse.

FUSED_RNN_KERNEL hang(int* out, int kind, unsigned* word) {
  const int i = thread_index().x;
  FUSED_RNN_SHARED(Mbarrier, full, 1);
  store(out + me(), me());
  switch (kind) {
    case 0:  // one warp at each of two barriers that want both
      if (warp() == 0) sync_threads(1, 64);
      if (warp() == 1) sync_threads(2, 64);
      break;
    case 1:  // the flag of the neighbour, before one's own
      poll_acquire(word + (i + 1) % 2, [](unsigned seen) { return seen == 1; });
      store_release(word + i % 2, 1u);
      break;
    case 2:  // spins in a loop of its own
      while (load_acquire(word) == 0) continue;
      break;
    case 3:
      if (i == 0) shuffle(i, 1);
      if (i == 1) sync_block();
      break;
    case 4:
      if (i < 16) shuffle(i, 1);
      if (i >= 16) ballot(true);
      break;
    case 5:
      if (i == 0) shuffle(i, 1, 0xfffffffeu);
      break;
    case 6:
      if (i == 0) mbarrier_init(full, 1);
      if (i == 0) mbarrier_wait(full, 0);
      break;
    case 7:
      if (i == 0) mbarrier_init(full, 1);
      sync_block();
      mbarrier_expect(full, 4);
      mbarrier_arrive(full);
      break;
    case 8: cluster_wait(); break;
  }
}
template <int kKind>
Outcome hangs(uint64_t seed) {
  Memory<unsigned> word("word", 2);
  word.fill(0);
  Launch launch = blocks("hang", 1, 64, seed);
  launch.idle_limit = 1 << 16;
  return on_ints(launch, 64, hang, kKind, word.data());
}

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn::emulator;
  return run_cases(count, words,
                   {{"missing_barrier", missing_barrier},
                    {"missing_second_barrier", missing_second_barrier},
                    {"missing_sync_warp", missing_sync_warp},
                    {"early_flag", early_flag},
                    {"relaxed_flag", relaxed_flag},
                    {"missing_acquire", missing_acquire},
                    {"missing_fence", missing_fence},
                    {"missing_cluster_sync", missing_cluster_sync},
                    {"missing_copy_wait", missing_copy_wait},
                    {"missing_mbarrier_wait", missing_mbarrier_wait},
                    {"too_few_bytes", too_few_bytes},
                    {"too_many_bytes", too_many_bytes},
                    {"no_mbarrier_init", no_mbarrier_init},
                    {"peer_ended", peer_ended},
                    {"store_past_end", touches<0>},
                    {"load_before_start", touches<1>},
                    {"dynamic_shared_past_end", touches<2>},
                    {"static_shared_past_end", touches<3>},
                    {"misaligned_vector", touches<4>},
                    {"vector_past_end", touches<5>},
                    {"bypass_global", touches<6>},
                    {"bypass_shared", touches<7>},
                    {"atomic_past_end", touches<8>},
                    {"null_pointer", touches<9>},
                    {"misaligned_copy", touches<10>},
                    {"read_only_shared", touches<11>},
                    {"copy_from_shared", touches<12>},
                    {"two_barriers", hangs<0>},
                    {"poll_each_other", hangs<1>},
                    {"spin", hangs<2>},
                    {"lane_elsewhere", hangs<3>},
                    {"mixed_lanes", hangs<4>},
                    {"lane_not_in_mask", hangs<5>},
                    {"mbarrier_never", hangs<6>},
                    {"too_many_arrivals", hangs<7>},
                    {"wait_without_arrival", hangs<8>}});
}
