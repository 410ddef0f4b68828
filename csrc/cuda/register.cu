// The CUDA implementation of the ops.
#include <torch/csrc/stable/library.h>

#include "cuda/device.cuh"
#include "cuda/machine.cuh"

namespace fused_rnn::cuda {

// Compiled by cluster.cu and grid.cu, once for each dtype: it takes minutes, so in parallel.
#define FUSED_RNN_CLUSTER(Cell, T)                                                         \
  extern template Steps forward_cluster<Cell, T>(Directions<ForwardArgs>, WarpShape,       \
                                                 const ClusterCut&, CudaMachine&);         \
  extern template Steps backward_cluster<Cell, T>(Directions<BackwardArgs>, BackwardShape, \
                                                  const BackwardCut&, CudaMachine&);
#define FUSED_RNN_CLUSTERS(T)   \
  FUSED_RNN_CLUSTER(RnnTanh, T) \
  FUSED_RNN_CLUSTER(RnnRelu, T) FUSED_RNN_CLUSTER(Lstm, T) FUSED_RNN_CLUSTER(Gru, T)
#define FUSED_RNN_GRID(Cell, T, exact)                                                    \
  extern template void forward_grid<Cell, T, exact>(Directions<ForwardArgs>, GridShape,   \
                                                    const GridCut&, CudaMachine&);        \
  extern template void backward_grid<Cell, T, exact>(Directions<BackwardArgs>, GridShape, \
                                                     const GridCut&, CudaMachine&);
#define FUSED_RNN_GRIDS(T, exact)   \
  FUSED_RNN_GRID(RnnTanh, T, exact) \
  FUSED_RNN_GRID(RnnRelu, T, exact) FUSED_RNN_GRID(Lstm, T, exact) FUSED_RNN_GRID(Gru, T, exact)
FUSED_RNN_CLUSTERS(float)
FUSED_RNN_CLUSTERS(bf16)
FUSED_RNN_CLUSTERS(fp16)
FUSED_RNN_GRIDS(float, true)
FUSED_RNN_GRIDS(float, false)
FUSED_RNN_GRIDS(bf16, false)
FUSED_RNN_GRIDS(fp16, false)

}  // namespace fused_rnn::cuda

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CUDA, library) {
  fused_rnn::implement_ops<fused_rnn::cuda::Ops<fused_rnn::cuda::CudaMachine>::kDevice>(library);
  fused_rnn::implement_stack_ops<fused_rnn::cuda::Ops<fused_rnn::cuda::CudaMachine>::kDevice>(
      library);
}
