// Part of primitives.cuh: asynchronous copies, mbarriers, and the shared memory of a cluster.
#pragma once

namespace fused_rnn {

// ---- cp.async: a thread's own copies from global to shared memory, sm_80.

// 4, 8 or 16 bytes, of which the first `valid` are read and the rest become zero.
template <int kBytes>
FUSED_RNN_DEVICE void copy_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async moves 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  const uint32_t to = detail::shared_address(shared);
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (kBytes == 16) {  // the only size that may pass by L1, where nobody reads it again
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(valid)
                 : "memory");
  }
#else
  unsupported("copy_async needs sm_80");
#endif
}
FUSED_RNN_DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  unsupported("copy_async_commit needs sm_80");
#endif
}
// Waits until at most kGroups of the thread's newest groups are under way.
template <int kGroups>
FUSED_RNN_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
  unsupported("copy_async_wait needs sm_80");
#endif
}

// ---- Clusters. Below sm_90 each block is a cluster of its own.

// As has_mma(): a kernel for several blocks leaves its body out elsewhere.
FUSED_RNN_DEVICE constexpr bool has_clusters() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return false;
#else
  return true;
#endif
}

FUSED_RNN_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}
FUSED_RNN_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
#else
  return 1;
#endif
}
// Every thread of the cluster arrives once, then waits once. What was stored before the arrival,
// own or remote shared memory included, is seen after the wait. Not the .aligned form: a warp whose
// first lane has just initialised an mbarrier need not have come together again.
FUSED_RNN_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
FUSED_RNN_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}
FUSED_RNN_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// Where p, in the block's own shared memory, stands in the block of that rank.
template <class T>
FUSED_RNN_DEVICE T* map_shared(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return mapped;
#else
  return p;
#endif
}

namespace detail {

// st.async and remote arrivals want the 32-bit address of the cluster's shared window.
FUSED_RNN_DEVICE uint32_t cluster_address(const void* p, int rank) {
  uint32_t mapped = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared_address(p)), "r"(rank));
#endif
  return mapped;
}

}  // namespace detail

// ---- mbarriers, in the block's shared memory, sm_90. A phase ends when `count` arrivals and every
// expected byte are in; phases count from 0 and `parity` is that of the phase waited for.

struct alignas(8) Mbarrier {
  uint64_t word;
};

// One thread; then fence_mbarrier_init, and a barrier before anyone else touches it.
FUSED_RNN_DEVICE void mbarrier_init(Mbarrier* barrier, int count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)),
               "r"(count)
               : "memory");
#else
  unsupported("mbarrier_init needs sm_90");
#endif
}
FUSED_RNN_DEVICE void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  unsupported("fence_mbarrier_init needs sm_90");
#endif
}
// Between plain stores to shared memory and a bulk copy that reads them, or reads and a bulk copy
// that overwrites.
FUSED_RNN_DEVICE void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  unsupported("fence_async_proxy needs sm_90");
#endif
}
// `bytes` more belong to the current phase.
FUSED_RNN_DEVICE void mbarrier_expect(Mbarrier* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(
                   detail::shared_address(barrier)),
               "r"(bytes)
               : "memory");
#else
  unsupported("mbarrier_expect needs sm_90");
#endif
}
FUSED_RNN_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(detail::shared_address(barrier))
               : "memory");
#else
  unsupported("mbarrier_arrive needs sm_90");
#endif
}
FUSED_RNN_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   detail::shared_address(barrier)),
               "r"(bytes)
               : "memory");
#else
  unsupported("mbarrier_arrive_expect needs sm_90");
#endif
}
// At the mbarrier of the same place in the block of that rank.
FUSED_RNN_DEVICE void mbarrier_arrive_remote(Mbarrier* barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   detail::cluster_address(barrier, rank))
               : "memory");
#else
  unsupported("mbarrier_arrive_remote needs sm_90");
#endif
}
// Scope of the cluster: what peers sent or stored before they arrived is seen.
FUSED_RNN_DEVICE bool mbarrier_try_wait(Mbarrier* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(detail::shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
#else
  unsupported("mbarrier_try_wait needs sm_90");
  return true;
#endif
}
FUSED_RNN_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity) {
  while (!mbarrier_try_wait(barrier, parity)) continue;
}

// ---- Stores and copies that complete on an mbarrier, sm_90. Each counts its bytes there.

// Writes value at the place of `shared` in the block of that rank, whose mbarrier at the place of
// `barrier` counts it. 4, 8 or 16 bytes.
template <class T>
FUSED_RNN_DEVICE void store_async(T* shared, T value, Mbarrier* barrier, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16,
                "st.async moves 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 900
  const uint32_t to = detail::cluster_address(shared, rank);
  const uint32_t at = detail::cluster_address(barrier, rank);
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
        "r"(detail::bit_cast<unsigned>(value)), "r"(at)
        : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to),
        "l"(detail::bit_cast<uint64_t>(value)), "r"(at)
        : "memory");
  } else {
    const uint4 bits = detail::bit_cast<uint4>(value);
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(to),
        "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w), "r"(at)
        : "memory");
  }
#else
  unsupported("store_async needs sm_90");
#endif
}
// One thread copies `bytes`, a multiple of 16, from global memory to the block's own shared memory.
FUSED_RNN_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Mbarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(detail::shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(detail::shared_address(barrier))
      : "memory");
#else
  unsupported("copy_bulk needs sm_90");
#endif
}
// The same from the block's own shared memory to the place of `to` in the block of that rank, whose
// mbarrier at the place of `barrier` counts the bytes.
FUSED_RNN_DEVICE void copy_bulk_to_peer(void* to, const void* from, int bytes, Mbarrier* barrier,
                                        int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(detail::cluster_address(to, rank)),
      "r"(detail::shared_address(from)), "r"(bytes), "r"(detail::cluster_address(barrier, rank))
      : "memory");
#else
  unsupported("copy_bulk_to_peer needs sm_90");
#endif
}

}  // namespace fused_rnn
