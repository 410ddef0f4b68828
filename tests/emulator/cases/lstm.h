// An LSTM in bf16, forward and backward, for the drivers of the algorithms that keep the weights on
// the chip: its operands in the emulator's memory, and what has to come out.
#pragma once

#include <math.h>

#include <algorithm>
#include <vector>

#include "case.h"
#include "cuda/backward_units.cuh"
#include "cuda/forward_layer.cuh"

namespace fused_rnn::emulator {

using namespace fused_rnn::cuda;

inline constexpr int kT = 5, kH = 36, kGates = 4;

inline float entry(int salt, int i) {
  return float(int((unsigned(i) * 2654435761u + unsigned(salt) * 40503u) >> 13) % 17 - 8) / 16;
}
// What a forward might have saved: any numbers in (0, 1) do.
inline float gate(int i) { return 0.5f + entry(3, i) / 2; }

template <class Entry>
std::vector<bf16> values(int count, Entry entry_of) {
  std::vector<bf16> all;
  for (int i = 0; i < count; ++i) all.push_back(from_float<bf16>(entry_of(i)));
  return all;
}

// bf16 is off by some roundings of values near 1.
inline void compare(Outcome& outcome, const char* name, const Memory<bf16>& got,
                    const std::vector<double>& right, double tolerance) {
  outcome.compare(name, got, [&](int i) {
    const bool near = fabs(to_float(got[size_t(i)]) - right[size_t(i)]) < tolerance;
    return near ? got[size_t(i)] : from_float<bf16>(float(right[size_t(i)]));
  });
}

// The reverse direction has weights of its own.
inline float weight(bool reverse, int i) { return entry(reverse ? 6 : 2, i); }

struct ForwardProblem {
  const int N = 3;
  const bool reverse = false;
  const int H = kH;
  Memory<bf16> x{"x", values(kT * N * kGates * H, [](int i) { return entry(1, i); })};
  Memory<bf16> w_hh{"w_hh", values(kGates * H * H, [this](int i) { return weight(reverse, i); })};
  Memory<bf16> h{"h", size_t(kT * N * H)}, c{"c", size_t(kT * N * H)};
  Memory<bf16> saved{"saved", size_t(kT * N * kGates * H)};
  Memory<float> h_n{"h_n", size_t(N * H)}, c_n{"c_n", size_t(N * H)};

  ForwardLayer<bf16> layer() {
    h_n.fill(0);
    c_n.fill(0);
    ForwardLayer<bf16> a{};
    a.loop.T = kT, a.loop.N = a.N = N, a.loop.states = 2 * H;
    a.loop.reverse = reverse;
    a.count = kT, a.H = H;
    a.x = x.data(), a.w_hh = w_hh.data();
    a.h = h.data(), a.c = c.data(), a.saved = saved.data();
    a.h_n = h_n.data(), a.c_n = c_n.data();
    return a;
  }

  // Step by step in double, h rounded where the kernels round it.
  Outcome& check(Outcome& outcome) const {
    std::vector<double> now(size_t(N) * H), c_now(now), all_h(kT * now.size()), all_c(all_h);
    std::vector<double> all_gates(kGates * all_h.size());
    for (int step = 0; step < kT; ++step) {
      const int t = reverse ? kT - 1 - step : step;
      std::vector<double> next(now.size());
      for (int n = 0; n < N; ++n)
        for (int u = 0; u < H; ++u) {
          double gates[kGates];
          for (int g = 0; g < kGates; ++g) {
            const int row = g * H + u, of_all = (t * N + n) * kGates * H + row;
            gates[g] = entry(1, of_all);
            for (int k = 0; k < H; ++k)
              gates[g] += weight(reverse, row * H + k) *
                          to_float(from_float<bf16>(float(now[size_t(n * H + k)])));
            gates[g] = g == 2 ? tanh(gates[g]) : 1 / (1 + exp(-gates[g]));
            all_gates[size_t(of_all)] = gates[g];
          }
          double& state = c_now[size_t(n * H + u)];
          state = gates[1] * state + gates[0] * gates[2];
          next[size_t(n * H + u)] = gates[3] * tanh(state);
        }
      now = next;
      std::copy(now.begin(), now.end(), all_h.begin() + t * N * H);
      std::copy(c_now.begin(), c_now.end(), all_c.begin() + t * N * H);
    }
    compare(outcome, "h", h, all_h, 1.0 / 128);
    compare(outcome, "c", c, all_c, 1.0 / 32);
    compare(outcome, "saved", saved, all_gates, 1.0 / 64);
    return outcome;
  }
};

struct BackwardProblem {
  const int N = 3;
  const bool reverse = false;
  Memory<bf16> w_hh{"w_hh", values(kGates * kH * kH, [this](int i) { return weight(reverse, i); })};
  Memory<bf16> saved{"saved", values(kT * N * kGates * kH, gate)};
  Memory<bf16> c{"c", values(kT * N * kH, [](int i) { return entry(4, i); })};
  Memory<bf16> dh{"dh", values(kT * N * kH, [](int i) { return entry(5, i); })};
  Memory<bf16> h{"h", size_t(kT * N * kH)}, dgx{"dgx", size_t(kT * N * kGates * kH)};
  Memory<float> dh0{"dh0", size_t(N * kH)}, dc0{"dc0", size_t(N * kH)};

  BackwardLoop<bf16> loop() {
    dh0.fill(0);
    dc0.fill(0);
    BackwardLoop<bf16> a{};
    a.layer.loop.T = kT, a.layer.loop.N = a.layer.N = N, a.layer.loop.states = 2 * kH;
    a.layer.loop.reverse = reverse;
    a.count = kT;
    a.layer.H = a.layer.R = kH;
    a.layer.h = h.data(), a.layer.c = c.data(), a.layer.saved = saved.data();
    a.wide = true;
    a.w_hh = w_hh.data(), a.dh = dh.data(), a.dh0 = dh0.data(), a.dc0 = dc0.data();
    a.dgx = dgx.data();
    return a;
  }

  // Step by step in double, the gates' gradients rounded where the kernels do it.
  Outcome& check(Outcome& outcome) const {
    std::vector<double> of_h(size_t(N) * kH), of_c(of_h), all(kT * kGates * of_h.size());
    for (int step = kT - 1; step >= 0; --step) {
      const int t = reverse ? kT - 1 - step : step;
      std::vector<double> before(of_h.size());
      for (int n = 0; n < N; ++n)
        for (int u = 0; u < kH; ++u) {
          const int row = t * N + n, at = n * kH + u;
          double gates[4], s[2] = {}, s1[2], ds[2], of_x[4], of_gh[4];
          for (int g = 0; g < 4; ++g) gates[g] = gate((row * 4 + g) * kH + u);
          s1[1] = entry(4, row * kH + u);
          s[1] = step > 0 ? entry(4, (reverse ? row + N : row - N) * kH + u) : 0;
          const double ds1[2] = {of_h[size_t(at)] + entry(5, row * kH + u), of_c[size_t(at)]};
          Lstm::backward(ds1, gates, s, s1, of_x, of_gh, ds);
          of_c[size_t(at)] = ds[1];
          for (int g = 0; g < 4; ++g) {
            all[size_t((row * 4 + g) * kH + u)] = of_x[g];
            const double rounded = to_float(from_float<bf16>(float(of_gh[g])));
            for (int k = 0; k < kH; ++k)
              before[size_t(n * kH + k)] += rounded * weight(reverse, (g * kH + u) * kH + k);
          }
        }
      of_h = before;
    }
    compare(outcome, "dgx", dgx, all, 1.0 / 64);
    return outcome;
  }
};

}  // namespace fused_rnn::emulator
