"""Layers in one direction, one above the other, as one differentiable function.

A backend's ``layer`` runs one layer over all steps. Where a GPU has room for more, a backend's
``wavefront`` is this one: a layer works on a chunk of steps while the layer above it works on those
before. Every step computes what it does where layers run one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from operator import and_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd
from .backends import cudnn, reference
from .bidirectional import BITS, GRADIENTS, own_gradients
from .cells import Cell

_OWN = len(BITS)
_MADE, _FOUND = 6, len(GRADIENTS)  # that the ops return of a layer
_KEPT = (0, 1, 2, 5)  # of these x, h, c and saved
_K = len(_KEPT)


class How(NamedTuple):
    """How a stack runs.

    Args:
        scales: what elements that dropout let pass are multiplied by, forward and backward.
        chunks: how many steps a layer runs at a time, forward and backward; 0 for the device's own
            choice, one layer after the other.
        side_by_side: with chunks, layers do not wait for all of the layer before.
    """

    library: Any
    scales: tuple[float, float]
    reverse: bool
    chunks: tuple[int, int]
    side_by_side: bool
    last: tuple[int, bool]  # algorithm, and whether TF32 is allowed

    def arguments(self, *, backward: bool) -> tuple[Any, ...]:
        chunk = self.chunks[backward]
        return chunk, self.side_by_side and chunk > 0, *self.last


class _Stack(torch.autograd.Function):
    """The last layer's h and c, then the final states of all layers."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, how: How, layers: int, x: Tensor, *tensors):
        results = _run(cell, how, layers, x, tensors, save=True)
        kept = [y for of_layer in results for y in (of_layer[i] for i in _KEPT)]
        outputs = _outputs(results)
        ctx.cell, ctx.how, ctx.layers = cell, how, layers
        ctx.set_materialize_grads(False)
        if cell.states == 1:
            ctx.mark_non_differentiable(outputs[1], *outputs[3::2])
        ctx.save_for_backward(x, *tensors, *kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, dh, dc, *d_states):
        layers, saved = ctx.layers, ctx.saved_tensors
        count = len(saved) - layers * _K
        inputs, kept = saved[:count], saved[count:]
        own = (True, *[name in GRADIENTS for name in BITS] * layers)
        has_gradient = (*own, *[False] * (count - len(own)))  # masks of dropout
        needs = [*map(and_, ctx.needs_input_grad[3:], has_gradient)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = (dh, dc, *d_states)
            found = _differentiable_backward(ctx.cell, ctx.how, layers, inputs, grads, needs)
        else:
            found = _backward(ctx.cell, ctx.how, layers, inputs, kept, (dh, dc), d_states, needs)
        return None, None, None, *found


def _outputs(results) -> tuple[Tensor, ...]:
    _, h, c, *_ = results[-1]
    return h, c, *(state for of_layer in results for state in of_layer[3:5])


def _run(cell: Cell, how: How, layers: int, x: Tensor, tensors, *, save: bool):
    operands, passed = tensors[: layers * _OWN], tensors[layers * _OWN :]
    arguments = (cell.id, x, operands, passed, how.scales[0], how.reverse, save)
    results = autograd._call(how.library.stack, *arguments, *how.arguments(backward=False))
    return [results[i : i + _MADE] for i in range(0, len(results), _MADE)]


def _backward(cell: Cell, how: How, layers: int, inputs, kept, of_last, d_states, needs):
    x, *tensors = inputs
    operands, passed = tensors[: layers * _OWN], tensors[layers * _OWN :]
    of_each = [needs[1 + i : 1 + i + _OWN] for i in range(0, layers * _OWN, _OWN)]
    wanted = [sum(compress(BITS.values(), needed)) for needed in of_each]
    wanted[0] += needs[0]
    grads = [grad for i in range(0, 2 * layers, 2) for grad in (None, None, *d_states[i : i + 2])]
    grads[-4:-2] = of_last
    # Below the lowest layer that somebody asks for nothing runs.
    lowest = 0 if needs[0] else next(i for i, needed in enumerate(of_each) if any(needed))
    if lowest:
        own, below = kept[lowest * _K], kept[(lowest - 1) * _K + 1]
        x = own if passed else below
    tensors = (operands[lowest * _OWN :], passed[lowest:])
    loop = (kept[lowest * _K :], x, *tensors, how.scales[1], how.reverse)
    given = (cell.id, wanted[lowest:], grads[lowest * 4 :], *loop)
    found = autograd._call(how.library.stack_backward, *given, *how.arguments(backward=True))
    gradients: list[Tensor | None] = [found[0] if needs[0] else None, *[None] * (lowest * _OWN)]
    for i, needed in enumerate(of_each[lowest:]):
        own = operands[(lowest + i) * _OWN : (lowest + i + 1) * _OWN]
        gradients += own_gradients(found[i * _FOUND : (i + 1) * _FOUND], own, needed)
    return *gradients, *[None] * len(passed)


def _differentiable_backward(cell: Cell, how: How, layers: int, inputs, grads, needs):
    """The same gradients as a graph, from the reference's own: as of one layer."""
    aliases: list[Any] = [x if x is None else x.view_as(x) for x in inputs]
    (x, *operands), passed = aliases[: 1 + layers * _OWN], inputs[1 + layers * _OWN :]
    states: list[Tensor | None] = []
    for i in range(layers):
        if i and passed:
            x = x * passed[i - 1] * how.scales[0]
        named: dict[str, Any] = dict(zip(BITS, operands[i * _OWN : (i + 1) * _OWN], strict=True))
        x, c, *finals = reference.layer(cell, x, reverse=how.reverse, **named)
        states += finals
    return autograd._gradients((x, c, *states), grads, aliases, needs)


def wavefront(
    cell: Cell,
    x: Tensor,
    layers: Sequence[Mapping[str, Any]],
    *,
    passed: Sequence[Tensor] = (),
    scales: tuple[float, float] = (1.0, 1.0),
    chunks: tuple[int, int],
    side_by_side: bool = True,
    algorithm: int = 0,
    cells: bool = False,
    library: Any = None,
) -> list[tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]]:
    """Layers over all steps, each on the output of the one before it.

    Args:
        x: the first layer's input ``[T,N,I]``.
        layers: the operands of each, by their names in :func:`fused_rnn.autograd.layer`, and
            ``reverse``, the same for all.
        passed: below each layer but the first, where dropout let an element pass ``[T,N,R]``
            uint8; empty without dropout. Default: ``()``
        scales, chunks, side_by_side: see :class:`How`.
        algorithm, cells, library: as in :func:`fused_rnn.autograd.layer`.

    Returns:
        what :func:`fused_rnn.autograd.layer` returns, of each layer; of h and c the last layer's
        alone, elsewhere ``None``.
    """
    operands = [own.get(name) for own in layers for name in BITS]
    reverse = bool(layers[0].get("reverse", False))
    last = (algorithm, x.is_cuda and cudnn.allows_tf32())
    how = How(library or autograd.ops, scales, reverse, chunks, side_by_side, last)
    tensors, n = (*operands, *passed), len(layers)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *operands)):
        h, c, *states = _Stack.apply(cell, how, n, x, *tensors)
    else:
        h, c, *states = _outputs(_run(cell, how, n, x, tensors, save=cells))
    has_c = cell.states == 2
    shown: list[Any] = [(None, None)] * (n - 1) + [(h, c if has_c and c.dim() > 1 else None)]
    finals = zip(states[::2], states[1::2], strict=True)
    return [
        (*own, h_n, c_n if has_c else None) for own, (h_n, c_n) in zip(shown, finals, strict=True)
    ]
