"""Layers, directions, dropout and packed input, over one call a layer and direction.

Everything here is time-major; ``sequence_module.py`` brings input into that form and back. What
torch.nn refuses (tensors of different dtypes or on different devices, no steps at all) is handed to
torch.nn, which then refuses it in its own words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import Problem, algorithm, requested, select, torch_nn
from .cells import Cell, States, carry_dtype
from .sequences import Options, sent


class Weights(NamedTuple):
    """One layer in one direction, in torch.nn's names, order and shapes."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


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
        cell: one of :data:`fused_rnn.cells.CELLS`.
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
    problem = describe(cell, input, states, weights, batch_sizes, bidirectional, options)
    if options is not None and options.weight_dropout:
        p = options.weight_dropout
        weights = [w._replace(w_hh=torch.dropout(w.w_hh, p, True)) for w in weights]
    tensors = [w for layer in weights for w in layer if w is not None]
    if problem.T == 0 or not agree(input, (*(states or ()), *tensors)):
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
        # Some backends multiply padding too, and 0 times NaN is NaN; this one leaves it out.
        input = loop.input(input, clean=chosen.NAME != "cpu")
    keywords: dict[str, Any] = algorithm(backend)
    finals: list[States] = []
    for first in range(0, len(weights), problem.directions):
        if first and dropout and training:
            input = torch.dropout(input, dropout, True)
        outputs: list[Tensor] = []
        cells: list[Any] = []
        if options is not None and options.return_cell_states:
            keywords["cells"] = first + problem.directions == len(weights)
        for k, reverse in enumerate(reverses, first):
            entering = None if states is None else tuple(s[k] for s in states)
            if loop is not None:
                entering = loop.enter(entering, k, reverse)
                keywords["control"] = loop.control(reverse)
                keywords["h_mask"] = loop.h_mask(weights[k].w_hh.size(1), problem.dtype)
            h, c, final = _layer(
                chosen, cell, input, entering, weights[k], reverse=reverse, rows=rows, **keywords
            )
            outputs.append(h)
            cells.append(c)
            finals.append(final if loop is None else loop.leave(final, reverse))
        input = joined(outputs)
    stacked = (
        torch.stack(s) if len(s) > 1 else s[0].unsqueeze(0) for s in zip(*finals, strict=True)
    )
    results = tuple(map(cast, stacked, dtypes))
    if options is None or loop is None:
        return cast(input, dtypes[0]), results, None
    if options.last_step_only:
        last = zip(outputs, finals[-problem.directions :], reverses, strict=True)
        output = joined([loop.last(h, final[0], reverse) for h, final, reverse in last])
    else:
        output = loop.output(input)
    c = loop.output(cast(joined(cells), dtypes[1])) if options.return_cell_states else None
    return cast(output, dtypes[0]), results, c


def joined(directions: Sequence[Tensor]) -> Tensor:
    """The directions of a layer side by side."""
    return directions[0] if len(directions) == 1 else torch.cat(tuple(directions), -1)


def step(
    cell: Cell, input: Tensor, states: States | None, w: Weights, backend: str = "auto"
) -> States:
    r"""One step of one layer.

    Args:
        cell: one of :data:`fused_rnn.cells.CELLS`.
        input: ``[N,I]``.
        states: ``(h,)`` or ``(h, c)``, each ``[N,H]``. ``None``: zeros.
        w: the weights; no projection.
        backend: name of a backend, or ``"auto"``. Default: ``"auto"``

    Returns:
        the next states.

    Raises:
        RuntimeError: as :func:`rnn`.
    """
    if states is None:
        states = (input.new_zeros(input.size(0), w.w_hh.size(1)),) * cell.states
    h, c = states if cell.states == 2 else (states[0], None)
    if _is_plain(input, states):
        grad = torch.is_grad_enabled() and needs_grad((input, *states, *w))
        shapes = (input.shape, w.w_hh.shape)
        small_step, cell_step = _step_kernels(
            cell.name, input.dtype, input.device, shapes, grad, requested(backend)
        )
        try:
            if small_step is not None:
                stepped = small_step(cell, input, h, c, *w[:4])
                if stepped is not None:
                    return stepped[: cell.states]
            if cell_step is not None:
                return cell_step(cell, input, h, c, *w[:4])[: cell.states]
        except (RuntimeError, IndexError):
            check_step(cell, input, states, w)
            raise
    check_step(cell, input, states, w)
    if c is h:
        c = h.view_as(h)  # dynamo refuses a tensor that is two arguments of a Function
    problem = describe_step(cell, input, states, w)
    chosen = select(problem, requested(backend))
    if chosen is torch_nn or (hasattr(chosen, "cell_step") and autocast_dtype(input) is None):
        return chosen.cell_step(cell, input, h, c, *w[:4])[: cell.states]
    _, _, final = _layer(chosen, cell, input.unsqueeze(0), (h,) if c is None else (h, c), w)
    return tuple(map(cast, final, result_dtypes(problem, input, states)))


def _is_plain(input: Tensor, states: States) -> bool:
    """Whether nothing but autograd has to see each operation: no tracer, transform or autocast.

    A step may then go straight to its kernel, whose own checks suffice.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
        or not input.dtype is states[0].dtype is states[-1].dtype
    )


@lru_cache(maxsize=1024)
def _step_kernels(
    cell: str,
    dtype: torch.dtype,
    device: torch.device,
    shapes: tuple[torch.Size, torch.Size],
    grad: bool,
    name: str,
) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """The chosen backend's ``small_step`` and ``cell_step``.

    Cached, because choosing takes longer than the step.
    """
    (N, I), (_, H) = shapes  # noqa: E741
    problem = Problem(cell, dtype, device.type, 0, N, I, H, 0, 1, 1, grad, False, False)
    problem = problem._replace(ordinal=device.index or 0)
    chosen = select(problem, name)
    small = hasattr(chosen, "small_step") and chosen.is_small(problem)
    return chosen.small_step if small else None, getattr(chosen, "cell_step", None)


def check_step(cell: Cell, input: Tensor, states: States, w: Weights) -> None:
    """Refuse what torch.nn's cells refuse, in the same words."""
    (n, size), (_, expected), hidden = input.shape, w.w_ih.shape, w.w_hh.size(1)
    if size != expected:
        raise RuntimeError(f"input has inconsistent input_size: got {size} expected {expected}")
    for k, state in enumerate(states):
        if state.size(0) != n:
            raise RuntimeError(
                f"Input batch size {n} doesn't match hidden{k} batch size {state.size(0)}"
            )
        if state.size(1) != hidden:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.size(1)}, expected {hidden}"
            )
    if not agree(input, (*states, *(x for x in w if x is not None))):
        torch_nn.cell_step(cell, input, states[0], states[-1], *w[:4])


def _layer(
    chosen: ModuleType,
    cell: Cell,
    input: Tensor,
    states: States | None,
    w: Weights,
    **options: Any,
) -> tuple[Tensor, Tensor | None, States]:
    """One layer in one direction, in the dtype that autocast gives its GEMMs."""
    low = autocast_dtype(input)
    dtype = input.dtype if low is None else low
    if low is not None:  # otherwise they agree already
        w = Weights(*(None if x is None else cast(x, low) for x in w))  # type: ignore[arg-type]
    h0 = c0 = None
    if states is not None:
        kept = (dtype, carry_dtype(dtype))
        h0, *c0s = (s if s.dtype in kept else s.to(kept[1]) for s in states)
        c0 = c0s[0] if c0s else None
    h, c, h_n, c_n = chosen.layer(
        cell,
        cast(input, dtype),
        w.w_hh,
        w.b_hh,
        h0,
        c0,
        w_ih=w.w_ih,
        b_ih=w.b_ih,
        w_hr=w.w_hr,
        **options,
    )
    return h, c, (h_n,) if c_n is None else (h_n, c_n)


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
    if not torch._C._is_any_autocast_enabled() or input.dtype is torch.float64:
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
        compiling=torch.compiler.is_compiling(),
        transformed=transformed,
        vmapped=vmapped,
        options=() if options is None else options.asked,
        ordinal=input.device.index or 0,
    )


def describe_step(cell: Cell, input: Tensor, states: States | None, w: Weights) -> Problem:
    """What :func:`step` asks of a backend: a problem of no steps."""
    transformed, vmapped = transforms()
    return Problem(
        cell=cell.name,
        dtype=autocast_dtype(input) or input.dtype,
        device=input.device.type,
        T=0,
        N=input.size(0),
        I=input.size(1),
        H=w.w_hh.size(1),
        P=0,
        layers=1,
        directions=1,
        grad=needs_grad((input, *(states or ()), *w)),
        packed=False,
        compiling=torch.compiler.is_compiling(),
        transformed=transformed,
        vmapped=vmapped,
        ordinal=input.device.index or 0,
    )


def transforms() -> tuple[bool, bool]:
    """What is done with each operation: whether it has to be seen by forward-mode AD or by nested
    transforms of ``torch.func``, and whether ``vmap`` runs it for many at once.

    One level of ``torch.func.grad`` is an ordinary backward.
    """
    if torch.compiler.is_compiling():
        return False, False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds, kind = [interpreter.key() for interpreter in stack], torch._C._functorch.TransformType
    vmapped, grads = kinds.count(kind.Vmap), kinds.count(kind.Grad)
    seen = forward_ad._current_level >= 0 or grads > 1 or vmapped + grads < len(kinds)
    return seen, vmapped > 0


def needs_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
