// Primitives of one block and of plain, atomic and polled memory, each against plain arithmetic.
#include <math.h>

#include "case.h"
#include "cuda/primitives.cuh"

namespace fused_rnn::emulator {
namespace {

FUSED_RNN_KERNEL positions(int* out) {
  const Index3 t = thread_index(), b = block_index(), n = block_size(), g = grid_size();
  const int thread = (t.z * n.y + t.y) * n.x + t.x;
  const int block = (b.z * g.y + b.y) * g.x + b.x;
  store(out + block * n.x * n.y * n.z + thread, block * 1000 + thread);
}

Outcome test_positions(uint64_t seed) {
  Memory<int> out("out", 12 * 24);
  Launch launch{.name = "positions", .grid = {2, 3, 2}, .block = {4, 3, 2}, .seed = seed};
  return Outcome().add(run(launch, positions, out.data())).compare("out", out, [](int i) {
    return i / 24 * 1000 + i % 24;
  });
}

FUSED_RNN_KERNEL reverse(float* x, int rounds) {
  float* shared = shared_memory<float>();
  FUSED_RNN_SHARED(float, other, 96);
  const int i = thread_index().x, n = block_size().x, first = block_index().x * n;
  store(shared + i, load(x + first + i));
  for (int round = 0; round < rounds; ++round) {
    float* from = round % 2 == 0 ? shared : other;
    float* to = round % 2 == 0 ? other : shared;
    sync_block();
    store(to + i, load(from + n - 1 - i) + 1);
  }
  store(x + first + i, load((rounds % 2 == 0 ? shared : other) + i));
}

Outcome test_barrier(uint64_t seed) {
  Memory<float> x("x", 3 * 96);
  for (int i = 0; i < 3 * 96; ++i) x[size_t(i)] = float(i);
  Launch launch{
      .name = "reverse", .grid = {3}, .block = {96}, .shared_bytes = 96 * 4, .seed = seed};
  return Outcome().add(run(launch, reverse, x.data(), 7)).compare("x", x, [](int i) {
    return float(i / 96 * 96 + 95 - i % 96 + 7);
  });
}

// Each half of the block meets at a barrier of its own, one half more often than the other.
FUSED_RNN_KERNEL halves(int* out) {
  int* shared = shared_memory<int>();
  const int i = thread_index().x, half = i / 64, first = half * 64;
  int sum = i;
  for (int round = 0; round < 3 + 4 * half; ++round) {
    store(shared + i, sum);
    sync_threads(1 + half, 64);
    sum = load(shared + first + (i + 1) % 64);
    sync_threads(1 + half, 64);
  }
  store(out + i, sum);
}

Outcome test_named_barrier(uint64_t seed) {
  Memory<int> out("out", 128);
  Launch launch{.name = "halves", .block = {128}, .shared_bytes = 512, .seed = seed};
  return Outcome().add(run(launch, halves, out.data())).compare("out", out, [](int i) {
    return i / 64 * 64 + (i + (i < 64 ? 3 : 7)) % 64;
  });
}

FUSED_RNN_KERNEL warp_functions(double* out, unsigned* votes) {
  const int i = thread_index().x, l = lane();
  double x = shuffle(double(i), (l + 5) % 32);  // the value of lane l + 5
  for (int bits = 16; bits > 0; bits /= 2) x += shuffle_xor(x, bits);
  store(out + i, x);
  // Even and odd lanes vote apart.
  const unsigned mask = l % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  unsigned vote = ballot(l % 3 == 0, mask);
  if (any(l == 4, mask)) vote ^= 1u << 30;
  if (all(l % 2 == 1, mask)) vote ^= 1u << 31;
  store(votes + i, vote + unsigned(warp()));
  // In the last warp only a few lanes live.
  if (l == 0) return;
  FUSED_RNN_SHARED(int, row, 70);
  const unsigned rest = kFullWarp & ~1u;
  store(row + i, i);
  sync_warp(rest);
  store(out + i, load(out + i) + load(row + (l == 1 ? i : i - 1)));
}

Outcome test_warp(uint64_t seed) {
  Memory<double> out("out", 64);
  Memory<unsigned> votes("votes", 64);
  Launch launch{.name = "warp_functions", .block = {64}, .seed = seed};
  return Outcome()
      .add(run(launch, warp_functions, out.data(), votes.data()))
      .compare("out", out,
               [](int i) {
                 const double sum = 31 * 16 + 32.0 * 32 * (i / 32);
                 return i % 32 == 0 ? sum : sum + (i % 32 == 1 ? i : i - 1);
               })
      .compare("votes", votes, [](int i) {
        unsigned vote = 0;
        for (int l = i % 2; l < 32; l += 2) vote |= unsigned(l % 3 == 0) << l;
        vote ^= 1u << (i % 2 == 0 ? 30 : 31);
        return vote + unsigned(i / 32);
      });
}

template <class T, int N>
FUSED_RNN_KERNEL vectors(const T* in, T* out) {
  const int i = thread_index().x * N;
  Vector<T, N> x = load_vector<N>(in + i), y;
  for (int j = 0; j < N; ++j) y[j] = x[N - 1 - j];
  store_vector(out + i, y);
  store(out + i, load(out + i + N - 1));  // a part of a vector just stored
  store_streaming(out + i + 1, load_streaming(in + i));
  store(out + i + N - 1, load_read_only(in + i + 1));
}

template <class T, int N>
Outcome test_vectors(uint64_t seed) {
  Memory<T> in("in", 32 * N), out("out", 32 * N);
  for (int i = 0; i < 32 * N; ++i) in[size_t(i)] = T(from_float<T>(float(i)));
  Launch launch{.name = "vectors", .block = {32}, .seed = seed};
  return Outcome()
      .add(run(launch, vectors<T, N>, in.data(), out.data()))
      .compare("out", out, [](int i) {
        const int first = i / N * N;
        const int from = i == first || i == first + 1 ? first
                         : i == first + N - 1         ? first + 1
                                                      : first + N - 1 - (i - first);
        return from_float<T>(float(from));
      });
}

template <class Word>
FUSED_RNN_KERNEL count(Word* words) {
  const Word i = Word(block_index().x * block_size().x + thread_index().x);
  atomic_add(words, i);
  atomic_or(words + 1, Word(1) << (i % 32));
  atomic_max(words + 2, i);
  atomic_add(words + 3, atomic_exchange(words + 4, i + 1));  // all but the last come back
  Word seen = load_relaxed(words + 5);
  while (true) {
    const Word old = atomic_compare_exchange(words + 5, seen, seen + 2);
    if (old == seen) break;
    seen = old;
  }
  if (i == 0) store(words + 6, Word(-1));  // its own store is seen by its own atomic
  if (i == 0) atomic_add(words + 6, Word(2));
}

template <class Word>
Outcome test_atomics(uint64_t seed) {
  Memory<Word> words("words", 7);
  words.fill(0);
  Launch launch{.name = "count", .grid = {2}, .block = {48}, .seed = seed};
  Outcome outcome;
  outcome.add(run(launch, count<Word>, words.data()));
  words[3] += words[4], words[4] = 0;
  return outcome.compare("words", words, [](int i) {
    const Word expected[] = {96 * 95 / 2, 0xffffffffu, 95, 96 * 97 / 2, 0, 2 * 96, 1};
    return expected[i];
  });
}

// Block 0 sends arrays, block 1 adds them up; words carry the number of the step.
template <class Word>
FUSED_RNN_KERNEL send_released(float* data, Word* ready, Word* taken, float* out, int steps) {
  const int i = thread_index().x;
  float sum = 0;
  for (int step = 1; step <= steps; ++step) {
    const Word now = Word(step);
    if (block_index().x == 0) {
      poll_acquire(taken + i, [=](Word seen) { return seen + 1 == now; });
      store(data + i, float(step * i));
      store_release(ready + i, now);
    } else {
      poll_acquire(ready + i, [=](Word seen) { return seen == now; });
      sum += load(data + i);
      store_release(taken + i, now);
    }
  }
  if (block_index().x == 1) store(out + i, sum);
}

template <class Word>
Outcome test_release(uint64_t seed) {
  Memory<float> data("data", 8), out("out", 8);
  Memory<Word> ready("ready", 8), taken("taken", 8);
  ready.fill(0), taken.fill(0);
  Launch launch{.name = "send_released", .grid = {2}, .block = {8}, .seed = seed};
  return Outcome()
      .add(
          run(launch, send_released<Word>, data.data(), ready.data(), taken.data(), out.data(), 12))
      .compare("out", out, [](int i) { return float(12 * 13 / 2 * i); });
}

// The word is data and flag: 32 bits of each, two slots. Every block sums what all sent.
FUSED_RNN_KERNEL exchange_words(uint64_t* slots, unsigned* out, int steps) {
  const int i = thread_index().x, n = block_size().x * grid_size().x;
  const int me = block_index().x * block_size().x + i;
  FUSED_RNN_SHARED(unsigned, sums, 8);
  unsigned mine = unsigned(me);
  for (int step = 1; step <= steps; ++step) {
    uint64_t* slot = slots + (step % 2) * n;
    store_relaxed(slot + me, uint64_t(step) << 32 | mine);
    unsigned sum = 0;
    for (int from = i; from < n; from += block_size().x) {
      sum += unsigned(
          poll_relaxed(slot + from, [=](uint64_t word) { return word >> 32 == unsigned(step); }));
    }
    store(sums + i, sum);
    sync_block();
    mine = unsigned(me);
    for (int j = 0; j < block_size().x; ++j) mine += load(sums + j);
    sync_block();
  }
  store(out + me, mine);
}

Outcome test_words(uint64_t seed) {
  Memory<uint64_t> slots("slots", 2 * 24);
  Memory<unsigned> out("out", 24);
  slots.fill(0);
  Launch launch{.name = "exchange_words", .grid = {3}, .block = {8}, .seed = seed};
  unsigned sum = 0;
  for (int step = 0; step < 6; ++step) sum = 24 * sum + 23 * 24 / 2;
  return Outcome()
      .add(run(launch, exchange_words, slots.data(), out.data(), 6))
      .compare("out", out, [&](int i) { return sum + unsigned(i); });
}

// A grid's barrier: of the block, then a fence and a counter by one thread, and back.
FUSED_RNN_DEVICE void sync_grid(unsigned* counter, unsigned round, bool with_release) {
  sync_block();
  if (thread_index().x == 0) {
    if (with_release) {
      atomic_add_release(counter, 1u);
    } else {
      fence_gpu();
      atomic_add(counter, 1u);
    }
    const unsigned all = round * unsigned(grid_size().x);
    if (with_release) {
      poll_acquire(counter, [=](unsigned seen) { return seen >= all; });
    } else {
      poll_relaxed(counter, [=](unsigned seen) { return seen >= all; });
      fence_gpu();
    }
  }
  sync_block();
}

FUSED_RNN_KERNEL shift(int* x, unsigned* counter, int rounds) {
  const int n = block_size().x * grid_size().x;
  const int me = block_index().x * block_size().x + thread_index().x;
  for (int round = 1; round <= rounds; ++round) {
    const int value = load(x + (me + 17) % n);
    sync_grid(counter, 2 * unsigned(round) - 1, round % 2 == 0);
    store(x + me, value + 1);
    sync_grid(counter, 2 * unsigned(round), round % 2 == 1);
  }
}

Outcome test_grid_barrier(uint64_t seed) {
  Memory<int> x("x", 64);
  Memory<unsigned> counter("counter", 1);
  counter[0] = 0;
  for (int i = 0; i < 64; ++i) x[size_t(i)] = i;
  Launch launch{.name = "shift", .grid = {4}, .block = {16}, .seed = seed};
  return Outcome().add(run(launch, shift, x.data(), counter.data(), 4)).compare("x", x, [](int i) {
    return (i + 4 * 17) % 64 + 4;
  });
}

// Rounding: halfway between neighbours goes to the even one, a little off goes to the nearer.
template <class T>
Outcome test_conversions(uint64_t) {
  Outcome outcome;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const T x = {uint16_t(bits)}, next = {uint16_t(bits + 1)};
    const float value = to_float(x), after = to_float(next);
    const bool right =
        isnan(value) ? isnan(to_float(from_float<T>(value))) : from_float<T>(value).bits == x.bits;
    bool rounds = true;
    if ((bits & 0x7fff) != 0x7fff && isfinite(value) && isfinite(after)) {
      const float middle = value + (after - value) / 2;
      rounds = from_float<T>(middle).bits == (bits % 2 == 0 ? x.bits : next.bits) &&
               from_float<T>(nextafterf(middle, value)).bits == x.bits &&
               from_float<T>(nextafterf(middle, after)).bits == next.bits;
    }
    if (!right || !rounds) {
      outcome.problem = "wrong conversion of 0x" + std::to_string(bits);
      break;
    }
  }
  const T two[2] = {from_float<T>(1.5f), from_float<T>(-2.0f)};
  uint32_t packed;
  memcpy(&packed, two, 4);
  if (pack(two[0], two[1]) != packed) outcome.problem += "wrong pack";
  return outcome;
}

FUSED_RNN_KERNEL approximate(float* x) {
  const int i = thread_index().x;
  const float y = load(x + i);
  store(x + i, approximate_exp(y) + approximate_tanh(y));
}

Outcome test_approximate(uint64_t seed) {
  Memory<float> x("x", 32);
  for (int i = 0; i < 32; ++i) x[size_t(i)] = 0.25f * float(i - 16);
  Launch launch{.name = "approximate", .block = {32}, .seed = seed};
  return Outcome().add(run(launch, approximate, x.data())).compare("x", x, [](int i) {
    const float y = 0.25f * float(i - 16);
    return expf(y) + tanhf(y);
  });
}

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn;
  using namespace fused_rnn::emulator;
  return run_cases(count, words,
                   {{"positions", test_positions},
                    {"barrier", test_barrier},
                    {"named_barrier", test_named_barrier},
                    {"warp", test_warp},
                    {"vectors_float4", test_vectors<float, 4>},
                    {"vectors_bf16x8", test_vectors<bf16, 8>},
                    {"vectors_fp16x4", test_vectors<fp16, 4>},
                    {"atomics_32", test_atomics<uint32_t>},
                    {"atomics_64", test_atomics<uint64_t>},
                    {"release_32", test_release<uint32_t>},
                    {"release_64", test_release<uint64_t>},
                    {"words", test_words},
                    {"grid_barrier", test_grid_barrier},
                    {"conversions_bf16", test_conversions<bf16>},
                    {"conversions_fp16", test_conversions<fp16>},
                    {"approximate", test_approximate}});
}
