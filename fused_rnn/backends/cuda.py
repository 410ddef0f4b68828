"""The native CUDA kernels: ``csrc/cuda``. They run behind the same ops as the CPU's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import native
from ..autograd import layer
from ..plan import ALGORITHMS, KNOWN_DEVICES, Device, Plan, plan
from . import cpu, cudnn
from .cpu import cell_step

if TYPE_CHECKING:
    from . import Problem

__all__ = ["ALGORITHMS", "NAME", "available", "cell_step", "explain", "lacks", "layer", "supports"]

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
    return what if device is None else f"{what}\n{_plan(problem, device)}"


def lacks(algorithm: str, problem: Problem) -> str | None:
    """Why ``algorithm`` cannot run ``problem``, or None."""
    if algorithm == "stepwise":
        return None
    if problem.T == 0:
        return f"a single step has no time loop for {algorithm!r} to run"
    device = _described_device()
    if device is None:
        return f"nothing is known of the current GPU, and {algorithm!r} is planned for one"
    try:
        _plan(problem, device, algorithm)
    except RuntimeError as error:
        return str(error)
    return None


def _plan(problem: Problem, device: Device, algorithm: str = "auto") -> Plan:
    return plan(
        problem.cell,
        problem.dtype,
        problem.T,
        problem.N,
        problem.H,
        problem.P,
        device=device,
        tf32=cudnn.allows_tf32(),
        options=(*problem.options, *(("rows",) if problem.packed else ())),
        algorithm=algorithm,
    )


def _described_device() -> Device | None:
    """The description of the current GPU, if it is one that the planner has."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties()
    capability = 10 * found.major + found.minor
    like = [d for d in KNOWN_DEVICES.values() if d.capability == capability]
    return next((d for d in like if d.sms == found.multi_processor_count), None)
