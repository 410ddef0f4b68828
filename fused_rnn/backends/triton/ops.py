"""The ops ``fused_rnn_triton::*``: schemas, shapes of results, checks, allocation.

Schemas and sentences are those of the native ops (``csrc/schemas.h``, ``csrc/ops.cpp``). What runs
is in ``launch.py``, which imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import recompute
from ...cells import CELLS, Cell, carry_dtype
from ...native import FAKES, SCHEMAS
from .tuning import ALGORITHMS, RECOMPUTE

NAME = "fused_rnn_triton"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BY_ID = {cell.id: cell for cell in CELLS.values()}


class Operands:
    """Checks operands against the one called ``name``, and makes them contiguous."""

    def __init__(self, name: str, like: Tensor) -> None:
        self.name, self.like = name, like
        if like.dtype not in _DTYPES:
            raise RuntimeError(f"fused_rnn: {name} must be float32, bfloat16 or float16")

    def get(
        self,
        name: str,
        x: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
        *,
        state: bool = False,
    ) -> Any:
        """None stays None. A state may come in its own dtype or in the carry dtype."""
        if x is None:
            return None
        if tuple(x.shape) != shape:
            sizes = [*x.shape], [*shape]
            raise RuntimeError(f"fused_rnn: {name} has size {sizes[0]}, expected {sizes[1]}")
        if x.device != self.like.device:
            raise RuntimeError(
                f"fused_rnn: {name} is on another device than {self.name}; "
                f"move it there with .to({self.name}.device)"
            )
        dtype = dtype or self.like.dtype
        if x.dtype != dtype and not (state and x.dtype == carry_dtype(dtype)):
            raise RuntimeError(
                f"fused_rnn: {name} has another dtype than expected; {self.name}, the weights and "
                "the states must agree, control and keep are uint8 and rows is int32"
            )
        return x.contiguous()


def cell_of(number: int) -> Cell:
    if number not in _BY_ID:
        raise RuntimeError(f"fused_rnn: no cell has number {number}")
    return _BY_ID[number]


class Layer:
    """What forward and backward read the same way: sizes, and operands that were checked."""

    def __init__(
        self, cell, x, w_ih, w_hh, reverse, control, rows, w_hr, h_mask, keep, algorithm, tf32
    ) -> None:
        operands = self.operands = Operands("x", x)
        self.cell = cell_of(cell)
        self.reverse, self.algorithm, self.tf32 = reverse, algorithm, tf32
        if w_hr is not None:
            raise RuntimeError("fused_rnn: the Triton backend lacks projections (w_hr)")
        if not 0 <= algorithm <= len(ALGORITHMS):
            raise RuntimeError(f"fused_rnn: this device has no algorithm {algorithm}")
        dimensions = 3 if rows is None else 2
        if x.dim() != dimensions:
            raise RuntimeError(f"fused_rnn: x must have {dimensions} dimensions, got {x.dim()}")
        if w_hh.dim() != 2 or w_hh.size(0) == 0 or w_hh.size(0) % self.cell.gates:
            raise RuntimeError(
                f"fused_rnn: w_hh must be [{self.cell.gates}*H, R], got {[*w_hh.shape]}"
            )
        if rows is not None and rows.dim() < 2:
            raise RuntimeError("fused_rnn: rows must be [T, N]")
        # Whether the backward makes the gates again.
        self.again = algorithm == RECOMPUTE and self.cell.saved > 0
        self.gates = w_hh.size(0)
        self.H = self.gates // self.cell.gates
        self.T, self.N = (x if rows is None else rows).shape[:2]
        self.M = self.T * self.N if rows is None else x.size(0)
        self.I = x.size(-1) if w_ih is not None else self.gates
        if not self.I:
            raise RuntimeError("fused_rnn: w_hh and w_ih must not be empty")
        self.lead = tuple(x.shape[:-1])
        self.x = operands.get("x", x, self.rows_of(self.I))
        self.w_ih = operands.get("w_ih", w_ih, (self.gates, self.I))
        if w_hh.size(1) != self.H:
            raise RuntimeError(
                f"fused_rnn: w_hh must be [{self.gates}, {self.H}] without a projection"
            )
        self.w_hh = operands.get("w_hh", w_hh, (self.gates, self.H))
        steps = (self.T, self.N)
        self.control = operands.get("control", control, steps, torch.uint8)
        self.rows = operands.get("rows", rows, steps, torch.int32)
        if rows is not None and x.device.type == "cpu":
            check_rows(rows, self.M)
        self.h_mask = operands.get("h_mask", h_mask, (self.N, self.H))
        widths = self.cell.states * self.H
        if is_share(keep):
            self.keep = operands.get("keep", keep, (widths,), state=True)
        else:
            self.keep = operands.get("keep", keep, (*steps, widths), torch.uint8)

    def rows_of(self, width: int) -> tuple[int, ...]:
        return (*self.lead, width)

    @staticmethod
    def column(w: Tensor | None) -> Tensor | None:
        """What has the shape of the weight's bias."""
        return None if w is None else w[:, 0]


def is_share(keep: Tensor | None) -> bool:
    """Whether ``keep`` is how much of each state stays, and not a mask."""
    return keep is not None and keep.dtype is not torch.uint8


def check_rows(rows: Tensor, count: int) -> None:
    """On the CPU, as the native op: a GPU would have to be waited for."""
    named = rows[rows >= 0].sort().values
    if not torch.equal(named, torch.arange(count, dtype=named.dtype)):
        raise RuntimeError(
            f"fused_rnn: each of the {count} rows of x must belong to one step, and rows names "
            f"{named.unique().numel()} of them"
        )


def fake_layer(*arguments) -> tuple[Tensor, ...]:
    """As the native op's, but that ``recompute`` saves both biases, ``[2*G*H]``, and no gate: the
    backward that makes the gates again is not given the biases."""
    *results, saved = FAKES["layer"](*arguments)
    if arguments[-2] == RECOMPUTE and saved.dim() > 1:
        saved = saved.new_empty((2 * arguments[4].size(0),))
    return *results, saved


def _or_none(x: Tensor) -> Tensor | None:
    """An empty tensor stands for none; so does one of no rows, which nobody reads."""
    return x if x.numel() else None


def layer(
    cell, x, w_ih, b_ih, w_hh, b_hh, h0, c0, reverse, save, control, rows, w_hr, h_mask, keep,
    algorithm, tf32,
):  # fmt: skip
    options = (control, rows, w_hr, h_mask, keep, algorithm, tf32)
    p = Layer(cell, x, w_ih, w_hh, reverse, *options)
    get, has_c, states = p.operands.get, p.cell.states == 2, (p.N, p.H)
    if w_ih is None and b_ih is not None:
        raise RuntimeError("fused_rnn: b_ih needs w_ih")
    b_ih = get("b_ih", b_ih, (p.gates,))
    b_hh = get("b_hh", b_hh, (p.gates,))
    h0 = get("h0", h0, states, state=True)
    c0 = get("c0", c0, states, state=True) if has_c else None
    results = fake_layer(cell, x, w_ih, b_ih, w_hh, b_hh, h0, c0, reverse, save, *options)
    h, c, h_n, c_n, saved = results
    gates: Tensor | None = _or_none(saved)
    if p.again:
        gates = None
        if save:
            for kept, bias in zip(saved.view(2, -1), (b_ih, b_hh), strict=True):
                kept.zero_() if bias is None else kept.copy_(bias)
    if p.N:
        from . import launch

        outputs = (h, _or_none(c), h_n, _or_none(c_n), gates)
        launch.forward(p, b_ih, b_hh, h0, c0, *outputs)
    return results


def layer_backward(
    cell, wanted, dh, dc, dh_n, dc_n, h, c, saved, x, w_ih, w_hh, h0, c0, reverse, control, rows,
    w_hr, h_mask, keep, algorithm, tf32,
):  # fmt: skip
    options = (control, rows, w_hr, h_mask, keep, algorithm, tf32)
    p = Layer(cell, x, w_ih, w_hh, reverse, *options)
    if wanted & 64:
        raise RuntimeError("fused_rnn: the Triton backend lacks dh_norm")
    get, has_c, states = p.operands.get, p.cell.states == 2, (p.N, p.H)
    shown, carry = p.rows_of(p.H), carry_dtype(x.dtype)
    if is_share(keep):
        raise RuntimeError("fused_rnn: there is no backward where keep is a share of each state")
    dh = get("dh", dh, shown)
    dc = get("dc", dc, shown) if has_c else None
    dh_n = get("dh_n", dh_n, states, state=True)
    dc_n = get("dc_n", dc_n, states, state=True) if has_c else None
    h = get("h", h, shown)
    c = get("c", c, shown) if has_c else None
    biases = None
    if p.again:
        biases, saved = get("saved", saved, (2 * p.gates,)), None
    else:
        saved = get("saved", saved, p.rows_of(p.cell.saved * p.H)) if p.cell.saved else None
    h0 = get("h0", h0, states, state=True)
    c0 = get("c0", c0, states, state=True) if has_c else None
    dh0 = x.new_zeros(states, dtype=carry) if dh_n is None else dh_n.to(carry, copy=True)
    dc0 = x.new_empty((0,), dtype=carry)
    if has_c:
        dc0 = x.new_zeros(states, dtype=carry) if dc_n is None else dc_n.to(carry, copy=True)
    if p.N:
        from . import launch

        grads = (dh, dc, dh0, dc0 if has_c else None)
        found = launch.backward(p, wanted, grads, (h, c, saved, biases), h0, c0)
    else:  # of no rows: zeros
        found = tuple(
            None if like is None else torch.zeros_like(like)
            for like in (p.x, p.w_ih, p.column(p.w_ih), p.w_hh, p.column(p.w_hh))
        )
    given = (
        x.new_empty((0,)) if g is None or not wanted & bit else g
        for g, bit in zip(found, (1, 2, 4, 8, 16), strict=True)
    )
    return (*given, dh0, dc0, x.new_empty((0,)), x.new_empty((0,), dtype=carry))


def step(cell, gx, gh, h, c, save):
    spec, operands = cell_of(cell), Operands("gx", gx)
    if h.dim() != 2:
        raise RuntimeError(f"fused_rnn: h has size {[*h.shape]}, expected [N, H]")
    N, H = h.shape
    if spec.states == 2 and c is None:
        raise RuntimeError("fused_rnn: c is missing")
    gx = operands.get("gx", gx, (N, spec.gates * H))
    gh = operands.get("gh", gh, (N, spec.gates * H))
    h = operands.get("h", h, (N, H))
    c = operands.get("c", c, (N, H)) if spec.states == 2 else None
    results = FAKES["step"](cell, gx, gh, h, c, save)
    if h.numel():
        from . import launch

        launch.step(spec, gx, gh, h, c, *map(_or_none, results))
    return results


def step_backward(cell, dh1, dc1, h1, c1, saved, h, c):
    spec, operands = cell_of(cell), Operands("h1", h1)
    if h1.dim() != 2:
        raise RuntimeError(f"fused_rnn: h1 has size {[*h1.shape]}, expected [N, H]")
    states, has_c = tuple(h1.shape), spec.states == 2
    if has_c and c is None:
        raise RuntimeError("fused_rnn: c is missing")
    N, H = states
    dh1 = operands.get("dh1", dh1, states)
    dc1 = operands.get("dc1", dc1, states) if has_c else None
    c = operands.get("c", c, states) if has_c else None
    h = operands.get("h", h, states)
    h1 = operands.get("h1", h1, states)
    c1 = operands.get("c1", c1, states) if has_c else None
    saved = operands.get("saved", saved, (N, spec.saved * H)) if spec.saved else None
    results = FAKES["step_backward"](cell, dh1, dc1, h1, c1, saved, h, c)
    if h1.numel():
        from . import launch

        launch.step_backward(spec, (h, c, h1, c1, saved, dh1, dc1), map(_or_none, results))
    return results


def _define() -> torch.library.Library:
    library = torch.library.Library(NAME, "DEF")
    fakes = FAKES | {"layer": fake_layer}
    for implementation in (layer, layer_backward, step, step_backward):
        name = implementation.__name__
        library.define(name + SCHEMAS[name])
        for device in ("CPU", "CUDA"):
            library.impl(name, implementation, device)
        torch.library.register_fake(f"{NAME}::{name}", fakes[name], lib=library)
    return library


_libraries = _define(), recompute.define(NAME)
# What has them as attributes.
library = getattr(torch.ops, NAME)
