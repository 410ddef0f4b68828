"""The oracle: the time loop in plain PyTorch, any dtype and device, differentiable to any order."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..cells import Cell, carry_dtype
from ..norm_cells import Norm, NormCell

if TYPE_CHECKING:
    from . import Problem

NAME = "reference"

CLEAR, HOLD, CUT = 1, 2, 4


def available() -> str | None:
    return None


def supports(problem: Problem) -> str | None:
    return None


def explain(problem: Problem) -> str:
    return "one PyTorch loop over the steps"


def layer(
    cell: Cell,
    x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    w_ih: Tensor | None = None,
    b_ih: Tensor | None = None,
    reverse: bool = False,
    control: Tensor | None = None,
    rows: Tensor | None = None,
    w_hr: Tensor | None = None,
    h_mask: Tensor | None = None,
    keep: Tensor | None = None,
    cells: bool = True,
    norm: Norm | None = None,
    recompute: bool = False,
    dh_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One layer in one direction over all steps; see ``docs/architecture.md`` for the arguments.

    ``x`` is the layer's input, or without ``w_ih`` its product ``gx``. ``cells`` changes nothing:
    cell states are always kept. ``norm`` is for the cells that have one. With ``recompute`` the
    layer's graph is made in its backward, which fills ``dh_norm``.

    The half types are computed in float32 and rounded once, in the visible output.
    """
    if recompute and not _in_transform():
        options: dict[str, Any] = {"control": control, "rows": rows, "w_hr": w_hr}
        options |= {"h_mask": h_mask, "keep": keep}
        options |= {"w_ih": w_ih, "b_ih": b_ih, "reverse": reverse, "dh_norm": dh_norm}
        given = (cell, x, w_hh, b_hh, h0, c0)
        return checkpoint(layer, *given, use_reentrant=False, **options)
    gx = x if w_ih is None else torch.nn.functional.linear(x, w_ih, b_ih)
    steps, batch = (gx if rows is None else rows).shape[:2]
    carry = carry_dtype(gx.dtype)
    x, w, b = gx.to(carry), w_hh.to(carry), None if b_hh is None else b_hh.to(carry)
    projection = None if w_hr is None else w_hr.to(carry)
    mask = None if h_mask is None else h_mask.to(carry)
    widths = (w_hh.size(1), w_hh.size(0) // cell.gates)[: cell.states]
    states = tuple(
        x.new_zeros(batch, width) if s is None else s.to(carry)
        for s, width in zip((h0, c0), widths, strict=False)
    )
    step = cell.step
    if norm is not None:
        tensors = (None if n is None else n.to(carry) for n in norm.tensors)
        step = partial(step, norm=Norm._make((*tensors, norm.eps)))
    hold = None if rows is None else rows < 0
    if control is not None:
        hold = (control & HOLD) != 0 if hold is None else hold | ((control & HOLD) != 0)

    seen: list[tuple[Tensor, ...]] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        entering = states
        if control is not None:
            cut = ((control[t] & CUT) != 0).unsqueeze(-1)
            clear = ((control[t] & CLEAR) != 0).unsqueeze(-1)
            entering = tuple(torch.where(cut, s.detach(), s) for s in entering)
            entering = tuple(s.masked_fill(clear, 0) for s in entering)
        x_t = x[t] if rows is None else _read(x, rows[t])
        operand = entering[0] if mask is None else entering[0] * mask
        stepped = step(x_t, torch.nn.functional.linear(operand, w, b), entering)
        if projection is not None:
            stepped = (torch.nn.functional.linear(stepped[0], projection), *stepped[1:])
        if keep is not None and keep.dtype is torch.uint8:
            kept = keep[t].bool().split(widths, -1)
            stepped = tuple(map(torch.where, kept, entering, stepped))
        elif keep is not None:
            shares = keep.split(widths, -1)
            stepped = tuple(map(torch.lerp, stepped, entering, shares))
        if dh_norm is not None and stepped[0].requires_grad:
            at = None if rows is None else rows[t]
            stepped[0].register_hook(partial(_fill, dh_norm, t, at))
        if hold is None:
            states = stepped
            seen.append(states)
        else:
            held = hold[t].unsqueeze(-1)
            states = tuple(torch.where(held, s, n) for s, n in zip(states, stepped, strict=True))
            seen.append(tuple(s.masked_fill(held, 0) for s in states))

    if reverse:
        seen.reverse()
    visible = [torch.stack(s).to(gx.dtype) for s in zip(*seen, strict=True)]
    if rows is not None:
        visible = [_compact(v, rows, gx.size(0)) for v in visible]
    if cell.states == 1:
        return visible[0], None, states[0], None
    return visible[0], visible[1], states[0], states[1]


def norm_layer(
    cell: NormCell,
    gx: Tensor,
    w_hh: Tensor,
    norm: Norm,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    **loop: Any,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """:func:`layer` for a cell with layer norms."""
    return layer(cell, gx, w_hh, None, h0, c0, norm=norm, **loop)


def _fill(dh_norm: Tensor, t: int, rows: Tensor | None, dh: Tensor) -> None:
    """Hook on a step's h. Squares of what has nearly vanished are no floats."""
    norm = dh.detach().double().norm(dim=-1).to(dh_norm.dtype)
    if rows is None:
        dh_norm[t] = norm
    else:
        live = rows >= 0
        dh_norm[rows[live].long()] = norm[live]


def _in_transform() -> bool:
    """Of ``torch.func``, none of which takes a checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _read(x: Tensor, rows: Tensor) -> Tensor:
    """The compact rows of one step; a step that holds reads some row and ignores it."""
    if x.size(0) == 0:
        return x.new_zeros(rows.size(0), x.size(1))
    return x.index_select(0, rows.clamp(min=0).long())


def _compact(visible: Tensor, rows: Tensor, size: int) -> Tensor:
    """``[T,N,*]`` to ``[M,*]``: row ``rows[t, n]`` is what step t shows of sequence n."""
    live = rows >= 0
    out = visible.new_zeros(size, visible.size(-1))
    return out.index_copy(0, rows[live].long(), visible[live])
