"""The rule by which ``torch.func.vmap`` runs a layer's op.

Where the weights are shared, the batch of vmap is more rows of the op's own batch. Where they are
not, or where each member of it wants gradients of its own for them, it is the op's dimension of
models, first in every operand: :func:`torch.func.stack_module_state` gives weights of that form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

# The tensors of the op and of its backward, in the order in which the Functions take them.
MASKS = ("control", "rows", "h_mask", "keep")
INPUTS = ("x", "w_ih", "b_ih", "w_hh", "b_hh", "h0", "c0", "w_hr")
OUTPUTS = ("h", "c", "h_n", "c_n", "saved")
KEPT = ("h", "c", "saved")
GRADS = ("dh", "dc", "dh_n", "dc_n")

_WEIGHTS = ("w_ih", "b_ih", "w_hh", "b_hh", "w_hr")
_STEPS = ("control", "rows")
"""``[T,N]``; whatever else depends on the batch ends in it and one more dimension."""

Tensors = Sequence[Tensor | None]
Call = Callable[..., Sequence[Tensor]]


def vmapped(
    call: Call,
    size: int,
    names: Sequence[str],
    tensors: Tensors,
    dims: Sequence[int | None],
    *,
    apart: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """``call(*tensors)`` for each of ``size`` along ``dims``, and where that is in the results.

    Args:
        call: the op, a function of tensors called ``names``.
        dims: the dimension of vmap in each tensor, ``None`` where all share it.
        apart: there are results that no two members share although they share the weights.
    """
    given = dict(zip(names, tensors, strict=True))
    shared: tuple[str, ...] = _WEIGHTS
    keep = given["keep"]
    if keep is not None and keep.is_floating_point():  # a share of each state, the same in each row
        shared += ("keep",)
    at = dict(zip(names, dims, strict=True))
    first = {
        name: x if x is None or _is_empty(x) else _first(x, at[name], size)
        for name, x in given.items()
    }
    if apart or any(at.get(name) is not None for name in shared):
        return _side_by_side(call, size, first)
    return _as_rows(
        call, size, {k: given[k] if k in shared else x for k, x in first.items()}, shared
    )


def innermost() -> bool:
    """Whether the innermost transform is a vmap."""
    top = _functorch.peek_interpreter_stack()
    return top is not None and top.key() == _functorch.TransformType.Vmap


def lowered(
    call: Call, names: Sequence[str], tensors: Tensors, *, apart: bool = False
) -> Sequence[Tensor]:
    """:func:`vmapped` for tensors that the innermost transform, a vmap, has wrapped.

    It is what ``apply`` of a Function that has the rule does, less the greater part of its time.
    """
    interpreter: Any = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    pairs = [(x, None) if x is None else _functorch._unwrap_batched(x, level) for x in tensors]
    unwrapped, dims = zip(*pairs, strict=True)
    with interpreter.lower():
        if not any(dim is not None for dim in dims):
            return call(*unwrapped)
        size = interpreter.batch_size()
        found, places = vmapped(call, size, names, unwrapped, dims, apart=apart)
    return [
        y if at is None else _functorch._add_batch_dim(y, at, level)
        for y, at in zip(found, places, strict=True)
    ]


def _is_empty(x: Tensor) -> bool:
    """What the op returns in place of a result that there is not."""
    return x.dim() == 1 and not x.numel()


def _first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _side_by_side(
    call: Call, size: int, operands: dict[str, Tensor | None]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """As models, beside those that there are already."""
    w_hh = operands["w_hh"]
    assert w_hh is not None
    nested = w_hh.shape[:2] if w_hh.dim() == 4 else None
    if nested is None:
        found = call(*operands.values())
    else:
        flat = (x if x is None or _is_empty(x) else x.flatten(0, 1) for x in operands.values())
        found = [y if _is_empty(y) else y.unflatten(0, nested) for y in call(*flat)]
    return tuple(found), tuple(None if _is_empty(y) else 0 for y in found)


def _as_rows(
    call: Call, size: int, operands: dict[str, Tensor | None], shared: Sequence[str]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """As more of the batch N, or of the M rows of compact input; ``shared`` are as they were."""
    rows, x = operands.get("rows"), operands["x"]
    assert x is not None
    if rows is not None:
        start = x.size(-2) * torch.arange(size, dtype=rows.dtype, device=rows.device)
        start = start.view(-1, *(1 for _ in rows.shape[1:]))
        operands = operands | {"rows": torch.where(rows < 0, rows, rows + start)}
    folded = []
    for name, y in operands.items():
        if y is not None and name not in shared and not _is_empty(y):
            n = -1 if name in _STEPS else -2
            y = y.movedim(0, n - 1).flatten(n - 1, n)
        folded.append(y)
    found: list[Tensor] = []
    places: list[int | None] = []
    for y in call(*folded):
        empty = _is_empty(y)
        found.append(y if empty else y.unflatten(-2, (size, y.size(-2) // max(size, 1))))
        places.append(None if empty else y.dim() - 2)
    return tuple(found), tuple(places)
