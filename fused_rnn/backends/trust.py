"""Whether kernels may be trusted where nobody has asked for them.

A GPU, its driver and its compiler make code that nobody has seen before. So before ``auto`` takes
kernels that are compiled where they run, they take two steps of the problem's size beside the
reference, once a process; a cell takes one, by itself and as a sequence, which is its way under
autocast. What no trial can save is a kernel that takes the GPU down with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C import DisableTorchFunction, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd.graph import saved_tensors_hooks

from ..cells import CELLS
from . import cudnn, reference

if TYPE_CHECKING:
    from types import ModuleType

    from . import Problem

ALLOWED = {torch.float32: 5e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Largest error that is rounding, by norm, as a share of the value. In float32 that may be TF32's,
which turns some ReLUs of nearly 0 around."""
ROWS = 64
"""Sequences of a trial, and as many more as leave the same remainder: the rest are the same."""

_FOUND: dict[tuple[object, ...], str | None] = {}


def doubts(backend: ModuleType, problem: Problem) -> str | None:
    """Why ``backend`` is not to be trusted with ``problem``, or None."""
    p = problem._replace(N=min(problem.N, ROWS + problem.N % ROWS))
    tf32 = p.dtype == torch.float32 and cudnn.allows_tf32()
    key: tuple[object, ...] = (backend.NAME, p.cell, p.dtype, p.device, p.ordinal, p.N, p.I, p.H)
    key += (p.T == 0, p.directions, p.packed, p.grad, tf32)
    if key not in _FOUND:
        if _len_torch_dispatch_stack() or _get_tracing_state():
            return "not compared yet, and something watches each operation"
        if p.device == "cuda" and torch.cuda.is_current_stream_capturing():
            return "not compared yet, and a CUDA graph is being captured"
        try:
            _FOUND[key] = _disagreement(backend, p)
        except torch.OutOfMemoryError:
            return "not compared yet, there was no memory for it"
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

    steps, gates, states = 2 if p.T else 1, CELLS[p.cell].gates * p.H, CELLS[p.cell].states
    # None of the caller's contexts shall see it: hooks of a checkpoint, say.
    with (
        DisableTorchFunction(),
        saved_tensors_hooks(lambda x: x, lambda x: x),
        torch.inference_mode(False),
        torch.autocast(p.device, enabled=False),
    ):
        operands = {"x": draw(2 * p.N, p.I) if p.packed else draw(steps, p.N, p.I)}
        operands |= {name: draw(p.N, p.H) for name in ("h", "c")[:states]}
        operands["w_ih"] = draw(gates, p.I, scale=p.I**-0.5)
        operands["w_hh"] = draw(gates, p.H, scale=p.H**-0.5)
        operands |= {"b_ih": draw(gates), "b_hh": draw(gates)}
        exact = {name: x.double() for name, x in operands.items()}
        for reverse in (False, True)[: p.directions]:
            expected = _results(reference, p, exact, reverse=reverse)
            for by_itself in (False, True) if p.T == 0 else (False,):
                found = _results(backend, p, operands, reverse=reverse, by_itself=by_itself)
                for name, value in expected.items():
                    error = ((found[name].double() - value).norm() / value.norm()).item()
                    if not error <= ALLOWED[p.dtype]:
                        return f"{name} is {error:.1%} off the reference"
    return None


def _results(
    backend: ModuleType,
    p: Problem,
    operands: dict[str, Tensor],
    *,
    reverse: bool,
    by_itself: bool = False,
) -> dict[str, Tensor]:
    """Output, last states and, where the problem has gradients, those of their sum: of a layer, or
    of a step by itself."""
    with torch.set_grad_enabled(p.grad):
        leaves = {name: x.detach().requires_grad_(p.grad) for name, x in operands.items()}
        x, h, c = leaves["x"], leaves["h"], leaves.get("c")
        w_ih, w_hh, b_ih, b_hh = (leaves[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh"))
        if by_itself:
            h_n, c_n = backend.cell_step(CELLS[p.cell], x[0], h, c, w_ih, w_hh, b_ih, b_hh)
            y = h_n.unsqueeze(0)
        else:
            rows = None
            if p.packed:
                rows = torch.arange(2 * p.N, dtype=torch.int32, device=x.device).view(2, p.N)
            more = {"w_ih": w_ih, "b_ih": b_ih, "reverse": reverse, "rows": rows}
            y, _, h_n, c_n = backend.layer(CELLS[p.cell], x, w_hh, b_hh, h, c, **more)
        results = {"output": y, "h_n": h_n} | ({} if c_n is None else {"c_n": c_n})
        if p.grad:
            total = sum(result.double().sum() for result in results.values())
            gradients = torch.autograd.grad(total, [*leaves.values()])
            results |= {f"d {k}": g for k, g in zip(leaves, gradients, strict=True)}
    return {name: result.detach() for name, result in results.items()}
