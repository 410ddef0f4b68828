// The backward of the cluster algorithm as a program of its own: for ThreadSanitizer, which sees
// every access, and for variants that are wrong on purpose (test_emulator.py makes them).
#include "cuda/cluster_backward.cuh"

#include <math.h>

#include "case.h"

namespace fused_rnn::emulator {
namespace {

using namespace fused_rnn::cuda;

constexpr int kT = 5, kN = 3, kH = 36, kGates = 4;

float entry(int salt, int i) {
  return float(int((unsigned(i) * 2654435761u + unsigned(salt) * 40503u) >> 13) % 17 - 8) / 16;
}
// What a forward might have saved: any numbers in (0, 1) do.
float gate(int i) { return 0.5f + entry(3, i) / 2; }

// An LSTM in bf16, step by step in double, the gates' gradients rounded where the kernel does it.
std::vector<double> expected() {
  std::vector<double> dh(kN * kH), dc(kN * kH), all(kT * kN * kGates * kH);
  for (int t = kT - 1; t >= 0; --t) {
    std::vector<double> before(kN * kH);
    for (int n = 0; n < kN; ++n)
      for (int u = 0; u < kH; ++u) {
        const int row = t * kN + n, at = n * kH + u;
        double saved[4], s[2] = {}, s1[2], ds[2], dgx[4], dgh[4];
        for (int g = 0; g < 4; ++g) saved[g] = gate((row * 4 + g) * kH + u);
        s1[1] = entry(4, row * kH + u);
        s[1] = t > 0 ? entry(4, (row - kN) * kH + u) : 0;
        const double ds1[2] = {dh[size_t(at)] + entry(5, row * kH + u), dc[size_t(at)]};
        Lstm::backward(ds1, saved, s, s1, dgx, dgh, ds);
        dc[size_t(at)] = ds[1];
        for (int g = 0; g < 4; ++g) {
          all[size_t((row * 4 + g) * kH + u)] = dgx[g];
          const double rounded = to_float(from_float<bf16>(float(dgh[g])));
          for (int k = 0; k < kH; ++k)
            before[size_t(n * kH + k)] += rounded * entry(2, (g * kH + u) * kH + k);
        }
      }
    dh = before;
  }
  return all;
}

template <int kTeam>
Outcome test_lstm(uint64_t seed) {
  Memory<bf16> w("w_hh", 4 * kH * kH), saved("saved", kT * kN * 4 * kH), c("c", kT * kN * kH),
      h("h", kT * kN * kH), dh("dh", kT * kN * kH), dgx("dgx", kT * kN * 4 * kH);
  Memory<float> dh0("dh0", kN * kH), dc0("dc0", kN * kH);
  for (size_t i = 0; i < w.size(); ++i) w[i] = from_float<bf16>(entry(2, int(i)));
  for (size_t i = 0; i < saved.size(); ++i) saved[i] = from_float<bf16>(gate(int(i)));
  for (size_t i = 0; i < c.size(); ++i) c[i] = from_float<bf16>(entry(4, int(i)));
  for (size_t i = 0; i < dh.size(); ++i) dh[i] = from_float<bf16>(entry(5, int(i)));
  dh0.fill(0);
  dc0.fill(0);
  constexpr BackwardShape kShape = backward_shape(4, 2, 4, 2, kH, 8);
  ClusterBackward<bf16> a{};
  a.layer.loop.T = kT, a.layer.loop.N = a.layer.N = kN, a.layer.loop.states = 2 * kH;
  a.layer.H = a.layer.R = kH;
  a.layer.h = h.data(), a.layer.c = c.data(), a.layer.saved = saved.data();
  a.cut = backward_cut(kShape, kH, kTeam);
  a.pairs = true;
  a.w_hh = w.data(), a.dh = dh.data(), a.dh0 = dh0.data(), a.dc0 = dc0.data();
  a.dgx = dgx.data();
  Launch launch{.name = "cluster_backward", .grid = {kTeam}, .seed = seed};
  launch.block = {32 * a.cut.warps};
  launch.shared_bytes = size_t(BackwardShared(kShape, a.cut).bytes);
  launch.cluster = kTeam;
  Outcome outcome;
  outcome.add(run(launch, cluster_backward<Lstm, bf16, kShape.m_tiles, 1>, a));
  // Some roundings to bf16 of a value near 1.
  const std::vector<double> right = expected();
  return outcome.compare("dgx", dgx, [&](int i) {
    const bool near = fabs(to_float(dgx[size_t(i)]) - right[size_t(i)]) < 1.0 / 64;
    return near ? dgx[size_t(i)] : from_float<bf16>(float(right[size_t(i)]));
  });
}

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn::emulator;
  return run_cases(count, words, {{"alone", test_lstm<1>}, {"two", test_lstm<2>}});
}
