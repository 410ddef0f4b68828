"""The native CUDA kernels: ``csrc/cuda``. They run behind the same ops as the CPU's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import native
from ..autograd import layer
from ..plan import describe, plan
from . import cpu
from .cpu import cell_step

if TYPE_CHECKING:
    from . import Problem

__all__ = ["NAME", "available", "cell_step", "explain", "layer", "supports"]

NAME = "cuda"


def available() -> str | None:
    return native.UNAVAILABLE or native.CUDA_UNAVAILABLE


def supports(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"it runs on CUDA devices, and the input is on {problem.device}"
    return cpu.cannot_compute(problem)


def explain(problem: Problem) -> str:
    if problem.T == 0:
        return "torch's two GEMMs, then one native pointwise kernel"
    what = "stepwise: one product by cuBLAS and one native pointwise kernel a step"
    given = (problem.cell, problem.dtype, problem.T, problem.N, problem.H, problem.P)
    options = (*problem.options, *(("rows",) if problem.packed else ()))
    try:
        device = describe(torch.cuda.current_device())
        return f"{what}\n{plan(*given, device=device, options=options)}"
    except (RuntimeError, ValueError) as error:
        return f"{what}\nno plan: {error}"
