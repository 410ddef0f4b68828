"""Which of cuDNN's RNN algorithms torch.nn asks for: what ours has to be faster than."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import backends, float16, float64

if TYPE_CHECKING:
    from . import Problem

STANDARD = "STANDARD"
PERSIST_STATIC = "PERSIST_STATIC"
PERSIST_STATIC_SMALL_H = "PERSIST_STATIC_SMALL_H"


def allows_tf32() -> bool:
    """Whether float32 may be multiplied in TF32: torch's flag for RNNs on CUDA, the older
    ``torch.backends.cudnn.allow_tf32`` included."""
    return bool(backends.cudnn.rnn.fp32_precision == "tf32")  # type: ignore[attr-defined]


def algorithm(
    problem: Problem, capability: tuple[int, int], processors: int, *, backward: bool = False
) -> str:
    """The algorithm by the rule in torch's ``aten/src/ATen/native/cudnn/RNN.cpp`` (``get_algo``).

    Args:
        problem: what torch.nn is asked for.
        capability: compute capability of the GPU, such as ``(9, 0)``.
        processors: how many multiprocessors it has.
        backward: for the backward, whose limits are lower. Default: ``False``

    Returns:
        ``"STANDARD"`` (a product and a pointwise launch a step), ``"PERSIST_STATIC"`` or
        ``"PERSIST_STATIC_SMALL_H"``.
    """
    plain_rnn = problem.cell.startswith("rnn")
    if problem.P or problem.packed:
        return STANDARD
    if problem.dtype is not float64 and capability[0] >= 6:
        limit = (256 if backward else 384) if plain_rnn else (128 if backward else 192)
        if limit >= problem.H:
            return PERSIST_STATIC_SMALL_H
    common = (
        problem.dtype is float16
        and problem.layers == problem.directions == 1
        and problem.H <= 1024
        and problem.H % 128 == problem.I % 128 == 0
    )
    if common and _persists_on_device(problem, capability, processors):
        return PERSIST_STATIC
    return STANDARD


def _persists_on_device(problem: Problem, capability: tuple[int, int], processors: int) -> bool:
    T, N = problem.T, problem.N
    if capability[0] == 7:
        fits = (N % 16 == 0 and N not in (80, 112)) or N == 8
        long = (T >= 40 and N <= 128) or (T >= 20 and N <= 96) or (T >= 10 and N <= 32)
        return capability[1] != 5 and fits and long
    if capability[0] < 8 or processors < 98 or capability[1] == 6 or problem.cell == "gru":
        return False
    if N % 8 or N > 128:
        return False
    return problem.cell == "lstm" or N < 96 or problem.H < 896
