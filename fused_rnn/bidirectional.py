"""Both directions of a layer as one differentiable function.

A backend's ``layer`` runs one direction. Where both can share a launch of a GPU, its ``both`` is
this one: one call of the op ``bidirectional`` instead of two of ``layer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from operator import and_
from typing import Any

import torch
from torch import Tensor

from . import autograd
from .backends import cudnn, reference
from .cells import Cell

# What a direction has of its own, in the order of the op's lists, and the bit of the op's `wanted`
# that asks for the gradient. Those of the states always come; what acts in the loop has none.
BITS = {
    "w_ih": 2,
    "b_ih": 4,
    "w_hh": 8,
    "b_hh": 16,
    "h0": 0,
    "c0": 0,
    "control": 0,
    "w_hr": 32,
    "h_mask": 0,
    "keep": 0,
}
# The order in which the op returns a direction's gradients.
GRADIENTS = ("x", "w_ih", "b_ih", "w_hh", "b_hh", "h0", "c0", "w_hr", "dh_norm")


class _Both(torch.autograd.Function):
    """Both directions of a layer over the same ``x``. Of the results the first five are those of
    the forward direction."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, how, rows, x, *operands):
        outputs = tuple(_run(cell, how, rows, x, operands, save=True))
        kept = [outputs[i] for i in (0, 1, 4, 5, 6, 9)]  # h, c and saved
        ctx.cell, ctx.how = cell, how
        ctx.set_materialize_grads(False)
        no_c = () if cell.states == 2 else (1, 3, 6, 8)
        ctx.mark_non_differentiable(*(outputs[i] for i in (4, 9, *no_c)))
        ctx.save_for_backward(rows, x, *operands, *kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *dy):
        rows, *inputs = ctx.saved_tensors
        inputs, kept = inputs[:-6], inputs[-6:]
        grads = (*dy[:4], *dy[5:9])
        has_gradient = (True, *[name in GRADIENTS for name in BITS] * 2)
        needs = [*map(and_, ctx.needs_input_grad[3:], has_gradient)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _differentiable_backward(ctx.cell, rows, inputs, grads, needs)
        else:
            found = _backward(ctx.cell, ctx.how, rows, inputs, grads, kept, needs)
        return None, None, None, *found


def _run(cell: Cell, how, rows, x: Tensor, operands, *, save: bool):
    (library, *how), own = how, len(BITS)
    directions = operands[:own], operands[own:]
    return autograd._call(library.bidirectional, cell.id, x, *directions, save, rows, *how)


def _backward(cell: Cell, how, rows, inputs, grads, kept, needs):
    (library, *how), (x, *operands), own = how, inputs, len(BITS)
    directions = operands[:own], operands[own:]
    of_each = needs[1 : 1 + own], needs[1 + own :]
    wanted = [needs[0] + sum(compress(BITS.values(), needed)) for needed in of_each]
    arguments = (cell.id, wanted, grads, kept, x, *directions, rows, *how)
    found = autograd._call(library.bidirectional_backward, *arguments)
    first, second = found[:9], found[9:]
    gradients = [first[0].add_(second[0]) if needs[0] else None]
    for of_one, given, needed in zip((first, second), directions, of_each, strict=True):
        gradients += own_gradients(of_one, given, needed)
    return gradients


def own_gradients(found, given, needed) -> list[Tensor | None]:
    """Of the operands ``given`` those that are needed, out of what the op returns of one."""
    by_name = dict(zip(GRADIENTS, found, strict=True))
    each = zip(BITS, given, needed, strict=True)
    return [by_name[name].to(operand.dtype) if need else None for name, operand, need in each]


def _differentiable_backward(cell: Cell, rows, inputs, grads, needs):
    """The same gradients as a graph, from the reference's own: as of one direction."""
    aliases: list[Any] = [x if x is None else x.view_as(x) for x in inputs]
    (x, *operands), own = aliases, len(BITS)
    outputs: list[Tensor | None] = []
    for given, reverse in ((operands[:own], False), (operands[own:], True)):
        named: dict[str, Any] = dict(zip(BITS, given, strict=True))
        outputs += reference.layer(cell, x, rows=rows, reverse=reverse, **named)
    return autograd._gradients(outputs, grads, aliases, needs)


def both(
    cell: Cell,
    x: Tensor,
    forward: Mapping[str, Any],
    reverse: Mapping[str, Any],
    *,
    rows: Tensor | None = None,
    algorithm: int = 0,
    cells: bool = False,
    library: Any = None,
) -> list[tuple[Tensor, Tensor | None, Tensor, Tensor | None]]:
    """Both directions of a layer over all steps.

    Args:
        x: the layer's input ``[T,N,I]``, or without ``w_ih`` its product ``gx`` ``[T,N,G*H]``.
        forward, reverse: the operands of each direction, by their names in
            :func:`fused_rnn.autograd.layer`.
        rows, algorithm, cells, library: as there, the same for both.

    Returns:
        what :func:`fused_rnn.autograd.layer` returns, of each direction.
    """
    operands = [own.get(name) for own in (forward, reverse) for name in BITS]
    how = (library or autograd.ops, algorithm, x.is_cuda and cudnn.allows_tf32())
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *operands)):
        outputs = _Both.apply(cell, how, rows, x, *operands)
    else:
        outputs = _run(cell, how, rows, x, operands, save=cells)
    return [
        (h, c if cell.states == 2 and c.dim() > 1 else None, h_n, c_n if cell.states == 2 else None)
        for h, c, h_n, c_n, _ in (outputs[:5], outputs[5:])
    ]
