"""Who runs a workload: fused_rnn on each backend, torch.nn, a plain loop, other packages."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import fused_rnn

from ..backends import check_name
from . import peers
from .workloads import Case, Workload, make_cases

KNOWN = (
    "fused_rnn[:backend[:algorithm]]",
    "recompute",
    "torch",
    "torch:packed",
    "torch.compile",
    "loop",
    "plain",
    *peers.NAMES,
)
MOST_COMPILED_STEPS = 64
"""torch.compile unrolls the loop; the compiler's time grows with it, and for more steps too far."""


@dataclass(frozen=True)
class Provider:
    """A namespace with torch.nn's classes, and how it is used.

    Args:
        name: as it was asked for.
        namespace: has ``LSTM``, ``GRUCell``, ... with torch.nn's arguments and ``state_dict``.
        options: further arguments of its classes.
        packs: input is packed, also where the workload's is not.
        compiles: modules go through ``torch.compile``.
        plain: a task is done in torch.nn's way, with other modules.
    """

    name: str
    namespace: Any
    options: dict[str, Any] = field(default_factory=dict)
    packs: bool = False
    compiles: bool = False
    plain: bool = False

    @property
    def is_torch(self) -> bool:
        return self.namespace is nn

    def refusal(self, w: Workload) -> str | None:
        """Why ``w`` is not run, or None."""
        if self.packs and (w.mode == "step" or w.task):
            return f"{'a single step' if w.mode == 'step' else 'this'} has nothing to pack"
        if "recompute" in self.options and (w.mode == "step" or w.task):
            return f"{'a single step' if w.mode == 'step' else 'this'} has nothing to compute again"
        if self.compiles and w.task:
            return "what people write is compared as they write it"
        if isinstance(self.namespace, peers.Peer):
            return self.namespace.refusal(w)
        if self.plain and not w.task:
            return "there is no task to do in torch.nn's way"
        if self.compiles and w.T > MOST_COMPILED_STEPS:
            return f"compiling {w.T} steps takes too long; {MOST_COMPILED_STEPS} are the most"
        return None

    def workload(self, w: Workload) -> Workload:
        """What is run where ``w`` is asked for."""
        if self.packs and w.lengths is None:
            return replace(w, lengths="full")
        return replace(w, plain=True) if self.plain else w

    def case(self, w: Workload, dtype: torch.dtype, device: str) -> Case:
        """``w`` to run; the values are the same for all providers."""
        case = make_cases(
            self.workload(w),
            {self.name: self.namespace},
            dtype,
            options={self.name: self.options},
            device=device,
            oracle=False,
        )[self.name]
        if self.compiles:
            case.module.compile()
        return case

    def ran(self, case: Case) -> dict[str, str]:
        """Which backend ran, and how, as columns of a row."""
        requested = self.options.get("backend", "")
        if self.namespace is not fused_rnn:
            backend = "torch.nn" if self.is_torch else self.name
            return {"requested": requested, "backend": backend, "algorithm": ""}
        module: Any = case.module
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            found = fused_rnn.explain(module, case.input, case.states)
        else:  # a task of today.py
            found = module.explain(case.data)
        algorithm = found.algorithm.splitlines()[0]
        return {"requested": requested, "backend": found.backend, "algorithm": algorithm}


def find(name: str) -> Provider:
    """The provider called ``name``.

    Raises:
        ValueError: there is none, or its package is not installed.
    """
    base, _, backend = name.partition(":")
    if base == "fused_rnn":
        check_name(backend or "auto")
        return Provider(name, fused_rnn, {"backend": backend or "auto"})
    if name == "recompute":
        return Provider(name, fused_rnn, {"recompute": True})
    if name == "plain":
        return Provider(name, fused_rnn, plain=True)
    if name in ("torch", "torch:packed"):
        return Provider(name, nn, packs=name != "torch")
    if name in ("loop", "torch.compile"):
        loop = {"backend": "reference"}
        return Provider(name, fused_rnn, loop, compiles=name == "torch.compile")
    if base not in peers.NAMES or (backend and base != "flashrnn"):
        raise ValueError(f"unknown provider {name!r}: expected one of {', '.join(KNOWN)}")
    try:
        return Provider(name, peers.find(name))
    except ImportError as error:
        raise ValueError(f"provider {name!r} cannot be imported: {error}; install it") from error
