// The backward of the cluster algorithm as a program of its own: see cluster_forward.cpp.
#include "cuda/cluster_backward.cuh"

#include "lstm.h"

namespace fused_rnn::emulator {
namespace {

// In as many directions, which are one launch.
template <int kTeam, int kDirections = 1>
Outcome test_lstm(uint64_t seed) {
  BackwardProblem problem, back{3, true};
  constexpr BackwardShape kShape = backward_shape(4, 2, 4, 2, kH, 8);
  const ClusterBackward<bf16> a{
      {problem.loop(), back.loop()}, kDirections, backward_cut(kShape, kH, kTeam)};
  Launch launch{.name = "cluster_backward", .grid = {kTeam * kDirections}, .seed = seed};
  launch.block = {32 * a.cut.warps};
  launch.shared_bytes = size_t(BackwardShared(kShape, a.cut).bytes);
  launch.cluster = kTeam;
  Outcome outcome;
  outcome.add(run(launch, cluster_backward<Lstm, bf16, kShape.m_tiles, 1>, a));
  if (kDirections == 2) back.check(outcome);
  return problem.check(outcome);
}

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn::emulator;
  return run_cases(count, words,
                   {{"alone", test_lstm<1>}, {"two", test_lstm<2>}, {"both", test_lstm<2, 2>}});
}
