"""The native CPU loops: ``csrc/cpu``."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import native
from ..autograd import layer, step
from ..cells import Cell

if TYPE_CHECKING:
    from . import Problem

__all__ = ["NAME", "available", "cell_step", "explain", "layer", "supports"]

NAME = "cpu"

# In the order of csrc/cpu/kernels.h.
_SCALARS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_PLAIN = {Tensor, torch.nn.Parameter}
_shape, _kind = attrgetter("shape"), attrgetter("dtype", "is_cpu")
# Up to here one pass over the weights beats two GEMMs and their calls.
_SMALL_ROWS = 4
_NOT_YET = ("h_mask", "keep")


def available() -> str | None:
    return native.UNAVAILABLE


def supports(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"it runs on the CPU, and the input is on {problem.device}"
    if problem.dtype not in _SCALARS:
        return f"it computes in float32, float64, bfloat16 and float16, not {problem.dtype}"
    missing = [option for option in problem.options if option in _NOT_YET]
    if missing:
        return f"it lacks {', '.join(missing)}"
    return None


def explain(problem: Problem) -> str:
    return "one native call a layer and direction"


def cell_step(
    cell: Cell,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One step of one layer: the next ``(h, c)``; ``c`` is ``None`` but for the LSTM."""
    if h is None:
        h = c = x.new_zeros(x.size(0), w_hh.size(1))
    return step(cell, linear(x, w_ih, b_ih), linear(h, w_hh, b_hh), h, c)


def small_step(
    cell: Cell,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor | None] | None:
    """:func:`cell_step` in one pass over the weights, for a few rows and no gradient.

    The caller has made sure that nothing watches the computation. The kernel is called by address,
    past the dispatcher, which takes longer than the step itself; so what it reads is checked here,
    and ``None`` says that it is not plain contiguous memory of the right size.
    """
    n, size = x.shape
    hidden = h.shape[1]
    gates = cell.gates * hidden
    state, bias = (n, hidden), (gates,)
    operands = [x, h, w_ih, w_hh]
    expected = [(n, size), state, (gates, size), (gates, hidden)]
    if c is not None:
        operands.append(c)
        expected.append(state)
    if b_ih is not None and b_hh is not None:
        operands += b_ih, b_hh
        expected += bias, bias
    kind = (x.dtype, True)
    if (
        not 0 < n <= _SMALL_ROWS
        or list(map(_shape, operands)) != expected
        or set(map(_kind, operands)) != {kind}
        or not _PLAIN.issuperset(map(type, operands))
        or not all(map(Tensor.is_contiguous, operands))
    ):
        return None
    h1 = torch.empty_like(h)
    c1 = None if c is None else torch.empty_like(c)
    native.LIBRARY.fused_rnn_cell(
        cell.id,
        _SCALARS[x.dtype],
        n,
        size,
        hidden,
        *(None if t is None else t.data_ptr() for t in (x, h, c, w_ih, w_hh, b_ih, b_hh, h1, c1)),
    )
    return h1, c1
