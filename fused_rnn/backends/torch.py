"""torch.nn's own kernels (oneDNN, cuDNN, MKL and ATen loops), whole stacks at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import _VF, Tensor, cuda
from torch.backends import cudnn as backends_cudnn

from ..cells import Cell
from . import cudnn

if TYPE_CHECKING:
    from . import Problem

NAME = "torch"

_CUDNN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STEPS: dict[str, Any] = {
    "rnn_tanh": _VF.rnn_tanh_cell,
    "rnn_relu": _VF.rnn_relu_cell,
    "lstm": _VF.lstm_cell,
    "gru": _VF.gru_cell,
}
_STACKS: dict[str, Any] = {
    "rnn_tanh": _VF.rnn_tanh,
    "rnn_relu": _VF.rnn_relu,
    "lstm": _VF.lstm,
    "gru": _VF.gru,
}


def available() -> str | None:
    return None


_LACKS = {
    "control": "lengths, reset or tbptt",
    "cell_states": "return_cell_states",
    "last_step": "last_step_only",
    "reverse": 'direction="reverse"',
    "jagged": "input of jagged layout",
    "episodes": "resets to a learned state",
    "h_mask": "recurrent_dropout",
    "keep": "zoneout",
    "keep_share": "zoneout",
    "layer_norm": "layer norms",
    "gradient_flow": "norms for gradient_flow",
}


def supports(problem: Problem) -> str | None:
    if problem.options:
        return f"torch.nn has no {', '.join(_LACKS.get(o, o) for o in problem.options)}"
    return None


def explain(problem: Problem) -> str:
    if problem.T == 0:
        return "torch.nn's cell"
    if problem.device == "cuda" and cuda.is_available() and cudnn_can_run(problem):
        device = cuda.get_device_properties(problem.ordinal)
        found = cudnn.algorithm(problem, (device.major, device.minor), device.multi_processor_count)
        return f"cuDNN for the whole stack, forward by its algorithm {found} in torch's rule"
    return "torch.nn's kernel for the whole stack"


def cudnn_can_run(problem: Problem) -> bool:
    """Whether torch.nn goes to cuDNN, which it does wherever it may."""
    return backends_cudnn.is_available() and backends_cudnn.enabled and problem.dtype in _CUDNN


def stack(
    cell: Cell,
    input: Tensor,
    states: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None,
    batch: int,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    training: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers and directions; ``weights`` flat, in torch.nn's order."""
    if states is None:
        blocks = num_layers * (2 if bidirectional else 1)
        widths = (weights[1].size(1), weights[1].size(0) // cell.gates)[: cell.states]
        states = tuple(input.new_zeros(blocks, batch, width) for width in widths)
    hx = states if cell.states == 2 else states[0]
    options = (bias, num_layers, dropout, training, bidirectional)
    if batch_sizes is None:
        result = _STACKS[cell.name](input, hx, weights, *options, False)
    else:
        result = _STACKS[cell.name](input, batch_sizes, hx, weights, *options)
    return result[0], tuple(result[1:])


def cell_step(
    cell: Cell,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One step of one layer: the next ``(h, c)``; ``c`` is ``None`` but for the LSTM."""
    hx = (h, c) if cell.states == 2 else h
    result = _STEPS[cell.name](x, hx, w_ih, w_hh, b_ih, b_hh)
    return result if cell.states == 2 else (result, None)
