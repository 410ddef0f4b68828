// ldmatrix and mma against plain products. The layouts are those of the PTX manual, written from
// the lane's side: with g = lane / 4 and t = lane % 4,
//
//   m16n8k16, 16-bit elements, A in 4 registers of 2: element i (0..7) stands at
//     row g, or g + 8 for i in {2, 3, 6, 7};    column 2t + (i & 1), and 8 more for i >= 4
//   B in 2 registers of 2: element i (0..3) at row 2t + (i & 1), and 8 more for i >= 2; column g
//   C and D, 4 floats: element i at row g, or g + 8 for i >= 2; column 2t + (i & 1)
//   m16n8k8, TF32, A in 4 registers: i at row g, or g + 8 for odd i; column t, or t + 4 for i >= 2
//   B in 2 registers: i at row t + 4i, column g;  C and D as above
//   ldmatrix: register j of a lane holds row g of matrix j, columns 2t and 2t + 1; with .trans the
//     elements at rows 2t and 2t + 1 of column g
//
// The stand-in computes the other way, from an element to the lane that holds it. Products of small
// integers are exact, so results are compared bit for bit; integers do not prove rounding.
#include "case.h"
#include "cuda/primitives.cuh"

namespace fused_rnn::emulator {
namespace {

// Small integers without a pattern that a wrong layout could keep.
int entry(int salt, int i) {
  return int((unsigned(i) * 2654435761u + unsigned(salt)) >> 13) % 9 - 4;
}

template <class T>
struct Shape {
  static constexpr int kDepth = 16;
  static FUSED_RNN_DEVICE uint32_t encode(const float* low, const float* high) {
    return pack(from_float<T>(load(low)), from_float<T>(load(high)));
  }
  // A [16][16] and B [16][8], row by row.
  static FUSED_RNN_DEVICE void fragments(const float* a, const float* b, uint32_t (&ra)[4],
                                         uint32_t (&rb)[2]) {
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 8; i += 2) {
      const int row = i == 2 || i == 6 ? g + 8 : g, column = 2 * t + (i >= 4 ? 8 : 0);
      ra[i / 2] = encode(a + row * 16 + column, a + row * 16 + column + 1);
    }
    for (int i = 0; i < 4; i += 2) {
      const int row = 2 * t + (i >= 2 ? 8 : 0);
      rb[i / 2] = encode(b + row * 8 + g, b + (row + 1) * 8 + g);
    }
  }
};
template <>
struct Shape<tf32> {
  static constexpr int kDepth = 8;
  static FUSED_RNN_DEVICE void fragments(const float* a, const float* b, uint32_t (&ra)[4],
                                         uint32_t (&rb)[2]) {
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
      ra[i] = to_tf32(load(a + (i % 2 == 0 ? g : g + 8) * 8 + (i < 2 ? t : t + 4)));
    }
    for (int i = 0; i < 2; ++i) rb[i] = to_tf32(load(b + (t + 4 * i) * 8 + g));
  }
};

template <class T>
FUSED_RNN_KERNEL multiply(const float* a, const float* b, float* d) {
  uint32_t ra[4], rb[2];
  Shape<T>::fragments(a, b, ra, rb);
  const int g = lane() / 4, t = lane() % 4;
  float acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = load(d + (i >= 2 ? g + 8 : g) * 8 + 2 * t + (i & 1));
  mma<T>(acc, ra, rb);
  for (int i = 0; i < 4; ++i) store(d + (i >= 2 ? g + 8 : g) * 8 + 2 * t + (i & 1), acc[i]);
}

template <class T>
Outcome test_mma(uint64_t seed) {
  constexpr int K = Shape<T>::kDepth;
  Memory<float> a("a", 16 * K), b("b", K * 8), d("d", 16 * 8);
  for (int i = 0; i < 16 * K; ++i) a[size_t(i)] = float(entry(1, i));
  for (int i = 0; i < K * 8; ++i) b[size_t(i)] = float(entry(2, i));
  for (int i = 0; i < 16 * 8; ++i) d[size_t(i)] = float(entry(3, i));
  Launch launch{.name = "multiply", .block = {32}, .seed = seed};
  return Outcome()
      .add(run(launch, multiply<T>, a.data(), b.data(), d.data()))
      .compare("d", d, [](int i) {
        float sum = float(entry(3, i));
        for (int k = 0; k < K; ++k) sum += float(entry(1, i / 8 * K + k) * entry(2, k * 8 + i % 8));
        return sum;
      });
}

// TF32 operands have 10 bits of mantissa: the tensor core does not look at the rest.
FUSED_RNN_KERNEL truncate(float* d) {
  const uint32_t bits = float_bits(1 + 0x1p-10f + 0x1p-11f);
  const uint32_t a[4] = {bits, bits, bits, bits};
  const bool top = lane() % 4 == 0;  // k = 0 only
  const uint32_t b[2] = {top ? float_bits(1) : 0, 0};
  float acc[4] = {};
  mma<tf32>(acc, a, b);
  store(d + lane(), acc[0]);
  store(d + 32 + lane(), bits_float(to_tf32(1 + 0x1p-10f + 0x1p-11f)));
}

Outcome test_tf32_bits(uint64_t seed) {
  Memory<float> d("d", 64);
  Launch launch{.name = "truncate", .block = {32}, .seed = seed};
  return Outcome().add(run(launch, truncate, d.data())).compare("d", d, [](int i) {
    return i < 32 ? 1 + 0x1p-10f : 1 + 0x1p-9f;
  });
}

template <int kCount, bool kTranspose>
FUSED_RNN_KERNEL fetch(uint32_t* out) {
  uint16_t* shared = shared_memory<uint16_t>();
  for (int i = lane(); i < kCount * 64; i += 32) store(shared + i, uint16_t(1000 + i));
  sync_warp();
  uint32_t r[kCount];
  load_matrix<kCount, kTranspose>(r, shared + lane() % (8 * kCount) * 8);
  for (int j = 0; j < kCount; ++j) store(out + j * 32 + lane(), r[j]);
}

template <int kCount, bool kTranspose>
Outcome test_load_matrix(uint64_t seed) {
  Memory<uint32_t> out("out", kCount * 32);
  Launch launch{.name = "fetch", .block = {32}, .shared_bytes = kCount * 128, .seed = seed};
  return Outcome()
      .add(run(launch, fetch<kCount, kTranspose>, out.data()))
      .compare("out", out, [](int i) {
        const int matrix = i / 32, g = i % 32 / 4, t = i % 4;
        const int low = kTranspose ? 2 * t * 8 + g : g * 8 + 2 * t;
        const int high = kTranspose ? low + 8 : low + 1;
        return uint32_t(1000 + matrix * 64 + low) | uint32_t(1000 + matrix * 64 + high) << 16;
      });
}

// A kernel's use of both: A [16][16] by ldmatrix.x4, B [16][8] stored row by row by .x2.trans.
template <class T>
FUSED_RNN_KERNEL multiply_shared(const float* a, const float* b, float* d) {
  T* sa = shared_memory<T>();
  T* sb = sa + 256;
  for (int i = lane(); i < 256; i += 32) store(sa + i, from_float<T>(load(a + i)));
  for (int i = lane(); i < 128; i += 32) store(sb + i, from_float<T>(load(b + i)));
  sync_warp();
  uint32_t ra[4], rb[2];
  // Matrices of A in the order of its registers: rows 0-7, rows 8-15, then both with columns 8-15.
  load_matrix(ra, sa + lane() % 16 * 16 + lane() / 16 * 8);
  load_matrix<2, true>(rb, sb + lane() % 16 * 8);
  float acc[4] = {};
  mma<T>(acc, ra, rb);
  const int g = lane() / 4, t = lane() % 4;
  store_vector(d + g * 8 + 2 * t, Vector<float, 2>{{acc[0], acc[1]}});
  store_vector(d + (g + 8) * 8 + 2 * t, Vector<float, 2>{{acc[2], acc[3]}});
}

template <class T>
Outcome test_mma_load_matrix(uint64_t seed) {
  Memory<float> a("a", 256), b("b", 128), d("d", 128);
  for (int i = 0; i < 256; ++i) a[size_t(i)] = float(entry(4, i));
  for (int i = 0; i < 128; ++i) b[size_t(i)] = float(entry(5, i));
  Launch launch{.name = "multiply_shared", .block = {32}, .shared_bytes = 768, .seed = seed};
  return Outcome()
      .add(run(launch, multiply_shared<T>, a.data(), b.data(), d.data()))
      .compare("d", d, [](int i) {
        int sum = 0;
        for (int k = 0; k < 16; ++k) sum += entry(4, i / 8 * 16 + k) * entry(5, k * 8 + i % 8);
        return float(sum);
      });
}

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn;
  using namespace fused_rnn::emulator;
  return run_cases(count, words,
                   {{"mma_bf16", test_mma<bf16>},
                    {"mma_fp16", test_mma<fp16>},
                    {"mma_tf32", test_mma<tf32>},
                    {"tf32_bits", test_tf32_bits},
                    {"load_matrix_x1", test_load_matrix<1, false>},
                    {"load_matrix_x2", test_load_matrix<2, false>},
                    {"load_matrix_x4", test_load_matrix<4, false>},
                    {"load_matrix_x1_trans", test_load_matrix<1, true>},
                    {"load_matrix_x2_trans", test_load_matrix<2, true>},
                    {"load_matrix_x4_trans", test_load_matrix<4, true>},
                    {"mma_load_matrix_bf16", test_mma_load_matrix<bf16>},
                    {"mma_load_matrix_fp16", test_mma_load_matrix<fp16>}});
}
