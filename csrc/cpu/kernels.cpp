// The time loops of one dtype for one instruction set. setup.py compiles this file once for each
// pair, with FUSED_RNN_ISA (baseline, avx2, avx512) and FUSED_RNN_SCALAR (float, double, bfloat16,
// half).
#define FUSED_RNN_JOIN_(a, b) a##b
#define FUSED_RNN_JOIN(a, b) FUSED_RNN_JOIN_(a, b)
#define FUSED_RNN_NAMESPACE FUSED_RNN_JOIN(fused_rnn_, FUSED_RNN_ISA)

#include "backward.h"
#include "cell.h"
#include "forward.h"
#include "norm_backward.h"
#include "norm_forward.h"
#include "step.h"

namespace FUSED_RNN_NAMESPACE {
namespace {

using bfloat16 = BFloat16;
using half = Half;

template <class Args, class Run>
constexpr fused_rnn::Loop<Args> make_loop() {
  return {[](const Args& args, const Schedule& schedule) {
            Arena arena;
            Run run(args, schedule, arena);
            return arena.used;
          },
          [](const Args& args, const Schedule& schedule, char* memory) {
            Arena arena{memory};
            Run(args, schedule, arena).run();
          }};
}

template <class Cell, class T>
constexpr auto forward_loop = make_loop<ForwardArgs, Forward<Cell, T>>();
template <class Cell, class T>
constexpr auto backward_loop = make_loop<BackwardArgs, Backward<Cell, T>>();
template <class Cell, class T>
constexpr auto norm_forward_loop = make_loop<NormForwardArgs, NormForward<Cell, T>>();
template <class Cell, class T>
constexpr auto norm_backward_loop = make_loop<NormBackwardArgs, NormBackward<Cell, T>>();

template <class T>
constexpr fused_rnn::Kernels kKernels = {
    {forward_loop<RnnTanh, T>, forward_loop<RnnRelu, T>, forward_loop<Lstm, T>,
     forward_loop<Gru, T>},
    {backward_loop<RnnTanh, T>, backward_loop<RnnRelu, T>, backward_loop<Lstm, T>,
     backward_loop<Gru, T>},
    {Steps<RnnTanh, T>::forward, Steps<RnnRelu, T>::forward, Steps<Lstm, T>::forward,
     Steps<Gru, T>::forward},
    {Steps<RnnTanh, T>::backward, Steps<RnnRelu, T>::backward, Steps<Lstm, T>::backward,
     Steps<Gru, T>::backward},
    {run_cell<RnnTanh, T>, run_cell<RnnRelu, T>, run_cell<Lstm, T>, run_cell<Gru, T>},
    {norm_forward_loop<NormLstm, T>, norm_forward_loop<NormGru, T>,
     norm_forward_loop<NormGruJoint, T>},
    {norm_backward_loop<NormLstm, T>, norm_backward_loop<NormGru, T>,
     norm_backward_loop<NormGruJoint, T>}};

}  // namespace

const fused_rnn::Kernels& FUSED_RNN_JOIN(kernels_, FUSED_RNN_SCALAR)() {
  return kKernels<FUSED_RNN_SCALAR>;
}

}  // namespace FUSED_RNN_NAMESPACE
