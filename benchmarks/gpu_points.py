"""What ``gpu_grid.py`` measures, in which order: the most telling rows first, then the grid from
coarse to fine, so that a run that was cut is still worth reading."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import results  # noqa: F401, where the package is

from fused_rnn.bench import workloads
from fused_rnn.bench.arithmetic import DTYPES, Arithmetic
from fused_rnn.bench.workloads import GATES, Workload, square

ARITHMETICS = {
    "fp16": DTYPES["float16"],
    "bf16": DTYPES["bfloat16"],
    "tf32": DTYPES["tf32"],
    "fp32": DTYPES["float32"],
}
# Both widths first, then the other of each.
DTYPE_PAIRS = (("bf16", "tf32"), ("fp16", "fp32"))
ANCHOR = "flashrnn-figure"
HIDDEN = (64, 128, 256, 512, 768, 1024, 1150, 2048)
BATCHES = (1, 8, 16, 64, 128, 256)
STEPS = (1024, 64)


@dataclass(frozen=True)
class Point:
    """A workload in one arithmetic and one pass (``"forward"``, ``"train"`` or ``"step"``), and the
    group that put it where it stands."""

    group: str
    workload: Workload
    dtype: str
    kind: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two points the same measurement: all but names."""
        w = self.workload
        more = f"dropout {w.dropout} bias {w.bias} batch_first {w.batch_first}"
        return w.cell, w.shape, self.dtype, self.kind, more

    @property
    def arithmetic(self) -> Arithmetic:
        return ARITHMETICS[self.dtype]

    def __str__(self) -> str:
        return f"{self.workload.cell} {self.workload.shape} {self.dtype} {self.kind}"


def core() -> Iterator[Workload]:
    for H, N, cell in product((512, 256, 1024), (16, 1, 64, 256), ("lstm", "gru")):
        yield square(cell, H, N, STEPS[0])


def forms() -> Iterator[Workload]:
    """What cuDNN has no persistent kernel for: packed, bidirectional, three layers."""
    for cell, L, D, lengths in product(("lstm", "gru"), (1, 3), (1, 2), ("uniform", None)):
        if (L, D, lengths) != (1, 1, None):
            yield square(cell, 512, 32, 256, L=L, D=D, lengths=lengths)


def grid(hidden: Iterable[int], batches: Iterable[int]) -> Iterator[Workload]:
    for T, H, N, cell in product(STEPS, hidden, batches, GATES):
        yield square(cell, H, N, T)


def ordered() -> Iterator[tuple[str, Iterable[str], Iterable[Workload]]]:
    """Groups: their name, dtypes and workloads."""
    real = workloads.load()
    yield "anchor", ("fp16", "bf16", "tf32", "fp32"), [w for w in real if w.name == ANCHOR]
    for dtypes in DTYPE_PAIRS:
        yield "core", dtypes, core()
        yield "workload", dtypes, real
        yield "form", dtypes, forms()
    every = [dtype for pair in DTYPE_PAIRS for dtype in pair]
    yield "grid", every, grid((128, 512, 1024), (1, 16, 128))
    yield "grid", every, grid(HIDDEN[::2], BATCHES[::2])
    yield "grid", every, grid(HIDDEN, BATCHES)


def shrink(w: Workload) -> Workload:
    """The same form at a size that any machine runs in a moment."""
    sizes = {"I": min(w.I, 5), "H": min(w.H, 6), "T": min(w.T, 4), "N": min(w.N, 3)}
    return replace(w, **sizes)  # type: ignore[arg-type]


def points(*, tiny: bool = False) -> list[Point]:
    """Every point once, where it stands first. ``tiny`` shrinks them all: does it run."""
    found: dict[tuple[str, ...], Point] = {}
    for group, dtypes, members in ordered():
        members = [shrink(w) if tiny else w for w in members]
        for dtype, w in product(dtypes, members):
            for kind in w.passes:
                point = Point(group, w, dtype, kind)
                found.setdefault(point.key, point)
    return list(found.values())
