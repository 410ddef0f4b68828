// The forward of the cluster algorithm as a program of its own: for ThreadSanitizer, which sees
// every access, and for variants that are wrong on purpose (test_emulator.py makes them).
#include "cuda/cluster_forward.cuh"

#include "lstm.h"

namespace fused_rnn::emulator {
namespace {

// In as many directions, which are one launch; of 40 units, whose outputs are whole pieces, or 36.
template <int kTeam, int kDirections = 1, int kUnits = kH>
Outcome test_lstm(uint64_t seed) {
  ForwardProblem problem{3, false, kUnits}, back{3, true, kUnits};
  constexpr WarpShape kShape = warp_shape(4, 2, 4, 2, kUnits, kTeam, 8);
  const ClusterForward<bf16> a{
      {problem.layer(), back.layer()}, kDirections, cluster_cut(kShape, kUnits, kTeam, 1 << 20)};
  Launch launch{.name = "cluster_forward", .grid = {kTeam * kDirections}, .seed = seed};
  launch.block = {32 * a.cut.warps()};
  launch.shared_bytes = size_t(ClusterShared(kShape, a.cut).bytes);
  launch.cluster = kTeam;
  Outcome outcome;
  outcome.add(run(launch, cluster_forward<Lstm, bf16, kShape.blocks, 1>, a));
  if (kDirections == 2) back.check(outcome);
  return problem.check(outcome);
}

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn::emulator;
  return run_cases(count, words,
                   {{"alone", test_lstm<1>},
                    {"two", test_lstm<2>},
                    {"pieces", test_lstm<2, 1, 40>},
                    {"both", test_lstm<2, 2>}});
}
