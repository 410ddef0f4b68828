"""Layers, directions, dropout and packed input, over one call a layer and direction.

Everything here is time-major; ``sequence_module.py`` brings input into that form and back. What
torch.nn refuses (tensors of different dtypes or on different devices, no steps at all) is handed to
torch.nn, which then refuses it in its own words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import get_interpreter_stack, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .autograd import in_transform
from .backends import Problem, algorithm, requested, select, torch_nn
from .backends import chunks as chunks_of
from .cells import Cell, States, carry_dtype
from .norm_cells import NormCell
from .sequences import Options, sent


class Weights(NamedTuple):
    """One layer in one direction, in torch.nn's names, order and shapes.

    Where there are norms, biases are theirs, and they have gains: of the input's product, of the
    recurrent product (or of the sum of both), ``[G*H]``; and with another bias of c, ``[H]``.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    g_ih: Tensor | None = None
    g_hh: Tensor | None = None
    g_c: Tensor | None = None
    b_c: Tensor | None = None


def rnn(
    cell: Cell,
    input: Tensor,
    states: States | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    options: Options | None = None,
    *,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, States, Tensor | None]:
    r"""A stack of recurrent layers.

    Args:
        cell: one of :data:`fused_rnn.cells.CELLS`, or one with layer norms.
        input: ``[T,N,I]``, or ``[M,I]`` with ``batch_sizes``.
        states: ``(h_0,)`` or ``(h_0, c_0)``, each ``[L*D,N,*]``. ``None``: zeros.
        weights: one entry a layer and direction, the directions of a layer together.
        batch_sizes: ``[T]`` on the CPU, as in a ``PackedSequence``. Default: ``None``
        bidirectional: D is 2. Default: ``False``
        options: what torch.nn lacks; with its ``rows`` the input is ``[M,I]``. Default: ``None``
        dropout: probability that an element between two layers is zeroed. Default: 0
        training: whether dropout acts. Default: ``False``
        backend: name of a backend, or ``"auto"``. Default: ``"auto"``

    Returns:
        the output ``[T,N,D*R]`` (``[M,D*R]`` for compact input, ``[N,D*R]`` for the last step
        only), the final states, shaped as ``states``, and the last layer's cell states
        ``[T,N,D*H]``, ``None`` unless asked for.

    Raises:
        RuntimeError: T is 0; tensors on different devices or of different dtypes; or the backend
            asked for cannot run this.
    """
    if type(cell) is Cell and is_plain() and (options is None or options.is_control_only):
        p, directions = dropout if training else 0.0, 2 if bidirectional else 1
        asked = (batch_sizes, directions, options)
        found = _plain_rnn(cell, input, states, weights, *asked, p, backend)
        if found is not None:
            return *found, None
    problem = describe(cell, input, states, weights, batch_sizes, bidirectional, options)
    if options is not None and options.weight_dropout:
        p = options.weight_dropout
        weights = [w._replace(w_hh=torch.dropout(w.w_hh, p, True)) for w in weights]
    if options is not None and options.flow is not None:
        options.flow.begin(problem)
    tensors = [w for layer in weights for w in layer if w is not None]
    if problem.T == 0 or not agree(input, (*(states or ()), *tensors)):
        if isinstance(cell, NormCell):
            refuse(problem)
        chosen = torch_nn
    else:
        backend = requested(backend)
        chosen = select(problem, backend)
    if hasattr(chosen, "stack"):
        return *chosen.stack(
            cell,
            input,
            states,
            tensors,
            batch_sizes=batch_sizes,
            batch=problem.N,
            bias=weights[0].b_ih is not None,
            num_layers=problem.layers,
            bidirectional=bidirectional,
            dropout=dropout,
            training=training,
        ), None

    dtypes = result_dtypes(problem, input, states)
    reverses: tuple[bool, ...] = (False, True)[: problem.directions]
    rows = None if batch_sizes is None else packed_rows(batch_sizes, problem.N, input.device)
    loop = None
    if options is not None:
        loop = options.loop(problem.T, problem.N, input.device, rows)
        rows, reverses = loop.rows, (True,) if options.reverse else reverses
        # Some backends multiply padding too, and 0 times NaN is NaN; this one leaves it out where
        # it has the product.
        clean = chosen.NAME != "cpu" or isinstance(cell, NormCell)
        input = loop.input(input, clean=clean)
    keywords: dict[str, Any] = algorithm(backend)
    if "recompute" in problem.options and not (problem.transformed or problem.vmapped):
        keywords["recompute"] = True

    def given(first: int, x: Tensor) -> list[dict[str, Any]]:
        """What each direction of a layer whose input is like ``x`` is given."""
        each: list[dict[str, Any]] = []
        for k, reverse in enumerate(reverses, first):
            entering = None if states is None else tuple(s[k] for s in states)
            if loop is not None:
                entering = loop.enter(entering, k, reverse)
            own = operands(cell, x, entering, weights[k])
            if loop is not None:
                recurrent, hidden = weights[k].w_hh.size(1), problem.H
                widths = (recurrent, hidden)[: cell.states]
                own["control"] = loop.control(reverse)
                own["h_mask"] = loop.h_mask(recurrent, problem.dtype)
                if (keep := loop.keep(widths, carry_dtype(problem.dtype))) is not None:
                    own["keep"] = keep
            if options is not None and options.flow is not None:
                own["dh_norm"] = options.flow.room(x, problem.dtype, loop)
            each.append({"reverse": reverse, **own})
        return each

    wants_cells = options is not None and options.return_cell_states
    p = dropout if training else 0.0
    chunks = (0, 0) if in_transform() else chunks_of(chosen, problem, backend)
    finals: list[States] = []
    if any(chunks):
        keywords |= {"chunks": chunks, "cells": wants_cells}
        outputs, cells, finals = run_stack(chosen, cell, input, len(weights), given, p, **keywords)
        if loop is not None:
            finals = [loop.leave(final, reverses[0]) for final in finals]
        input = outputs[0]
    else:
        for first in range(0, len(weights), problem.directions):
            if first and p:
                input = torch.dropout(input, p, True)
            if wants_cells:
                keywords["cells"] = first + problem.directions == len(weights)
            layer = given(first, input)
            outputs, cells, after = run_layer(chosen, cell, input, layer, rows=rows, **keywords)
            finals += after if loop is None else map(loop.leave, after, reverses)
            input = joined(outputs)
    results = tuple(map(cast, _stacked(finals), dtypes))
    if options is None or loop is None:
        return cast(input, dtypes[0]), results, None
    if options.last_step_only:
        last = zip(outputs, finals[-problem.directions :], reverses, strict=True)
        output = joined([loop.last(h, final[0], reverse) for h, final, reverse in last])
    else:
        output = loop.output(input)
    c = loop.output(cast(joined(cells), dtypes[1])) if options.return_cell_states else None
    return cast(output, dtypes[0]), results, c


def _plain_rnn(
    cell: Cell,
    input: Tensor,
    states: States | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None,
    directions: int,
    options: Options | None,
    dropout: float,
    backend: str,
) -> tuple[Tensor, States] | None:
    """:func:`rnn` for the common case: dense or packed sequences on the CPU that only autograd
    watches, all of one dtype, with no options but those that are ``control``. ``None`` where it is
    another one.

    A call usually finds the caches full of something else, and each line of Python then costs
    microseconds: this has no more of them than the case needs.
    """
    if input.size(0) == 0:
        return None
    dtype, grad = input.dtype, False
    for tensors in ((input,), states or (), *weights):
        for x in tensors:
            if x is not None:
                if x.dtype is not dtype or not x.is_cpu:
                    return None
                grad = grad or x.requires_grad
    grad = grad and torch.is_grad_enabled()
    if batch_sizes is None:
        T, N = input.shape[:2]
    else:
        T, N = batch_sizes.size(0), int(batch_sizes[0])
    _, w_hh, *_, w_hr = weights[0][:5]
    widths = (input.size(-1), w_hh.size(0) // cell.gates, 0 if w_hr is None else w_hr.size(0))
    sizes = (T, N, *widths, len(weights) // directions, directions)
    packed, asked = batch_sizes is not None, () if options is None else ("control",)
    problem = Problem(cell.name, dtype, "cpu", *sizes, grad, packed, False, options=asked)
    chosen = select(problem, requested(backend))
    if not hasattr(chosen, "plain_layer"):
        return None
    rows = None if batch_sizes is None else packed_rows(batch_sizes, N, input.device)
    loop = None if options is None else options.loop(T, N, input.device, rows)
    finals: list[States] = []
    for first in range(0, len(weights), directions):
        if first and dropout:
            input = torch.dropout(input, dropout, True)
        outputs = []
        for k in range(first, first + directions):
            reverse = k > first
            before = (None, None) if states is None else (states[0][k], states[-1][k])
            control = None if loop is None else loop.control(reverse)
            given = (control, rows, input, before, weights[k])
            h, final = chosen.plain_layer(cell, reverse, grad, *given)
            outputs.append(h)
            finals.append(final)
        input = joined(outputs)
    if loop is not None:
        input = loop.output(input)
    return input, tuple([s if s.dtype is dtype else s.to(dtype) for s in _stacked(finals)])


def refuse(problem: Problem) -> NoReturn:
    """Where torch.nn has no module that could refuse in its own words."""
    if problem.T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    raise RuntimeError(
        "fused_rnn: input, states and parameters must be on one device and of one dtype; move them "
        "with .to(...)"
    )


def _stacked(finals: Sequence[States]) -> States:
    """The final states of all layers and directions, ``[L*D,N,*]``."""
    if len(finals) == 1:
        return tuple([s.unsqueeze(0) for s in finals[0]])
    return tuple(map(torch.stack, zip(*finals, strict=True)))


def joined(directions: Sequence[Tensor]) -> Tensor:
    """The directions of a layer side by side."""
    return directions[0] if len(directions) == 1 else torch.cat(tuple(directions), -1)


def is_plain() -> bool:
    """Whether nothing but autograd has to see each operation: no tracer, transform or autocast."""
    return not (
        is_compiling()
        or _get_tracing_state()
        or _is_any_autocast_enabled()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def operands(cell: Cell, input: Tensor, states: States | None, w: Weights) -> dict[str, Any]:
    """What one direction is given, by the names of a backend's ``layer``, in the dtype that
    autocast gives its GEMMs."""
    low = autocast_dtype(input)
    dtype = input.dtype if low is None else low
    if low is not None:  # otherwise they agree already
        w = Weights(*(None if x is None else cast(x, low) for x in w))  # type: ignore[arg-type]
    h0 = c0 = None
    if states is not None:
        kept = (dtype, carry_dtype(dtype))
        h0, *c0s = (s if s.dtype in kept else s.to(kept[1]) for s in states)
        c0 = c0s[0] if c0s else None
    if isinstance(cell, NormCell):
        return {"h0": h0, "c0": c0, "weights": w}
    w_ih, w_hh, b_ih, b_hh, w_hr, *_ = w
    own = {"w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh, "w_hr": w_hr}
    return {"h0": h0, "c0": c0, **own}


def run_layer(
    chosen: ModuleType,
    cell: Cell,
    input: Tensor,
    directions: Sequence[dict[str, Any]],
    **shared: Any,
) -> tuple[list[Tensor], list[Any], list[States]]:
    """The outputs, cell states and final states of a layer, each by direction.

    ``directions`` are what :func:`operands` gives, and what acts in the loop. A transform has a
    rule for one direction alone, and what is computed again is one direction's.
    """
    x = cast(input, autocast_dtype(input) or input.dtype)
    apart = in_transform() or "recompute" in shared or "dh_norm" in directions[0]
    if isinstance(cell, NormCell):
        found = [_norm_layer(chosen, cell, x, **own, **shared) for own in directions]
    elif len(directions) == 2 and hasattr(chosen, "both") and not apart:
        found = chosen.both(cell, x, *directions, **shared)
    else:
        found = [chosen.layer(cell, x, **own, **shared) for own in directions]
    finals: list[States] = [(h_n,) if c_n is None else (h_n, c_n) for _, _, h_n, c_n in found]
    return [h for h, *_ in found], [c for _, c, *_ in found], finals


def run_stack(
    chosen: ModuleType,
    cell: Cell,
    input: Tensor,
    layers: int,
    given: Callable[[int, Tensor], list[dict[str, Any]]],
    dropout: float,
    **keywords: Any,
) -> tuple[list[Tensor], list[Any], list[States]]:
    """The same of all layers in one direction, by the backend's ``wavefront``; outputs and cell
    states of the last one. ``given(k, x)`` is as for :func:`run_layer`."""
    x = cast(input, autocast_dtype(input) or input.dtype)
    each: list[dict[str, Any]] = []
    passed: list[Tensor] = []
    for k in range(layers):
        if k and dropout:
            passed.append(dropout_mask(x, each[-1]["w_hh"].size(1), dropout))
        each += given(k, input)
    scales = dropout_scales(dropout, x.dtype)
    found = chosen.wavefront(cell, x, each, passed=passed, scales=scales, **keywords)
    finals: list[States] = [(h_n,) if c_n is None else (h_n, c_n) for _, _, h_n, c_n in found]
    return [found[-1][0]], [found[-1][1]], finals


def dropout_mask(x: Tensor, width: int, p: float) -> Tensor:
    """Where ``torch.dropout`` would let an output of a layer pass, by the same random numbers."""
    like = x.new_empty(*x.shape[:-1], width)
    if p == 1:
        return torch.zeros_like(like, dtype=torch.uint8)
    return torch.native_dropout(like, p, True)[1].view(torch.uint8)


def dropout_scales(p: float, dtype: torch.dtype) -> tuple[float, float]:
    """What CUDA's dropout multiplies by, forward and backward: forward it takes ``1 / (1 - p)`` of
    what was rounded to float32 first."""
    if p in (0, 1):
        return 1.0, 1.0
    passes = 1 - p if dtype is torch.float64 else ctypes.c_float(1 - p).value
    return 1 / passes, 1 / (1 - p)


def _norm_layer(
    chosen: ModuleType,
    cell: NormCell,
    x: Tensor,
    *,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    **options: Any,
) -> Any:
    gx = cast(cell.product(x, weights), x.dtype)
    return chosen.norm_layer(cell, gx, weights.w_hh, cell.norm(weights), h0, c0, **options)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)`` that leaves no trace, in time or in a graph, where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def packed_rows(batch_sizes: Tensor, batch: int, device: torch.device) -> Tensor:
    """Where each step's row stands in packed data, ``[T,N]`` int32; -1 past a sequence's end."""
    sizes = sent(batch_sizes, device, "packed input", "pad it")
    n = torch.arange(batch, device=device)
    starts = sizes.cumsum(0) - sizes
    return torch.where(n < sizes.unsqueeze(1), starts.unsqueeze(1) + n, -1).int()


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a GEMM on ``input``, or None where it leaves it alone."""
    if not _is_any_autocast_enabled() or input.dtype is torch.float64:
        return None
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def agree(input: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether all are on one device and of one dtype, or autocast would make it one."""
    dtype, device = input.dtype, input.device
    others = [x for x in others if x.dtype is not dtype or x.device != device]
    if not others:
        return True
    castable = all(x.is_floating_point() and x.dtype is not torch.float64 for x in (input, *others))
    same_device = all(x.device == device for x in others)
    return same_device and castable and autocast_dtype(input) is not None


def result_dtypes(
    problem: Problem, input: Tensor, states: States | None
) -> tuple[torch.dtype, ...]:
    """The dtypes in which torch.nn returns h (and the output) and c.

    Without autocast, the input's. Under autocast a GEMM's result has the autocast dtype, and an
    elementwise result is promoted with the state that enters: h of an RNN or behind a projection
    is the former, other states are the latter. But torch's LSTM module goes to oneDNN where that
    can run it, which returns the autocast dtype throughout. On CUDA everything does: cuDNN, and
    the cells, which autocast runs in it.
    """
    low = autocast_dtype(input)
    if low is None:
        return input.dtype, input.dtype
    if problem.device == "cuda":
        return low, low
    state = torch.promote_types(low, input.dtype if states is None else states[-1].dtype)
    dense = problem.T > 0 and not problem.packed and problem.P == 0
    if problem.cell == "lstm" and dense and input.dtype is not torch.float16:
        state = low
    from_gemm = problem.cell in ("rnn_tanh", "rnn_relu") or problem.P > 0
    return low if from_gemm else state, state


def describe(
    cell: Cell,
    input: Tensor,
    states: States | None,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    options: Options | None = None,
) -> Problem:
    """What :func:`rnn` asks of a backend."""
    packed = True
    if batch_sizes is not None:
        steps, batch = batch_sizes.size(0), int(batch_sizes[0])
    elif options is not None and options.rows is not None:
        steps, batch = options.rows.shape
    else:
        (steps, batch), packed = input.shape[:2], False
    w = weights[0]
    directions = 2 if bidirectional else 1
    asked = () if options is None else options.asked
    transformed, vmapped = transforms()
    return Problem(
        cell=cell.name,
        dtype=autocast_dtype(input) or input.dtype,
        device=input.device.type,
        T=steps,
        N=batch,
        I=w.w_ih.size(1),
        H=w.w_hh.size(0) // cell.gates,
        P=0 if w.w_hr is None else w.w_hr.size(0),
        layers=len(weights) // directions,
        directions=directions,
        grad=torch.is_grad_enabled()
        and (any(map(needs_grad, weights)) or needs_grad((input, *(states or ())))),
        packed=packed,
        compiling=is_compiling(),
        transformed=transformed,
        vmapped=vmapped,
        options=(*asked, "layer_norm") if isinstance(cell, NormCell) else asked,
        ordinal=input.device.index or 0,
    )


def transforms() -> tuple[bool, bool]:
    """What is done with each operation: whether it has to be seen by forward-mode AD or by nested
    transforms of ``torch.func``, and whether ``vmap`` runs it for many at once.

    One level of ``torch.func.grad`` is an ordinary backward.
    """
    if is_compiling():
        return False, False
    stack = get_interpreter_stack() or ()
    kinds, kind = [interpreter.key() for interpreter in stack], torch._C._functorch.TransformType
    vmapped, grads = kinds.count(kind.Vmap), kinds.count(kind.Grad)
    seen = forward_ad._current_level >= 0 or grads > 1 or vmapped + grads < len(kinds)
    return seen, vmapped > 0


def needs_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
