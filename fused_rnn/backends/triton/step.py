"""One step whose two products are given: what the cell modules run, torch's products around it."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import cells
from .steps import kernel, read, read_tuple, write_tuple


class Step(NamedTuple):
    """One step: ``gx``, ``gh`` ``[N,G*H]``; states ``[N,H]``; ``saved`` ``[N,kSaved*H]``.

    c, c1, saved and each gradient that a cell does not have are None.
    """

    gx: Tensor | None
    gh: Tensor | None
    h: Tensor
    c: Tensor | None
    h1: Tensor
    c1: Tensor | None
    saved: Tensor | None
    dh1: Tensor | None = None
    dc1: Tensor | None = None
    dgx: Tensor | None = None
    dgh: Tensor | None = None
    dh: Tensor | None = None
    dc: Tensor | None = None


@triton.jit
def tile(N, H: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    u = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    return row, u, (row < N) & (u < H)


@kernel("N")
def step_forward(
    a,
    N,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    row, u, mask = tile(N, H, ROWS, UNITS)
    gx = read_tuple(a.gx, row, u, mask, GATES, H)
    gh = read_tuple(a.gh, row, u, mask, GATES, H)
    h, c = read(a.h, row * H + u, mask), read(a.c, row * H + u, mask)
    h1, c1, saved = cells.forward(CELL, gx, gh, h, c)
    tl.store(a.h1 + row * H + u, h1, mask=mask)
    if a.c1 is not None:
        tl.store(a.c1 + row * H + u, c1, mask=mask)
    if a.saved is not None:
        write_tuple(a.saved, row, u, mask, saved, SAVED, H)


@kernel("N")
def step_backward(
    a,
    N,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    row, u, mask = tile(N, H, ROWS, UNITS)
    saved = read_tuple(a.saved, row, u, mask, SAVED, H)
    h, c = read(a.h, row * H + u, mask), read(a.c, row * H + u, mask)
    h1, c1 = read(a.h1, row * H + u, mask), read(a.c1, row * H + u, mask)
    dh1, dc1 = read(a.dh1, row * H + u, mask), read(a.dc1, row * H + u, mask)
    dgx, dgh, dh, dc = cells.backward(CELL, dh1, dc1, saved, h, c, h1, c1)
    write_tuple(a.dgx, row, u, mask, dgx, GATES, H)
    if a.dgh is not None:
        write_tuple(a.dgh, row, u, mask, dgh, GATES, H)
    if a.dh is not None:
        tl.store(a.dh + row * H + u, dh, mask=mask)
    if a.dc is not None:
        tl.store(a.dc + row * H + u, dc, mask=mask)
