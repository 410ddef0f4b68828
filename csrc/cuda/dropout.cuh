// Dropout between the layers of a stack, for some rows of a layer's x or dx.
#pragma once

#include "layer.cuh"

namespace fused_rnn::cuda {

template <class T>
struct Dropout {
  const T* from;
  const uint8_t* passed;
  arithmetic_t<T> scale;
  T* to;
  int64_t rows, width;
};

template <class T>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 1) drop_out(Dropout<T> a) {
  using A = arithmetic_t<T>;
  const Place place;
  if (place.unit >= a.width) return;
  for (int64_t row = place.first_row; row < a.rows; row += place.stride) {
    const int64_t at = row * a.width + place.unit;
    write(a.to, at, read(a.from, at) * A(load(a.passed + at)) * a.scale);
  }
}

// Rows `first` and on of a layer's x or dx.
template <class T, class Machine>
void drop_out_rows(const Layer& a, const void* from, void* to, int64_t first, int64_t rows,
                   Machine& machine) {
  machine.launch(
      drop_out<T>, a.I, rows,
      Dropout<T>{static_cast<const T*>(from) + first * a.I, a.passed + first * a.I,
                 arithmetic_t<T>(a.passed_scale), static_cast<T*>(to) + first * a.I, rows, a.I});
}

}  // namespace fused_rnn::cuda
