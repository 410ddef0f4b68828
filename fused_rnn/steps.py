"""One step of one layer, which is what the cells of ``cell_modules.py`` and ``step`` of a sequence
module run.

A step may take less time than Python needs to look at its arguments: so the small ones go straight
to their kernel, and what is chosen is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module

from .backends import LOG, SMALL_STEPS, Problem, cuda, requested, select, torch_nn
from .cells import Cell, States
from .functional import (
    Weights,
    agree,
    autocast_dtype,
    cast,
    is_plain,
    needs_grad,
    operands,
    result_dtypes,
    run_layer,
    transforms,
)

# The same of a cell, which has no projection. A plain tuple: the other takes longer to make than
# a small step to find its kernel.
CellWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def step(
    cell: Cell, input: Tensor, states: States | None, weights: CellWeights, backend: str = "auto"
) -> States:
    r"""One step of one layer.

    Args:
        cell: one of :data:`fused_rnn.cells.CELLS`.
        input: ``[N,I]``.
        states: ``(h,)`` or ``(h, c)``, each ``[N,H]``. ``None``: zeros.
        weights: ``w_ih, w_hh, b_ih, b_hh``.
        backend: name of a backend, or ``"auto"``. Default: ``"auto"``

    Returns:
        the next states.

    Raises:
        RuntimeError: as :func:`functional.rnn`.
    """
    if states is None:
        states = (input.new_zeros(input.size(0), weights[1].size(1)),) * cell.states
    grad = torch.is_grad_enabled() and needs_grad((input, *states, *weights))
    if not grad:
        stepped = small_step(cell, input, states, weights, None, backend)
        if stepped is not None:
            return stepped
    h, c = states if cell.states == 2 else (states[0], None)
    if is_plain() and input.dtype is h.dtype is states[-1].dtype:
        name = requested(backend)
        try:
            shapes = (input.shape, weights[1].shape)
            # A trial of Triton's kernels may say "not yet", and remembers its results itself.
            settled = input.is_cpu or name != "auto" or cuda.available() is None
            find = _cell_step if settled else _cell_step.__wrapped__
            cell_step = find(cell.name, input.dtype, input.device, shapes, grad, name)
            if cell_step is not None:
                return cell_step(cell, input, h, c, *weights)[: cell.states]
        except (RuntimeError, IndexError):
            check_step(cell, input, states, weights)
            raise
    check_step(cell, input, states, weights)
    if c is h:
        c = h.view_as(h)  # dynamo refuses a tensor that is two arguments of a Function
    problem = describe_step(cell, input, states, weights)
    chosen = select(problem, requested(backend))
    if chosen is torch_nn or (hasattr(chosen, "cell_step") and autocast_dtype(input) is None):
        return chosen.cell_step(cell, input, h, c, *weights)[: cell.states]
    own = operands(cell, input, (h,) if c is None else (h, c), Weights(*weights))
    _, _, (final,) = run_layer(chosen, cell, input.unsqueeze(0), [own])
    return tuple(map(cast, final, result_dtypes(problem, input, states)))


def reads_parameters(module_class: type) -> bool:
    """Whether the weights of its modules are the parameters of their names: a subclass may have
    attributes of its own before them."""
    classes = module_class.__mro__[: module_class.__mro__.index(Module)]
    names = [name for each in classes for name in vars(each)]
    return "__getattr__" not in names and not any(map(_WEIGHT.match, names))


_WEIGHT = re.compile("(weight|bias)_(ih|hh|hr)")


def small_step(
    cell: Cell, input: Tensor, state: Any, weights: Any, names: Any, backend: str
) -> Any:
    """What :func:`step` computes, where no gradient is needed, the step is small and plain, and the
    backend has a kernel for it; else ``None``.

    Args:
        cell, input, backend: as for :func:`step`.
        state: ``(h, c)``, or of a cell without c ``h``, or without names ``(h,)``.
        weights: as for :func:`step`; or where they have names, the dictionary that holds them (if
            the module :func:`reads_parameters`).
        names: of the weights, as a tuple, or ``None``. A list of those of L layers says that states
            are ``[L,N,H]``, and that each layer's input is the next h of the one below.

    Returns:
        the next state, in the form of ``state``; for a list of names ``(y, state)``, with the last
        layer's h, ``[N,H]``, as ``y``.
    """
    kernel = SMALL_STEPS.get(requested(backend))
    if kernel is None or not is_plain():
        return None
    stepped = kernel(cell.id, input, state, weights, names)
    if LOG and stepped is not None:
        first = names[0] if isinstance(names, list) else names
        four: Any = weights if names is None else tuple(weights[name] for name in first)
        states = state if isinstance(state, tuple) else (state,)
        select(describe_step(cell, input, states, four), requested(backend))
    return stepped


@lru_cache(maxsize=1024)
def _cell_step(
    cell: str,
    dtype: torch.dtype,
    device: torch.device,
    shapes: tuple[torch.Size, torch.Size],
    grad: bool,
    name: str,
) -> Callable[..., Any] | None:
    """The chosen backend's ``cell_step``: cached, because choosing takes longer than the step."""
    (N, I), (_, H) = shapes  # noqa: E741
    problem = Problem(cell, dtype, device.type, 0, N, I, H, 0, 1, 1, grad, False, False)
    problem = problem._replace(ordinal=device.index or 0)
    return getattr(select(problem, name), "cell_step", None)


def check_step(cell: Cell, input: Tensor, states: States, weights: CellWeights) -> None:
    """Refuse what torch.nn's cells refuse, in the same words."""
    w_ih, w_hh, *_ = weights
    (n, size), (_, expected), hidden = input.shape, w_ih.shape, w_hh.size(1)
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
    if not agree(input, (*states, *(x for x in weights if x is not None))):
        torch_nn.cell_step(cell, input, states[0], states[-1], *weights)


def describe_step(
    cell: Cell, input: Tensor, states: States | None, weights: CellWeights
) -> Problem:
    """What :func:`step` asks of a backend: a problem of no steps."""
    transformed, vmapped = transforms()
    return Problem(
        cell=cell.name,
        dtype=autocast_dtype(input) or input.dtype,
        device=input.device.type,
        T=0,
        N=input.size(0),
        I=input.size(1),
        H=weights[1].size(1),
        P=0,
        layers=1,
        directions=1,
        grad=needs_grad((input, *(states or ()), *weights)),
        packed=False,
        compiling=is_compiling(),
        transformed=transformed,
        vmapped=vmapped,
        ordinal=input.device.index or 0,
    )
