// The cluster algorithm for the dtype FUSED_RNN_SCALAR, which setup.py gives.
#include "cuda/cluster_backward.cuh"
#include "cuda/cluster_forward.cuh"
#include "cuda/machine.cuh"

namespace fused_rnn::cuda {

#define FUSED_RNN_CLUSTER(Cell)                                                                    \
  template Steps forward_cluster<Cell, FUSED_RNN_SCALAR>(Directions<ForwardArgs>, WarpShape,       \
                                                         const ClusterCut&, CudaMachine&);         \
  template Steps backward_cluster<Cell, FUSED_RNN_SCALAR>(Directions<BackwardArgs>, BackwardShape, \
                                                          const BackwardCut&, CudaMachine&);
FUSED_RNN_CLUSTER(RnnTanh)
FUSED_RNN_CLUSTER(RnnRelu)
FUSED_RNN_CLUSTER(Lstm)
FUSED_RNN_CLUSTER(Gru)

}  // namespace fused_rnn::cuda
