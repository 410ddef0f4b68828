"""The native ops as differentiable functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import cudnn, reference
from .cells import Cell
from .recompute import over as recomputing

ops = torch.ops.fused_rnn

# What acts inside the loop beside the weights, in the order in which a layer's Function takes it.
_MASKS = ("control", "rows", "h_mask", "keep")


class How(NamedTuple):
    """Which ops run a layer, and how.

    Args:
        library: has the ops as attributes.
        again: they are those of ``recompute.py``.
        save: as the op's.
        last: the op's last arguments.
        dh_norm: what the backward fills with the norm of dL/dh of each step, or None.
    """

    library: Any
    again: bool
    save: bool
    last: tuple[int, bool]
    dh_norm: Tensor | None = None


def _call(op: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """``op(*arguments)``, where memory that a GPU has not is torch's own exception.

    An exception loses its type on its way through torch's stable ABI.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    try:
        return op(*arguments)
    except RuntimeError as error:
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in arguments)
        if on_gpu and "out of memory" in str(error):
            torch.cuda.current_stream().query()  # raises an earlier kernel's failure, if that is it
            raise torch.OutOfMemoryError(str(error)) from error
        raise


class _Layer(torch.autograd.Function):
    """One layer in one direction, with the input's product where ``w_ih`` is given."""

    @staticmethod
    def forward(ctx: Any, *inputs):
        outputs = _LayerInTransform.forward(*inputs)
        _LayerInTransform.setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, dh, dc, dh_n, dc_n, _):
        masks, inputs, kept = ctx.saved_tensors[:4], ctx.saved_tensors[4:12], ctx.saved_tensors[12:]
        grads, needs = (dh, dc, dh_n, dc_n), ctx.needs_input_grad[7:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            loop = {"reverse": ctx.reverse, **dict(zip(_MASKS, masks, strict=True))}
            loop["dh_norm"] = ctx.how.dh_norm
            found = _differentiable_backward(ctx.cell, inputs, grads, needs, loop)
        else:
            found = _backward(ctx.cell, inputs, grads, kept, needs, ctx.reverse, masks, ctx.how)
        return None, None, None, None, None, None, None, *found


class _LayerInTransform(_Layer):
    """The form that ``torch.func`` asks for; its ``apply`` takes 200 us to bind the arguments."""

    @staticmethod
    def forward(cell: Cell, reverse: bool, how, control, rows, h_mask, keep, *inputs):
        options = (control, rows, inputs[-1], h_mask, keep)
        op = how.library.layer
        return _call(op, cell.id, *inputs[:-1], reverse, how.save, *options, *how.last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.cell, ctx.reverse, ctx.how, *tensors = inputs
        h, c, _, c_n, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved, *(() if ctx.cell.states == 2 else (c, c_n)))
        ctx.save_for_backward(*tensors, *(() if ctx.how.again else (h, c)), saved)


def _backward(cell: Cell, inputs, grads, kept, needs, reverse, masks, how):
    x, w_ih, b_ih, w_hh, b_hh, h0, c0, w_hr = inputs
    if how.again:
        kept = (b_ih, b_hh, *kept)
    # The op's gradients stand in the order of the inputs; its bits leave out the states'.
    bits = (1, 2, 4, 8, 16, 0, 0, 32)
    wanted = sum(bit for bit, need in zip(bits, needs, strict=True) if need)
    if how.dh_norm is not None:
        wanted |= 64
    control, rows, h_mask, keep = masks
    options = (reverse, control, rows, w_hr, h_mask, keep)
    inputs = (x, w_ih, w_hh, h0, c0)
    arguments = (cell.id, wanted, *grads, *kept, *inputs, *options, *how.last)
    *found, dh_norm = _call(how.library.layer_backward, *arguments)
    if how.dh_norm is not None:
        how.dh_norm.copy_(dh_norm)
    if needs[5]:
        found[5] = found[5].to(h0.dtype)
    if needs[6]:
        found[6] = found[6].to(c0.dtype)
    return tuple(dx if need else None for dx, need in zip(found, needs, strict=True))


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
    def forward(ctx: Any, *inputs):
        outputs = _StepInTransform.forward(*inputs)
        _StepInTransform.setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, dh1, dc1, _):
        cell, library = ctx.cell, ctx.library
        gx, gh, h, c, h1, c1, saved = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs, needs = (gx, gh, h, c), ctx.needs_input_grad[2:]
            return None, None, *_differentiable_step_backward(cell, inputs, (dh1, dc1), needs)
        dgx, dgh, dh, dc = library.step_backward(cell.id, dh1, dc1, h1, c1, saved, h, c)
        if not cell.splits_gates:
            return None, None, dgx, dgx, None, dc if cell.states == 2 else None
        return None, None, dgx, dgh, dh, None


class _StepInTransform(_Step):
    """As :class:`_LayerInTransform`."""

    @staticmethod
    def forward(cell: Cell, library, gx, gh, h, c):
        return library.step(cell.id, gx, gh, h, c, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.cell, ctx.library, *tensors = inputs
        h1, c1, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved, *(() if ctx.cell.states == 2 else (c1,)))
        ctx.save_for_backward(*tensors, h1, c1, saved)


def in_transform() -> bool:
    """Whether a ``torch.func`` transform is at work."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


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
    cell: Cell, gx: Tensor, gh: Tensor, h: Tensor, c: Tensor | None, *, library: Any = None
) -> tuple[Tensor, Tensor | None]:
    """One step of one layer, pointwise part.

    Args:
        cell: one of :data:`fused_rnn.cells.CELLS`.
        gx, gh: the products with ``w_ih`` and ``w_hh``, biases included, ``[N,G*H]``.
        h, c: the states before, ``[N,H]``; ``c`` for the LSTM.
        library: whose ops run. Default: ``None``, the native ones

    Returns:
        the states after: ``h, c``; ``c`` is ``None`` but for the LSTM.
    """
    library = library or ops
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (gx, gh, h, c)):
        function = _StepInTransform if in_transform() else _Step
        h1, c1, _ = function.apply(cell, library, gx, gh, h, c)
    else:
        h1, c1, _ = library.step(cell.id, gx, gh, h, c, False)
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
    h_mask: Tensor | None = None,
    keep: Tensor | None = None,
    algorithm: int = 0,
    cells: bool = False,
    recompute: bool = False,
    dh_norm: Tensor | None = None,
    library: Any = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One layer in one direction over all steps; ``docs/architecture.md`` has the contract.

    Args:
        x: the layer's input ``[T,N,I]``, or without ``w_ih`` its product ``gx`` ``[T,N,G*H]``.
        algorithm: number of one of the device's algorithms, 0 for its own choice. Default: 0
        cells: keep the cell states also where no gradient is needed. Default: ``False``
        recompute: keep for the backward the states at few steps only. Default: ``False``
        dh_norm: what the backward fills with the norm of dL/dh of each step: ``[T,N]``, or
            ``[M]`` with ``rows``, in the carry dtype. Default: ``None``
        library: whose ops run. Default: ``None``, the native ones

    Returns:
        ``h, c, h_n, c_n``. ``c`` is ``None`` for cells without one, and where no gradient is
        needed or ``recompute`` is asked for, since nothing then keeps the cell states, unless
        ``cells`` asks for them.
    """
    tensors = (x, w_ih, b_ih, w_hh, b_hh, h0, c0, w_hr)
    library, last = library or ops, (algorithm, x.is_cuda and cudnn.allows_tf32())
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        function = _LayerInTransform if in_transform() else _Layer
        how = How(library, False, True, last, dh_norm)
        if recompute:
            how = How(recomputing(library), True, cells, last, dh_norm)
        masks = (control, rows, h_mask, keep)
        h, c, h_n, c_n, _ = function.apply(cell, reverse, how, *masks, *tensors)
    else:
        options = (control, rows, w_hr, h_mask, keep)
        h, c, h_n, c_n, _ = _call(
            library.layer, cell.id, *tensors[:-1], reverse, cells, *options, *last
        )
    has_c = cell.states == 2
    return h, c if has_c and c.dim() > 1 else None, h_n, c_n if has_c else None
