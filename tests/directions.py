"""Random problems for both directions of a layer, and their results by one call and by two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from layers import Problem, make_problem
from torch import Tensor

from fused_rnn import autograd
from fused_rnn.bidirectional import both

NAMES = ("forward", "reverse")


def make_directions(
    cell: str, dtype: torch.dtype, shape: tuple[int, int, int], **options: Any
) -> tuple[Problem, Problem]:
    """Two problems with the same ``x`` and ``rows``; all else of the second is the first's with
    its first dimension turned round."""
    forward = make_problem(cell, dtype, shape, **options)

    def turned(group: dict[str, Any]) -> dict[str, Any]:
        same = ("x", "rows", "reverse")
        return {
            name: x if x is None or name in same else x.flip(0).contiguous()
            for name, x in group.items()
        }

    groups = {name: turned(getattr(forward, name)) for name in ("operands", "grads", "options")}
    groups["options"]["reverse"] = True
    return forward, replace(forward, **groups)


def run_directions(
    forward: Problem,
    reverse: Problem,
    *,
    together: bool,
    device: str = "cpu",
    algorithm: int = 0,
) -> dict[str, Tensor]:
    """Outputs, final states and all gradients of both directions, by name; together by one call of
    the op, or by one each."""
    problems = dict(zip(NAMES, (forward, reverse), strict=True))

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().to(device).requires_grad_(x.is_floating_point())

    x, rows = (leaf(y) for y in (forward.operands["x"], forward.options.get("rows")))
    own = [
        {name: leaf(y) for name, y in (p.operands | p.options).items() if name not in ("x", "rows")}
        for p in problems.values()
    ]
    shared = {"rows": rows, "algorithm": algorithm}
    if together:
        outputs = both(forward.cell, x, *own, **shared)
    else:
        outputs = [autograd.layer(forward.cell, x, **given, **shared) for given in own]
    found, grads = {}, []
    for (direction, problem), results in zip(problems.items(), outputs, strict=True):
        for name, y in zip(("h", "c", "h_n", "c_n"), results, strict=True):
            if y is not None:
                found[f"{direction} {name}"] = y
                grads.append(problem.grads[name].to(device, y.dtype))
    torch.autograd.backward(list(found.values()), grads)
    found["dx"] = x.grad
    for direction, given in zip(NAMES, own, strict=True):
        for name, y in given.items():
            if isinstance(y, Tensor) and y.grad is not None:
                found[f"{direction} d{name}"] = y.grad
    return {name: y.detach().cpu() for name, y in found.items()}
