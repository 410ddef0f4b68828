"""The backward of a layer in one direction: all steps in one launch, and what it needs before.

The kernels are those of ``forward.py`` from the last step to the first: dh of a step is what comes
from outside, what the cell passes on beside the product, and the later step's dgh times W_hh. There
are no atomics: every sum has one order. Products over all rows (gradients of input and weights)
come after the loop, and are torch's.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import cells
from .steps import (
    INITIAL,
    ZERO,
    before_of,
    keeps,
    kernel,
    multiplied,
    multiply,
    read,
    read_tuple,
    rows_of,
    state_before,
    time_of,
)


class Backward(NamedTuple):
    """What the kernels read and write; what may be None says so.

    Args:
        dh, dc: ``[M,H]`` or None.
        h, c, saved: what forward showed and saved; c and saved may be None.
        w_hh: ``[G*H,H]``.
        h0, c0: ``[N,H]``, or None: zero.
        before: ``[T,N]`` of :func:`trace_back`, or None: the row of the step before.
        control, rows, h_mask, keep: as the op's, or None.
        dgx: ``[M,G*H]``.
        dgh: the same, or None where it equals dgx.
        dh0, dc0: ``[N,H]`` float32: gradients of the final states, then of the initial ones. dc0
            may be None.
    """

    dh: Tensor | None
    dc: Tensor | None
    h: Tensor
    c: Tensor | None
    saved: Tensor | None
    w_hh: Tensor
    h0: Tensor | None
    c0: Tensor | None
    before: Tensor | None
    control: Tensor | None
    rows: Tensor | None
    h_mask: Tensor | None
    keep: Tensor | None
    dgx: Tensor
    dgh: Tensor | None
    dh0: Tensor
    dc0: Tensor | None


@triton.jit
def backward_units(
    a,
    at,
    index,
    live,
    before,
    n,
    u,
    dh,
    dc,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    H: tl.constexpr,
):
    """One step of some units: ``dgh``, and of dh and dc what does not pass through the product.

    ``dh`` and ``dc`` are what later steps send. A kept state (zoneout) is the one before, whatever
    was computed. In rows that hold, what is returned means nothing.
    """
    units = u < H
    row, shown = index[:, None], (index >= 0)[:, None] & units
    stepping, entry = live[:, None] & units, before[:, None]
    dh = dh + read(a.dh, row * H + u, stepping)
    saved = read_tuple(a.saved, row, u, stepping, SAVED, H)
    h, c, h1, c1 = dh, dh, dh, dh
    if CELL == cells.GRU:
        h = state_before(a.h, a.h0, entry, n, u, stepping, H)
    if SAVED == 0:
        h1 = read(a.h, row * H + u, stepping)
    if STATES == 2:
        dc = dc + read(a.dc, row * H + u, stepping)
        c = state_before(a.c, a.c0, entry, n, u, stepping, H)
        c1 = read(a.c, row * H + u, stepping)
    past_h = tl.zeros_like(dh)
    past_c = tl.zeros_like(dh)
    if a.keep is not None:
        keeps_h = keeps(a, at[:, None], u, stepping, 0, STATES, H)
        past_h, dh = tl.where(keeps_h, dh, 0.0), tl.where(keeps_h, 0.0, dh)
        if STATES == 2:
            keeps_c = keeps(a, at[:, None], u, stepping, 1, STATES, H)
            past_c, dc = tl.where(keeps_c, dc, 0.0), tl.where(keeps_c, 0.0, dc)
            c1 = tl.where(keeps_c, cells.next_c(saved, c), c1)
    dgx, dgh, dh, dc = cells.backward(CELL, dh, dc, saved, h, c, h1, c1)
    for gate in tl.static_range(GATES):
        place = (row * GATES + gate) * H + u
        tl.store(a.dgx + place, tl.where(live[:, None], dgx[gate], 0.0), mask=shown)
        if a.dgh is not None:
            tl.store(a.dgh + place, tl.where(live[:, None], dgh[gate], 0.0), mask=shown)
    return dgh, dh + past_h, dc + past_c


@kernel("T", "N", "reverse")
def backward_resident(
    a,
    T,
    N,
    reverse,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    u = tl.arange(0, UNITS)[None, :]
    k = tl.arange(0, UNITS)[:, None]
    inside, row = n < N, n[:, None]
    state = inside[:, None] & (u < H)
    weights = ()
    for gate in tl.static_range(GATES):
        place = (gate * H + k).to(tl.int64) * H + u
        weights = weights + (tl.load(a.w_hh + place, mask=(u < H) & (k < H), other=0),)
    dh = read(a.dh0, row * H + u, state)
    dc = read(a.dc0, row * H + u, state)

    for i in range(T):
        step = T - 1 - i
        at = time_of(step, T, reverse) * N.to(tl.int64) + n
        index, live, _, passes = rows_of(a, at, inside)
        before = before_of(a, at, step, N, reverse, inside)
        dgh, dh_in, dc_in = backward_units(
            a, at, index, live, before, row, u, dh, dc, CELL, GATES, STATES, SAVED, H
        )  # fmt: skip
        product = tl.zeros_like(dh)
        for gate in tl.static_range(GATES):
            x = dgh[gate].to(a.w_hh.dtype.element_ty)
            product = multiply(x, weights[gate], product, PRECISION)
        dh_in += multiplied(a, product, row, u, state, H)
        dh = tl.where(live[:, None], tl.where(passes[:, None], dh_in, 0.0), dh)
        dc = tl.where(live[:, None], tl.where(passes[:, None], dc_in, 0.0), dc)

    tl.store(a.dh0 + row * H + u, dh, mask=state)
    if STATES == 2:
        tl.store(a.dc0 + row * H + u, dc, mask=state)


@triton.jit
def back_product(
    a,
    row,
    reads,
    u,
    width,
    GATES: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of dgh times some columns of W_hh; tiles of W_hh are read as needed."""
    dgh = a.dgx
    if a.dgh is not None:
        dgh = a.dgh
    product = tl.zeros((ROWS, UNITS), tl.float32)
    for first in range(0, GATES * width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        real = k < GATES * H
        x = tl.load(dgh + row * (GATES * H) + k[None, :], mask=reads & real[None, :], other=0)
        at = k[:, None].to(tl.int64) * H + u
        w = tl.load(a.w_hh + at, mask=real[:, None] & (u < H), other=0)
        product = multiply(x, w, product, PRECISION)
    return tl.where(reads, product, 0.0)


@kernel("T", "N", "reverse", "width")
def backward_tiled(
    a,
    T,
    N,
    reverse,
    width,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside, row = n < N, n[:, None]
    # One more than there are steps: the last one takes the first step's product, and holds.
    for i in range(T + 1):
        step = T - 1 - i
        later = time_of(step + 1, T, reverse) * N.to(tl.int64) + n
        index, _, _, passes = rows_of(a, later, n < tl.where(step + 1 < T, N, 0))
        source, flows = index[:, None], passes[:, None]
        at = time_of(step, T, reverse) * N.to(tl.int64) + n
        there = n < tl.where(step >= 0, N, 0)
        index, live, _, passes = rows_of(a, at, there)
        before = before_of(a, at, step, N, reverse, there)
        for first in range(0, width, UNITS):
            u = first + tl.arange(0, UNITS)[None, :]
            state = inside[:, None] & (u < H)
            product = back_product(
                a, source, flows, u, width, GATES, H, ROWS, UNITS, DEPTH, PRECISION
            )
            dh = read(a.dh0, row * H + u, state)
            dh += multiplied(a, product, row, u, state, H)
            dc = read(a.dc0, row * H + u, state)
            _dgh, dh_in, dc_in = backward_units(
                a, at, index, live, before, row, u, dh, dc, CELL, GATES, STATES, SAVED, H
            )  # fmt: skip
            dh_in = tl.where(passes[:, None], dh_in, 0.0)
            tl.store(a.dh0 + row * H + u, tl.where(live[:, None], dh_in, dh), mask=state)
            if STATES == 2:
                dc_in = tl.where(passes[:, None], dc_in, 0.0)
                tl.store(a.dc0 + row * H + u, tl.where(live[:, None], dc_in, dc), mask=state)
        # The next step multiplies what other threads have written.
        tl.debug_barrier()


@kernel("T", "N", "reverse")
def trace_back(a, before, T, N, reverse, ROWS: tl.constexpr):
    """For each step of ROWS sequences, where the state before it lies."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = n < N
    last = tl.full((ROWS,), INITIAL, tl.int64)
    for step in range(T):
        at = time_of(step, T, reverse) * N.to(tl.int64) + n
        index, live, clears, _ = rows_of(a, at, inside)
        tl.store(before + at, tl.where(clears, ZERO, last), mask=inside)
        last = tl.where(live, index, last)


@kernel("T", "N", "reverse")
def gather_operands(
    a,
    operand,
    T,
    N,
    reverse,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """For ROWS rows, the h that entered the recurrent product; zero in rows that hold."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, n = at // N, at % N
    inside = t < T
    index, live, _, _ = rows_of(a, at, inside)
    step = time_of(t, T, reverse)  # its own inverse
    before = before_of(a, at, step, N, reverse, inside)
    u = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    stepping = live[:, None] & (u < H)
    h = state_before(a.h, a.h0, before[:, None], n[:, None], u, stepping, H)
    h = multiplied(a, h, n[:, None], u, stepping, H)
    tl.store(operand + index[:, None] * H + u, h, mask=(index >= 0)[:, None] & (u < H))
