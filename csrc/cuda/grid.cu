// The grid algorithm for the dtype FUSED_RNN_SCALAR, which setup.py gives.
#include "cuda/grid_backward.cuh"
#include "cuda/grid_forward.cuh"
#include "cuda/machine.cuh"

namespace fused_rnn::cuda {

#define FUSED_RNN_GRID(Cell, exact)                                                               \
  template void forward_grid<Cell, FUSED_RNN_SCALAR, exact>(Directions<ForwardArgs>, GridShape,   \
                                                            const GridCut&, CudaMachine&);        \
  template void backward_grid<Cell, FUSED_RNN_SCALAR, exact>(Directions<BackwardArgs>, GridShape, \
                                                             const GridCut&, CudaMachine&);
#define FUSED_RNN_GRIDS(exact)   \
  FUSED_RNN_GRID(RnnTanh, exact) \
  FUSED_RNN_GRID(RnnRelu, exact) FUSED_RNN_GRID(Lstm, exact) FUSED_RNN_GRID(Gru, exact)
FUSED_RNN_GRIDS(false)
#ifdef FUSED_RNN_EXACT
FUSED_RNN_GRIDS(true)
#endif

}  // namespace fused_rnn::cuda
