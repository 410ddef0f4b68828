"""What the CPU's loops are to reach, and what they reached: a part of ``make bench``, or alone.

Ratios are those of ``backend="cpu"`` to torch.nn on one thread, in float32, layer 0's input without
gradient; the rest compares our own calls with each other. docs/cpu-performance.md has the reasons
where an aim was not reached.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import results
import torch
from torch import nn

import fused_rnn
from fused_rnn.bench import measure, rows, timing
from fused_rnn.bench.__main__ import progress, silence
from fused_rnn.bench.arithmetic import DTYPES
from fused_rnn.bench.measure import Bench, Point
from fused_rnn.bench.providers import find
from fused_rnn.bench.rows import Line, Provenance, Row
from fused_rnn.bench.timing import Turn
from fused_rnn.bench.workloads import Case, Workload, grad_mode, square
from fused_rnn.cells import CELLS

OURS = "fused_rnn:cpu"
CELL_NAMES = ("gru", "rnn_tanh", "lstm")
SMALL = [(128, N, H) for H in (64, 256) for N in (1, 16, 64)]
LARGE = [(64, 32, 512), (64, 64, 1024)]
# By cell and pass: the geometric mean over SMALL, and each of LARGE.
RATIOS = {
    ("gru", "train"): (7.0, 1.35),
    ("gru", "forward"): (4.0, 1.2),
    ("rnn_tanh", "train"): (5.0, 1.25),
    ("rnn_tanh", "forward"): (3.0, 1.05),
    ("lstm", "train"): (1.8, 1.2),
    ("lstm", "forward"): (1.5, 1.0),
}
NOISE = 0.95
"""A ratio of 1 to torch.nn that is above this is one within the noise."""
SECONDS = 0.3
"""Of a comparison among our own calls, at least."""
LEAST = 3
"""Repeats of a large point: torch.nn alone takes seconds."""
SAME = ("cpu", "build", "torch")
SPEEDUP = 1.6
"""Two threads are judged where they give the sgemm beside them at least this much."""


@dataclass(frozen=True)
class Aim(Line):
    """One aim: ``reached`` is to be at least ``aim``, or at most, where ``most``. ``reached`` is
    empty, and ``note`` says why, where it could not be measured or does not count."""

    name: str
    aim: float
    most: bool
    reached: float | None
    of: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached <= self.aim if self.most else self.reached >= self.aim

    @property
    def cells(self) -> tuple[str, ...]:
        """As a table has them."""
        verdict = {True: "yes", False: "no", None: "not judged"}[self.met]
        reached = "" if self.reached is None else f"{self.reached:.2f}"
        sign = "≤" if self.most else "≥"
        return (
            self.name,
            f"{sign} {self.aim:g}",
            reached,
            verdict,
            "; ".join(filter(None, (self.of, self.note))),
        )


HEAD = ("aim", "wanted", "reached", "met", "of")


def ratio_points() -> list[Point]:
    """What :data:`RATIOS` speak of. The names are their own: a run has rows of some of the shapes
    with another provider."""
    shapes = [square(cell, H, N, T) for T, N, H in SMALL + LARGE for cell in CELL_NAMES]
    named = [replace(w, name=f"aim-{w.name}") for w in shapes]
    return measure.points(named, kinds=("forward", "train"))


def is_ours(row: Row) -> bool:
    """Whether the CPU's loops ran it, by name or because ``auto`` chose them, on one thread."""
    ours = row.provider == OURS or (row.provider == "fused_rnn" and row.backend == "cpu")
    plain = row.dtype == "float32" and not (row.task or row.input_gradient)
    return ours and plain and row.threads == 1 and row.ratio is not None


def missing(points: Iterable[Point], found: Iterable[Row]) -> list[Point]:
    """The points that no row is of, whatever its workload is called."""
    there = {(row.cell, row.shape, row.kind) for row in found if is_ours(row)}
    return [p for p in points if (p.workload.cell, p.workload.shape, p.kind) not in there]


def ratio_aims(found: Iterable[Row]) -> Iterator[Aim]:
    """The table of ratios, and the share of the sgemm beside them."""
    by_shape = {(r.cell, r.kind, r.shape): r for r in found if is_ours(r)}

    def row_of(cell: str, kind: str, T: int, N: int, H: int) -> Row | None:
        return by_shape.get((cell, kind, square(cell, H, N, T).shape))

    for (cell, kind), (small, large) in RATIOS.items():
        ratios = {}
        for T, N, H in SMALL:
            row = row_of(cell, kind, T, N, H)
            if row is not None and row.ratio:
                ratios[f"{N}×{H}"] = row.ratio
        complete = len(ratios) == len(SMALL)
        mean = geometric_mean(ratios.values()) if complete else None
        each = ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items())
        note = "" if complete else "not all were measured"
        yield Aim(f"{cell} {kind}, T128, mean", small, False, mean, f"N×H: {each}", note)
        for T, N, H in LARGE:
            row = row_of(cell, kind, T, N, H)
            note = "" if row else "not measured"
            ratio = row.ratio if row else None
            yield Aim(f"{cell} {kind}, {T}:{N}:{H}", large, False, ratio, note=note)
    for name, aim, shapes in (
        ("training, H 256, N 16 and 64: share of sgemm", 0.65, SMALL),
        ("training, large: share of sgemm", 0.85, LARGE),
    ):
        shares = {}
        wanted = [
            (cell, T, N, H) for cell in CELL_NAMES for T, N, H in shapes if N > 1 and H >= 256
        ]
        for cell, T, N, H in wanted:
            row = row_of(cell, "train", T, N, H)
            if row is not None and row.gflops and row.calibration_gflops:
                shares[f"{cell} {N}×{H}"] = row.gflops / row.calibration_gflops
        yield worst(name, aim, shapes_of(shares, wanted), most=False)


def shapes_of(found: dict[str, float], wanted: list[Any]) -> dict[str, float]:
    """All that were wanted, or none: the worst of some says nothing."""
    return found if len(found) == len(wanted) else {}


def workload_aims(found: list[Row], whence: str) -> Iterator[Aim]:
    """Of rows of every workload with ``backend="cpu"`` by name, which ``whence`` tells."""
    ours = [row for row in found if row.provider == OURS and is_ours(row)]
    slow = sorted(ours, key=lambda row: row.ratio or 0.0)[:3]
    lowest = {f"{row.workload} {row.kind}": row.ratio for row in slow if row.ratio}
    name = "every workload, by name: lowest ratios to torch.nn"
    yield worst(name, NOISE, lowest, most=False, note=whence)
    trained = [row.ratio for row in ours if row.kind == "train" and row.ratio]
    mean = geometric_mean(trained) if trained else None
    of = f"{len(trained)} rows"
    yield Aim("every workload, by name, training: geometric mean", 4.0, False, mean, of, whence)


def kept(folder: Path, here: Provenance) -> tuple[list[Row], str]:
    """Rows of all workloads, which take a quarter of an hour and are measured apart; none, with the
    reason, where they are of another processor, build or torch."""
    path = folder / "workloads-cpu.csv"
    if not path.exists():
        return [], f"no {path.name} is kept of this device: see benchmarks/README.md"
    found, origin = rows.read(path)
    for name in SAME:
        if getattr(origin, name) != getattr(here, name):
            return [], f"{path.name} is of another {name}: {getattr(origin, name)}"
    return found, f"{path.name}, {origin.date[:10]}, commit {origin.commit}"


def worst(name: str, aim: float, found: dict[str, float], *, most: bool, note: str = "") -> Aim:
    """An aim that all of ``found`` are to reach."""
    reached = (max if most else min)(found.values(), default=None)
    each = ", ".join(f"{what} {value:.2f}" for what, value in found.items())
    return Aim(name, aim, most, reached, each, note)


def case(w: Workload, dtype: str = "float32") -> Case:
    return find(OURS).case(w, DTYPES[dtype].dtype, "cpu")


def quotient(over: Turn, under: Turn, seconds: float) -> float:
    """The time of one call over that of another, in turn."""
    for turn in (over, under):
        turn.call()  # the first call may take so long that a sample would have no more than one
    samples = timing.interleave({"over": over, "under": under}, seconds)
    return timing.median_ratio(samples["over"], samples["under"])


class EmptyCall(nn.Module):
    """What it costs to call an op with a cell's operands and results from a module: one of torch's
    dispatcher, on no sequences at all."""

    def __init__(self, like: nn.Module, cell: int, states: int) -> None:
        super().__init__()
        self.cell, self.states = cell, states
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            self.register_parameter(name, getattr(like, name))
        self.op = torch.ops.fused_rnn.layer

    def forward(self, x: torch.Tensor, hx: torch.Tensor) -> torch.Tensor:
        w_ih, w_hh, b_ih, b_hh = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        more = (False, False, None, None, None, None, None, 0, False)
        c0 = hx if self.states == 2 else None
        _, _, h_n, _, _ = self.op(self.cell, x, w_ih, b_ih, w_hh, b_hh, hx, c0, *more)
        return h_n


def step_aims(seconds: float) -> Iterator[Aim]:
    found = {}
    for name in CELL_NAMES:
        cell, w = CELLS[name], Workload(name, name, mode="step", T=1, N=1, I=128, H=128)
        step = case(w)
        empty = EmptyCall(step.module, cell.id, cell.states)
        x, hx = torch.empty(1, 0, 128), torch.empty(0, 128)
        with grad_mode("step"):
            found[name] = quotient(Turn(step.step), Turn(partial(empty, x, hx)), seconds)
    yield worst("cell step, N 1, H 128: times an empty op", 1.6, found, most=True)


def slope_aims(seconds: float, least: int = 128, most: int = 4096) -> Iterator[Aim]:
    """How training time grows with T: the slope of its logarithm between two T."""
    slopes, costs, times = {}, [], most // least
    for name in CELL_NAMES:
        short, long = (case(square(name, 64, 16, T)) for T in (least, most))

        def as_many_steps(call: Callable[[], object] = short.train) -> None:
            for _ in range(times):
                call()

        cost = quotient(Turn(long.train), Turn(as_many_steps), seconds)
        slopes[name] = 1 + math.log(cost) / math.log(most / least)
        costs.append(f"{name} {cost:.2f}")
    note = f"a step takes {', '.join(costs)} times as long"
    name = f"training 16:64, slope of time from T {least} to {most}"
    yield worst(name, 1.05, slopes, most=True, note=note)


def thread_aims(seconds: float) -> Iterator[Aim]:
    product = timing.calibration()
    for name, aim, sizes in (
        ("training on two threads, H 256, N 16 and 64: times faster", 1.7, [(16, 256), (64, 256)]),
        ("training on two threads, H 64: times faster", NOISE, [(1, 64), (16, 64), (64, 64)]),
    ):
        found, gains, left_out = {}, [], []
        for cell in CELL_NAMES:
            for N, H in sizes:
                call = case(square(cell, H, N, 128)).train
                rivals = {"call": call, "sgemm": product}
                turns = {f"{k} {n}": Turn(rivals[k], n) for n in (1, 2) for k in rivals}
                call()
                samples = timing.interleave(turns, seconds)
                gains.append(timing.median_ratio(samples["sgemm 1"], samples["sgemm 2"]))
                gain = timing.median_ratio(samples["call 1"], samples["call 2"])
                if gains[-1] >= SPEEDUP:
                    found[f"{cell} {N}×{H}"] = gain
                else:
                    left_out.append(f"{cell} {N}×{H}")
        note = f"sgemm gained {min(gains):.2f} to {max(gains):.2f}"
        if left_out:
            note += f", under {SPEEDUP} and so not judged: {', '.join(left_out)}"
        yield worst(name, aim, found, most=False, note=note)


def half_aims(seconds: float) -> Iterator[Aim]:
    times, peaks = {}, {}
    for cell in CELL_NAMES:
        w, long = square(cell, 256, 16, 128), square(cell, 256, 16, 512)
        full = case(w)
        whole = timing.peak_memory(case(long).train)
        for dtype in ("bfloat16", "float16"):
            name = f"{cell} {dtype}"
            times[name] = quotient(Turn(case(w, dtype).train), Turn(full.train), seconds)
            half = timing.peak_memory(case(long, dtype).train)
            if half and whole:
                peaks[name] = half / whole
    yield worst("training in half types, 128:16:256: time over float32's", 1.1, times, most=True)
    yield worst("training in half types, 512:16:256: memory over float32's", 0.5, peaks, most=True)


def memory_aims() -> Iterator[Aim]:
    """What one call of training grows the process by, against what is counted on paper."""
    found = {}
    for cell in CELL_NAMES:
        for T, N, H in ((512, 16, 128), (128, 64, 256)):
            w = square(cell, H, N, T)
            used = timing.peak_memory(case(w).train)
            if used is not None:
                found[f"{cell} {T}:{N}:{H}"] = used / bytes_on_paper(w)
    yield worst("training, peak memory over what is counted on paper", 1.1, found, most=True)


def bytes_on_paper(w: Workload) -> int:
    """Of one call of training in float32: what is kept of each step (h, c and what the cell saves);
    each weight's gradient and the sums it is made of, and the recurrent weight as the backward
    reads it; and the gates' gradients and their factors of a chunk of 256 rows."""
    cell = CELLS[w.cell]
    kept = w.T * w.N * w.H * (cell.states + cell.saved)
    weights = cell.gates * w.H * (2 * (w.I + w.H) + w.H)
    chunk = 256 * ((cell.gates + cell.splits_gates) * w.H + w.I + w.H)
    return 4 * (kept + weights + chunk)


def ragged_aims(seconds: float) -> Iterator[Aim]:
    found = {}
    for cell in CELL_NAMES:
        for N in (16, 64):
            dense = square(cell, 256, N, 128)
            ragged = replace(dense, lengths="uniform")
            share = float(ragged.sequence_lengths().sum()) / (dense.T * N)
            time = quotient(Turn(case(ragged).train), Turn(case(dense).train), seconds)
            found[f"{cell} N{N}"] = time / share
    name = "training, uniform lengths, H 256: time over the share of the steps"
    yield worst(name, 1.2, found, most=True)


def own_aims(seconds: float = SECONDS) -> Iterator[Aim]:
    """Those that are not against torch.nn; each comparison takes about so many seconds."""
    with timing.torch_threads(1):
        yield from step_aims(seconds)
        yield from slope_aims(seconds)
        yield from half_aims(seconds)
        yield from memory_aims()
        yield from ragged_aims(seconds)
    yield from thread_aims(seconds)


def text(found: Iterable[Aim]) -> Iterator[str]:
    """The table, line by line."""
    for aim in found:
        name, wanted, reached, met, of = aim.cells
        yield f"{name:62} {wanted:>7} {reached:>7}  {met:10}  {of}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="a comparison, at least")
    parser.add_argument("--own", action="store_true", help="only what is not against torch.nn")
    arguments = parser.parse_args(argv)
    silence()
    aims: list[Aim] = []
    if not arguments.own:
        bench = Bench([find(OURS), find("torch")], memory=False)
        found: list[Row] = []
        for point in progress(ratio_points()):
            found += bench.rows(point, arguments.seconds, LEAST)
        aims += ratio_aims(found)
        here = rows.provenance(fused_rnn)
        aims += workload_aims(*kept(results.RESULTS / here.slug, here))
    aims += own_aims(arguments.seconds)
    for line in text(aims):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
