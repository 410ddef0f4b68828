// A SIMD vector that cells.h accepts as its arithmetic type, as wide as the instruction set this
// file is compiled for. Compiler vector types do the work, so one source serves SSE2, AVX2,
// AVX-512 and NEON. Nothing from std:: may be instantiated here: see cells.h on namespaces.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../cells.h"

namespace FUSED_RNN_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Arithmetic type of a storage type.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

template <class A>
struct Format;
template <>
struct Format<float> {
  typedef float Raw __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  static constexpr int kMantissa = 23, kBias = 127, kTaylor = 7;
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer
  static constexpr float kLog2e = 0x1.715476p0f, kLn2High = 0x1.62e4p-1f,
                         kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kExpMax = 89.f, kExpMin = -104.f, kTanhMax = 10.f;
};
template <>
struct Format<double> {
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 52, kBias = 1023, kTaylor = 13;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2e = 0x1.71547652b82fep0, kLn2High = 0x1.62e42fefap-1,
                          kLn2Low = 0x1.cf79abc9e3b398p-40;
  static constexpr double kExpMax = 710.0, kExpMin = -746.0, kTanhMax = 20.0;
};

template <class A>
struct Vec {
  using Raw = typename Format<A>::Raw;
  using Int = typename Format<A>::Int;
  using Bits = typename Format<A>::Bits;
  static constexpr int kWidth = kVectorBytes / sizeof(A);

  Raw v;

  Vec() = default;
  FUSED_RNN_FN Vec(Raw raw) : v(raw) {}
  FUSED_RNN_FN explicit Vec(A x) : v(x - Raw{}) {}

  friend FUSED_RNN_FN Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend FUSED_RNN_FN Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend FUSED_RNN_FN Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend FUSED_RNN_FN Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend FUSED_RNN_FN Vec operator-(Vec a) { return -a.v; }
  friend FUSED_RNN_FN Int operator<=(Vec a, Vec b) { return a.v <= b.v; }
  friend FUSED_RNN_FN Int operator>(Vec a, Vec b) { return a.v > b.v; }
  friend FUSED_RNN_FN Vec select(Int mask, Vec a, Vec b) { return mask ? a.v : b.v; }

  // The first n lanes; the others are zero.
  template <class T>
  static FUSED_RNN_FN Vec load(const T* p, int64_t n = kWidth) {
    if (n >= kWidth) return widen(p);
    T lanes[kWidth] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return widen(lanes);
  }
  template <class T>
  FUSED_RNN_FN void store(T* p, int64_t n = kWidth) const {
    if (n >= kWidth) return narrow(p);
    T lanes[kWidth];
    narrow(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }

 private:
  static FUSED_RNN_FN Vec widen(const A* p) {
    Raw v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  FUSED_RNN_FN void narrow(A* p) const { memcpy(p, &v, sizeof(v)); }

  static FUSED_RNN_FN Bits widen_bits(const uint16_t* p) {
    typename Format<A>::Narrow x;
    memcpy(&x, p, sizeof(x));
    return __builtin_convertvector(x, Bits);
  }
  static FUSED_RNN_FN void narrow_bits(Bits bits, uint16_t* p) {
    const auto x = __builtin_convertvector(bits, typename Format<A>::Narrow);
    memcpy(p, &x, sizeof(x));
  }

  static FUSED_RNN_FN Vec widen(const BFloat16* p) {
    return reinterpret_cast<Raw>(widen_bits(&p->bits) << 16);
  }
  FUSED_RNN_FN void narrow(BFloat16* p) const {  // round to nearest even, NaN stays NaN
    const Bits bits = reinterpret_cast<Bits>(v);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    narrow_bits(v != v ? Bits{} + 0x7fc0 : rounded, &p->bits);
  }

  static FUSED_RNN_FN Vec widen(const Half* p) {
    const Bits bits = widen_bits(&p->bits), magnitude = bits & 0x7fff;
    const Raw finite = reinterpret_cast<Raw>(magnitude << 13) * 0x1p112f;
    const Bits value = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000u
                                           : reinterpret_cast<Bits>(finite);
    return reinterpret_cast<Raw>(value | ((bits & 0x8000) << 16));
  }
  FUSED_RNN_FN void narrow(Half* p) const {  // round to nearest even
    const Bits bits = reinterpret_cast<Bits>(v), magnitude = bits & 0x7fffffff;
    // Below 2^-14 the result is subnormal: adding 1/2 aligns its last bit with a float's.
    const Bits subnormal =
        reinterpret_cast<Bits>(reinterpret_cast<Raw>(magnitude) + 0.5f) - 0x3f000000u;
    const Bits normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
    Bits value = magnitude < 0x38800000u ? subnormal : normal;
    value = magnitude >= 0x477ff000u ? Bits{} + 0x7c00 : value;
    value = magnitude > 0x7f800000u ? Bits{} + 0x7e00 : value;
    narrow_bits(value | ((bits >> 16) & 0x8000), &p->bits);
  }
};

// e^r - 1 by its Taylor series; with |r| <= ln(2)/2 what is cut off is below half an ulp.
template <class A>
FUSED_RNN_FN Vec<A> expm1_reduced(Vec<A> r) {
  A coefficient[Format<A>::kTaylor + 1];
  A factorial = 1;
  for (int k = 1; k <= Format<A>::kTaylor; ++k) coefficient[k] = 1 / (factorial *= k);
  Vec<A> sum(coefficient[Format<A>::kTaylor]);
#pragma GCC unroll 16
  for (int k = Format<A>::kTaylor - 1; k >= 2; --k) sum = sum * r + Vec<A>(coefficient[k]);
  return sum * r * r + r;
}

// x = n ln 2 + r with integer n and |r| <= ln(2)/2.
template <class A>
struct Reduced {
  Vec<A> r;
  typename Vec<A>::Int n;

  explicit FUSED_RNN_FN Reduced(Vec<A> x) {
    using F = Format<A>;
    const Vec<A> shifted = x * Vec<A>(F::kLog2e) + Vec<A>(F::kRound);
    const Vec<A> count = shifted - Vec<A>(F::kRound);
    r = x - count * Vec<A>(F::kLn2High) - count * Vec<A>(F::kLn2Low);
    n = reinterpret_cast<typename Vec<A>::Int>(shifted.v) -
        reinterpret_cast<typename Vec<A>::Int>(Vec<A>(F::kRound).v);
  }
};

template <class A>
FUSED_RNN_FN Vec<A> power_of_two(typename Vec<A>::Int n) {
  return reinterpret_cast<typename Vec<A>::Raw>((n + Format<A>::kBias) << Format<A>::kMantissa);
}

// A comparison with NaN is false, so these clamps let it through.
template <class A>
FUSED_RNN_FN Vec<A> clamp(Vec<A> x, A low, A high) {
  x = select(x > Vec<A>(high), Vec<A>(high), x);
  return select(Vec<A>(low) > x, Vec<A>(low), x);
}

template <class A>
FUSED_RNN_FN Vec<A> exp(Vec<A> x) {
  const Reduced<A> y(clamp(x, Format<A>::kExpMin, Format<A>::kExpMax));
  // Two factors, because 2^n alone leaves the exponent's range at both ends.
  const typename Vec<A>::Int half = y.n >> 1;
  return (Vec<A>(1) + expm1_reduced(y.r)) * power_of_two<A>(half) * power_of_two<A>(y.n - half);
}

// tanh x = m / (m + 2) with m = e^2x - 1: accurate near 0, where 1 - 2 / (e^2x + 1) is not.
template <class A>
FUSED_RNN_FN Vec<A> tanh(Vec<A> x) {
  x = clamp(x, -Format<A>::kTanhMax, Format<A>::kTanhMax);
  const Reduced<A> y(x + x);
  const Vec<A> scale = power_of_two<A>(y.n);
  const Vec<A> m = expm1_reduced(y.r) * scale + (scale - Vec<A>(1));
  return m / (m + Vec<A>(2));
}

}  // namespace FUSED_RNN_NAMESPACE
