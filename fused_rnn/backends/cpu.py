"""The native CPU loops: ``csrc/cpu``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import native
from ..autograd import layer, step
from ..cells import CELLS, Cell

if TYPE_CHECKING:
    from . import Problem

__all__ = ["NAME", "available", "cell_step", "explain", "is_small", "layer", "supports"]

NAME = "cpu"

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Up to either of these, rows or multiplications, one pass over the weights beats two GEMMs and
# their calls.
SMALL_ROWS = 4
SMALL_PRODUCTS = 2**21


def available() -> str | None:
    return native.UNAVAILABLE


def supports(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"it runs on the CPU, and the input is on {problem.device}"
    return cannot_compute(problem)


def cannot_compute(problem: Problem) -> str | None:
    """What no native loop does, on whatever device."""
    if problem.dtype not in _DTYPES:
        return f"it computes in float32, float64, bfloat16 and float16, not {problem.dtype}"
    if problem.transformed:
        return "forward-mode AD and nested torch.func transforms have to see each operation"
    if problem.vmapped and problem.T == 0:
        return "torch.func.vmap has no rule for a single step of it"
    return None


def explain(problem: Problem) -> str:
    if is_small(problem):
        return "one pass over the weights, past the dispatcher"
    if problem.T == 0:
        return "torch's two GEMMs, then one native pointwise kernel"
    return (
        "input product, time loop and gradients in one native call, the batch split over threads; "
        "results are bit-equal on any number of threads"
    )


def is_small(problem: Problem) -> bool:
    """Whether :func:`small_step` is the way to run ``problem``."""
    weights = CELLS[problem.cell].gates * problem.H * (problem.I + problem.H)
    few = problem.N <= SMALL_ROWS or problem.N * weights <= SMALL_PRODUCTS
    return problem.T == 0 and not problem.grad and few


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

    The caller has made sure that nothing watches the computation: this goes past the dispatcher,
    which takes longer than the step itself. ``None`` says that an operand is not plain contiguous
    memory of the right size.
    """
    # A view may carry its sign as a bit beside the memory. Written out: a loop over the operands
    # takes a tenth of the whole step.
    if (
        x.is_neg()
        or h.is_neg()
        or w_ih.is_neg()
        or w_hh.is_neg()
        or (c is not None and c.is_neg())
        or (b_ih is not None and b_ih.is_neg())
        or (b_hh is not None and b_hh.is_neg())
    ):
        return None
    h1 = torch.empty_like(h)
    c1 = None if c is None else torch.empty_like(c)
    if not native.small_step(cell.id, x, h, c, w_ih, w_hh, b_ih, b_hh, h1, c1):
        return None
    return h1, c1
