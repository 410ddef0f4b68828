"""The forward of a layer in one direction: all steps in one launch.

A program owns ROWS sequences for all steps and waits for no other. A step multiplies their h by all
of W_hh; what of W_hh a program keeps tells the two kernels apart:

``forward_resident``
    all, in registers or shared memory, as the compiler finds room. h, c and a gate of all units are
    one tile, and stay in registers from step to step.
``forward_tiled``
    nothing: it is read anew in each step, from L2, tile by tile. States stand in memory. How many
    tiles there are is told at run time (``width`` is H): known to ptxas, it unrolls the loops over
    them into more than it has registers for.

Sums, gates and carried states are float32. Operands of products have the dtype of the weights.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import cells
from .steps import (
    after,
    kernel,
    multiplied,
    multiply,
    read,
    read_tuple,
    rows_of,
    time_of,
    write_tuple,
)


class Forward(NamedTuple):
    """What the kernels read and write; what may be None says so.

    Args:
        gx: ``[M,G*H]``, the input's product with its bias.
        w_hh, b_hh: ``[G*H,H]``, ``[G*H]`` or None.
        h0, c0: ``[N,H]``, or None: zero.
        control, rows, h_mask, keep: as the op's, or None.
        h, c, saved: ``[M,H]``, ``[M,H]`` or None, ``[M,kSaved*H]`` or None.
        h_n, c_n: ``[N,H]`` float32; ``forward_tiled`` carries the states there. c_n may be None.
        operand: for ``forward_tiled`` ``[2,N,H]``, what this step's product and the next's read.
    """

    gx: Tensor
    w_hh: Tensor
    b_hh: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    control: Tensor | None
    rows: Tensor | None
    h_mask: Tensor | None
    keep: Tensor | None
    h: Tensor
    c: Tensor | None
    saved: Tensor | None
    h_n: Tensor
    c_n: Tensor | None
    operand: Tensor | None


@triton.jit
def forward_units(
    a,
    at,
    index,
    live,
    u,
    gh,
    h,
    c,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    SAVED: tl.constexpr,
    H: tl.constexpr,
):
    """One step of some units: from the states that enter it those after it, which are also shown.

    In rows that hold nothing is read, 0 is shown, and what is returned means nothing.
    """
    units = u < H
    row, shown = index[:, None], (index >= 0)[:, None] & units
    stepping = live[:, None] & units
    gx = read_tuple(a.gx, row, u, stepping, GATES, H)
    h1, c1, saved = cells.forward(CELL, gx, gh, h, c)
    if a.keep is not None:
        h1 = after(a, at[:, None], u, stepping, 0, STATES, H, h, h1)
        if STATES == 2:
            c1 = after(a, at[:, None], u, stepping, 1, STATES, H, c, c1)
    tl.store(a.h + row * H + u, tl.where(live[:, None], h1, 0.0), mask=shown)
    if a.c is not None:
        tl.store(a.c + row * H + u, tl.where(live[:, None], c1, 0.0), mask=shown)
    if a.saved is not None:
        write_tuple(a.saved, row, u, stepping, saved, SAVED, H)
    return h1, c1


@kernel("T", "N", "reverse")
def forward_resident(
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
    inside = n < N
    state = inside[:, None] & (u < H)
    weights = ()
    for gate in tl.static_range(GATES):
        place = (gate * H + u).to(tl.int64) * H + k
        weights = weights + (tl.load(a.w_hh + place, mask=(u < H) & (k < H), other=0),)
    h = read(a.h0, n[:, None] * H + u, state)
    c = read(a.c0, n[:, None] * H + u, state)

    for step in range(T):
        at = time_of(step, T, reverse) * N.to(tl.int64) + n
        index, live, clears, _ = rows_of(a, at, inside)
        h_in = tl.where(clears[:, None], 0.0, h)
        c_in = tl.where(clears[:, None], 0.0, c)
        operand = multiplied(a, h_in, n[:, None], u, state, H).to(a.w_hh.dtype.element_ty)
        gh = ()
        for gate in tl.static_range(GATES):
            product = tl.zeros((ROWS, UNITS), tl.float32)
            product = multiply(operand, weights[gate], product, PRECISION)
            # Read anew: biases of all gates would take registers that some cells do not have.
            gh = gh + (product + read(a.b_hh, gate * H + u, u < H),)
        h1, c1 = forward_units(
            a, at, index, live, u, gh, h_in, c_in, CELL, GATES, STATES, SAVED, H
        )  # fmt: skip
        h = tl.where(live[:, None], h1, h)
        c = tl.where(live[:, None], c1, c)

    tl.store(a.h_n + n[:, None] * H + u, h, mask=state)
    if STATES == 2:
        tl.store(a.c_n + n[:, None] * H + u, c, mask=state)


@triton.jit
def recurrent(
    a,
    operand,
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
    """Rows of ``operand`` times W_hh, the gates of some units; tiles of W_hh are read as needed."""
    gh = ()
    for _ in tl.static_range(GATES):
        gh = gh + (tl.zeros((ROWS, UNITS), tl.float32),)
    for first in range(0, width, DEPTH):
        k = first + tl.arange(0, DEPTH)
        x = tl.load(operand + row * H + k[None, :], mask=reads & (k < H)[None, :], other=0)
        sums = ()
        for gate in tl.static_range(GATES):
            at = (gate * H + u).to(tl.int64) * H + k[:, None]
            w = tl.load(a.w_hh + at, mask=(u < H) & (k < H)[:, None], other=0)
            sums = sums + (multiply(x, w, gh[gate], PRECISION),)
        gh = sums
    biased = ()
    for gate in tl.static_range(GATES):
        biased = biased + (gh[gate] + read(a.b_hh, gate * H + u, u < H),)
    return biased


@kernel("T", "N", "reverse", "width")
def forward_tiled(
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
    slots = N.to(tl.int64) * H
    for first in range(0, width, UNITS):
        u = first + tl.arange(0, UNITS)[None, :]
        state = inside[:, None] & (u < H)
        h = read(a.h0, row * H + u, state)
        tl.store(a.h_n + row * H + u, h, mask=state)
        tl.store(a.operand + row * H + u, multiplied(a, h, row, u, state, H), mask=state)
        if STATES == 2:
            tl.store(a.c_n + row * H + u, read(a.c0, row * H + u, state), mask=state)
    tl.debug_barrier()

    for step in range(T):
        at = time_of(step, T, reverse) * N.to(tl.int64) + n
        index, live, clears, _ = rows_of(a, at, inside)
        entered = inside[:, None] & ~clears[:, None]
        now = a.operand + (step % 2) * slots
        later = a.operand + (1 - step % 2) * slots
        for first in range(0, width, UNITS):
            u = first + tl.arange(0, UNITS)[None, :]
            gh = recurrent(a, now, row, entered, u, width, GATES, H, ROWS, UNITS, DEPTH, PRECISION)
            state = inside[:, None] & (u < H)
            h = read(a.h_n, row * H + u, state)
            h_in = tl.where(clears[:, None], 0.0, h)
            c = read(a.c_n, row * H + u, state)
            c_in = tl.where(clears[:, None], 0.0, c)
            h1, c1 = forward_units(
                a, at, index, live, u, gh, h_in, c_in, CELL, GATES, STATES, SAVED, H
            )  # fmt: skip
            h = tl.where(live[:, None], h1, h)
            tl.store(a.h_n + row * H + u, h, mask=state)
            tl.store(later + row * H + u, multiplied(a, h, row, u, state, H), mask=state)
            if STATES == 2:
                tl.store(a.c_n + row * H + u, tl.where(live[:, None], c1, c), mask=state)
        # The next step reads what other threads have written, and writes what they have read.
        tl.debug_barrier()


class Gates(NamedTuple):
    """What a backward has instead of ``saved`` where the forward kept states alone.

    Args:
        gx: ``[M,G*H]``, made again.
        operand: ``[M,H]``, the h that entered each row's product.
        w_hh, b_hh: as the forward's.
        saved: ``[M,kSaved*H]``, to be written.
    """

    gx: Tensor
    operand: Tensor
    w_hh: Tensor
    b_hh: Tensor | None
    saved: Tensor


@kernel("M", "width")
def gates_again(
    a,
    M,
    width,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``saved`` from the states: all rows at once, since none waits for another any more."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    u = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    state = (row < M) & (u < H)
    gh = recurrent(a, a.operand, row, row < M, u, width, GATES, H, ROWS, UNITS, DEPTH, PRECISION)
    gx = read_tuple(a.gx, row, u, state, GATES, H)
    # What is saved does not depend on the states but through gh.
    _, _, saved = cells.forward(CELL, gx, gh, gh[0], gh[0])
    write_tuple(a.saved, row, u, state, saved, SAVED, H)
