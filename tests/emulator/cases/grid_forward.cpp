// The forward of the grid algorithm as a program of its own: see cluster_forward.cpp.
#include "cuda/grid_forward.cuh"

#include "lstm.h"

namespace fused_rnn::emulator {
namespace {

template <int kTeam, int kGranule, int kGroups = 1, bool kOverlaid = false, int kDirections = 1>
Outcome test_lstm(uint64_t seed, int N = 3) {
  ForwardProblem problem{N}, back{N, true};
  constexpr GridShape kShape =
      grid_shape(4, 2, 4, 2, false, false, most_units(kH, kGranule, kTeam), 1, 8);
  const GridCut cut = grid_cut(kShape, kH, kTeam, kGroups, 1, kOverlaid, kGranule);
  Memory<uint64_t> words("words", size_t(grid_words(kShape, cut)));
  words.fill(0);
  Memory<bf16> operand("operand", size_t(kDirections * N * kH));
  operand.fill(from_float<bf16>(0));
  const GridForward<bf16> a{
      {problem.layer(), back.layer()}, {cut, kDirections, N, kH, words.data()}, operand.data()};
  Launch launch{.name = "grid_forward", .grid = {kTeam * kGroups}, .seed = seed};
  launch.block = {32 * kGridWarps};
  launch.shared_bytes = size_t(GridShared(kShape, cut).bytes);
  Outcome outcome;
  outcome.add(run(launch, grid_forward<Lstm, bf16, false, kShape.m_tiles, 1>, a));
  if (kDirections == 2) back.check(outcome);
  return problem.check(outcome);
}

// Two groups of blocks, the first of which has two tiles of the batch, in turn.
Outcome test_tiles(uint64_t seed) { return test_lstm<3, 8, 2, true>(seed, 19); }
// Two groups, one for each direction.
Outcome test_both(uint64_t seed) { return test_lstm<3, 8, 2, false, 2>(seed); }

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn::emulator;
  const auto three = [](uint64_t seed) { return test_lstm<3, 4>(seed); };
  const auto nine = [](uint64_t seed) { return test_lstm<9, 4>(seed); };
  return run_cases(count, words,
                   {{"three", three}, {"tiles", test_tiles}, {"both", test_both}, {"nine", nine}});
}
