// Part of the stand-in: asynchronous copies, mbarriers, and the shared memory of a cluster.
#pragma once

namespace fused_rnn {

// ---- cp.async.

template <int kBytes>
FUSED_RNN_DEVICE void copy_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async moves 4, 8 or 16 bytes");
  emulator::want_global("copy_async", global);
  emulator::copy_start(shared, global, kBytes, valid);
}
FUSED_RNN_DEVICE void copy_async_commit() { emulator::copy_group(); }
template <int kGroups>
FUSED_RNN_DEVICE void copy_async_wait() {
  emulator::copy_wait(kGroups);
}

// ---- Clusters.

FUSED_RNN_DEVICE constexpr bool has_clusters() { return true; }
FUSED_RNN_DEVICE int cluster_rank() { return emulator::place().cluster_rank; }
FUSED_RNN_DEVICE int cluster_size() { return emulator::place().cluster_size; }
FUSED_RNN_DEVICE void cluster_arrive() { emulator::cluster_barrier_arrive(); }
FUSED_RNN_DEVICE void cluster_wait() { emulator::cluster_barrier_wait(); }
FUSED_RNN_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
template <class T>
FUSED_RNN_DEVICE T* map_shared(T* p, int rank) {
  return static_cast<T*>(emulator::peer("map_shared", p, rank));
}

// ---- mbarriers.

struct alignas(8) Mbarrier {
  uint64_t word;
};

FUSED_RNN_DEVICE void mbarrier_init(Mbarrier* barrier, int count) {
  emulator::mbarrier_start(barrier, count);
}
FUSED_RNN_DEVICE void fence_mbarrier_init() {
  emulator::fence("fence_mbarrier_init", emulator::Scope::kBlock);
}
FUSED_RNN_DEVICE void fence_async_proxy() {
  emulator::fence("fence_async_proxy", emulator::Scope::kBlock);
}
FUSED_RNN_DEVICE void mbarrier_expect(Mbarrier* barrier, int bytes) {
  emulator::mbarrier_update("mbarrier_expect", barrier, 0, bytes, emulator::Scope::kBlock);
}
FUSED_RNN_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
  emulator::mbarrier_update("mbarrier_arrive", barrier, 1, 0, emulator::Scope::kBlock);
}
FUSED_RNN_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  emulator::mbarrier_update("mbarrier_arrive_expect", barrier, 1, bytes, emulator::Scope::kBlock);
}
FUSED_RNN_DEVICE void mbarrier_arrive_remote(Mbarrier* barrier, int rank) {
  void* remote = emulator::peer("mbarrier_arrive_remote", barrier, rank);
  emulator::mbarrier_update("mbarrier_arrive_remote", remote, 1, 0, emulator::Scope::kGpu);
}
FUSED_RNN_DEVICE bool mbarrier_try_wait(Mbarrier* barrier, int parity) {
  return emulator::mbarrier_test(barrier, parity);
}
FUSED_RNN_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity) {
  emulator::mbarrier_block(barrier, parity);
}

// ---- Stores and copies that complete on an mbarrier.

template <class T>
FUSED_RNN_DEVICE void store_async(T* shared, T value, Mbarrier* barrier, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16,
                "st.async moves 4, 8 or 16 bytes");
  emulator::send("store_async", emulator::peer("store_async", shared, rank), &value, sizeof(T),
                 emulator::peer("store_async", barrier, rank));
}
FUSED_RNN_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Mbarrier* barrier) {
  const int rank = cluster_rank();
  emulator::want_global("copy_bulk", global);
  emulator::send_bulk("copy_bulk", emulator::peer("copy_bulk", shared, rank), global, bytes,
                      emulator::peer("copy_bulk", barrier, rank));
}
FUSED_RNN_DEVICE void copy_bulk_to_peer(void* to, const void* from, int bytes, Mbarrier* barrier,
                                        int rank) {
  const char* what = "copy_bulk_to_peer";
  const void* own = emulator::peer(what, const_cast<void*>(from), cluster_rank());
  emulator::send_bulk(what, emulator::peer(what, to, rank), own, bytes,
                      emulator::peer(what, barrier, rank));
}

}  // namespace fused_rnn
