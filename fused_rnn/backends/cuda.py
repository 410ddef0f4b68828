"""The native CUDA kernels: ``csrc/cuda``. They run behind the same ops as the CPU's."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from .. import native
from ..autograd import layer
from ..bidirectional import both
from ..plan import ALGORITHMS, Device, Plan, describe, plan
from ..wavefront import wavefront
from . import cpu, cudnn, tuning
from .cpu import cell_step

if TYPE_CHECKING:
    from . import Problem

__all__ = [
    "ALGORITHMS",
    "NAME",
    "available",
    "both",
    "cell_step",
    "chunks",
    "explain",
    "lacks",
    "layer",
    "supports",
    "wavefront",
]

NAME = "cuda"


def available() -> str | None:
    return native.UNAVAILABLE or native.CUDA_UNAVAILABLE


def supports(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"it runs on CUDA devices, and the input is on {problem.device}"
    if "layer_norm" in problem.options:
        return "it has no kernels for layer norms"
    if "gradient_flow" in problem.options:
        return "it lacks the norms that gradient_flow records"
    return cpu.cannot_compute(problem)


_WORDS = {
    "stepwise": "one product by cuBLAS and one native pointwise kernel a step",
    "cluster": "clusters keep the weights on chip for all steps, in one launch",
    "grid": "the whole chip keeps the weights for all steps, in one launch",
}


def explain(problem: Problem, algorithm: str = "auto") -> str:
    if problem.T == 0:
        return "torch's two GEMMs, then one native pointwise kernel"
    ran = "stepwise" if algorithm == "auto" else algorithm
    lines = [f"{ran}: {_WORDS[ran]}"]
    try:
        device = describe(problem.ordinal)
        lines.append(str(_plan(problem, device, algorithm)))
    except (RuntimeError, ValueError) as error:
        return f"{lines[0]}\nno plan: {error}"
    if problem.grad:
        try:
            lines.append(str(_plan(problem, device, algorithm, backward=True)))
        except RuntimeError as error:  # as device.cuh has it
            lines.append(f"the backward is stepwise: {error}")
    return "\n".join(lines)


def lacks(algorithm: str, problem: Problem) -> str | None:
    """Why ``algorithm`` cannot run ``problem``, or None."""
    if algorithm == "stepwise":
        return None
    if problem.T == 0:
        return f"a single step has no time loop for {algorithm!r} to run"
    try:
        _plan(problem, describe(problem.ordinal), algorithm)
    except (RuntimeError, ValueError) as error:
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
        directions=problem.directions,
        layers=problem.layers if _is_stack(problem) else 1,
        tf32=cudnn.allows_tf32(),
        algorithm=algorithm,
    )


def chunks(problem: Problem, algorithm: str) -> tuple[int, int]:
    """How many steps at a time the layers run side by side, forward and backward; 0 where they run
    one after the other.

    Args:
        algorithm: the one asked for; ``""`` for none, which is ``"stepwise"`` so far.
    """
    if algorithm != "cluster" or not _is_stack(problem):  # the others leave no SM free
        return 0, 0
    return _chunks(problem, cudnn.allows_tf32())


def _is_stack(problem: Problem) -> bool:
    """Whether one call may have all layers. A compiler or a transform wants to see each; what is
    computed again is one layer's; packed rows, and those of episodes, may lie anywhere."""
    apart = problem.compiling or problem.transformed or problem.vmapped or problem.packed
    apart = apart or not {"recompute", "episodes"}.isdisjoint(problem.options)
    return problem.layers > 1 and problem.T > 0 and not apart


@lru_cache(maxsize=1024)
def _chunks(problem: Problem, tf32: bool) -> tuple[int, int]:
    device = describe(problem.ordinal)
    forward = _plan(problem, device, "cluster").chunk
    if not problem.grad:
        return forward, 0
    try:
        return forward, _plan(problem, device, "cluster", backward=True).chunk
    except RuntimeError:  # it is stepwise: as device.cuh has it
        return forward, 0


@lru_cache(maxsize=1024)
def faster_than_torch(problem: Problem, tf32: bool, cudnn_runs: bool) -> tuple[bool, str]:
    """Whether ours runs ``problem`` on its GPU faster than torch.nn does, and why we think so.

    A measurement near it decides. Without one, ours has to keep the weights on the chip where torch
    would have cuDNN run a product and a pointwise kernel a step.
    """
    try:
        return _faster(problem, describe(problem.ordinal), tf32, cudnn_runs)
    except (RuntimeError, ValueError) as error:
        return False, f"no plan for ours: {error}"


def _faster(problem: Problem, device: Device, tf32: bool, cudnn_runs: bool) -> tuple[bool, str]:
    row = tuning.measured(problem, device.name, tf32)
    if row is not None:
        where = f"T={row.T} N={row.N} H={row.H}, {row.algorithm}"
        return row.speedup >= 1, f"measured at {row.speedup:.2f} times torch.nn's speed ({where})"
    unmeasured = "ours was not measured near this size on this GPU; ask for it by name"
    if problem.T == 0 or not cudnn_runs:
        return False, unmeasured
    capability = divmod(device.capability, 10)
    passes = (False, True) if problem.grad else (False,)
    asked = {cudnn.algorithm(problem, capability, device.sms, backward=b) for b in passes}
    plans = {_plan(problem, device, backward=b).algorithm for b in passes}
    if asked == {cudnn.STANDARD} and "stepwise" not in plans:
        return True, "torch would launch kernels for each step, ours keeps the weights on the chip"
    return False, unmeasured
