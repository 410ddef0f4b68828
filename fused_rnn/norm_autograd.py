"""The native ops of the cells with layer norms: their shapes, and the differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native
from .autograd import _call, _gradients, in_transform, ops
from .backends import reference
from .cells import carry_dtype
from .norm_cells import NORM_CELLS, Norm, NormCell

_BY_ID = {cell.id: cell for cell in NORM_CELLS.values()}

# What acts inside the loop beside the weights, in the order in which the ops take it.
_MASKS = ("control", "rows", "h_mask")


class _NormLayer(torch.autograd.Function):
    """One layer in one direction. Inputs: gx, w_hh, the norms' parameters, h0, c0."""

    @staticmethod
    def forward(ctx: Any, *inputs):
        outputs = _NormLayerInTransform.forward(*inputs)
        _NormLayerInTransform.setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, dh, dc, dh_n, dc_n, *_):
        grads, needs = (dh, dc, dh_n, dc_n), ctx.needs_input_grad[6:]
        masks, inputs, kept = ctx.saved_tensors[:3], ctx.saved_tensors[3:11], ctx.saved_tensors[11:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            loop = {"reverse": ctx.reverse, **dict(zip(_MASKS, masks, strict=True))}
            found = _differentiable_backward(ctx.cell, ctx.eps, inputs, grads, needs, loop)
        else:
            found = _backward(ctx.cell, inputs, grads, kept, needs, ctx.reverse, masks)
        return None, None, None, None, None, None, *found


class _NormLayerInTransform(_NormLayer):
    """The form that ``torch.func`` asks for; its ``apply`` takes long to bind the arguments."""

    @staticmethod
    def forward(cell: NormCell, eps: float, reverse: bool, control, rows, h_mask, *inputs):
        masks = (control, rows, h_mask)
        return _call(ops.norm_layer, cell.id, eps, *inputs, reverse, True, *masks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.cell, ctx.eps, ctx.reverse, *tensors = inputs
        h, c, _, c_n, *kept = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept, *(() if ctx.cell.states == 2 else (c, c_n)))
        # The op does without gx.
        ctx.save_for_backward(*tensors, h, c, *kept)


def _backward(cell: NormCell, inputs, grads, kept, needs, reverse, masks):
    _, w_hh, *norm, h0, c0 = inputs
    wanted = needs[0] + 2 * needs[1] + 4 * any(needs[2:6])
    arguments = (cell.id, wanted, *grads, *kept, w_hh, *norm, h0, c0, reverse, *masks)
    found = list(_call(ops.norm_layer_backward, *arguments))
    for place, state in ((6, h0), (7, c0)):
        if needs[place]:
            found[place] = found[place].to(state.dtype)
    return tuple(dx if need else None for dx, need in zip(found, needs, strict=True))


def _differentiable_backward(cell: NormCell, eps: float, inputs, grads, needs, loop):
    """As for the other cells: gradients as a graph, from the reference's own."""
    aliases: list[Any] = [x if x is None else x.view_as(x) for x in inputs]
    gx, w_hh, *norm, h0, c0 = aliases
    outputs = reference.norm_layer(cell, gx, w_hh, Norm._make((*norm, eps)), h0, c0, **loop)
    return _gradients(outputs, grads, aliases, needs)


def norm_layer(
    cell: NormCell,
    gx: Tensor,
    w_hh: Tensor,
    norm: Norm,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    reverse: bool = False,
    control: Tensor | None = None,
    rows: Tensor | None = None,
    h_mask: Tensor | None = None,
    cells: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One layer in one direction over all steps; ``docs/architecture.md`` has the contract.

    Args:
        cell: one of :data:`fused_rnn.norm_cells.NORM_CELLS`.
        gx: what ``cell.product`` makes of the input, ``[T,N,G*H]``.
        cells: keep the cell states also where no gradient is needed. Default: ``False``

    Returns:
        as :func:`fused_rnn.autograd.layer`.
    """
    tensors, masks = (gx, w_hh, *norm.tensors, h0, c0), (control, rows, h_mask)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        function = _NormLayerInTransform if in_transform() else _NormLayer
        h, c, h_n, c_n, *_ = function.apply(cell, norm.eps, reverse, *masks, *tensors)
    else:
        arguments = (cell.id, norm.eps, *tensors, reverse, cells, *masks)
        h, c, h_n, c_n, *_ = _call(ops.norm_layer, *arguments)
    has_c = cell.states == 2
    return h, c if has_c and c.dim() > 1 else None, h_n, c_n if has_c else None


def fake_norm_layer(
    cell,
    eps,
    gx,
    w_hh,
    gain,
    bias,
    c_gain,
    c_bias,
    h0,
    c0,
    reverse,
    save,
    control,
    rows,
    h_mask,
) -> tuple[Tensor, ...]:
    norm = {"gain": gain, "bias": bias, "c_gain": c_gain, "c_bias": c_bias}
    options = {"control": control, "rows": rows, "h_mask": h_mask}
    native._one_device("gx", gx.device, w_hh=w_hh, **norm, h0=h0, c0=c0, **options)
    spec, hidden = _BY_ID[cell], w_hh.shape[1]
    lead, batch = gx.shape[:-1], (gx if rows is None else rows).shape[1]
    carry, has_c = carry_dtype(gx.dtype), spec.states == 2
    return (
        gx.new_empty((*lead, hidden)),
        gx.new_empty((*lead, hidden) if has_c and save else (0,)),
        gx.new_empty((batch, hidden), dtype=carry),
        gx.new_empty((batch, hidden) if has_c else (0,), dtype=carry),
        gx.new_empty((*lead, spec.saved * hidden) if save else (0,)),
        gx.new_empty((*lead, spec.stats) if save else (0,), dtype=carry),
    )


def fake_norm_layer_backward(
    cell,
    wanted,
    dh,
    dc,
    dh_n,
    dc_n,
    h,
    c,
    saved,
    stats,
    w_hh,
    gain,
    bias,
    c_gain,
    c_bias,
    h0,
    c0,
    reverse,
    control,
    rows,
    h_mask,
) -> tuple[Tensor, ...]:
    grads = {"dh": dh, "dc": dc, "dh_n": dh_n, "dc_n": dc_n}
    norm = {"gain": gain, "bias": bias, "c_gain": c_gain, "c_bias": c_bias}
    options = {"control": control, "rows": rows, "h_mask": h_mask}
    kept = {"c": c, "saved": saved, "stats": stats, "w_hh": w_hh, "h0": h0, "c0": c0}
    native._one_device("h", h.device, **grads, **kept, **norm, **options)
    (gates, hidden), batch = w_hh.shape, (h if rows is None else rows).shape[1]
    carry, has_c = carry_dtype(h.dtype), _BY_ID[cell].states == 2

    def gradient(bit: int, exists: bool, shape: tuple[int, ...]) -> Tensor:
        return h.new_empty(shape if wanted & bit and exists else (0,))

    return (
        gradient(1, True, (*h.shape[:-1], gates)),
        gradient(2, True, (gates, hidden)),
        gradient(4, True, (gates,)),
        gradient(4, True, (gates,)),
        gradient(4, has_c, (hidden,)),
        gradient(4, has_c, (hidden,)),
        h.new_empty((batch, hidden), dtype=carry),
        h.new_empty((batch, hidden) if has_c else (0,), dtype=carry),
    )


if native.UNAVAILABLE is None:
    torch.library.register_fake("fused_rnn::norm_layer", fake_norm_layer)
    torch.library.register_fake("fused_rnn::norm_layer_backward", fake_norm_layer_backward)
