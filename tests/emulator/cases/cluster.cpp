// Clusters, mbarriers and asynchronous copies, each against plain arithmetic.
#include "case.h"
#include "cuda/primitives.cuh"

namespace fused_rnn::emulator {
namespace {

// Each block writes into the shared memory of the next, and reads that of the one after.
FUSED_RNN_KERNEL neighbours(int* out) {
  int* shared = shared_memory<int>();
  const int i = thread_index().x, rank = cluster_rank(), size = cluster_size();
  const int block = block_index().x;
  store(map_shared(shared, (rank + 1) % size) + i, block * 100 + i);
  cluster_sync();
  const int far = load(map_shared(shared, (rank + 2) % size) + i);
  cluster_arrive();  // nobody ends while others read
  store(out + block * block_size().x + i, far * 10 + rank);
  cluster_wait();
}

Outcome test_cluster(uint64_t seed) {
  Memory<int> out("out", 8 * 16);
  Launch launch{.name = "neighbours",
                .grid = {8},
                .block = {16},
                .shared_bytes = 64,
                .cluster = 4,
                .seed = seed};
  return Outcome().add(run(launch, neighbours, out.data())).compare("out", out, [](int i) {
    const int block = i / 16, rank = block % 4, from = block - rank + (rank + 1) % 4;
    return (from * 100 + i % 16) * 10 + rank;
  });
}

// The exchange of a recurrent layer on a cluster: every block sends its part of h to every peer,
// double-buffered, and waits on one mbarrier a slot. Nothing is sent after the last step.
template <class T>
FUSED_RNN_KERNEL recurrence(T* out, int steps) {
  constexpr int kWords = sizeof(T) / 4;
  const int i = thread_index().x, n = block_size().x, rank = cluster_rank(), size = cluster_size();
  T* h = shared_memory<T>();  // [2][size][n]
  FUSED_RNN_SHARED(Mbarrier, full, 2);
  if (i == 0) {
    for (int slot = 0; slot < 2; ++slot) mbarrier_init(full + slot, 1);
    fence_mbarrier_init();
    for (int slot = 0; slot < 2; ++slot) {
      mbarrier_arrive_expect(full + slot, int(sizeof(T)) * n * size);
    }
  }
  cluster_sync();
  uint32_t mine[kWords];
  for (int w = 0; w < kWords; ++w) mine[w] = uint32_t(rank * n + i + w);
  for (int step = 0; step + 1 < steps; ++step) {
    const int slot = step % 2;
    T value;
    memcpy(&value, mine, sizeof(T));
    for (int to = 0; to < size; ++to) {
      store_async(h + (slot * size + rank) * n + i, value, full + slot, to);
    }
    mbarrier_wait(full + slot, step / 2 % 2);
    // For the step after next: each of its bytes is sent after this block's answer to all of them.
    if (i == 0) mbarrier_arrive_expect(full + slot, int(sizeof(T)) * n * size);
    for (int w = 0; w < kWords; ++w) mine[w] += 1;
    for (int from = 0; from < size; ++from) {
      for (int j = 0; j < n; ++j) {
        uint32_t words[kWords];
        const T got = load(h + (slot * size + from) * n + j);
        memcpy(words, &got, sizeof(T));
        for (int w = 0; w < kWords; ++w) mine[w] += words[w];
      }
    }
    sync_block();
  }
  T value;
  memcpy(&value, mine, sizeof(T));
  store(out + block_index().x * n + i, value);
}

template <class T>
Outcome test_store_async(uint64_t seed) {
  constexpr int kBlocks = 4, n = 6, kSteps = 9;
  Memory<T> out("out", kBlocks * n);
  Launch launch{.name = "recurrence",
                .grid = {kBlocks},
                .block = {n},
                .shared_bytes = 2 * kBlocks * n * sizeof(T),
                .cluster = kBlocks,
                .seed = seed};
  Outcome outcome;
  outcome.add(run(launch, recurrence<T>, out.data(), kSteps));
  Memory<uint32_t> words("words", kBlocks * n * sizeof(T) / 4);
  memcpy(words.data(), out.data(), words.size() * 4);
  return outcome.compare("words", words, [](int i) {
    constexpr int kWords = sizeof(T) / 4;
    uint32_t sum = 0, more = 0;  // every thread adds the same to its start
    for (int j = 0; j < kBlocks * n; ++j) sum += uint32_t(j + i % kWords);
    for (int step = 0; step + 1 < kSteps; ++step) {
      more += 1 + sum + kBlocks * n * more;
    }
    return uint32_t(i / kWords + i % kWords) + more;
  });
}

// Plain stores to a peer, then an arrival at its mbarrier.
FUSED_RNN_KERNEL arrive_remotely(int* out) {
  int* shared = shared_memory<int>();
  FUSED_RNN_SHARED(Mbarrier, barrier, 1);
  const int i = thread_index().x, n = block_size().x, rank = cluster_rank();
  if (i == 0) mbarrier_init(barrier, n + 1);
  if (i == 0) fence_mbarrier_init();
  cluster_sync();
  store(map_shared(shared, 1 - rank) + i, rank * 100 + i);
  mbarrier_arrive_remote(barrier, 1 - rank);
  if (i == 0) mbarrier_arrive(barrier);
  while (!mbarrier_try_wait(barrier, 0)) continue;
  store(out + block_index().x * n + i, load(shared + n - 1 - i));
  cluster_sync();
}

Outcome test_remote_arrival(uint64_t seed) {
  Memory<int> out("out", 2 * 40);
  Launch launch{.name = "arrive_remotely",
                .grid = {2},
                .block = {40},
                .shared_bytes = 160,
                .cluster = 2,
                .seed = seed};
  return Outcome().add(run(launch, arrive_remotely, out.data())).compare("out", out, [](int i) {
    return (1 - i / 40) * 100 + 39 - i % 40;
  });
}

// Two groups in flight; the tail is filled with zeros.
template <int kBytes>
FUSED_RNN_KERNEL copy_groups(const char* in, char* out, int steps, int tail) {
  const int i = thread_index().x, n = block_size().x * kBytes;
  char* shared = shared_memory<char>();
  for (int step = 0; step < steps; ++step) {
    if (step == 0) {
      copy_async<kBytes>(shared + i * kBytes, in + i * kBytes);
      copy_async_commit();
    }
    if (step + 1 < steps) {
      const int at = (step + 1) % 2 * n + i * kBytes;
      copy_async<kBytes>(shared + at, in + (step + 1) * n + i * kBytes,
                         step + 2 == steps ? tail : kBytes);
    }
    copy_async_commit();
    copy_async_wait<1>();
    sync_block();
    for (int b = 0; b < kBytes; ++b) {  // a neighbour's bytes
      const int at = (i + 1) % block_size().x * kBytes + b;
      store(out + step * n + at, load(shared + step % 2 * n + at));
    }
    sync_block();
  }
}

template <int kBytes>
Outcome test_copy_async(uint64_t seed) {
  constexpr int kThreads = 10, kSteps = 4, kTail = kBytes - 3;
  Memory<char> in("in", kThreads * kSteps * kBytes), out("out", kThreads * kSteps * kBytes);
  for (size_t i = 0; i < in.size(); ++i) in[i] = char(i % 101 + 1);
  Launch launch{.name = "copy_groups",
                .block = {kThreads},
                .shared_bytes = 2 * kThreads * kBytes,
                .seed = seed};
  return Outcome()
      .add(run(launch, copy_groups<kBytes>, in.data(), out.data(), kSteps, kTail))
      .compare("out", out, [](int i) {
        const bool zero = i >= (kSteps - 1) * kThreads * kBytes && i % kBytes >= kTail;
        return zero ? char(0) : char(i % 101 + 1);
      });
}

// From global to shared memory, then on to the peer.
FUSED_RNN_KERNEL copy_bulks(const int* in, int* out, int count) {
  int* own = shared_memory<int>();
  int* other = own + count;
  FUSED_RNN_SHARED(Mbarrier, barriers, 2);
  const int i = thread_index().x, n = block_size().x, rank = cluster_rank();
  const int bytes = count * int(sizeof(int));
  if (i == 0) {
    mbarrier_init(barriers, 1);
    mbarrier_init(barriers + 1, 1);
    fence_mbarrier_init();
    mbarrier_expect(barriers, bytes);
    mbarrier_arrive(barriers);
    mbarrier_arrive_expect(barriers + 1, bytes);
    copy_bulk(own, in + block_index().x * count, bytes, barriers);
  }
  cluster_sync();
  mbarrier_wait(barriers, 0);
  for (int j = i; j < count; j += n) store(own + j, 2 * load(own + j));
  fence_async_proxy();
  sync_block();
  if (i == 0) copy_bulk_to_peer(other, own, bytes, barriers + 1, 1 - rank);
  mbarrier_wait(barriers + 1, 0);
  for (int j = i; j < count; j += n) store(out + block_index().x * count + j, load(other + j));
  cluster_sync();
}

Outcome test_copy_bulk(uint64_t seed) {
  constexpr int kCount = 40;
  Memory<int> in("in", 2 * kCount), out("out", 2 * kCount);
  for (int i = 0; i < 2 * kCount; ++i) in[size_t(i)] = i;
  Launch launch{.name = "copy_bulks",
                .grid = {2},
                .block = {8},
                .shared_bytes = 2 * kCount * 4,
                .cluster = 2,
                .seed = seed};
  return Outcome()
      .add(run(launch, copy_bulks, in.data(), out.data(), kCount))
      .compare("out", out, [](int i) { return 2 * ((i + kCount) % (2 * kCount)); });
}

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn;
  using namespace fused_rnn::emulator;
  return run_cases(count, words,
                   {{"cluster", test_cluster},
                    {"store_async_4", test_store_async<uint32_t>},
                    {"store_async_8", test_store_async<Vector<uint32_t, 2>>},
                    {"store_async_16", test_store_async<Vector<uint32_t, 4>>},
                    {"remote_arrival", test_remote_arrival},
                    {"copy_async_4", test_copy_async<4>},
                    {"copy_async_8", test_copy_async<8>},
                    {"copy_async_16", test_copy_async<16>},
                    {"copy_bulk", test_copy_bulk}});
}
