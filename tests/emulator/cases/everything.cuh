// One kernel that names every primitive: compiled by nvcc for each architecture and by g++ against
// the stand-in, so that the two sides cannot drift apart. It is compiled, not run.
#pragma once

#include "cuda/primitives.cuh"

namespace fused_rnn {

FUSED_RNN_DEVICE float positions(float x) {
  const Index3 thread = thread_index(), block = block_index();
  const Index3 size = block_size(), grid = grid_size();
  x += float(thread.x + thread.y + thread.z + block.x + block.y + block.z);
  x += float(size.x + size.y + size.z + grid.x + grid.y + grid.z + lane() + warp());
  return x + float(cluster_rank() + cluster_size());
}

FUSED_RNN_DEVICE float votes(float x) {
  x += shuffle(x, 3) + shuffle_xor(x, 1, kFullWarp);
  sync_warp();
  const unsigned votes = ballot(x > 0);
  return any(x > 1) || all(x > 2) ? x : float(votes);
}

template <class Word>
FUSED_RNN_DEVICE void words(Word* p) {
  atomic_add(p, Word(1));
  atomic_add_release(p, Word(1));
  atomic_or(p, Word(1));
  atomic_max(p, Word(1));
  atomic_exchange(p, Word(1));
  atomic_compare_exchange(p, Word(1), Word(2));
  store_relaxed(p, load_relaxed(p));
  store_release(p, load_acquire(p));
  poll_relaxed(p, [](Word word) { return word > 1; });
  poll_acquire(p, [](Word word) { return word > 2; });
}

template <class T>
FUSED_RNN_DEVICE float conversions(T* p) {
  Vector<T, 2> two = load_vector<2>(p);
  store_vector(p + 2, two);
  store_streaming(p, load_streaming(p));
  const T x = load_read_only(p);
  store(p, from_float<T>(to_float(x) + to_float(load(p + 1))));
  return to_float(two[0]);
}

FUSED_RNN_DEVICE void asynchronous(unsigned char* shared, const unsigned char* global) {
  FUSED_RNN_SHARED(Mbarrier, barrier, 1);
  copy_async<4>(shared, global);
  copy_async<8>(shared, global);
  copy_async<16>(shared, global, 12);
  copy_async_commit();
  copy_async_wait<0>();
  mbarrier_init(barrier, 1);
  fence_mbarrier_init();
  fence_async_proxy();
  cluster_arrive();
  cluster_wait();
  mbarrier_expect(barrier, 16);
  mbarrier_arrive(barrier);
  mbarrier_arrive_expect(barrier, 16);
  mbarrier_arrive_remote(barrier, 0);
  store_async(reinterpret_cast<float*>(shared), 1.0f, barrier, 0);
  store_async(reinterpret_cast<uint64_t*>(shared), uint64_t(1), barrier, 0);
  store_async(reinterpret_cast<Vector<float, 4>*>(shared), Vector<float, 4>{}, barrier, 0);
  copy_bulk(shared, global, 16, barrier);
  copy_bulk_to_peer(shared, shared + 16, 16, barrier, 0);
  if (!mbarrier_try_wait(barrier, 0)) mbarrier_wait(barrier, 0);
  cluster_sync();
  store(map_shared(shared, 0), load(shared + 1));
}

FUSED_RNN_DEVICE void matrices(float* out, const unsigned char* shared) {
  uint32_t one[1], two[2], four[4];
  load_matrix(one, shared);
  load_matrix<1, true>(one, shared);
  load_matrix(two, shared);
  load_matrix<2, true>(two, shared);
  load_matrix(four, shared);
  load_matrix<4, true>(four, shared);
  four[0] ^= one[0] ^ to_tf32(bits_float(float_bits(1.5f)));
  float d[4] = {};
  mma<bf16>(d, four, two);
  mma<fp16>(d, four, two);
  FUSED_RNN_UNROLL
  for (int i = 0; i < 2; ++i)
    if constexpr (has_mma() && has_clusters()) mma<tf32>(d, four, two);
  FUSED_RNN_ROLL
  for (int i = 0; i < 4; ++i) store(out + i, d[i]);
}

FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(256, 1)
    everything(float* x, bf16* y, fp16* z, uint32_t* a, uint64_t* b, FUSED_RNN_ARGUMENT float one) {
  unsigned char* shared = shared_memory<unsigned char>();
  FUSED_RNN_SHARED(float, fixed, 32);
  store(fixed + lane(), votes(positions(one)));
  sync_block();
  sync_threads(1, 64);
  words(a);
  fence_block();
  words(b);
  fence_gpu();
  store(x, conversions(x) + conversions(y) + conversions(z) + load(fixed));
  store(a, pack(load(y), load(y + 1)) + pack(load(z), load(z + 1)));
  asynchronous(shared, reinterpret_cast<const unsigned char*>(x));
  matrices(x, shared);
  store(x + 8, approximate_exp(load(x)) + approximate_tanh(load(x)));
}

}  // namespace fused_rnn
