"""The four cells: their registry and their equations in plain PyTorch.

These equations are the oracle that every backend is tested against. They stand twice more: in C++
in ``csrc/cells.h``, and in Triton in ``backends/triton/cells.py``; the numbers in :data:`CELLS` are
the same there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

States = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """One recurrent cell: what a backend must know about it, and its step.

    Args:
        name: the registry's key.
        id: the number by which the native op knows the cell.
        gates: G, the number of H-wide blocks in ``gx`` and in the recurrent product.
        states: S, the number of carried states: ``(h,)`` or ``(h, c)``.
        saved: how many H-wide blocks the native forward keeps for its backward.
        splits_gates: ``gx`` and ``gh`` get different gradients: GRU's reset gate multiplies the
            recurrent half of ``n``.
        mode: torch.nn's name of the cell.
        step: ``step(gx, gh, states) -> states`` with ``gx``, the input's product, and ``gh``, the
            recurrent product (each with the bias that belongs to it), of shape ``[..., G*H]``.
    """

    name: str
    id: int
    gates: int
    states: int
    saved: int
    splits_gates: bool
    mode: str
    step: Callable[..., States]


def _rnn_tanh(gx: Tensor, gh: Tensor, states: States) -> States:
    return (torch.tanh(gx + gh),)


def _rnn_relu(gx: Tensor, gh: Tensor, states: States) -> States:
    return (torch.relu(gx + gh),)


def _lstm(gx: Tensor, gh: Tensor, states: States) -> States:
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(gx: Tensor, gh: Tensor, states: States) -> States:
    (rx, zx, nx), (rh, zh, nh) = gx.chunk(3, -1), gh.chunk(3, -1)
    n = torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
    return (n + torch.sigmoid(zx + zh) * (states[0] - n),)


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", 0, 1, 1, 0, False, "RNN_TANH", _rnn_tanh),
        Cell("rnn_relu", 1, 1, 1, 0, False, "RNN_RELU", _rnn_relu),
        Cell("lstm", 2, 4, 2, 4, False, "LSTM", _lstm),
        Cell("gru", 3, 3, 1, 4, True, "GRU", _gru),
    )
}


def carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a state between steps: float32 for the half types, else ``dtype`` itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
