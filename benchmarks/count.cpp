// One call of a layer's loops in float32 on one thread, with nothing around it, for a tool that
// counts instructions: count CELL T N H forward|train, the cell by its number.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <vector>

#include "../csrc/cpu/kernels.h"

namespace fused_rnn_avx2 {
const fused_rnn::Kernels& kernels_float();
}

namespace {

// Values between -0.1 and 0.1.
std::vector<float> some(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  uint32_t state = 1;
  for (float& value : values) {
    state = state * 1664525 + 1013904223;
    value = float(state >> 8) / float(1 << 23) * 0.1f - 0.1f;
  }
  return values;
}

}  // namespace

// What the tool counts, by this name.
extern "C" __attribute__((noinline)) void counted(void (*call)(void*), void* context) {
  call(context);
}

namespace {

template <class Args>
void run(const fused_rnn::Loop<Args>& loop, const Args& args, const fused_rnn::Schedule& schedule) {
  const size_t bytes = (loop.bytes(args, schedule) + 63) / 64 * 64;
  char* const memory = static_cast<char*>(aligned_alloc(64, bytes));
  const auto call = [&] { loop.run(args, schedule, memory); };
  counted([](void* context) { (*static_cast<decltype(call)*>(context))(); },
          const_cast<void*>(static_cast<const void*>(&call)));
  free(memory);
}

}  // namespace

int main(int count, char** given) {
  if (count != 6) return 2;
  const int cell = atoi(given[1]);
  const int64_t T = atoi(given[2]), N = atoi(given[3]), H = atoi(given[4]);
  const bool train = !strcmp(given[5], "train");
  const fused_rnn::CellShape& shape = fused_rnn::kCellShapes[cell];
  const fused_rnn::Kernels& kernels = fused_rnn_avx2::kernels_float();
  const int64_t gates = shape.gates * H, rows = T * N;
  const auto x = some(rows * H), w_ih = some(gates * H), w_hh = some(gates * H), b = some(gates);
  std::vector<float> h(size_t(rows * H)), c(h), saved(size_t(rows * shape.saved * H) + 1);
  std::vector<float> h_n(size_t(N * H)), c_n(h_n);
  // As register.cpp cuts up a call on one thread.
  const int64_t sum_steps = fused_rnn::kSumRows > N ? fused_rnn::kSumRows / N : 1;
  const int64_t steps = sum_steps < T ? sum_steps : T;
  const fused_rnn::Schedule schedule{1, 1, 1, 0, steps, sum_steps, nullptr};

  fused_rnn::Layer layer{};
  layer.cell = cell;
  layer.T = T;
  layer.N = N;
  layer.I = layer.H = layer.R = H;
  layer.M = rows;
  layer.x = x.data();
  layer.w_ih = w_ih.data();
  layer.w_hh = w_hh.data();
  fused_rnn::ForwardArgs forward{};
  static_cast<fused_rnn::Layer&>(forward) = layer;
  forward.save = train;
  forward.b_ih = forward.b_hh = b.data();
  forward.h = h.data();
  forward.c = c.data();
  forward.h_n = h_n.data();
  forward.c_n = c_n.data();
  forward.saved = saved.data();
  run(kernels.forward[cell], forward, schedule);
  if (train) {
    const auto dh = some(rows * H);
    std::vector<float> dw_ih(w_ih), dw_hh(w_hh), db_ih(b), db_hh(b);
    fused_rnn::BackwardArgs backward{};
    static_cast<fused_rnn::Layer&>(backward) = layer;
    backward.dh = dh.data();
    backward.h = h.data();
    backward.c = c.data();
    backward.saved = saved.data();
    backward.dh0 = h_n.data();
    backward.dc0 = c_n.data();
    backward.dw_ih = dw_ih.data();
    backward.dw_hh = dw_hh.data();
    backward.db_ih = db_ih.data();
    backward.db_hh = db_hh.data();
    run(kernels.backward[cell], backward, schedule);
    printf("%g\n", double(dw_hh[0]));
  }
  printf("%g\n", double(h[0]));
}
