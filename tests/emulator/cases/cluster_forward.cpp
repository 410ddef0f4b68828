// The forward of the cluster algorithm as a program of its own: for ThreadSanitizer, which sees
// every access, and for variants that are wrong on purpose (test_emulator.py makes them).
#include "cuda/cluster_forward.cuh"

#include <math.h>

#include "case.h"

namespace fused_rnn::emulator {
namespace {

using namespace fused_rnn::cuda;

constexpr int kT = 5, kN = 3, kH = 36;

float entry(int salt, int i) {
  return float(int((unsigned(i) * 2654435761u + unsigned(salt) * 40503u) >> 13) % 17 - 8) / 16;
}

// An LSTM in bf16, step by step in double, h rounded where the kernel rounds it.
std::vector<double> expected() {
  std::vector<double> h(kN * kH), c(kN * kH), all;
  for (int t = 0; t < kT; ++t) {
    std::vector<double> next(kN * kH);
    for (int n = 0; n < kN; ++n)
      for (int u = 0; u < kH; ++u) {
        double gate[4];
        for (int g = 0; g < 4; ++g) {
          const int row = g * kH + u;
          gate[g] = entry(1, (t * kN + n) * 4 * kH + row);
          for (int k = 0; k < kH; ++k)
            gate[g] += entry(2, row * kH + k) * to_float(from_float<bf16>(float(h[n * kH + k])));
        }
        const auto sigmoid = [](double x) { return 1 / (1 + exp(-x)); };
        double& state = c[n * kH + u];
        state = sigmoid(gate[1]) * state + sigmoid(gate[0]) * tanh(gate[2]);
        next[n * kH + u] = sigmoid(gate[3]) * tanh(state);
      }
    h = next;
    all.insert(all.end(), h.begin(), h.end());
  }
  return all;
}

template <int kTeam>
Outcome test_lstm(uint64_t seed) {
  Memory<bf16> x("x", kT * kN * 4 * kH), w("w_hh", 4 * kH * kH), h("h", kT * kN * kH);
  Memory<float> h_n("h_n", kN * kH), c_n("c_n", kN * kH);
  for (size_t i = 0; i < x.size(); ++i) x[i] = from_float<bf16>(entry(1, int(i)));
  for (size_t i = 0; i < w.size(); ++i) w[i] = from_float<bf16>(entry(2, int(i)));
  h_n.fill(0);
  c_n.fill(0);
  constexpr WarpShape kShape = warp_shape(4, 2, 4, 2, kH, kTeam, 8);
  ClusterForward<bf16> a{};
  a.loop.T = kT, a.loop.N = a.N = kN, a.loop.states = 2 * kH;
  a.count = kT, a.H = kH;
  a.cut = cluster_cut(kShape, kH, kTeam);
  a.x = x.data(), a.w_hh = w.data(), a.h = h.data(), a.h_n = h_n.data(), a.c_n = c_n.data();
  Launch launch{.name = "cluster_forward", .grid = {kTeam}, .seed = seed};
  launch.block = {32 * a.cut.warps()};
  launch.shared_bytes =
      size_t(ClusterShared(kShape, a.cut.groups, a.cut.parts, a.cut.part_tiles).bytes);
  launch.cluster = kTeam;
  Outcome outcome;
  outcome.add(run(launch, cluster_forward<Lstm, bf16, kShape.blocks, 1>, a));
  // Two roundings to bf16 of a value below 1.
  const std::vector<double> right = expected();
  return outcome.compare("h", h, [&](int i) {
    const bool near = fabs(to_float(h[size_t(i)]) - right[size_t(i)]) < 1.0 / 128;
    return near ? h[size_t(i)] : from_float<bf16>(float(right[size_t(i)]));
  });
}

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn::emulator;
  return run_cases(count, words, {{"alone", test_lstm<1>}, {"two", test_lstm<2>}});
}
