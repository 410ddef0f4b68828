"""Launch shapes of the loops, as data, and the choice between the two kernels.

``resident`` keeps W_hh on the chip for all steps; what fits is computed from the GPU's shared
memory. ``tiled`` reads it in every step. ``recompute`` is either, with a forward that saves states
only: its backward makes the gates again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from torch import cuda, float32
from torch import dtype as DType

from ...cells import Cell

ALGORITHMS = ("resident", "tiled", "recompute")
RESIDENT, TILED, RECOMPUTE = range(1, 4)


class Shape(NamedTuple):
    """How a loop is launched.

    Args:
        rows: sequences of a program.
        units: of a tile; ``resident`` takes all of them as one.
        depth: terms of the product that ``tiled`` reads at a time.
        warps: of a program.
        stages: tiles of W_hh that ``tiled`` has on their way.
        registers: that ptxas may give a thread. Left to itself (``None``) it spills a few where one
            more program would then fit beside; told, it takes all, and in wide shapes more.
        multiple: H has to be one of it.
        gates: of a cell, at most.
        measured: where this was measured to be the fastest.
    """

    rows: int
    units: int
    depth: int
    warps: int
    stages: int
    registers: int | None = 255
    multiple: int = 1
    gates: int = 4
    measured: str = "not yet measured"


# By how products are made: of half types, in TF32, in exact float32. 16 rows are the fewest that
# fill a tensor core's tile. All were compiled with every option for sm_80, sm_90 and sm_100, and
# none spills; with 128 units of float32, or of an LSTM or GRU whose H is no multiple of 8, some
# would, and so would an RNN of 16 warps.
RESIDENT_SHAPES = {
    "half": (
        Shape(16, 16, 0, 2, 1),
        Shape(16, 32, 0, 4, 1),
        Shape(16, 64, 0, 8, 1),
        Shape(16, 128, 0, 8, 1, gates=1),
        Shape(16, 128, 0, 16, 1, registers=None, multiple=8),
        Shape(16, 256, 0, 16, 1, registers=None, multiple=8),
    ),
    "tf32": (Shape(16, 16, 0, 2, 1), Shape(16, 32, 0, 4, 1), Shape(16, 64, 0, 8, 1)),
    "ieee": (Shape(16, 16, 0, 2, 1), Shape(16, 32, 0, 4, 1), Shape(16, 64, 0, 8, 1)),
}
TILED_SHAPES = {
    "half": Shape(16, 64, 32, 8, 3),
    "tf32": Shape(16, 64, 16, 8, 3),
    "ieee": Shape(16, 32, 16, 8, 2),
}
# What a resident program needs beside W_hh: tiles on their way from one layout to another.
SPARE_BYTES = 16 * 1024
# What a block of an A100 may have; also where there is no GPU, in Triton's interpreter.
A100_BYTES = 166_912
# What torch does not say of a GPU of AMD.
HIP_BYTES = 65_536


@lru_cache
def shared_bytes(ordinal: int | None) -> int:
    """Shared memory that a block may have on a GPU; ``None``: none is at hand."""
    if ordinal is None or not cuda.is_available():
        return A100_BYTES
    found = cuda.get_device_properties(ordinal)
    return getattr(found, "shared_memory_per_block_optin", HIP_BYTES)


def precision(dtype: DType, tf32: bool) -> str:
    """The key of ``TILED_SHAPES``."""
    return "half" if dtype is not float32 else "tf32" if tf32 else "ieee"


def resident(cell: Cell, H: int, precision: str, shared: int) -> tuple[Shape | None, str]:
    """The shape in which W_hh stays on the chip, or why it cannot."""
    shapes = RESIDENT_SHAPES[precision]
    fits = (shape for shape in shapes if shape.units >= H and shape.gates >= cell.gates)
    shape = next(fits, None)
    if shape is None:
        return None, f"{H} units are more than one tile has (at most {shapes[-1].units})"
    if H % shape.multiple:
        return None, f"{H} units, in a tile of {shape.units}, are no multiple of {shape.multiple}"
    weights = cell.gates * shape.units**2 * (2 if precision == "half" else 4)
    if weights + SPARE_BYTES > shared:
        return None, (
            f"W_hh in tiles of {shape.units} units has {weights:,} bytes, and with "
            f"{SPARE_BYTES:,} more a program may have {shared:,}"
        )
    return shape, ""


def choose(cell: Cell, H: int, precision: str, algorithm: int, shared: int) -> tuple[str, Shape]:
    """The kernel that runs, and its shape.

    Args:
        precision: ``"half"``, ``"tf32"`` or ``"ieee"``.
        algorithm: number of the one asked for, or 0.
        shared: bytes of :func:`shared_bytes`.

    Raises:
        RuntimeError: ``resident`` was asked for, and W_hh does not fit.
    """
    shape, reason = resident(cell, H, precision, shared)
    if algorithm == RESIDENT and shape is None:
        raise RuntimeError(f"fused_rnn: resident cannot run this: {reason}")
    if algorithm == TILED or shape is None:
        return "tiled", TILED_SHAPES[precision]
    return "resident", shape


def configurations(cell: Cell, shared: int) -> Iterator[tuple[str, str, int, Shape]]:
    """Kernel, precision, an H and shape: all that a GPU with so much shared memory may run. Each
    shape comes with an H that leaves the tile's end empty and, where it may, is odd, and with one
    whose rows of W_hh are aligned: either may be what takes more."""
    for precision, shapes in RESIDENT_SHAPES.items():
        for H in (1001, 1024):
            yield "tiled", precision, H, TILED_SHAPES[precision]
        for shape in shapes:
            for H in (shape.units - shape.multiple, shape.units):
                if resident(cell, H, precision, shared)[0] == shape:
                    yield "resident", precision, H, shape
