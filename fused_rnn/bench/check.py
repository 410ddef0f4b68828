"""Every cell against torch.nn: outputs, final states and all gradients.

The rule: the oracle is torch.nn in float64, on the same values. A result passes if its largest
error is at most twice torch.nn's own at the same dtype and shape, plus a few units in the last
place of the largest value, which is what is left to say where torch.nn happens to be exact. In
float64 torch.nn is the oracle itself and has no error to compare with: there two orders of
summation may differ by more of them.

A ReLU's gradient jumps where rounding flips the sign of its argument, and the half types flip some
in any random problem, ours and torch.nn's others. So in those the ReLU runs on integers with one
±1 in each row of a weight: forward is exact, and the kink is met only at 0 itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .workloads import GATES, Case, Workload, make_cases

FACTOR = 2
ULPS = 8
FLOAT64_ULPS = 64
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)

PLAIN = Workload("plain", "lstm", I=7, H=19, T=13, N=5, mode="train")
FORMS = (
    PLAIN,
    replace(PLAIN, name="one sequence", N=1, H=32),
    replace(PLAIN, name="whole tiles", I=64, H=64, T=20, N=16),
    replace(PLAIN, name="two layers, two directions", L=2, D=2),
    replace(PLAIN, name="dropout", L=2, dropout=0.5),
    replace(PLAIN, name="batch_first", batch_first=True),
    replace(PLAIN, name="no bias", bias=False),
    replace(PLAIN, name="packed, two directions", D=2, lengths="uniform"),
    replace(PLAIN, name="projection", P=11),
    replace(PLAIN, name="cell", mode="step", T=1),
    replace(PLAIN, name="cell, no bias", mode="step", T=1, N=1, bias=False),
)


@dataclass(frozen=True)
class Comparison:
    """One tensor of one form: our error and the error the rule allows."""

    where: str
    error: float
    allowed: float
    torch_error: float
    scale: float = 1.0  # the oracle's largest value

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """Our error as a share of the allowed one."""
        return self.error / self.allowed if self.allowed else (0.0 if self.ok else float("inf"))

    def __str__(self) -> str:
        verb = "within" if self.ok else "ABOVE"
        return (
            f"{self.where}: error {self.error:.2e} {verb} {self.allowed:.2e} "
            f"(torch.nn's own {self.torch_error:.2e})"
        )


def compare(
    where: str, ours: Tensor, theirs: Tensor, oracle: Tensor, eps: float | None = None
) -> Comparison:
    """Applies the rule to one tensor. A NaN in an error fails; it compares as not ok. ``eps`` is
    that of the tensors' dtype, unless their products were made in another."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise AssertionError(
            f"{where}: {ours.dtype} {tuple(ours.shape)}, "
            f"torch.nn gives {theirs.dtype} {tuple(theirs.shape)}"
        )
    if not oracle.numel():
        return Comparison(where, 0.0, 0.0, 0.0)
    error = (ours.double() - oracle).abs().max().item()
    torch_error = (theirs.double() - oracle).abs().max().item()
    scale = oracle.abs().max().item()
    ulp = (eps or torch.finfo(ours.dtype).eps) * scale
    ulps = FLOAT64_ULPS if ours.dtype == torch.float64 else ULPS
    return Comparison(where, error, FACTOR * torch_error + ulps * ulp, torch_error, scale)


def compare_cases(where: str, cases: dict[str, Case], kind: str) -> list[Comparison]:
    """Compares every result of the cases ``fused_rnn``, ``torch`` and ``oracle``."""
    results = {name: case.results(kind) for name, case in cases.items()}
    return compare_results(where, results["fused_rnn"], results["torch"], results["oracle"])


def compare_results(
    where: str,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    oracle: dict[str, Tensor],
    eps: float | None = None,
) -> list[Comparison]:
    """Compares what :meth:`workloads.Case.results` gave, tensor by tensor."""
    if ours.keys() != theirs.keys():
        raise AssertionError(f"{where}: results {[*ours]}, torch.nn gives {[*theirs]}")
    return [
        compare(f"{where}: {name}", ours[name], theirs[name], oracle[name], eps) for name in theirs
    ]


def check_all(
    providers: dict[str, ModuleType], options: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, str, list[Comparison]]]:
    """Runs the grid cell × dtype; yields both names and the comparisons of all forms."""
    for cell, dtype in product(GATES, DTYPES):
        comparisons: list[Comparison] = []
        for form in FORMS:
            w = replace(form, cell=cell)
            if w.P and cell != "lstm":
                continue
            for with_states in (False, True):
                cases = make_cases(
                    w,
                    providers,
                    dtype,
                    options=options,
                    with_states=with_states,
                    integers=cell == "rnn_relu" and dtype in HALF,
                )
                where = f"{cell}, {dtype}, {w.name}, {w.shape}, states {with_states}"
                comparisons += compare_cases(where, cases, "train")
        yield cell, str(dtype).removeprefix("torch."), comparisons
