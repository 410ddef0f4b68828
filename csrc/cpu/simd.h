// A SIMD vector that cells.h accepts as its arithmetic type, as wide as the instruction set this
// file is compiled for. Compiler vector types do the work, so one source serves SSE2, AVX2,
// AVX-512 and NEON. Nothing from std:: may be instantiated here: see cells.h on namespaces.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer
  // (e^r - 1 - r) / r^2 for |r| <= ln(2)/2: a minimax fit, e^r - 1 to 0.23 * 2^-24.
  static constexpr int kTerms = 5;
  static constexpr float coefficient(int k) {
    constexpr float fitted[kTerms] = {0.5f, 0x1.5554bp-3f, 0x1.555486p-5f, 0x1.122838p-7f,
                                      0x1.6d9956p-10f};
    return fitted[k];
  }
  static constexpr float kLog2e = 0x1.715476p0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kExpMax = 87.f, kTanhMax = 20.f;
};
template <>
struct Format<double> {
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  // The same by its Taylor series: what is cut off is below half an ulp.
  static constexpr int kTerms = 12;
  static constexpr double coefficient(int k) {
    double factorial = 2;
    for (int i = 1; i <= k; ++i) factorial *= i + 2;
    return 1 / factorial;
  }
  static constexpr double kLog2e = 0x1.71547652b82fep0, kLn2High = 0x1.62e42fefap-1,
                          kLn2Low = 0x1.cf79abc9e3b398p-40;
  static constexpr double kExpMax = 708.0, kTanhMax = 40.0;
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

  // With a count below kWidth only the first lanes are touched, and the others load as zero.
  template <class T>
  static FUSED_RNN_FN Vec load(const T* p, int64_t count = kWidth) {
    if (count >= kWidth) return widen(p);
    T lanes[kWidth] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return widen(lanes);
  }
  template <class T>
  FUSED_RNN_FN void store(T* p, int64_t count = kWidth) const {
    if (count >= kWidth) return narrow(p);
    T lanes[kWidth];
    narrow(lanes);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
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
    const Bits value =
        magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000u : reinterpret_cast<Bits>(finite);
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

template <int... kLanes>
struct Lanes {};
template <int kCount, int... kLanes>
struct CountLanes : CountLanes<kCount - 1, kCount - 1, kLanes...> {};
template <int... kLanes>
struct CountLanes<0, kLanes...> {
  using Type = Lanes<kLanes...>;
};

// Lane j has a partner kApart lanes away. Exchanged are a's lanes that are the second of two with
// b's that are the first: the 2x2 transpose.
template <int kApart, class A, int... kLanes>
FUSED_RNN_FN void exchange(Vec<A>& a, Vec<A>& b, Lanes<kLanes...>) {
  using Raw = typename Vec<A>::Raw;
  const typename Vec<A>::Int second = {(kLanes & kApart ? -1 : 0)...};
  const Raw leaving = second ? a.v : b.v;
  const Raw coming = {leaving[kLanes ^ kApart]...};
  a = second ? coming : a.v;
  b = second ? b.v : coming;
}

// kWidth vectors as the rows of a matrix, transposed in place.
template <int kApart, class A>
FUSED_RNN_FN void transpose(Vec<A>* rows) {
  constexpr int kWidth = Vec<A>::kWidth;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i)
    if (!(i & kApart))
      exchange<kApart>(rows[i], rows[i + kApart], typename CountLanes<kWidth>::Type());
  if constexpr (kApart > 1) transpose<kApart / 2>(rows);
}

// Sums of the lanes of kWidth vectors, the i-th in lane i of the result.
template <int kApart, class A>
FUSED_RNN_FN Vec<A> lane_sums(Vec<A>* v) {
#pragma GCC unroll 8
  for (int i = 0; i < kApart; ++i) {
    exchange<kApart>(v[i], v[i + kApart], typename CountLanes<Vec<A>::kWidth>::Type());
    v[i] = v[i] + v[i + kApart];
  }
  if constexpr (kApart > 1)
    return lane_sums<kApart / 2>(v);
  else
    return v[0];
}

// For cells.h: the compiler does not see that it is a product.
template <class A>
FUSED_RNN_FN Vec<A> rounded(Vec<A> product) {
#if defined(__x86_64__)
  asm("" : "+v"(product.v));
#elif defined(__aarch64__)
  asm("" : "+w"(product.v));
#endif
  return product;
}

// e^r - 1 for |r| <= ln(2)/2. Pairs of terms, then Horner in r^2: half the latency of Horner in r.
template <class A>
FUSED_RNN_FN Vec<A> expm1_reduced(Vec<A> r) {
  using F = Format<A>;
  const Vec<A> square = r * r;
  int k = F::kTerms - 1;
  Vec<A> sum(F::coefficient(k--));
  if (F::kTerms % 2 == 0) sum = sum * r + Vec<A>(F::coefficient(k--));
#pragma GCC unroll 8
  for (; k > 0; k -= 2)
    sum = sum * square + (Vec<A>(F::coefficient(k)) * r + Vec<A>(F::coefficient(k - 1)));
  return sum * square + r;
}

// 2^n for an integer n; `shifted` is n + kRound, whose low bits are n.
template <class A>
FUSED_RNN_FN Vec<A> power_of_two(Vec<A> /*n*/, Vec<A> shifted) {
  using Int = typename Vec<A>::Int;
  const Int n =
      reinterpret_cast<Int>(shifted.v) - reinterpret_cast<Int>(Vec<A>(Format<A>::kRound).v);
  return reinterpret_cast<typename Vec<A>::Raw>((n + Format<A>::kBias) << Format<A>::kMantissa);
}
#if defined(__AVX512F__)
FUSED_RNN_FN Vec<float> power_of_two(Vec<float> n, Vec<float>) {
  return Vec<float>::Raw(_mm512_maskz_scalef_ps(-1, Vec<float>(1).v, n.v));
}
#endif

// e^(sign x) as 2^n (1 + m), with |n| and m moderate where |x| <= kExpMax; sign is 1 or -1.
template <class A>
struct Exponential {
  Vec<A> scale, m;

  FUSED_RNN_FN Exponential(Vec<A> x, A sign) {
    using F = Format<A>;
    const Vec<A> shifted = x * Vec<A>(sign * F::kLog2e) + Vec<A>(F::kRound);
    const Vec<A> n = shifted - Vec<A>(F::kRound);
    const Vec<A> high = sign > 0 ? x - n * Vec<A>(F::kLn2High) : -(n * Vec<A>(F::kLn2High)) - x;
    m = expm1_reduced(high - n * Vec<A>(F::kLn2Low));
    scale = power_of_two(n, shifted);
  }
};

// The smaller (the larger) of limit and x; x where x is NaN.
template <class A>
FUSED_RNN_FN Vec<A> at_most(A limit, Vec<A> x) {
  return select(x > Vec<A>(limit), Vec<A>(limit), x);
}
template <class A>
FUSED_RNN_FN Vec<A> at_least(A limit, Vec<A> x) {
  return select(Vec<A>(limit) > x, Vec<A>(limit), x);
}
#if defined(__AVX512F__)
// One instruction each, where the compiler would compare and blend.
FUSED_RNN_FN Vec<float> at_most(float limit, Vec<float> x) {
  return Vec<float>::Raw(_mm512_mask_min_ps(x.v, -1, Vec<float>(limit).v, x.v));
}
FUSED_RNN_FN Vec<float> at_least(float limit, Vec<float> x) {
  return Vec<float>::Raw(_mm512_mask_max_ps(x.v, -1, Vec<float>(limit).v, x.v));
}
#endif

template <class A>
FUSED_RNN_FN Vec<A> clamp(Vec<A> x, A limit) {
  return at_least(-limit, at_most(limit, x));
}

// 1 / x for 1 <= |x| <= e^kExpMax + 1, which is where the gates need it.
template <class A>
FUSED_RNN_FN Vec<A> reciprocal(Vec<A> x) {
  return Vec<A>(1) / x;
}
#if defined(__AVX512F__)
// A division holds the divider for 16 cycles, and an LSTM step has five of them. The 14-bit
// estimate and one Newton step are within 1 ulp of it.
FUSED_RNN_FN Vec<float> reciprocal(Vec<float> x) {
  const Vec<float> estimate(Vec<float>::Raw(_mm512_maskz_rcp14_ps(-1, x.v)));
  return estimate + estimate * (Vec<float>(1) - x * estimate);
}
#endif

// 1 / (1 + e^-x). Beyond kExpMax e^-x stays where it is there: close enough for a gate.
template <class A>
FUSED_RNN_FN Vec<A> sigmoid(Vec<A> x) {
  const Exponential<A> e(clamp(x, Format<A>::kExpMax), -1);
  return reciprocal(e.m * e.scale + (e.scale + Vec<A>(1)));
}

// tanh x = y / (y + 2) with y = e^2x - 1: accurate near 0, where 1 - 2 / (e^2x + 1) is not.
template <class A>
FUSED_RNN_FN Vec<A> tanh(Vec<A> x) {
  const Exponential<A> e(clamp(x + x, Format<A>::kTanhMax), 1);
  const Vec<A> y = e.m * e.scale + (e.scale - Vec<A>(1));
  return y * reciprocal(y + Vec<A>(2));
}

// Of a lambda's body: a gate that the compiler chose to call would be a chain by itself.
#define FUSED_RNN_INLINE __attribute__((always_inline))

// K vectors that go through a cell together. A gate is a chain of some thirty dependent
// instructions; with two chains side by side the machine does not wait for either.
template <class A, int K>
struct Several {
  struct Mask {
    typename Vec<A>::Int part[K];
  };
  Vec<A> part[K];

  Several() = default;
  FUSED_RNN_FN explicit Several(A x) {
    each([&](int k) FUSED_RNN_INLINE { part[k] = Vec<A>(x); });
  }

  template <class Body>
  static FUSED_RNN_FN void each(Body body) {
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) body(k);
  }
  template <class Body>
  static FUSED_RNN_FN Several map(Body body) {
    Several out;
    each([&](int k) FUSED_RNN_INLINE { out.part[k] = body(k); });
    return out;
  }

  friend FUSED_RNN_FN Several operator+(const Several& a, const Several& b) {
    return map([&](int k) FUSED_RNN_INLINE { return a.part[k] + b.part[k]; });
  }
  friend FUSED_RNN_FN Several operator-(const Several& a, const Several& b) {
    return map([&](int k) FUSED_RNN_INLINE { return a.part[k] - b.part[k]; });
  }
  friend FUSED_RNN_FN Several operator*(const Several& a, const Several& b) {
    return map([&](int k) FUSED_RNN_INLINE { return a.part[k] * b.part[k]; });
  }
  friend FUSED_RNN_FN Several operator-(const Several& a) {
    return map([&](int k) FUSED_RNN_INLINE { return -a.part[k]; });
  }
  friend FUSED_RNN_FN Mask operator<=(const Several& a, const Several& b) {
    Mask out;
    each([&](int k) FUSED_RNN_INLINE { out.part[k] = a.part[k] <= b.part[k]; });
    return out;
  }
  friend FUSED_RNN_FN Several select(const Mask& mask, const Several& a, const Several& b) {
    return map([&](int k) FUSED_RNN_INLINE { return select(mask.part[k], a.part[k], b.part[k]); });
  }
  friend FUSED_RNN_FN Several sigmoid(const Several& x) {
    return map([&](int k) FUSED_RNN_INLINE { return sigmoid(x.part[k]); });
  }
  friend FUSED_RNN_FN Several tanh(const Several& x) {
    return map([&](int k) FUSED_RNN_INLINE { return tanh(x.part[k]); });
  }
  friend FUSED_RNN_FN Several rounded(const Several& x) {
    return map([&](int k) FUSED_RNN_INLINE { return rounded(x.part[k]); });
  }
};

}  // namespace FUSED_RNN_NAMESPACE
