"""The cells with layer norms: their registry and their equations in plain PyTorch, the oracle.

They stand once more in C++: in ``csrc/cells.h`` what is done to each unit, in ``csrc/cpu/norm*.h``
the norms. A norm takes mean and variance over units, which the loops of the other cells never do,
so these cells have loops and an op of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from .cells import Cell, States


class Norm(NamedTuple):
    """What the norms inside of a loop bring.

    Args:
        gain, bias: of the gates' norm, ``[G*H]``.
        c_gain, c_bias: of the norm of c, ``[H]``; ``None`` for cells without one.
        eps: what is added to a variance.
    """

    gain: Tensor
    bias: Tensor | None = None
    c_gain: Tensor | None = None
    c_bias: Tensor | None = None
    eps: float = 1e-5

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]


@dataclass(frozen=True)
class NormCell(Cell):
    """A recurrent cell with layer norms.

    Its ``step`` takes a :class:`Norm` as well, and ``gh`` without bias. Its ``id`` counts among
    these cells.

    Args:
        groups: how many neighbouring gates are normalised together, gate after gate.
        joint: the sum of ``gx`` and ``gh`` is normalised, and not each of them.
        stats: how many numbers a row's norms come down to, which the native forward keeps.
        eps: what :meth:`norm` and :meth:`product` add to a variance.
    """

    groups: tuple[int, ...] = ()
    joint: bool = False
    stats: int = 0
    eps: float = 1e-5

    def product(self, x: Tensor, w: Any) -> Tensor:
        """``gx`` for all steps: the input's product, and its norm where it has one of its own."""
        gx = linear(x, w.w_ih)
        return gx if self.joint else normalised(gx, self.groups, w.g_ih, w.b_ih, self.eps)

    def norm(self, w: Any) -> Norm:
        """What the loop needs of the weights."""
        return Norm(w.g_hh, w.b_hh, w.g_c, w.b_c, self.eps)


def normalised(
    x: Tensor, groups: tuple[int, ...], gain: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """``x`` ``[..., G*H]``, each group of gates normalised, times ``gain``, plus ``bias``."""
    if len(groups) == 1:
        return layer_norm(x, gain.shape, gain, bias, eps)
    widths = [x.size(-1) // sum(groups) * gates for gates in groups]
    biases = [None] * len(groups) if bias is None else bias.split(widths)
    parts = zip(x.split(widths, -1), gain.split(widths), biases, strict=True)
    return torch.cat([layer_norm(x, g.shape, g, b, eps) for x, g, b in parts], -1)


def _lstm(gx: Tensor, gh: Tensor, states: States, norm: Norm) -> States:
    gh = normalised(gh, (4,), norm.gain, norm.bias, norm.eps)
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    assert norm.c_gain is not None
    normed = normalised(c, (1,), norm.c_gain, norm.c_bias, norm.eps)
    return torch.sigmoid(o) * torch.tanh(normed), c


def _gru(gx: Tensor, gh: Tensor, states: States, norm: Norm) -> States:
    gh = normalised(gh, (2, 1), norm.gain, norm.bias, norm.eps)
    (rx, zx, nx), (rh, zh, nh) = gx.chunk(3, -1), gh.chunk(3, -1)
    n = torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
    return (states[0] + torch.sigmoid(zx + zh) * (n - states[0]),)


def _gru_joint(gx: Tensor, gh: Tensor, states: States, norm: Norm) -> States:
    r, z, n = normalised(gx + gh, (3,), norm.gain, norm.bias, norm.eps).chunk(3, -1)
    n = torch.tanh(torch.sigmoid(r) * n)
    return (states[0] + torch.sigmoid(z - 1) * (n - states[0]),)


NORM_CELLS: dict[str, NormCell] = {
    cell.name: cell
    for cell in (
        NormCell("layer_norm_lstm", 0, 4, 2, 9, False, "LSTM", _lstm, (4,), False, 2),
        NormCell("layer_norm_gru", 1, 3, 1, 6, False, "GRU", _gru, (2, 1), False, 2),
        NormCell("layer_norm_gru_joint", 2, 3, 1, 6, False, "GRU", _gru_joint, (3,), True, 1),
    )
}
