// The math of every cell, forward and backward side by side, and the only native place where a
// gate is computed.
//
// A is the arithmetic type: float, double, or a SIMD vector of either. The functions call
// sigmoid, tanh and select unqualified, so that each A brings its own. An operand that is half
// precision in memory is widened before it gets here.
//
//   gx, gh   [G]  the input half and the recurrent half of each gate, biases included
//   s, s1    [S]  states before and after the step: s[0] = h, s[1] = c
//   saved         what the backward reads besides s and s1
//   ds1, ds  [S]  dL/ds1, and the part of dL/ds that does not pass through the recurrent product
//   dgx, dgh [G]  dL/dgx and dL/dgh
//
// Where zoneout carries on the state before instead of s1, backward still wants the s1 that forward
// computed. That is s1 where dL/ds1 is not zero, but for the LSTM's c, which h' depends on: next_c.
#pragma once

#include <math.h>

#include "function.h"

// Each instruction-set build keeps its instantiations in a namespace of its own: the linker merges
// equal names, and would let one build call another's instructions.
#ifndef FUSED_RNN_NAMESPACE
#define FUSED_RNN_NAMESPACE fused_rnn
#endif

namespace FUSED_RNN_NAMESPACE {

FUSED_RNN_FN float select(bool condition, float a, float b) { return condition ? a : b; }
FUSED_RNN_FN double select(bool condition, double a, double b) { return condition ? a : b; }

FUSED_RNN_FN float sigmoid(float x) { return 1 / (1 + exp(-x)); }
FUSED_RNN_FN double sigmoid(double x) { return 1 / (1 + exp(-x)); }

// h = tanh(gx + gh)
struct RnnTanh {
  static constexpr int kId = 0, kGates = 1, kStates = 1, kSaved = 0;
  static constexpr bool kHiddenIsElementwise = false;  // h enters only through the product
  static constexpr bool kSplitsGates = false;          // dgh == dgx

  template <class A>
  static FUSED_RNN_FN void forward(const A* gx, const A* gh, const A*, A* s1, A*) {
    s1[0] = tanh(gx[0] + gh[0]);
  }
  template <class A>
  static FUSED_RNN_FN void backward(const A* ds1, const A*, const A*, const A* s1, A* dgx, A* dgh,
                                    A* ds) {
    dgx[0] = dgh[0] = ds1[0] * (A(1) - s1[0] * s1[0]);
    ds[0] = A(0);
  }
};

// h = max(gx + gh, 0). A NaN passes, value and gradient, as in torch.
struct RnnRelu {
  static constexpr int kId = 1, kGates = 1, kStates = 1, kSaved = 0;
  static constexpr bool kHiddenIsElementwise = false;
  static constexpr bool kSplitsGates = false;

  template <class A>
  static FUSED_RNN_FN void forward(const A* gx, const A* gh, const A*, A* s1, A*) {
    const A x = gx[0] + gh[0];
    s1[0] = select(x <= A(0), A(0), x);
  }
  template <class A>
  static FUSED_RNN_FN void backward(const A* ds1, const A*, const A*, const A* s1, A* dgx, A* dgh,
                                    A* ds) {
    dgx[0] = dgh[0] = select(s1[0] <= A(0), A(0), ds1[0]);
    ds[0] = A(0);
  }
};

// A product that is not contracted with the sum that it goes into. Of two products in one sum the
// compiler may choose either, and choose otherwise in another function; an arithmetic type that
// promises the same bits from all of them has its own.
template <class A>
FUSED_RNN_FN A rounded(const A& product) {
  return product;
}

// i, f, o = sigmoid(gx + gh);  g = tanh(gx + gh);  c' = f c + i g;  h' = o tanh(c')
struct Lstm {
  static constexpr int kId = 2, kGates = 4, kStates = 2, kSaved = 4;
  static constexpr bool kHiddenIsElementwise = false;
  static constexpr bool kSplitsGates = false;

  // c'. A backward asks again where what was carried on (zoneout) is not what was computed.
  template <class A>
  static FUSED_RNN_FN A next_c(const A* saved, A c) {
    return saved[1] * c + rounded(saved[0] * saved[2]);
  }

  // The gates and c'.
  template <class A>
  static FUSED_RNN_FN void forward_c(const A* gx, const A* gh, const A* s, A* s1, A* saved) {
    saved[0] = sigmoid(gx[0] + gh[0]);
    saved[1] = sigmoid(gx[1] + gh[1]);
    saved[2] = tanh(gx[2] + gh[2]);
    saved[3] = sigmoid(gx[3] + gh[3]);
    s1[1] = next_c(saved, s[1]);
  }
  // From dL/dc' and dL/do, o being the gate itself.
  template <class A>
  static FUSED_RNN_FN void backward_c(const A& dc, const A& d_o, const A* saved, const A* s, A* dgx,
                                      A* dgh, A* ds) {
    const A i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    dgx[0] = dgh[0] = dc * g * i * (A(1) - i);
    dgx[1] = dgh[1] = dc * s[1] * f * (A(1) - f);
    dgx[2] = dgh[2] = dc * i * (A(1) - g * g);
    dgx[3] = dgh[3] = d_o * o * (A(1) - o);
    ds[0] = A(0);
    ds[1] = dc * f;
  }

  template <class A>
  static FUSED_RNN_FN void forward(const A* gx, const A* gh, const A* s, A* s1, A* saved) {
    forward_c(gx, gh, s, s1, saved);
    s1[0] = saved[3] * tanh(s1[1]);
  }
  template <class A>
  static FUSED_RNN_FN void backward(const A* ds1, const A* saved, const A* s, const A* s1, A* dgx,
                                    A* dgh, A* ds) {
    const A tanh_c = tanh(s1[1]);
    const A dc = ds1[1] + ds1[0] * saved[3] * (A(1) - tanh_c * tanh_c);
    backward_c(dc, ds1[0] * tanh_c, saved, s, dgx, dgh, ds);
  }
};

// r, z = sigmoid(gx + gh);  n = tanh(gx + r gh);  h' = (1 - z) n + z h
struct Gru {
  static constexpr int kId = 3, kGates = 3, kStates = 1, kSaved = 4;
  static constexpr bool kHiddenIsElementwise = true;
  static constexpr bool kSplitsGates = true;

  template <class A>
  static FUSED_RNN_FN void forward(const A* gx, const A* gh, const A* s, A* s1, A* saved) {
    const A r = saved[0] = sigmoid(gx[0] + gh[0]);
    const A z = saved[1] = sigmoid(gx[1] + gh[1]);
    const A n = saved[2] = tanh(gx[2] + r * gh[2]);
    saved[3] = gh[2];
    s1[0] = n + z * (s[0] - n);
  }
  template <class A>
  static FUSED_RNN_FN void backward(const A* ds1, const A* saved, const A* s, const A*, A* dgx,
                                    A* dgh, A* ds) {
    const A r = saved[0], z = saved[1], n = saved[2];
    dgx[2] = ds1[0] * (A(1) - z) * (A(1) - n * n);
    dgh[2] = dgx[2] * r;
    dgx[0] = dgh[0] = dgx[2] * saved[3] * r * (A(1) - r);
    dgx[1] = dgh[1] = ds1[0] * (s[0] - n) * z * (A(1) - z);
    ds[0] = ds1[0] * z;
  }
};

// Cells with layer norms. A norm takes mean and variance over units, so it is not a cell's own
// business: gx and gh come normalised, and a step that has a norm inside is cut in two at it.
//
//   kGroups  neighbouring gates that are normalised together
//   kJoint   the sum of the halves is normalised and comes as gh, gx is zero
//   kNormsC  c' is normalised on its way into h
//   kSaved   gates; the recurrent half (with kJoint the sum) and c', normalised, before gain and
//   bias

// i, f, o = sigmoid(gx + gh);  g = tanh(gx + gh);  c' = f c + i g;  h' = o tanh(norm(c'))
struct NormLstm : Lstm {
  static constexpr int kId = 0, kSaved = 9;
  static constexpr int kGroups[] = {4};
  static constexpr bool kJoint = false, kNormsC = true;

  // h' from the norm of c'.
  template <class A>
  static FUSED_RNN_FN A forward_h(const A& o, const A& norm_c) {
    return o * tanh(norm_c);
  }
  // dL/d of the norm of c', and dL/do.
  template <class A>
  static FUSED_RNN_FN void backward_h(const A& dh, const A& o, const A& norm_c, A& dnorm_c,
                                      A& d_o) {
    const A tanh_c = tanh(norm_c);
    dnorm_c = dh * o * (A(1) - tanh_c * tanh_c);
    d_o = dh * tanh_c;
  }
};

// r = sigmoid(gx + gh);  z = sigmoid(gx + gh + kUpdateBias);  n = tanh(gx + r gh);
// h' = h + z (n - h)
template <int kUpdateBias>
struct NormGruStep {
  static constexpr int kGates = 3, kStates = 1, kSaved = 6;
  static constexpr bool kHiddenIsElementwise = true, kNormsC = false;
  // dgx and dgh differ in n. What meets the recurrent weight has gone through the norm.
  static constexpr bool kSplitsGates = false;

  template <class A>
  static FUSED_RNN_FN void forward(const A* gx, const A* gh, const A* s, A* s1, A* saved) {
    const A r = saved[0] = sigmoid(gx[0] + gh[0]);
    const A z = saved[1] = sigmoid(gx[1] + gh[1] + A(kUpdateBias));
    const A n = saved[2] = tanh(gx[2] + r * gh[2]);
    s1[0] = s[0] + z * (n - s[0]);
  }
  // gh_n: the recurrent half of n
  template <class A>
  static FUSED_RNN_FN void backward(const A& dh, const A& gh_n, const A* saved, const A* s, A* dgx,
                                    A* dgh, A* ds) {
    const A r = saved[0], z = saved[1], n = saved[2];
    dgx[2] = dh * z * (A(1) - n * n);
    dgh[2] = dgx[2] * r;
    dgx[0] = dgh[0] = dgx[2] * gh_n * r * (A(1) - r);
    dgx[1] = dgh[1] = dh * (n - s[0]) * z * (A(1) - z);
    ds[0] = dh * (A(1) - z);
  }
};

// r and z are normalised together, n apart; the halves apart.
struct NormGru : NormGruStep<0> {
  static constexpr int kId = 1;
  static constexpr int kGroups[] = {2, 1};
  static constexpr bool kJoint = false;
};

// All gates of the sum are normalised together.
struct NormGruJoint : NormGruStep<-1> {
  static constexpr int kId = 2;
  static constexpr int kGroups[] = {3};
  static constexpr bool kJoint = true;
};

}  // namespace FUSED_RNN_NAMESPACE
