"""The native CUDA kernels: ``csrc/cuda``. They run behind the same ops as the CPU's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import native
from ..autograd import layer
from ..plan import KNOWN_DEVICES, Device, plan
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
    device = _described_device()
    if device is None:
        return what
    given = (problem.cell, problem.dtype, problem.T, problem.N, problem.H, problem.P)
    options = (*problem.options, *(("rows",) if problem.packed else ()))
    return f"{what}\n{plan(*given, device=device, options=options)}"


def _described_device() -> Device | None:
    """The description of the current GPU, if it is one that the planner has."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties()
    capability = 10 * found.major + found.minor
    like = [d for d in KNOWN_DEVICES.values() if d.capability == capability]
    return next((d for d in like if d.sms == found.multi_processor_count), None)
