// The forward of the grid algorithm as a program of its own: see cluster_forward.cpp.
#include "cuda/grid_forward.cuh"

#include "lstm.h"

namespace fused_rnn::emulator {
namespace {

template <int kTeam>
Outcome test_lstm(uint64_t seed) {
  ForwardProblem problem;
  constexpr int kGranule = 4;
  constexpr GridShape kShape =
      grid_shape(4, 2, 4, 2, false, false, most_units(kH, kGranule, kTeam), 8);
  const GridCut cut = grid_cut(kShape, kH, kTeam, 1, kGranule);
  Memory<uint64_t> words("words", size_t(grid_words(kShape, cut)));
  words.fill(0);
  Memory<bf16> operand("operand", kN * kH);
  operand.fill(from_float<bf16>(0));
  const GridForward<bf16> a{problem.layer(), {cut, kN, kH, words.data()}, operand.data()};
  Launch launch{.name = "grid_forward", .grid = {kTeam}, .seed = seed};
  launch.block = {32 * kGridWarps};
  launch.shared_bytes = size_t(GridShared(kShape, cut).bytes);
  Outcome outcome;
  outcome.add(run(launch, grid_forward<Lstm, bf16, false, kShape.m_tiles, 1>, a));
  return problem.check(outcome);
}

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn::emulator;
  return run_cases(count, words, {{"three", test_lstm<3>}, {"nine", test_lstm<9>}});
}
