"""Why a module runs where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .backends import BACKENDS, Problem, choose, how, refusal, requested
from .cell_modules import CellModule
from .sequence_module import SequenceModule


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; prints as a short table.

    Args:
        problem: what the module asks of a backend for this input.
        requested: the backend asked for, or ``"auto"``.
        backend: the backend chosen.
        why: the reason for the choice.
        algorithm: what the chosen backend will do.
        answers: each backend's name and its refusal, or ``"can run this"``.
    """

    problem: Problem
    requested: str
    backend: str
    why: str
    algorithm: str
    answers: dict[str, str]

    def __str__(self) -> str:
        asked = ", ".join(f"{k}={v}" for k, v in self.problem._asdict().items())
        lines = [
            f"{self.problem.cell} on {self.backend!r}: {self.why}",
            f"  algorithm  {self.algorithm}",
            f"  requested  {self.requested}",
            *(f"  {name:<9}  {answer}" for name, answer in self.answers.items()),
            f"  problem    {asked}",
        ]
        return "\n".join(lines)

    __repr__ = __str__


def explain(module: nn.Module, input: Any, hx: Any = None, **options: Any) -> Explanation:
    """Say which backend ``module`` would use for ``input``, and why. Nothing is computed.

    Args:
        module: one of our modules.
        input: what would be passed to it.
        hx: likewise. Default: ``None``
        options: likewise, as keywords: ``lengths``, ``reset``, ...

    Returns:
        an object that prints as a table.

    Raises:
        TypeError: ``module`` is none of ours.
        RuntimeError: the backend asked for cannot run this, as the module itself would raise.

    Example::

        >>> print(fused_rnn.explain(rnn, input))
    """
    if not isinstance(module, (SequenceModule, CellModule)):
        raise TypeError(
            f"explain expects a module of fused_rnn, got {type(module).__name__}; "
            "fused_rnn.convert makes one out of torch.nn's"
        )
    problem = module.describe(input, hx, **options)
    name = requested(module.backend)
    backend, why = choose(problem, name)
    return Explanation(
        problem,
        name,
        backend.NAME,
        why,
        how(backend, problem, name),
        {b.NAME: refusal(b, problem) or "can run this" for b in BACKENDS.values()},
    )
