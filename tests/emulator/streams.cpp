#include <algorithm>

#include "cuda_runtime.h"
#include "machine.h"

namespace fused_rnn::emulator {

// In half of the orders a stream works as long as it can before the next one does.
bool synchronize(uint64_t seed) {
  Random random(seed);
  std::vector<CUstream_st*> order;
  for (const auto& stream : streams()) order.push_back(stream.get());
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  const bool greedy = random.one_in(2);
  while (true) {
    std::vector<CUstream_st*> ready;
    bool done = true;
    for (CUstream_st* stream : order) {
      if (stream->work.empty()) continue;
      done = false;
      const auto& waits_for = stream->work.front().waits_for;
      if (!waits_for || *waits_for) ready.push_back(stream);
    }
    if (done || ready.empty()) return done;
    CUstream_st& next = greedy ? *ready[0] : *ready[random.below(ready.size())];
    const auto run = std::move(next.work.front().run);
    next.work.pop_front();
    run();
  }
}

}  // namespace fused_rnn::emulator
