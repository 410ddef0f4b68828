"""Other packages' layers with torch.nn's arguments, parameters and results, as far as they go."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .workloads import Workload

NAMES = ("torchrl", "haste", "flashrnn")
"""Packages, as they are called here. ``flashrnn`` may have one of its backends after a colon."""
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def find(name: str) -> Any:
    """The classes of the package that is called ``name`` here.

    Raises:
        ImportError: it is not installed, or does not load.
    """
    if name == "torchrl":  # its classes take torch.nn's arguments and state_dict themselves
        return importlib.import_module("torchrl.modules.tensordict_module.rnn")
    base, _, backend = name.partition(":")
    return Flash(backend or "cuda_fused") if base == "flashrnn" else Haste()


class Peer:
    """A package of single layers, for some of the cells. It stands where torch.nn may stand, so its
    methods have the names of torch.nn's classes."""

    cells: tuple[str, ...]

    def refusal(self, w: Workload) -> str | None:
        """Why it cannot run ``w``, or None."""
        plain = Workload(w.name, w.cell, I=w.I, H=w.H, T=w.T, N=w.N, mode=w.mode, reset=w.reset)
        if w.cell not in self.cells:
            return f"the package has no {w.cell}"
        if w.mode == "step" or w != plain:
            return "the package has one layer in one direction with biases, on dense sequences"
        return None


class Haste(Peer):
    """``haste_pytorch``: weights in a layout of its own.

    Source: https://github.com/lmnt-com/haste, documentation of its LSTM and GRU.
    """

    cells = ("lstm", "gru")

    def __init__(self) -> None:
        self.package = importlib.import_module("haste_pytorch")

    def LSTM(self, I: int, H: int, **_: Any) -> nn.Module:  # noqa: E741, N802
        return HasteLayer(self.package.LSTM(I, H), (0, 2, 1, 3))  # i, g, f, o

    def GRU(self, I: int, H: int, **_: Any) -> nn.Module:  # noqa: E741, N802
        return HasteLayer(self.package.GRU(I, H), (1, 0, 2))  # z, r, n


class HasteLayer(nn.Module):
    """Its parameters are those of the package, so that no time goes into copies.

    Args:
        rnn: the package's module.
        order: where torch.nn's gates stand in its own.
    """

    def __init__(self, rnn: Any, order: tuple[int, ...]) -> None:
        super().__init__()
        self.rnn, self.order = rnn, order

    def load_state_dict(self, state: Any, *more: Any) -> Any:
        self.rnn.from_native_weights(*(state[f"{name}_l0"] for name in WEIGHTS))

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return self.rnn(input, hx)

    def as_torch(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients among ``results`` by torch.nn's names, in its layout."""
        own = {
            name.rpartition(".")[2]: x for name, x in results.items() if name.startswith("d rnn")
        }
        named = {name: x for name, x in results.items() if not name.startswith("d rnn")}
        ih, hh, b_ih = (self._gates(own[k]) for k in ("kernel", "recurrent_kernel", "bias"))
        b_hh = self._gates(own["recurrent_bias"]) if "recurrent_bias" in own else b_ih
        gradients = zip(WEIGHTS, (ih, hh, b_ih, b_hh), strict=True)
        return named | {f"d {name}_l0": x for name, x in gradients}

    def _gates(self, x: Tensor) -> Tensor:
        gates = x.chunk(len(self.order), -1)
        return torch.cat([gates[place] for place in self.order], -1).t()


class Flash(Peer):
    """``flashrnn``, of one head: the time loop, without the input's product.

    Source: https://github.com/NX-AI/flashrnn, README.
    """

    cells = ("lstm", "gru", "rnn_tanh")

    def __init__(self, backend: str) -> None:
        self.options = {"run": importlib.import_module("flashrnn").flashrnn, "backend": backend}

    def LSTM(self, I: int, H: int, **_: Any) -> nn.Module:  # noqa: E741, N802
        return FlashLayer(I, H, "lstm", 4, **self.options)

    def GRU(self, I: int, H: int, **_: Any) -> nn.Module:  # noqa: E741, N802
        return FlashLayer(I, H, "gru", 3, **self.options)

    def RNN(self, I: int, H: int, **_: Any) -> nn.Module:  # noqa: E741, N802
        return FlashLayer(I, H, "elman", 1, **self.options)


class FlashLayer(nn.Module):
    """With torch.nn's parameters, which it reads as they are but for a GRU's recurrent gates."""

    def __init__(
        self,
        I: int,  # noqa: E741
        H: int,
        function: str,
        gates: int,
        *,
        run: Any,
        backend: str,
    ) -> None:
        super().__init__()
        self.run, self.backend, self.function, self.hidden = run, backend, function, H
        for name, shape in zip(WEIGHTS, ((I,), (H,), (), ()), strict=True):
            self.register_parameter(f"{name}_l0", nn.Parameter(torch.empty(gates * H, *shape)))

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        (T, N, _), H = input.shape, self.hidden
        w_ih, w_hh, b_ih, b_hh = self.parameters()
        recurrent, bias = w_hh.view(-1, 1, H, H), (b_ih + b_hh).view(-1, 1, H)
        if self.function == "gru":  # n, r, z; and biases of n's recurrent half, r, z, n's input
            recurrent = recurrent.roll(1, 0)
            bias = torch.cat([b_hh.view(3, 1, H)[2:], bias[:2], b_ih.view(3, 1, H)[2:]])
        gates = linear(input, w_ih).view(T, N, -1, 1, H).transpose(0, 1)
        states = None
        if hx is not None:
            given = hx if self.function == "lstm" else (hx,)
            states = torch.stack([s.view(N, 1, 1, H) for s in given])
        dtype = str(input.dtype).removeprefix("torch.")
        options = {"function": self.function, "backend": self.backend, "dtype": dtype}
        found, last = self.run(gates, recurrent, bias, states=states, **options)
        final = tuple(s.reshape(1, N, H) for s in last)
        return found[0].reshape(N, T, H).transpose(0, 1), final if len(final) == 2 else final[0]
