// The stand-in for csrc/cuda/primitives.cuh: the same names, run by the emulator. What a primitive
// means is said there; here is only how it is called.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda/half.h"
#include "runtime.h"

#define FUSED_RNN_DEVICE inline
#define FUSED_RNN_KERNEL void
#define FUSED_RNN_LAUNCH_BOUNDS(threads, blocks)
#define FUSED_RNN_ARGUMENT const
#define FUSED_RNN_UNROLL
#define FUSED_RNN_ROLL
// The lambda's type is one for each declaration and instantiation, and so is its `site`.
#define FUSED_RNN_SHARED(T, name, count)                                \
  T* const name = static_cast<T*>(::fused_rnn::emulator::static_shared( \
      [] {                                                              \
        static const char site = 0;                                     \
        return &site;                                                   \
      }(),                                                              \
      #name, sizeof(T) * (count), alignof(T)))

namespace fused_rnn {

constexpr unsigned kFullWarp = 0xffffffffu;

struct Index3 {
  int x, y, z;
};

FUSED_RNN_DEVICE void unsupported(const char* what) { emulator::misuse("a kernel", what); }

// ---- Where a thread stands.

FUSED_RNN_DEVICE Index3 thread_index() {
  const int (&i)[3] = emulator::place().thread;
  return {i[0], i[1], i[2]};
}
FUSED_RNN_DEVICE Index3 block_index() {
  const int (&i)[3] = emulator::place().block;
  return {i[0], i[1], i[2]};
}
FUSED_RNN_DEVICE Index3 block_size() {
  const int (&i)[3] = emulator::place().block_size;
  return {i[0], i[1], i[2]};
}
FUSED_RNN_DEVICE Index3 grid_size() {
  const int (&i)[3] = emulator::place().grid_size;
  return {i[0], i[1], i[2]};
}
FUSED_RNN_DEVICE int lane() { return thread_index().x % 32; }
FUSED_RNN_DEVICE int warp() { return thread_index().x / 32; }

// ---- Barriers and fences.

FUSED_RNN_DEVICE void sync_block() { emulator::barrier("sync_block", 0, 0); }
FUSED_RNN_DEVICE void sync_threads(int id, int threads) {
  if (id == 0 || threads <= 0) {
    emulator::misuse("sync_threads", "wants barrier 1 to 15 and a number of threads");
  }
  emulator::barrier("sync_threads", id, threads);
}
FUSED_RNN_DEVICE void sync_warp(unsigned mask = kFullWarp) {
  const char mine = 0;
  char all[32];
  emulator::exchange("sync_warp", mask, &mine, 1, all, true);
}
FUSED_RNN_DEVICE void fence_block() { emulator::fence("fence_block", emulator::Scope::kBlock); }
FUSED_RNN_DEVICE void fence_gpu() { emulator::fence("fence_gpu", emulator::Scope::kGpu); }

// ---- Warp shuffles and votes.

template <class T>
FUSED_RNN_DEVICE T shuffle(T value, int from, unsigned mask = kFullWarp) {
  T all[32];
  emulator::exchange("shuffle", mask, &value, sizeof(T), all);
  return all[from & 31];
}
template <class T>
FUSED_RNN_DEVICE T shuffle_xor(T value, int bits, unsigned mask = kFullWarp) {
  T all[32];
  emulator::exchange("shuffle_xor", mask, &value, sizeof(T), all);
  return all[(emulator::place().linear_thread ^ bits) & 31];
}
FUSED_RNN_DEVICE unsigned ballot(bool vote, unsigned mask = kFullWarp) {
  const char mine = vote;
  char all[32];
  emulator::exchange("ballot", mask, &mine, 1, all);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned(all[i] == 1) << i;
  return votes & mask;
}
FUSED_RNN_DEVICE bool any(bool vote, unsigned mask = kFullWarp) { return ballot(vote, mask) != 0; }
FUSED_RNN_DEVICE bool all(bool vote, unsigned mask = kFullWarp) { return ballot(!vote, mask) == 0; }

// ---- Plain memory.

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
  T& operator[](int i) { return values[i]; }
  const T& operator[](int i) const { return values[i]; }
};

namespace detail {

template <class T>
T read(const char* what, const T* p) {
  static_assert(sizeof(T) <= 16, "one access moves at most 16 bytes");
  T value;
  emulator::read(what, p, &value, sizeof(T), sizeof(T));
  return value;
}
template <class T>
void write(const char* what, T* p, const T& value) {
  static_assert(sizeof(T) <= 16, "one access moves at most 16 bytes");
  emulator::write(what, p, &value, sizeof(T), sizeof(T));
}

}  // namespace detail

template <class T>
FUSED_RNN_DEVICE T load(const T* p) {
  return detail::read("load", p);
}
template <class T>
FUSED_RNN_DEVICE void store(T* p, T value) {
  detail::write("store", p, value);
}
template <int N, class T>
FUSED_RNN_DEVICE Vector<T, N> load_vector(const T* p) {
  return detail::read("load_vector", reinterpret_cast<const Vector<T, N>*>(p));
}
template <int N, class T>
FUSED_RNN_DEVICE void store_vector(T* p, Vector<T, N> value) {
  detail::write("store_vector", reinterpret_cast<Vector<T, N>*>(p), value);
}
template <class T>
FUSED_RNN_DEVICE T load_read_only(const T* p) {
  emulator::want_global("load_read_only", p);
  return detail::read("load_read_only", p);
}
template <class T>
FUSED_RNN_DEVICE T load_streaming(const T* p) {
  emulator::want_global("load_streaming", p);
  return detail::read("load_streaming", p);
}
template <class T>
FUSED_RNN_DEVICE void store_streaming(T* p, T value) {
  emulator::want_global("store_streaming", p);
  detail::write("store_streaming", p, value);
}
template <class T>
FUSED_RNN_DEVICE T* shared_memory() {
  return static_cast<T*>(emulator::dynamic_shared());
}

// ---- Conversions and approximate functions.

template <class T>
FUSED_RNN_DEVICE uint32_t pack(T low, T high) {
  static_assert(sizeof(T) == 2, "two halves make a register");
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}
FUSED_RNN_DEVICE float approximate_exp(float x) { return expf(x); }
FUSED_RNN_DEVICE float approximate_tanh(float x) { return tanhf(x); }

// ---- Words that other blocks read or write.

template <class Word>
FUSED_RNN_DEVICE Word load_relaxed(const Word* p) {
  return Word(emulator::read_word("load_relaxed", p, sizeof(Word), emulator::Order::kRelaxed));
}
template <class Word>
FUSED_RNN_DEVICE Word load_acquire(const Word* p) {
  return Word(emulator::read_word("load_acquire", p, sizeof(Word), emulator::Order::kAcquire));
}
template <class Word>
FUSED_RNN_DEVICE void store_relaxed(Word* p, Word value) {
  emulator::write_word("store_relaxed", p, value, sizeof(Word), emulator::Order::kRelaxed);
}
template <class Word>
FUSED_RNN_DEVICE void store_release(Word* p, Word value) {
  emulator::write_word("store_release", p, value, sizeof(Word), emulator::Order::kRelease);
}
template <class Word, class Done>
FUSED_RNN_DEVICE Word poll_relaxed(const Word* p, Done done) {
  Word value = load_relaxed(p);
  while (!done(value)) {
    emulator::wait_for_change("poll_relaxed", p, value, sizeof(Word));
    value = load_relaxed(p);
  }
  return value;
}
template <class Word, class Done>
FUSED_RNN_DEVICE Word poll_acquire(const Word* p, Done done) {
  Word value = load_acquire(p);
  while (!done(value)) {
    emulator::wait_for_change("poll_acquire", p, value, sizeof(Word));
    value = load_acquire(p);
  }
  return value;
}

namespace detail {

template <class Word>
Word update(const char* what, Word* p, emulator::Update kind, Word value, Word expected = 0,
            emulator::Order order = emulator::Order::kRelaxed) {
  return Word(emulator::update_word(what, p, kind, value, expected, sizeof(Word), order));
}

}  // namespace detail

template <class Word>
FUSED_RNN_DEVICE Word atomic_add(Word* p, Word value) {
  return detail::update("atomic_add", p, emulator::Update::kAdd, value);
}
template <class Word>
FUSED_RNN_DEVICE Word atomic_add_release(Word* p, Word value) {
  return detail::update("atomic_add_release", p, emulator::Update::kAdd, value, Word(0),
                        emulator::Order::kRelease);
}
template <class Word>
FUSED_RNN_DEVICE Word atomic_or(Word* p, Word value) {
  return detail::update("atomic_or", p, emulator::Update::kOr, value);
}
template <class Word>
FUSED_RNN_DEVICE Word atomic_max(Word* p, Word value) {
  return detail::update("atomic_max", p, emulator::Update::kMax, value);
}
template <class Word>
FUSED_RNN_DEVICE Word atomic_exchange(Word* p, Word value) {
  return detail::update("atomic_exchange", p, emulator::Update::kExchange, value);
}
template <class Word>
FUSED_RNN_DEVICE Word atomic_compare_exchange(Word* p, Word expected, Word value) {
  return detail::update("atomic_compare_exchange", p, emulator::Update::kCompareExchange, value,
                        expected);
}

}  // namespace fused_rnn

#include "cuda/primitives_cluster.cuh"
#include "cuda/primitives_matrix.cuh"
