// Every intrinsic and every line of inline PTX of the CUDA kernels. Kernels are written in these
// names only, so that the same source also runs in tests/emulator, which puts a file of this name
// first on the include path: include it as "cuda/primitives.cuh".
//
// load() and store() are plain accesses here; in the emulator they see the address. Pointers are
// generic. One file serves sm_75 to sm_120: what an architecture lacks traps in words, so a kernel
// compiles everywhere and the plan decides where it runs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define FUSED_RNN_DEVICE __device__ __forceinline__
#define FUSED_RNN_KERNEL __global__ void
#define FUSED_RNN_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// Before a kernel's argument that it reads by a computed index: where it lies, not from a copy.
#define FUSED_RNN_ARGUMENT const __grid_constant__
// Before a loop of few, constant rounds: its indices become constants, so arrays stay in registers.
#define FUSED_RNN_UNROLL _Pragma("unroll")
// Before a loop that must stay one.
#define FUSED_RNN_ROLL _Pragma("unroll 1")
// An array of the block; `name` is a T*, or decays to one.
#define FUSED_RNN_SHARED(T, name, count) __shared__ T name[count]

namespace fused_rnn {

using bf16 = __nv_bfloat16;
using fp16 = __half;
struct tf32 {};  // names the mma, is never stored

constexpr unsigned kFullWarp = 0xffffffffu;

struct Index3 {
  int x, y, z;
};

inline __device__ __noinline__ void unsupported(const char* what) {
  // In parts: arguments would lie in local memory, which a kernel must not have.
  printf("fused_rnn: ");
  printf(what);
  printf("\n");
  __trap();
}

// ---- Where a thread stands.

FUSED_RNN_DEVICE Index3 thread_index() {
  return {int(threadIdx.x), int(threadIdx.y), int(threadIdx.z)};
}
FUSED_RNN_DEVICE Index3 block_index() {
  return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)};
}
FUSED_RNN_DEVICE Index3 block_size() { return {int(blockDim.x), int(blockDim.y), int(blockDim.z)}; }
FUSED_RNN_DEVICE Index3 grid_size() { return {int(gridDim.x), int(gridDim.y), int(gridDim.z)}; }
// Of a block with one dimension: its threads fill warps in the order of x.
FUSED_RNN_DEVICE int lane() { return int(threadIdx.x % 32); }
FUSED_RNN_DEVICE int warp() { return int(threadIdx.x / 32); }

// ---- Barriers and fences.

FUSED_RNN_DEVICE void sync_block() { __syncthreads(); }
// `threads`, a multiple of 32, of the block meet at barrier `id`, 1 to 15; sync_block is 0. Lanes
// of a warp need not come together (bar.sync would want that).
FUSED_RNN_DEVICE void sync_threads(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FUSED_RNN_DEVICE void sync_warp(unsigned mask = kFullWarp) { __syncwarp(mask); }

FUSED_RNN_DEVICE void fence_block() { __threadfence_block(); }
FUSED_RNN_DEVICE void fence_gpu() { __threadfence(); }

// ---- Warp shuffles and votes. Every lane of the mask calls them.

template <class T>
FUSED_RNN_DEVICE T shuffle(T value, int from, unsigned mask = kFullWarp) {
  return __shfl_sync(mask, value, from);
}
template <class T>
FUSED_RNN_DEVICE T shuffle_xor(T value, int bits, unsigned mask = kFullWarp) {
  return __shfl_xor_sync(mask, value, bits);
}
FUSED_RNN_DEVICE unsigned ballot(bool vote, unsigned mask = kFullWarp) {
  return __ballot_sync(mask, vote);
}
FUSED_RNN_DEVICE bool any(bool vote, unsigned mask = kFullWarp) { return __any_sync(mask, vote); }
FUSED_RNN_DEVICE bool all(bool vote, unsigned mask = kFullWarp) { return __all_sync(mask, vote); }

// ---- Plain memory. A Vector of 4, 8 or 16 bytes moves in one instruction.

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
  __host__ __device__ T& operator[](int i) { return values[i]; }
  __host__ __device__ const T& operator[](int i) const { return values[i]; }
};

namespace detail {

template <int kBytes>
struct Bits;
template <>
struct Bits<2> {
  using Type = unsigned short;
};
template <>
struct Bits<4> {
  using Type = unsigned;
};
template <>
struct Bits<8> {
  using Type = uint2;
};
template <>
struct Bits<16> {
  using Type = uint4;
};

// By value: a copy from memory would be made byte by byte.
template <class To, class From>
FUSED_RNN_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
template <class T>
FUSED_RNN_DEVICE const typename Bits<sizeof(T)>::Type* as_bits(const T* p) {
  return reinterpret_cast<const typename Bits<sizeof(T)>::Type*>(p);
}
template <class T>
FUSED_RNN_DEVICE typename Bits<sizeof(T)>::Type* as_bits(T* p) {
  return reinterpret_cast<typename Bits<sizeof(T)>::Type*>(p);
}
FUSED_RNN_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

}  // namespace detail

template <class T>
FUSED_RNN_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
FUSED_RNN_DEVICE void store(T* p, T value) {
  *p = value;
}
template <int N, class T>
FUSED_RNN_DEVICE Vector<T, N> load_vector(const T* p) {
  return detail::bit_cast<Vector<T, N>>(*detail::as_bits(reinterpret_cast<const Vector<T, N>*>(p)));
}
template <int N, class T>
FUSED_RNN_DEVICE void store_vector(T* p, Vector<T, N> value) {
  using Bits = typename detail::Bits<sizeof(value)>::Type;
  *reinterpret_cast<Bits*>(p) = detail::bit_cast<Bits>(value);
}

// Global memory that no thread of the launch writes: may stay in L1.
template <class T>
FUSED_RNN_DEVICE T load_read_only(const T* p) {
  return detail::bit_cast<T>(__ldg(detail::as_bits(p)));
}
// Global memory touched once: evicted first, so that weights stay in L2.
template <class T>
FUSED_RNN_DEVICE T load_streaming(const T* p) {
  return detail::bit_cast<T>(__ldcs(detail::as_bits(p)));
}
template <class T>
FUSED_RNN_DEVICE void store_streaming(T* p, T value) {
  __stcs(detail::as_bits(p), detail::bit_cast<typename detail::Bits<sizeof(T)>::Type>(value));
}

// The dynamic shared memory of the block, from its first byte. 128: what bulk copies like best.
template <class T>
FUSED_RNN_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char fused_rnn_shared[];
  return reinterpret_cast<T*>(fused_rnn_shared);
}

// ---- Conversions and approximate functions.

FUSED_RNN_DEVICE float to_float(float x) { return x; }
FUSED_RNN_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
FUSED_RNN_DEVICE float to_float(fp16 x) { return __half2float(x); }

template <class T>
FUSED_RNN_DEVICE T from_float(float x);
template <>
FUSED_RNN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FUSED_RNN_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
FUSED_RNN_DEVICE fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}

// Two neighbours of a row in a 32-bit register, `low` at the lower address.
template <class T>
FUSED_RNN_DEVICE uint32_t pack(T low, T high) {
  return detail::bit_cast<uint32_t>(Vector<T, 2>{{low, high}});
}
FUSED_RNN_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
FUSED_RNN_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
// The bits of x rounded to TF32's 10 bits of mantissa, ties away from zero.
FUSED_RNN_DEVICE uint32_t to_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  unsupported("TF32 needs sm_80");
  return 0;
#endif
}

// For half-type I/O only.
FUSED_RNN_DEVICE float approximate_exp(float x) { return __expf(x); }
FUSED_RNN_DEVICE float approximate_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Words that other blocks read or write: 32 and 64 bits, scope of the GPU.

namespace detail {

// "r" for 32 bits, "l" for 64: the constraint is part of the text, so each width has its own.
#define FUSED_RNN_WORD(Word, bits, constraint)                                                  \
  FUSED_RNN_DEVICE Word word_load_relaxed(const Word* p) {                                      \
    Word value;                                                                                 \
    asm volatile("ld.relaxed.gpu.b" #bits " %0, [%1];" : "=" constraint(value) : "l"(p));       \
    return value;                                                                               \
  }                                                                                             \
  FUSED_RNN_DEVICE Word word_load_acquire(const Word* p) {                                      \
    Word value;                                                                                 \
    asm volatile("ld.acquire.gpu.b" #bits " %0, [%1];"                                          \
                 : "=" constraint(value)                                                        \
                 : "l"(p)                                                                       \
                 : "memory");                                                                   \
    return value;                                                                               \
  }                                                                                             \
  FUSED_RNN_DEVICE void word_store_relaxed(Word* p, Word value) {                               \
    asm volatile("st.relaxed.gpu.b" #bits " [%0], %1;" ::"l"(p), constraint(value));            \
  }                                                                                             \
  FUSED_RNN_DEVICE void word_store_release(Word* p, Word value) {                               \
    asm volatile("st.release.gpu.b" #bits " [%0], %1;" ::"l"(p), constraint(value) : "memory"); \
  }                                                                                             \
  FUSED_RNN_DEVICE Word word_add_release(Word* p, Word value) {                                 \
    Word old;                                                                                   \
    asm volatile("atom.add.release.gpu.u" #bits " %0, [%1], %2;"                                \
                 : "=" constraint(old)                                                          \
                 : "l"(p), constraint(value)                                                    \
                 : "memory");                                                                   \
    return old;                                                                                 \
  }
FUSED_RNN_WORD(uint32_t, 32, "r")
FUSED_RNN_WORD(uint64_t, 64, "l")
#undef FUSED_RNN_WORD

FUSED_RNN_DEVICE uint32_t* atomic_word(uint32_t* p) { return p; }
FUSED_RNN_DEVICE unsigned long long* atomic_word(uint64_t* p) {
  return reinterpret_cast<unsigned long long*>(p);
}

}  // namespace detail

template <class Word>
FUSED_RNN_DEVICE Word load_relaxed(const Word* p) {
  return detail::word_load_relaxed(p);
}
template <class Word>
FUSED_RNN_DEVICE Word load_acquire(const Word* p) {
  return detail::word_load_acquire(p);
}
template <class Word>
FUSED_RNN_DEVICE void store_relaxed(Word* p, Word value) {
  detail::word_store_relaxed(p, value);
}
template <class Word>
FUSED_RNN_DEVICE void store_release(Word* p, Word value) {
  detail::word_store_release(p, value);
}

// Loads until done(value), and returns that value. Only in kernels launched cooperatively.
template <class Word, class Done>
FUSED_RNN_DEVICE Word poll_relaxed(const Word* p, Done done) {
  Word value = load_relaxed(p);
  while (!done(value)) value = load_relaxed(p);
  return value;
}
template <class Word, class Done>
FUSED_RNN_DEVICE Word poll_acquire(const Word* p, Done done) {
  Word value = load_acquire(p);
  while (!done(value)) value = load_acquire(p);
  return value;
}

// Relaxed unless named otherwise; for counters, never for gradients. Each returns the old value.
template <class Word>
FUSED_RNN_DEVICE Word atomic_add(Word* p, Word value) {
  return atomicAdd(detail::atomic_word(p), value);
}
template <class Word>
FUSED_RNN_DEVICE Word atomic_add_release(Word* p, Word value) {
  return detail::word_add_release(p, value);
}
template <class Word>
FUSED_RNN_DEVICE Word atomic_or(Word* p, Word value) {
  return atomicOr(detail::atomic_word(p), value);
}
template <class Word>
FUSED_RNN_DEVICE Word atomic_max(Word* p, Word value) {
  return atomicMax(detail::atomic_word(p), value);
}
template <class Word>
FUSED_RNN_DEVICE Word atomic_exchange(Word* p, Word value) {
  return atomicExch(detail::atomic_word(p), value);
}
template <class Word>
FUSED_RNN_DEVICE Word atomic_compare_exchange(Word* p, Word expected, Word value) {
  return atomicCAS(detail::atomic_word(p), expected, value);
}

}  // namespace fused_rnn

#include "cuda/primitives_cluster.cuh"
#include "cuda/primitives_matrix.cuh"
