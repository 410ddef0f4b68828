// The half types by their bits. Conversions round to nearest even, as CUDA's do; a NaN becomes
// 0x7fff.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace fused_rnn {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct tf32 {};  // names the mma, is never stored

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? ldexpf(float(mantissa), -24)
                                          : ldexpf(float(mantissa + 1024), exponent - 25);
  return x.bits >> 15 ? -magnitude : magnitude;
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  if (isnan(x)) return {0x7fff};
  const uint32_t bits = float_bits(x);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  if (isnan(x)) return {0x7fff};
  const uint16_t sign = uint16_t(float_bits(x) >> 16 & 0x8000);
  const float magnitude = fabsf(x);
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  // An ulp of the result: 2^-24 below 2^-14, and 2^-10 of the power of two below x above. In units
  // of it x is below 2^11, and nearbyint rounds exactly; a carry into the exponent is right.
  const int exponent = magnitude < ldexpf(1, -14) ? -14 : ilogbf(magnitude);
  const int steps = int(nearbyintf(ldexpf(magnitude, 10 - exponent)));
  return {uint16_t(sign | (((exponent + 14) << 10) + steps))};
}

// Ties away from zero, as cvt.rna.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = float_bits(x);
  if (isnan(x)) return 0x7fffffff;
  return isinf(x) ? bits : (bits + 0x1000) & ~0x1fffu;
}

}  // namespace fused_rnn
