// The CUDA implementation of the ops.
#include <torch/csrc/stable/library.h>

#include "cuda/device.cuh"
#include "cuda/machine.cuh"

namespace fused_rnn::cuda {

// Compiled by cluster.cu, once for each dtype: it takes minutes, so in parallel.
#define FUSED_RNN_CLUSTER(Cell, T)                                                                \
  extern template void forward_cluster<Cell, T>(const ForwardArgs&, WarpShape, const ClusterCut&, \
                                                CudaMachine&);                                    \
  extern template void backward_cluster<Cell, T>(const BackwardArgs&, BackwardShape,              \
                                                 const BackwardCut&, CudaMachine&);
#define FUSED_RNN_CLUSTERS(T)   \
  FUSED_RNN_CLUSTER(RnnTanh, T) \
  FUSED_RNN_CLUSTER(RnnRelu, T) FUSED_RNN_CLUSTER(Lstm, T) FUSED_RNN_CLUSTER(Gru, T)
FUSED_RNN_CLUSTERS(float)
FUSED_RNN_CLUSTERS(bf16)
FUSED_RNN_CLUSTERS(fp16)

}  // namespace fused_rnn::cuda

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CUDA, library) {
  fused_rnn::implement_ops<fused_rnn::cuda::Ops<fused_rnn::cuda::CudaMachine>::kDevice>(library);
}
