// Part of primitives.cuh: matrix fragments. Which lane holds which element is written out in
// tests/emulator/cases/matrix.cpp.
#pragma once

namespace fused_rnn {

// A kernel that is made of mma leaves its body out elsewhere: compiling it takes seconds.
FUSED_RNN_DEVICE constexpr bool has_mma() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return false;
#else
  return true;
#endif
}

// kCount 8x8 matrices of 16-bit elements from shared memory. Lane i names the first byte of row
// i % 8 of matrix i / 8: 16 bytes, aligned to 16. Lanes past 8 * kCount may name anything valid.
template <int kCount, bool kTranspose = false>
FUSED_RNN_DEVICE void load_matrix(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const uint32_t at = detail::shared_address(row);
  if constexpr (kCount == 1) {
    if constexpr (kTranspose) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                   : "=r"(r[0])
                   : "r"(at)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                   : "=r"(r[0])
                   : "r"(at)
                   : "memory");
    }
  } else if constexpr (kCount == 2) {
    if constexpr (kTranspose) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                   : "=r"(r[0]), "=r"(r[1])
                   : "r"(at)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                   : "=r"(r[0]), "=r"(r[1])
                   : "r"(at)
                   : "memory");
    }
  } else {
    if constexpr (kTranspose) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(at)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(at)
                   : "memory");
    }
  }
}

// d += a b on a warp's fragments, fp32 accumulators. T: bf16 or fp16 for m16n8k16, tf32 for
// m16n8k8.
template <class T>
FUSED_RNN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if __CUDA_ARCH__ >= 800
#define FUSED_RNN_MMA(T, shape_and_types)                                                       \
  template <>                                                                                   \
  FUSED_RNN_DEVICE void mma<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape_and_types                                            \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));           \
  }
#else
#define FUSED_RNN_MMA(T, shape_and_types)                                                    \
  template <>                                                                                \
  FUSED_RNN_DEVICE void mma<T>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) { \
    unsupported("mma needs sm_80");                                                          \
  }
#endif
FUSED_RNN_MMA(bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FUSED_RNN_MMA(fp16, "m16n8k16.row.col.f32.f16.f16.f32")
FUSED_RNN_MMA(tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FUSED_RNN_MMA

}  // namespace fused_rnn
