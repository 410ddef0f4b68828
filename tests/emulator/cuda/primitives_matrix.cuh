// Part of the stand-in: matrix fragments, by the formulae of the PTX manual (mma.sync m16n8k16 for
// 16-bit elements, m16n8k8 for TF32, ldmatrix). Sums are taken in double and rounded once: the
// tensor core's own rounding is not known.
#pragma once

namespace fused_rnn {

FUSED_RNN_DEVICE constexpr bool has_mma() { return true; }

template <int kCount, bool kTranspose = false>
FUSED_RNN_DEVICE void load_matrix(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
  row = emulator::peer("load_matrix", const_cast<void*>(row), cluster_rank());
  const uint16_t* rows[32];
  emulator::exchange("load_matrix", kFullWarp, &row, sizeof(row), rows);
  // Lane l takes elements 2 (l % 4) and one more of row l / 4, or of column l / 4 if transposed.
  const int l = emulator::place().linear_thread % 32, line = l / 4, first = l % 4 * 2;
  for (int matrix = 0; matrix < kCount; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const uint16_t* from = rows[matrix * 8 + (kTranspose ? first + i : line)];
      if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
        emulator::misuse("load_matrix", "misaligned: a row wants a multiple of 16");
      }
      const uint16_t* element = from + (kTranspose ? line : first + i);
      emulator::read("load_matrix", element, &pair[i], 2, 2);
    }
    r[matrix] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
  }
}

namespace detail {

struct Fragments {
  uint32_t a[4], b[2];
};

// Element (row, k) of A and (k, column) of B among the registers of all lanes.
template <class T>
float element(uint32_t pair, int i) {
  return to_float(T{uint16_t(pair >> (16 * i))});
}
template <class T>
struct Layout {
  static constexpr int kDepth = 16;
  static float a(const Fragments* lanes, int row, int k) {
    const uint32_t pair = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
    return element<T>(pair, k % 2);
  }
  static float b(const Fragments* lanes, int k, int column) {
    return element<T>(lanes[column * 4 + k % 8 / 2].b[k / 8], k % 2);
  }
};
// The low 13 bits are not read.
template <>
struct Layout<tf32> {
  static constexpr int kDepth = 8;
  static float a(const Fragments* lanes, int row, int k) {
    return bits_float(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2] & ~0x1fffu);
  }
  static float b(const Fragments* lanes, int k, int column) {
    return bits_float(lanes[column * 4 + k % 4].b[k / 4] & ~0x1fffu);
  }
};

}  // namespace detail

template <class T>
FUSED_RNN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const detail::Fragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  detail::Fragments lanes[32];
  emulator::exchange("mma", kFullWarp, &mine, sizeof(mine), lanes);
  const int l = emulator::place().linear_thread % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < detail::Layout<T>::kDepth; ++k) {
      sum += double(detail::Layout<T>::a(lanes, row, k)) *
             double(detail::Layout<T>::b(lanes, k, column));
    }
    d[i] = float(sum);
  }
}

}  // namespace fused_rnn
