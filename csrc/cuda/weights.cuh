// A warp's part of a matrix of weights on the chip: kM tiles by some tiles of K, the first kHeld of
// them in registers, the rest in shared memory. As the tensor cores take it, a tile is 16 rows by
// 32 bytes of K; exact, where float stays float, 8 rows by 16 of K.
#pragma once

#include "cuda/primitives.cuh"

namespace fused_rnn::cuda {

// What the tensor cores take of a T.
template <class T>
struct Multiplied {
  using type = T;
};
template <>
struct Multiplied<float> {
  using type = tf32;
};

template <class T, int kM, int kHeld, bool kExact = false>
struct Weights {
  static constexpr int kChunk = 16 / sizeof(T), kDepth = kExact ? 16 : 2 * kChunk;

  uint32_t held[kHeld][kM][4];
  uint32_t* rest;
  int tiles;

  // Register i of a tile holds 4 bytes of row lane / 4, in the second half of the tile for odd i,
  // at byte 4 (lane % 4) of K, and 16 further for i >= 2; exact, of row lane % 8 at 4 (lane / 8) +
  // i of K. weight(m, half, k) is 0 outside the matrix.
  template <class Weight>
  FUSED_RNN_DEVICE void load(uint32_t* rest_of_warp, int tiles_of_warp, Weight weight) {
    rest = rest_of_warp;
    tiles = tiles_of_warp;
    const auto fragment = [&](int tile, int m, int i) {
      const int k = tile * kDepth + i / 2 * kChunk + lane() % 4 * (4 / int(sizeof(T)));
      if constexpr (kExact)
        return float_bits(weight(m, 0, tile * kDepth + lane() / 8 * 4 + i));
      else if constexpr (sizeof(T) == 4)
        return to_tf32(weight(m, i % 2, k));
      else
        return pack(weight(m, i % 2, k), weight(m, i % 2, k + 1));
    };
    // A loop, since the code of all tiles one after another takes the compiler long: each round
    // moves what registers hold some tiles down and fills the last ones.
    constexpr int kRounds = kHeld < 8 ? kHeld : 8, kNew = (kHeld + kRounds - 1) / kRounds;
    FUSED_RNN_ROLL
    for (int next = kHeld - kRounds * kNew; next < kHeld; next += kNew) {
      FUSED_RNN_UNROLL
      for (int slot = 0; slot < kHeld; ++slot) {
        FUSED_RNN_UNROLL
        for (int m = 0; m < kM; ++m) {
          FUSED_RNN_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int tile = next + slot - (kHeld - kNew);
            if (slot + kNew < kHeld)
              held[slot][m][i] = held[(slot + kNew) % kHeld][m][i];
            else
              held[slot][m][i] = tile >= 0 && tile < tiles ? fragment(tile, m, i) : 0;
          }
        }
      }
    }
    FUSED_RNN_ROLL
    for (int tile = kHeld; tile < tiles; ++tile) {
      FUSED_RNN_UNROLL
      for (int m = 0; m < kM; ++m) {
        Vector<uint32_t, 4> bits;
        FUSED_RNN_UNROLL
        for (int i = 0; i < 4; ++i) bits[i] = fragment(tile, m, i);
        store_vector(in_shared(tile, m), bits);
      }
    }
  }

  // sum[m][t] += the weights of tiles kFirst and on times 8 rows of the operand, whose K starts at
  // `operand`. Exact, times 4 rows, each lane over its own part of K: of each 16 the 4 it holds.
  template <int kFirst, int kCount, int kTiles>
  FUSED_RNN_DEVICE void multiply(const T* operand, int64_t stride,
                                 float (&sum)[kCount][kTiles][4]) const {
    const auto two_exact_tiles = [&](int tile, auto weight) {
      FUSED_RNN_UNROLL
      for (int i = 0; i < 2; ++i) {
        FUSED_RNN_UNROLL
        for (int column = 0; column < 4 * kTiles; ++column) {
          const auto x =
              load_vector<4>(operand + column * stride + (tile + i) * kDepth + lane() / 8 * 4);
          FUSED_RNN_UNROLL
          for (int m = 0; m < kCount; ++m) {
            FUSED_RNN_UNROLL
            for (int k = 0; k < 4; ++k)
              sum[m][column / 4][column % 4] += bits_float(weight(i, m)[k]) * x[k];
          }
        }
      }
    };
    // Lane i names row i % 8 of matrix i / 8: 8 rows of the batch, 16 bytes of K each.
    const T* const rows = operand + lane() % 8 * stride + lane() / 8 * kChunk;
    const auto two_tiles = [&](int tile, auto weight) {
      if constexpr (kExact) return two_exact_tiles(tile, weight);
      FUSED_RNN_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        uint32_t b[4];
        load_matrix<4>(b, rows + 8 * t * stride + tile * kDepth);
        FUSED_RNN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const uint32_t of_tile[2] = {b[2 * i], b[2 * i + 1]};
          FUSED_RNN_UNROLL
          for (int m = 0; m < kCount; ++m)
            mma<typename Multiplied<T>::type>(sum[m][t], weight(i, m), of_tile);
        }
      }
    };
    const auto from_shared = [&](int tile, uint32_t (&weight)[kCount][4]) {
      FUSED_RNN_UNROLL
      for (int m = 0; m < kCount; ++m) {
        const auto bits = load_vector<4>(in_shared(tile, kFirst + m));
        FUSED_RNN_UNROLL
        for (int k = 0; k < 4; ++k) weight[m][k] = bits[k];
      }
    };
    FUSED_RNN_UNROLL
    for (int tile = 0; tile < kHeld; tile += 2) {
      if (tile >= tiles) return;
      uint32_t weight[kCount][4];
      if (tile + 1 == kHeld) from_shared(tile + 1, weight);
      two_tiles(tile, [&](int i, int m) -> const uint32_t (&)[4] {
        if (tile + i == kHeld) return weight[m];
        return held[tile + i][kFirst + m];
      });
    }
    for (int tile = kHeld + kHeld % 2; tile < tiles; tile += 2) {
      uint32_t weight[2][kCount][4];
      from_shared(tile, weight[0]);
      from_shared(tile + 1, weight[1]);
      two_tiles(tile, [&](int i, int m) -> const uint32_t (&)[4] { return weight[i][m]; });
    }
  }

 private:
  FUSED_RNN_DEVICE uint32_t* in_shared(int tile, int m) const {
    return rest + (((tile - kHeld) * kM + m) * 32 + lane()) * 4;
  }
};

}  // namespace fused_rnn::cuda
