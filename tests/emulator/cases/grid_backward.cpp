// The backward of the grid algorithm as a program of its own: see cluster_forward.cpp.
#include "cuda/grid_backward.cuh"

#include "lstm.h"

namespace fused_rnn::emulator {
namespace {

template <int kTeam, int kGranule, int kLine, int kGroups = 1, bool kOverlaid = false,
          int kDirections = 1>
Outcome test_lstm(uint64_t seed, int N = 3) {
  BackwardProblem problem{N}, back{N, true};
  constexpr GridShape kShape =
      grid_shape(4, 2, 4, 2, false, true, most_grid_units(kH, kGranule, kTeam, kLine), kLine, 8);
  const GridCut cut = grid_cut(kShape, kH, kTeam, kGroups, kLine, kOverlaid, kGranule);
  Memory<uint64_t> words("words", size_t(grid_words(kShape, cut)));
  words.fill(0);
  const GridBackward<bf16> a{{problem.loop(), back.loop()},
                             {cut, kDirections, N, kH, words.data()}};
  Launch launch{.name = "grid_backward", .grid = {kTeam * kGroups}, .seed = seed};
  launch.block = {32 * kGridWarps};
  launch.shared_bytes = size_t(GridShared(kShape, cut).bytes);
  Outcome outcome;
  outcome.add(run(launch, grid_backward<Lstm, bf16, false, kShape.m_tiles, 1>, a));
  if (kDirections == 2) back.check(outcome);
  return problem.check(outcome);
}

// Two groups of blocks, the first of which has two tiles of the batch, in turn.
Outcome test_tiles(uint64_t seed) { return test_lstm<2, 8, 2, 2, true>(seed, 19); }
// Two groups, one for each direction.
Outcome test_both(uint64_t seed) { return test_lstm<2, 8, 2, 2, false, 2>(seed); }

}  // namespace
}  // namespace fused_rnn::emulator

int main(int count, char** words) {
  using namespace fused_rnn::emulator;
  const auto three = [](uint64_t seed) { return test_lstm<3, 4, 1>(seed); };
  const auto nine = [](uint64_t seed) { return test_lstm<9, 4, 3>(seed); };
  return run_cases(count, words,
                   {{"three", three}, {"tiles", test_tiles}, {"both", test_both}, {"nine", nine}});
}
