"""Time loops in Triton: for a GPU where there is no nvcc, and a second opinion on the CUDA kernels.

They run behind ops of their own, ``torch.ops.fused_rnn_triton``, with the schemas of the native
ones. Triton is imported by the first call that computes. Where ``TRITON_INTERPRET=1`` is set before
anything imports Triton, its interpreter runs them on the CPU: slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from ... import autograd
from ...cells import CELLS, Cell
from .. import cudnn
from . import ops, tuning

if TYPE_CHECKING:
    from .. import Problem

NAME = "triton"
ALGORITHMS = tuning.ALGORITHMS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _interprets() -> bool:
    """Whether Triton's interpreter runs the kernels, as Triton decides when it is imported."""
    if "triton.language" in sys.modules and "triton.runtime" in sys.modules:
        zeros = sys.modules["triton.language"].zeros
        return not isinstance(zeros, sys.modules["triton.runtime"].JITFunction)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; torch for CUDA on Linux brings it, or `pip install triton`"
    if not INTERPRETS and torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} has no CUDA, and Triton's interpreter is not asked for "
            "(TRITON_INTERPRET=1)"
        )
    return None


# Decided once: while torch.compile traces, nobody may look.
INTERPRETS = _interprets()
UNAVAILABLE = _missing()


def available() -> str | None:
    return UNAVAILABLE


def supports(problem: Problem) -> str | None:
    device = "cpu" if INTERPRETS else "cuda"
    if problem.device != device:
        where = "on the CPU, in Triton's interpreter" if INTERPRETS else "on GPUs"
        return f"it runs {where}, and the input is on {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"it computes in float32, bfloat16 and float16, not {problem.dtype}"
    if problem.P:
        return "it lacks projections (proj_size)"
    if "layer_norm" in problem.options:
        return "it has no kernels for layer norms"
    if "gradient_flow" in problem.options:
        return "it lacks the norms that gradient_flow records"
    if problem.device == "cuda" and not problem.compiling and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(problem.ordinal)
        if capability < (8, 0):
            return (
                "it needs a GPU of compute capability 8.0 or newer, and this one has "
                f"{capability[0]}.{capability[1]}"
            )
    if problem.transformed or problem.vmapped:
        return "forward-mode AD and torch.func transforms have to see each operation"
    return None


def lacks(algorithm: str, problem: Problem) -> str | None:
    """Why ``algorithm`` cannot run ``problem``, or None."""
    if problem.T == 0:
        return f"a single step has no time loop for {algorithm!r} to run"
    if algorithm == "resident":
        shared = tuning.shared_bytes(problem.ordinal if problem.device == "cuda" else None)
        precision = tuning.precision(problem.dtype, cudnn.allows_tf32())
        return tuning.resident(CELLS[problem.cell], problem.H, precision, shared)[1] or None
    return None


_WORDS = {
    "resident": "W_hh stays on the chip for all steps",
    "tiled": "each program reads W_hh from L2 in every step",
}


def explain(problem: Problem, algorithm: str = "auto") -> str:
    if problem.T == 0:
        return "torch's two GEMMs, then one pointwise kernel in Triton"
    again = algorithm == "recompute"
    kernel = algorithm
    if again or algorithm == "auto":
        kernel = "tiled" if lacks("resident", problem) else "resident"
    words = f"{kernel}: {_WORDS[kernel]}, in one launch of a Triton kernel; not yet measured"
    if again:
        words += "; the forward saves states only, the backward makes the gates again"
    return words


layer = partial(autograd.layer, library=ops.library)


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
    gx, gh = linear(x, w_ih, b_ih), linear(h, w_hh, b_hh)
    return autograd.step(cell, gx, gh, h, c, library=ops.library)
