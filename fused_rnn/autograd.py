"""The native ops as differentiable functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .backends import reference
from .cells import Cell

ops = torch.ops.fused_rnn


class _Layer(torch.autograd.Function):
    """One layer in one direction, with the input's product where ``w_ih`` is given.

    The product is inside so that nothing keeps ``gx``: backward needs ``x`` and ``w_ih``, which
    live on anyway.
    """

    @staticmethod
    def forward(cell: Cell, reverse: bool, control, rows, x, w_ih, b_ih, w_hh, b_hh, h0, c0, w_hr):
        options = (control, rows, w_hr, None, None)
        if w_ih is None:
            return ops.layer(cell.id, x, w_hh, b_hh, h0, c0, reverse, True, *options)
        gx = linear(x, w_ih, b_ih)
        if cell.saved == cell.gates and not torch.compiler.is_compiling():
            # gx is ours alone; a compiler sees to its memory itself.
            return *ops.layer_(cell.id, gx, w_hh, b_hh, h0, c0, reverse, *options), gx
        return ops.layer(cell.id, gx, w_hh, b_hh, h0, c0, reverse, True, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.cell, ctx.reverse, *tensors = inputs
        h, c, _, c_n, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved, *(() if ctx.cell.states == 2 else (c, c_n)))
        ctx.save_for_backward(*tensors, h, c, saved)

    @staticmethod
    def backward(ctx: Any, dh, dc, dh_n, dc_n, _):
        control, rows, *inputs, h, c, saved = ctx.saved_tensors
        loop = {"reverse": ctx.reverse, "control": control, "rows": rows}
        grads, needs = (dh, dc, dh_n, dc_n), ctx.needs_input_grad[4:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _differentiable_backward(ctx.cell, inputs, grads, needs, loop)
        else:
            found = _backward(ctx.cell, inputs, grads, (h, c, saved), needs, loop)
        return None, None, None, None, *found


def _backward(cell: Cell, inputs, grads, kept, needs, loop) -> tuple[Tensor | None, ...]:
    x, w_ih, _, w_hh, _, h0, c0, w_hr = inputs
    h, c, saved = kept
    reverse, control, rows = loop.values()
    dgx, dgh, dh0, dc0, h_in, dh_total = ops.layer_backward(
        cell.id, *grads, h, c, saved, w_hh, h0, c0, reverse, control, rows, w_hr, None, None
    )
    if cell.folds_bias:
        dgh = dgx
    dx = dgx
    if w_ih is not None and needs[0]:
        dx = dgx @ w_ih
    return (
        dx if needs[0] else None,
        dgx.flatten(0, -2).T @ x.flatten(0, -2) if needs[1] else None,
        dgx.flatten(0, -2).sum(0) if needs[2] else None,
        _recurrent_weight_grad(dgh, h, h0, h_in, reverse) if needs[3] else None,
        dgh.flatten(0, -2).sum(0) if needs[4] else None,
        dh0.to(h0.dtype) if needs[5] else None,
        dc0.to(c0.dtype) if needs[6] else None,
        _projection_grad(dh_total, c, saved) if needs[7] else None,
    )


def _recurrent_weight_grad(dgh: Tensor, h: Tensor, h0: Tensor | None, h_in: Tensor, reverse: bool):
    """``dgh.T @ (h that entered each product)``, which is h shifted by one step behind h0."""
    if h_in.dim() > 1:
        return dgh.flatten(0, -2).T @ h_in.flatten(0, -2)
    # Flat before it is cut: a slice of T-1 steps would make an exported program depend on T.
    steps, states, n = dgh.flatten(0, 1), h.flatten(0, 1), h.size(1)
    first, later, earlier = (
        (dgh[-1], steps[:-n], states[n:]) if reverse else (dgh[0], steps[n:], states[:-n])
    )
    dw = later.T @ earlier
    return dw if h0 is None else dw.addmm_(first.T, h0.to(dw.dtype))


def _projection_grad(dh_total: Tensor, c: Tensor, saved: Tensor) -> Tensor:
    hidden = c.size(-1)
    unprojected = saved[..., 3 * hidden :] * c.tanh()
    return dh_total.flatten(0, -2).T @ unprojected.flatten(0, -2)


def _differentiable_backward(cell: Cell, inputs, grads, needs, loop):
    """The same gradients as a graph, for a second derivative: from the reference's own graph.

    Differentiated are aliases of the inputs, so that an input computed from another one does not
    count twice.
    """
    aliases: list[Any] = [x if x is None else x.view_as(x) for x in inputs]
    x, w_ih, b_ih, w_hh, b_hh, h0, c0, w_hr = aliases
    outputs = reference.layer(cell, x, w_hh, b_hh, h0, c0, w_ih=w_ih, b_ih=b_ih, w_hr=w_hr, **loop)
    return _gradients(outputs, grads, aliases, needs)


class _Step(torch.autograd.Function):
    """One step of one layer, its two products given."""

    @staticmethod
    def forward(cell: Cell, gx, gh, h, c):
        return ops.step(cell.id, gx, gh, h, c, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.cell, *tensors = inputs
        h1, c1, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved, *(() if ctx.cell.states == 2 else (c1,)))
        ctx.save_for_backward(*tensors, h1, c1, saved)

    @staticmethod
    def backward(ctx: Any, dh1, dc1, _):
        cell = ctx.cell
        gx, gh, h, c, h1, c1, saved = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs, needs = (gx, gh, h, c), ctx.needs_input_grad[1:]
            return None, *_differentiable_step_backward(cell, inputs, (dh1, dc1), needs)
        dgx, dgh, dh, dc = ops.step_backward(cell.id, dh1, dc1, h1, c1, saved, h, c)
        if cell.folds_bias:
            return None, dgx, dgx, None, dc if cell.states == 2 else None
        return None, dgx, dgh, dh, None


def _differentiable_step_backward(cell: Cell, inputs, grads, needs):
    aliases: list[Any] = [x if x is None else x.view_as(x) for x in inputs]
    gx, gh, h, c = aliases
    return _gradients(cell.step(gx, gh, (h, c)[: cell.states]), grads, aliases, needs)


def _gradients(outputs, grads, inputs, needs) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of ``outputs`` at the inputs that need one."""
    pairs = zip(outputs, grads, strict=False)
    used = [(y, dy) for y, dy in pairs if y is not None and dy is not None]
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    ys, dys = [y for y, _ in used], [dy for _, dy in used]
    found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needs)


def step(
    cell: Cell, gx: Tensor, gh: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One step of one layer, pointwise part.

    Args:
        cell: one of :data:`fused_rnn.cells.CELLS`.
        gx, gh: the products with ``w_ih`` and ``w_hh``, biases included, ``[N,G*H]``.
        h, c: the states before, ``[N,H]``; ``c`` for the LSTM.

    Returns:
        the states after: ``h, c``; ``c`` is ``None`` but for the LSTM.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (gx, gh, h, c)):
        h1, c1, _ = _Step.apply(cell, gx, gh, h, c)
    else:
        h1, c1, _ = ops.step(cell.id, gx, gh, h, c, False)
    return h1, c1 if cell.states == 2 else None


def layer(
    cell: Cell,
    x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    w_ih: Tensor | None = None,
    b_ih: Tensor | None = None,
    reverse: bool = False,
    control: Tensor | None = None,
    rows: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One layer in one direction over all steps; ``docs/architecture.md`` has the contract.

    Args:
        x: the layer's input ``[T,N,I]``, or without ``w_ih`` its product ``gx`` ``[T,N,G*H]``.

    Returns:
        ``h, c, h_n, c_n``. ``c`` is ``None`` for cells without one, and where no gradient is
        needed, since nothing then keeps the cell states.
    """
    tensors = (x, w_ih, b_ih, w_hh, b_hh, h0, c0, w_hr)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        h, c, h_n, c_n, _ = _Layer.apply(cell, reverse, control, rows, *tensors)
    else:
        gx = x if w_ih is None else linear(x, w_ih, b_ih)
        h, c, h_n, c_n, _ = ops.layer(
            cell.id, gx, w_hh, b_hh, h0, c0, reverse, False, control, rows, w_hr, None, None
        )
    has_c = cell.states == 2
    return h, c if has_c and c.dim() > 1 else None, h_n, c_n if has_c else None
