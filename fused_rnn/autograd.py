"""The native ops as differentiable functions."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import cudnn, reference
from .cells import Cell
from .recompute import over as recomputing
from .vmap import GRADS, INPUTS, KEPT, MASKS, innermost, lowered, vmapped

ops = torch.ops.fused_rnn


class How(NamedTuple):
    """Which ops run a layer, and how.

    Args:
        library: has the ops as attributes.
        again: those of ``recompute.py`` run over them.
        cells: keep the cell states also where nothing else needs them.
        last: the op's last arguments.
        dh_norm: what the backward fills with the norm of dL/dh of each step, or None.
    """

    library: Any
    again: bool
    cells: bool
    last: tuple[int, bool]
    dh_norm: Tensor | None = None

    @property
    def ops(self) -> Any:
        return recomputing(self.library) if self.again else self.library


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
        needs = ctx.needs_input_grad[7:]
        # The op's gradients stand in the order of the inputs; its bits leave out the states'.
        wanted = sum(bit for bit, need in zip(_BITS, needs, strict=True) if need)
        saved, grads = ctx.saved_tensors, (dh, dc, dh_n, dc_n)
        found = [*_run_backward(ctx.cell, ctx.reverse, ctx.how, wanted, *grads, *saved)]
        for place in (5, 6):
            if needs[place]:
                found[place] = found[place].to(saved[len(MASKS) + place].dtype)
        found = [dx if need else None for dx, need in zip(found, needs, strict=True)]
        return None, None, None, None, None, None, None, *found


_BITS = (1, 2, 4, 8, 16, 0, 0, 32)
_GIVEN = GRADS + MASKS + INPUTS
_OF_BACKWARD = _GIVEN + KEPT


def _differs(wanted: int) -> bool:
    """Whether there are gradients of weights among the wanted: each member of a vmap has its own,
    whether it shares the weights or not."""
    return bool(wanted & (2 | 4 | 8 | 16 | 32))


class _LayerInTransform(_Layer):
    """The form that ``torch.func`` asks for; its ``apply`` takes 200 us to bind the arguments."""

    @staticmethod
    def forward(cell: Cell, reverse: bool, how, *tensors):
        return _forward(cell, reverse, how, how.cells or not how.again, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.cell, ctx.reverse, ctx.how, *tensors = inputs
        h, c, _, c_n, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved, *(() if ctx.cell.states == 2 else (c, c_n)))
        ctx.save_for_backward(*tensors, *(() if ctx.how.again else (h, c)), saved)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, cell: Cell, reverse: bool, how, *tensors):
        call = partial(_run, cell, reverse, how)
        return vmapped(call, info.batch_size, MASKS + INPUTS, tensors, in_dims[3:])


class _LayerBackward(torch.autograd.Function):
    """The gradients of a layer. Their own are those of the reference's graph."""

    @staticmethod
    def forward(ctx: Any, *inputs):
        outputs = _LayerBackwardInTransform.forward(*inputs)
        _LayerBackwardInTransform.setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *ddx):
        masks = dict(zip(MASKS, ctx.saved_tensors[4:8], strict=True))
        given = (*ctx.saved_tensors[:4], *ctx.saved_tensors[8:])
        needs = (*ctx.needs_input_grad[4:8], *ctx.needs_input_grad[12:20])
        wanted = [y is not None for y in ddx]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            grads, inputs = _split(map(_alias, given))
            outputs = _reference(ctx.cell, ctx.reverse, masks, inputs)
            first = _gradients(outputs, grads, inputs, wanted)
            second = _gradients(first, ddx, (*grads, *inputs), needs, create_graph=create_graph)
        grads, inputs = _split(second)
        kept = (None,) * len(ctx.needs_input_grad[20:])
        return None, None, None, None, *grads, None, None, None, None, *inputs, *kept


class _LayerBackwardInTransform(_LayerBackward):
    """As :class:`_LayerInTransform`."""

    @staticmethod
    def forward(cell: Cell, reverse: bool, how, wanted: int, *tensors):
        return _backward(cell, reverse, how, wanted, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.cell, ctx.reverse, _, _, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: len(_GIVEN)])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, cell: Cell, reverse: bool, how, wanted: int, *tensors):
        call = partial(_run_backward, cell, reverse, how, wanted)
        apart = _differs(wanted)
        return vmapped(call, info.batch_size, _OF_BACKWARD, tensors, in_dims[4:], apart=apart)


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


def _forward(
    cell, reverse, how, save,
    control, rows, h_mask, keep, x, w_ih, b_ih, w_hh, b_hh, h0, c0, w_hr,
):  # fmt: skip
    inputs, options = (x, w_ih, b_ih, w_hh, b_hh, h0, c0), (control, rows, w_hr, h_mask, keep)
    return _call(how.ops.layer, cell.id, *inputs, reverse, save, *options, *how.last)


def _backward(
    cell, reverse, how, wanted, dh, dc, dh_n, dc_n,
    control, rows, h_mask, keep, x, w_ih, b_ih, w_hh, b_hh, h0, c0, w_hr, *kept,
):  # fmt: skip
    if how.again:
        kept = (b_ih, b_hh, *kept)
    if how.dh_norm is not None:
        wanted |= 64
    given, options = (dh, dc, dh_n, dc_n, *kept), (control, rows, w_hr, h_mask, keep)
    inputs = (x, w_ih, w_hh, h0, c0)
    arguments = (cell.id, wanted, *given, *inputs, reverse, *options, *how.last)
    *found, dh_norm = _call(how.ops.layer_backward, *arguments)
    if how.dh_norm is not None:
        how.dh_norm.copy_(dh_norm)
    return tuple(found)


def _run(cell: Cell, reverse: bool, how, *tensors):
    """The op, in the form that whoever differentiates or transforms it asks for."""
    if in_transform():
        if innermost():
            return lowered(partial(_run, cell, reverse, how), MASKS + INPUTS, tensors)
        return _LayerInTransform.apply(cell, reverse, how, *tensors)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Layer.apply(cell, reverse, how, *tensors)
    return _forward(cell, reverse, how, how.cells, *tensors)


def _run_backward(cell: Cell, reverse: bool, how, wanted: int, *tensors):
    if in_transform():
        if how.again:  # no rule tells a transform of parts: all steps are computed again at once
            how, tensors = how._replace(again=False, cells=True), tensors[: len(_GIVEN)]
            h, c, _, _, saved = _run(cell, reverse, how, *tensors[len(GRADS) :])
            tensors += h, c, saved
        if innermost():
            call, apart = partial(_run_backward, cell, reverse, how, wanted), _differs(wanted)
            return lowered(call, _OF_BACKWARD, tensors, apart=apart)
        return _LayerBackwardInTransform.apply(cell, reverse, how, wanted, *tensors)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _LayerBackward.apply(cell, reverse, how, wanted, *tensors)
    return _backward(cell, reverse, how, wanted, *tensors)


def _reference(cell: Cell, reverse: bool, masks: dict[str, Any], inputs):
    """The reference's graph of the op, where there are models one for each."""
    x, w_ih, b_ih, w_hh, b_hh, h0, c0, w_hr = inputs
    if w_hh.dim() == 2:
        loop = {"w_ih": w_ih, "b_ih": b_ih, "w_hr": w_hr, "reverse": reverse, **masks}
        return reference.layer(cell, x, w_hh, b_hh, h0, c0, **loop)

    def each(y):
        return (None,) * w_hh.size(0) if y is None else y.unbind()

    models = zip(*map(each, (*masks.values(), *inputs)), strict=True)
    n = len(MASKS)
    found = [_reference(cell, reverse, dict(zip(MASKS, m[:n], strict=True)), m[n:]) for m in models]
    return [None if y[0] is None else torch.stack(y) for y in zip(*found, strict=True)]


def _alias(x):
    """``x`` as a tensor of its own, so that one computed from another one does not count twice."""
    if x is None or x.requires_grad:
        return x if x is None else x.view_as(x)
    return x.detach().requires_grad_()


def _split(tensors):
    tensors = tuple(tensors)
    return tensors[: len(GRADS)], tensors[len(GRADS) :]


def _differentiable_step_backward(cell: Cell, inputs, grads, needs):
    aliases: list[Any] = [x if x is None else x.view_as(x) for x in inputs]
    gx, gh, h, c = aliases
    return _gradients(cell.step(gx, gh, (h, c)[: cell.states]), grads, aliases, needs)


def _gradients(outputs, grads, inputs, needs, *, create_graph=True) -> tuple[Tensor | None, ...]:
    """Gradients of ``outputs`` at the inputs that need one, differentiable where asked."""
    pairs = zip(outputs, grads, strict=False)
    used = [(y, dy) for y, dy in pairs if y is not None and dy is not None]
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    if not used or not wanted:
        return (None,) * len(needs)
    ys, dys = [y for y, _ in used], [dy for _, dy in used]
    options = {"create_graph": create_graph, "allow_unused": True}
    found = iter(torch.autograd.grad(ys, wanted, dys, **options))
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
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    how = How(library, recompute and grad, cells, last, dh_norm)
    h, c, h_n, c_n, _ = _run(cell, reverse, how, control, rows, h_mask, keep, *tensors)
    has_c = cell.states == 2
    return h, c if has_c and c.dim() > 1 else None, h_n, c_n if has_c else None


def plain_layer(
    cell: Cell,
    reverse: bool,
    grad: bool,
    control: Tensor | None,
    rows: Tensor | None,
    x: Tensor,
    states: tuple[Tensor | None, Tensor | None],
    weights: tuple[Tensor | None, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output and final states of :func:`layer`, of an input that only autograd watches.

    Args:
        grad: gradients may be needed; whether these operands need any is looked at here.
        states: h and c (of other cells anything) that enter, ``[N,*]``, or ``None``: zeros.
        weights: ``w_ih, w_hh, b_ih, b_hh, w_hr``, and what is not read.
    """
    (h0, c0), (w_ih, w_hh, b_ih, b_hh, w_hr, *_) = states, weights
    inputs = (x, w_ih, b_ih, w_hh, b_hh, h0, c0 if cell.states == 2 else None)
    if grad and any(t is not None and t.requires_grad for t in (*inputs, w_hr)):
        how = How(ops, False, False, (0, False))
        found = _Layer.apply(cell, reverse, how, control, rows, None, None, *inputs, w_hr)
    else:
        options = (control, rows, w_hr, None, None, 0, False)
        found = ops.layer(cell.id, *inputs, reverse, False, *options)
    h, _, h_n, c_n, _ = found
    return h, (h_n, c_n) if cell.states == 2 else (h_n,)
