"""The native CUDA kernels: ``csrc/cuda``. They run behind the same ops as the CPU's."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .. import native
from ..autograd import layer
from ..plan import ALGORITHMS, KNOWN_DEVICES, Device, Plan, plan
from . import cpu, cudnn, tuning
from . import torch as torch_nn
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
    device = _described_device(problem.ordinal)
    return what if device is None else f"{what}\n{_plan(problem, device)}"


def lacks(algorithm: str, problem: Problem) -> str | None:
    """Why ``algorithm`` cannot run ``problem``, or None."""
    if algorithm == "stepwise":
        return None
    if problem.T == 0:
        return f"a single step has no time loop for {algorithm!r} to run"
    device = _described_device(problem.ordinal)
    if device is None:
        return f"nothing is known of this GPU, and {algorithm!r} is planned for one"
    try:
        _plan(problem, device, algorithm)
    except RuntimeError as error:
        return str(error)
    return None


def _plan(
    problem: Problem, device: Device, algorithm: str = "auto", *, backward: bool = False
) -> Plan:
    return plan(
        problem.cell,
        problem.dtype,
        problem.T,
        problem.N,
        problem.H,
        problem.P,
        device=device,
        backward=backward,
        tf32=cudnn.allows_tf32(),
        options=(*problem.options, *(("rows",) if problem.packed else ())),
        algorithm=algorithm,
    )


@lru_cache(maxsize=1024)
def faster_than_torch(problem: Problem, tf32: bool) -> tuple[bool, str]:
    """Whether ours runs ``problem`` on its GPU faster than torch.nn does, and why we think so.

    A measurement near it decides. Without one, ours has to keep the weights on the chip where torch
    would have cuDNN run a product and a pointwise kernel a step.
    """
    unmeasured = "ours was not measured near this size on this GPU; ask for it by name"
    device = _described_device(problem.ordinal)
    if device is None:
        return False, unmeasured
    row = tuning.measured(problem, device.name, tf32)
    if row is not None:
        where = f"T={row.T} N={row.N} H={row.H}, {row.algorithm}"
        return row.speedup >= 1, f"measured at {row.speedup:.2f} times torch.nn's speed ({where})"
    if problem.T == 0 or not torch_nn.cudnn_can_run(problem):
        return False, unmeasured
    capability = divmod(device.capability, 10)
    passes = (False, True) if problem.grad else (False,)
    asked = {cudnn.algorithm(problem, capability, device.sms, backward=b) for b in passes}
    plans = {_plan(problem, device, backward=b).algorithm for b in passes}
    if asked == {cudnn.STANDARD} and "stepwise" not in plans:
        return True, "torch would launch kernels for each step, ours keeps the weights on the chip"
    return False, unmeasured


def _described_device(index: int) -> Device | None:
    """The description of a GPU, if it is one that the planner has."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(index)
    capability = 10 * found.major + found.minor
    like = [d for d in KNOWN_DEVICES.values() if d.capability == capability]
    return next((d for d in like if d.sms == found.multi_processor_count), None)
