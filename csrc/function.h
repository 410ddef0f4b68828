// How a function is declared that host and device code share.
#pragma once

#if defined(__CUDACC__)
#define FUSED_RNN_FN __host__ __device__ __forceinline__
#else
#define FUSED_RNN_FN inline __attribute__((always_inline))
#endif
