"""The native CPU loops: ``csrc/cpu``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import native
from ..autograd import layer, plain_layer, step
from ..cells import CELLS, Cell
from ..norm_autograd import norm_layer

if TYPE_CHECKING:
    from . import Problem

__all__ = [
    "NAME",
    "available",
    "cell_step",
    "explain",
    "is_small",
    "layer",
    "norm_layer",
    "plain_layer",
    "small_step",
    "supports",
]

NAME = "cpu"

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The next state, in one pass over the weights, for a few rows and no gradient: arguments and result
# are those of steps.small_step, with the cell's id. The caller has made sure that nothing watches
# the computation: this goes past the dispatcher, which takes longer than the step itself. None says
# that this is not is_small, or that an operand is not plain contiguous memory of the right size.
small_step = native.small_step


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
    if problem.vmapped and (problem.T == 0 or "layer_norm" in problem.options):
        what = "a single step of it" if problem.T == 0 else "its loops with layer norms"
        return f"torch.func.vmap has no rule for {what}"
    if "keep_share" in problem.options and problem.grad:
        return "zoneout has a backward in training only, where it draws a mask"
    if {"layer_norm", "gradient_flow"} <= {*problem.options}:
        return "its loops with layer norms lack the norms that gradient_flow records"
    return None


def explain(problem: Problem) -> str:
    if "layer_norm" in problem.options:
        return (
            "input product (and its norm, unless it is joint) in torch, time loop with the other "
            "norms in one native call, the batch split over threads"
        )
    if is_small(problem):
        return "one pass over the weights, past the dispatcher"
    if problem.T == 0:
        return "torch's two GEMMs, then one native pointwise kernel"
    return (
        "input product, time loop and gradients in one native call, the batch (of few rows: the "
        "units) split over threads; "
        "results are bit-equal on any number of threads"
    )


def is_small(problem: Problem) -> bool:
    """Whether :func:`small_step` is the way to run ``problem``."""
    weights = CELLS[problem.cell].gates * problem.H * (problem.I + problem.H)
    few = problem.N <= native.SMALL_ROWS or problem.N * weights <= native.SMALL_PRODUCTS
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
