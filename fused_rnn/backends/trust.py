"""Whether kernels may be trusted where nobody has asked for them.

A GPU, its driver and its compiler make code that nobody has seen before. So before ``auto`` takes
kernels that are compiled where they run, they take two steps of the problem's size beside the
reference, once a process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack

from ..cells import CELLS
from . import reference

if TYPE_CHECKING:
    from types import ModuleType

    from . import Problem

ALLOWED = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest error that is rounding, as a share of the largest value; float32 may be TF32."""

_FOUND: dict[tuple[object, ...], str | None] = {}


def doubts(backend: ModuleType, problem: Problem) -> str | None:
    """Why ``backend`` is not to be trusted with ``problem``, or None."""
    p = problem
    key = (backend.NAME, p.cell, p.dtype, p.device, p.ordinal, p.N, p.I, p.H, p.T == 0, p.grad)
    if key not in _FOUND:
        if _len_torch_dispatch_stack() or _len_torch_function_stack():
            return "not compared yet, and a mode watches each operation"
        if p.device == "cuda" and torch.cuda.is_current_stream_capturing():
            return "not compared yet, and a CUDA graph is being captured"
        try:
            _FOUND[key] = _disagreement(backend, p)
        except Exception as error:  # of a compiler, a driver, ...: torch.nn has none of them
            _FOUND[key] = f"{type(error).__name__}: {error}"
    return _FOUND[key]


def _disagreement(backend: ModuleType, p: Problem) -> str | None:
    """Where ``backend`` and the reference differ by more than rounding."""
    device = torch.device(f"cuda:{p.ordinal}" if p.device == "cuda" else p.device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.rand(size, generator=generator, device=device) * 2 - 1
        return (scale * values).to(p.dtype)

    gates, states = CELLS[p.cell].gates * p.H, CELLS[p.cell].states
    with torch.inference_mode(False), torch.autocast(p.device, enabled=False):
        operands = {"x": draw(1 if p.T == 0 else 2, p.N, p.I)}
        operands |= {name: draw(p.N, p.H) for name in ("h", "c")[:states]}
        operands["w_ih"] = draw(gates, p.I, scale=p.I**-0.5)
        operands["w_hh"] = draw(gates, p.H, scale=p.H**-0.5)
        operands |= {"b_ih": draw(gates), "b_hh": draw(gates)}
        found = _results(backend, p, operands)
        expected = _results(reference, p, {name: t.double() for name, t in operands.items()})
    for name, value in expected.items():
        largest = value.abs().max().item()
        error = (found[name].double() - value).abs().max().item()
        if not error <= ALLOWED[p.dtype] * largest:
            return f"{name} is {error:.2g} off the reference, where the largest is {largest:.2g}"
    return None


def _results(backend: ModuleType, p: Problem, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last states, the output of more than a step and, where the problem has gradients, those
    of their sum."""
    cell = CELLS[p.cell]
    with torch.set_grad_enabled(p.grad):
        leaves = {name: t.detach().requires_grad_(p.grad) for name, t in operands.items()}
        x, h, c = leaves["x"], leaves["h"], leaves.get("c")
        w_ih, w_hh, b_ih, b_hh = (leaves[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh"))
        if p.T == 0 and hasattr(backend, "cell_step"):
            states = backend.cell_step(cell, x[0], h, c, w_ih, w_hh, b_ih, b_hh)
            results = dict(zip(("h_n", "c_n"), states, strict=True))
        else:
            y, _, *states = backend.layer(cell, x, w_hh, b_hh, h, c, w_ih=w_ih, b_ih=b_ih)
            results = dict(zip(("h_n", "c_n"), states, strict=True))
            if p.T:
                results["output"] = y
        results = {name: result for name, result in results.items() if result is not None}
        if p.grad:
            total = sum(result.double().sum() for result in results.values())
            gradients = torch.autograd.grad(total, [*leaves.values()])
            results |= {f"d {k}": g for k, g in zip(leaves, gradients, strict=True)}
    return {name: result.detach() for name, result in results.items()}
