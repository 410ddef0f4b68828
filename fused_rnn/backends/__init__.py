"""Backends: the ways to run a time loop, and the choice among them.

A backend is a module here with ``NAME``, ``available() -> str | None`` and
``supports(problem) -> str | None`` (the reason why not), ``explain(problem) -> str`` (which
algorithm), and one or more of

- ``layer(...)``: one layer in one direction over all steps;
- ``plain_layer(...)``: the same on the CPU for the common case, in few lines, beside a ``layer``;
- ``both(...)``: both directions of a layer in one call, beside a ``layer``;
- ``wavefront(...)``: all layers of a stack in one call, beside a ``layer``, and
  ``chunks(problem, algorithm)``, which says whether that pays for the algorithm asked for, if any;
- ``norm_layer(...)``: the same for a cell with layer norms;
- ``stack(...)``: all layers and directions in one call;
- ``cell_step(...)``: one step of one layer. It is differentiable and checks its arguments; beside
  a ``layer``, which runs cells under autocast, it may count on one dtype;
- ``small_step(...)``: the same of a cell's id, where nothing watches the computation, not even
  autograd, or ``None`` for "not this one". It is in ``SMALL_STEPS``, and asked before anything is
  chosen.

One with several algorithms has their names in ``ALGORITHMS``, ``lacks(algorithm, problem)`` for the
reason why one of them cannot run the problem; its ``explain`` takes the name of one that was asked
for, and its ``layer`` takes ``algorithm=``, their number from 1 on.
"""

from __future__ import annotations

import logging
import os
import threading
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

from torch import dtype as DType
from typing_extensions import Self

from . import cpu, cuda, cudnn, reference, triton
from . import torch as torch_nn
from .trust import doubts


class Problem(NamedTuple):
    """What is asked of a backend. While compiling, sizes may be symbolic: do not branch on them.

    Args:
        cell: name of the cell, a key of :data:`fused_rnn.cells.CELLS` or, with ``layer_norm`` among
            the options, of :data:`fused_rnn.norm_cells.NORM_CELLS`.
        dtype: dtype of ``gx``, that is, of the computation.
        device: device type, such as ``"cpu"``.
        T, N, I, H, P: sizes; ``T`` is 0 for one step of a cell module, ``P`` is 0 without a
            projection. With packed input ``T`` and ``N`` are the longest length and largest batch.
        layers, directions: how many.
        grad: a backward may follow.
        packed: rows are compact, as in a ``PackedSequence``.
        compiling: ``torch.compile`` or ``torch.export`` is tracing.
        transformed: forward-mode AD or nested ``torch.func`` transforms have to see each operation.
        options: what torch.nn lacks: names out of ``control``, ``h_mask``, ``keep`` (the op's),
            ``keep_share`` (``keep`` as shares), ``cell_states`` (c over time), ``last_step``
            (alone), ``reverse`` (as the only direction), ``jagged`` (input), ``episodes``
            (resets to a learned state), ``layer_norm``, ``recompute``, ``gradient_flow``.
        ordinal: which of the devices of that type.
        vmapped: ``torch.func.vmap`` runs it, for many at once.
    """

    cell: str
    dtype: DType
    device: str
    T: int
    N: int
    I: int  # noqa: E741
    H: int
    P: int
    layers: int
    directions: int
    grad: bool
    packed: bool
    compiling: bool
    transformed: bool = False
    options: tuple[str, ...] = ()
    ordinal: int = 0
    vmapped: bool = False


# In the order in which they are asked and explained.
BACKENDS: dict[str, ModuleType] = {
    backend.NAME: backend for backend in (cpu, cuda, triton, torch_nn, reference)
}


# By the request that they may answer. ``auto`` would choose the same.
SMALL_STEPS = {"auto": cpu.small_step, "cpu": cpu.small_step}

_ALGORITHMS = {name: getattr(backend, "ALGORITHMS", ()) for name, backend in BACKENDS.items()}
_NAMES = ["auto", *BACKENDS, *(f"{b}:{a}" for b, names in _ALGORITHMS.items() for a in names)]


class _Choice(threading.local):
    """The calling thread's choice. Not a ContextVar: dynamo cannot trace one under fullgraph.

    Nor a default in the class, which a compiled module would not notice to be hidden later.
    """

    def __init__(self) -> None:
        self.name = "auto"


_choice = _Choice()


class use_backend:  # noqa: N801
    """Context manager: modules whose ``backend`` is ``"auto"`` use this one, in this thread.

    A backward runs on the backend of its forward, wherever it is called. A module built with an
    explicit ``backend=`` keeps its own.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"triton"``, ``"torch"``, ``"reference"`` or ``"auto"``;
            with an algorithm of the backend after a colon, ``"cuda:stepwise"``, only that one will
            do.

    Raises:
        ValueError: there is no backend of that name.

    Example::

        >>> with fused_rnn.use_backend("reference"):
        ...     expected, _ = rnn(input)
    """

    def __init__(self, name: str) -> None:
        check_name(name)
        self.name = name
        self.previous: list[str] = []

    def __enter__(self) -> Self:
        self.previous.append(_choice.name)
        _choice.name = self.name
        return self

    def __exit__(self, *exc: object) -> None:
        _choice.name = self.previous.pop()


def check_name(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is a backend, one with its algorithm, or ``"auto"``."""
    if name not in _NAMES:
        known = ", ".join(map(repr, _NAMES))
        raise ValueError(f"unknown backend {name!r}: expected one of {known}")


def algorithm(name: str) -> dict[str, int]:
    """What the request ``name`` passes to the backend's ``layer``."""
    backend, _, wanted = name.partition(":")
    return {"algorithm": 1 + _ALGORITHMS[backend].index(wanted)} if wanted else {}


def requested(own: str) -> str:
    """A module's own choice, or where that is ``"auto"`` the thread's."""
    return _choice.name if own == "auto" else own


def refusal(backend: ModuleType, problem: Problem) -> str | None:
    """Why ``backend`` cannot run ``problem``, or None."""
    return backend.available() or backend.supports(problem)


def choose(problem: Problem, name: str) -> tuple[ModuleType, str]:
    """The backend for ``problem`` under the request ``name``, and why."""
    if name != "auto":
        check_name(name)
        base, _, wanted = name.partition(":")
        backend = BACKENDS[base]
        reason = refusal(backend, problem)
        if reason is None and wanted:
            reason = backend.lacks(wanted, problem)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run this: {reason}")
        return backend, "asked for"
    if problem.transformed:
        return reference, "a transform has to see each operation"
    if problem.vmapped:
        for backend in (cpu, cuda):
            if refusal(backend, problem) is None:
                return backend, "its op runs what vmap stacks in one call"
        return reference, "vmap runs each of its operations for all at once"
    if refusal(cpu, problem) is None:
        if problem.compiling or problem.T > 0 or cpu.is_small(problem):
            return cpu, "the time loop in one native call"
        return torch_nn, "a step of this size is two GEMMs, which are torch's"
    if not problem.compiling and refusal(torch_nn, problem) is None:
        if refusal(cuda, problem) is None:
            cudnn_runs = torch_nn.cudnn_can_run(problem)
            ours, why = cuda.faster_than_torch(problem, cudnn.allows_tf32(), cudnn_runs)
            return cuda if ours else torch_nn, why
        if problem.device != "cpu" and refusal(triton, problem) is None:
            doubt = doubts(triton, problem)
            if doubt is None:
                return triton, "the CUDA library cannot run this; a trial was as the reference"
            return torch_nn, f"the CUDA library cannot run this, and Triton's kernels: {doubt}"
        return torch_nn, "the native loop cannot run this, torch.nn can"
    if refusal(cuda, problem) is None:
        return cuda, "torch.nn cannot run this"
    if problem.device != "cpu" and refusal(triton, problem) is None:
        return triton, "neither torch.nn nor the CUDA library can run this"
    return reference, "nothing else can run this"


def select(problem: Problem, name: str = "auto") -> ModuleType:
    """The backend for ``problem``.

    Args:
        problem: what is to be run.
        name: a backend's name, or ``"auto"``. Default: ``"auto"``

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend is unavailable or cannot run the problem. An explicit
            choice never falls back.
    """
    backend, why = choose(problem, name)
    if LOG and not problem.compiling:
        _log(problem, name, backend, why)
    return backend


def how(backend: ModuleType, problem: Problem, name: str) -> str:
    """What ``backend`` does for ``problem`` under the request ``name``."""
    _, _, wanted = name.partition(":")
    return backend.explain(problem, wanted) if wanted else backend.explain(problem)


def chunks(backend: ModuleType, problem: Problem, name: str) -> tuple[int, int]:
    """How many steps at a time ``backend`` runs the layers of a stack side by side under the
    request ``name``, forward and backward; 0 where it runs one after the other."""
    if not hasattr(backend, "chunks"):
        return 0, 0
    return backend.chunks(problem, name.partition(":")[2])


LOG = os.environ.get("FUSED_RNN_LOG", "0") not in ("", "0")
if LOG:
    logging.getLogger("fused_rnn").addHandler(logging.StreamHandler())
    logging.getLogger("fused_rnn").setLevel(logging.INFO)


@lru_cache(maxsize=4096)
def _log(problem: Problem, name: str, backend: ModuleType, why: str) -> None:
    """Says once what runs a problem: one of the same shape, dtype and options is the same."""
    asked = " ".join(f"{k}={v}" for k, v in problem._asdict().items() if v not in (False, ()))
    lines = (f"{backend.NAME} runs {asked}", f"why: {why}", f"how: {how(backend, problem, name)}")
    logging.getLogger("fused_rnn").info("\n".join(lines).replace("\n", "\n    "))
