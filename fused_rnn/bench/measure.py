"""One point after another: each provider checked, then timed in turn with the others."""

import gc
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import torch
from torch import nn

from . import check, timing
from .arithmetic import DTYPES, tf32
from .providers import Provider
from .rows import Row, Writer
from .timing import Quantiles, Rates, Turn, torch_threads
from .workloads import Case, Workload, grad_mode, make_cases

TORCH = "torch"
ROW_S = 1.0
"""Seconds of timing a point where there is no budget, if its least repeats take less."""
FIRST_SHARE = 0.65
"""Share of a budget for the rows on the first number of threads, which count everywhere."""
LEAST = 5
MOST_INPUTS = 64
CUDA_CALIBRATION_SIZE = 4096


@dataclass(frozen=True)
class Point:
    """A workload in one dtype, one pass and on so many threads."""

    workload: Workload
    dtype: str
    kind: str
    threads: int = 1

    @property
    def columns(self) -> dict[str, Any]:
        w = self.workload
        return {
            "workload": w.name,
            "cell": w.cell,
            "shape": w.shape,
            "kind": self.kind,
            "dtype": self.dtype,
            "threads": self.threads,
        }


def points(
    workloads: Iterable[Workload],
    dtypes: Collection[str] = ("float32",),
    kinds: Collection[str] = ("forward", "train", "step"),
    threads: Iterable[int] = (1,),
) -> list[Point]:
    """Every workload in every dtype and those of its passes that are in ``kinds``, on the first
    number of threads, then on the next."""
    workloads = [*workloads]
    return [
        Point(w, dtype, kind, count)
        for count in threads
        for w in workloads
        for dtype in dtypes
        for kind in w.passes
        if kind in kinds
    ]


@dataclass
class Entry:
    """A provider at the workload in hand: its case, or the reason why it has none."""

    provider: Provider
    status: str = "ok"
    error: float | None = None
    case: Case | None = None

    @property
    def name(self) -> str:
        return self.provider.name


@dataclass
class Bench:
    """What all points share. torch.nn is what others are checked against, also where it is not
    among the providers. Without ``memory`` no peaks are measured, which takes three calls more."""

    providers: list[Provider]
    device: str = "cpu"
    input_gradient: bool = False
    memory: bool = True
    entries: dict[tuple[Workload, str], list[Entry]] = field(default_factory=dict)
    rates: dict[int, Rates] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.measure = timing.CudaStopwatch() if self.device == "cuda" else None

    def keys(self, point: Point) -> set[tuple[object, ...]]:
        """Of the point's rows: :attr:`fused_rnn.bench.rows.Row.key`."""
        where = (*point.columns.values(), self.input_gradient)
        return {(*where, provider.name) for provider in self.providers}

    def rows(self, point: Point, seconds: float = ROW_S, least: int = LEAST) -> list[Row]:
        """Measures all providers at ``point`` for about ``seconds``."""
        with tf32(DTYPES[point.dtype].tf32), torch_threads(point.threads):
            if point.threads not in self.rates:
                self.rates[point.threads] = Rates.of(self.device)
            entries = [replace(entry) for entry in self.checked(point.workload, point.dtype)]
            calls = {}
            peaks: dict[str, int | None] = {}
            ran: dict[str, dict[str, Any]] = {}
            for entry in entries:
                with self.noting(entry):
                    if entry.case is None:
                        continue
                    entry.case.module.train(point.kind == "train")
                    with grad_mode(point.kind):
                        ran[entry.name] = entry.provider.ran(entry.case)
                        call = self.rotating(entry.case, point.kind)
                        if self.memory:
                            peaks[entry.name] = self.peak(call, point.threads)
                    calls[entry.name] = call
            samples: dict[str, list[float]] = {}
            together = Entry(self.providers[0])
            with self.noting(together), grad_mode(point.kind):
                turns = {name: Turn(call, point.threads) for name, call in calls.items()}
                samples = timing.interleave(
                    self.products(point) | turns, seconds, min_repeats=least, measure=self.measure
                )
        for entry in entries:
            if entry.name in calls:
                entry.status = together.status
        nothing: dict[str, Any] = {"requested": "", "backend": "", "algorithm": ""}
        return [
            Row(
                **point.columns,
                provider=entry.name,
                **ran.get(entry.name, nothing),
                **self.statistics(point, samples, entry),
                peak_kib=None if (peak := peaks.get(entry.name)) is None else peak // 1024,
                note=point.workload.note,
                status=entry.status,
                error=entry.error,
                input_gradient=self.input_gradient,
                task=point.workload.task or "",
            )
            for entry in entries
        ]

    def checked(self, w: Workload, dtype: str) -> list[Entry]:
        """The providers' cases. The errors are kept, the cases only until the next workload."""
        before = self.entries.get((w, dtype))
        if before and any(entry.case for entry in before):
            return before
        for old in self.entries.values():
            for entry in old:
                entry.case = None
        entries = before or [Entry(p, p.refusal(w) or "ok") for p in self.providers]
        for entry in entries:
            if entry.status == "ok":
                with self.noting(entry):
                    case = entry.provider.case(w, DTYPES[dtype].dtype, self.device)
                    entry.case = replace(case, input_gradient=self.input_gradient)
        if before is None:
            ours = [e for e in entries if e.case and not e.provider.is_torch]
            for what in dict.fromkeys(e.provider.workload(w) for e in ours):
                self.check(what, dtype, [e for e in ours if e.provider.workload(w) == what])
            self.entries[w, dtype] = entries
        return entries

    def check(self, w: Workload, dtype: str, entries: list[Entry]) -> None:
        """Fills in errors, and ``wrong`` where they break the rule of ``check.py``."""
        arithmetic, kind = DTYPES[dtype], w.passes[-1]
        # A GPU's random numbers are not the same in all kernels.
        other = w.dropout > 0 and self.device == "cuda"
        w = replace(w, dropout=0.0) if other else w
        yardstick = Entry(Provider(TORCH, nn))
        expected = {}
        with self.noting(yardstick):
            if entries:
                cases = make_cases(w, {TORCH: nn}, arithmetic.dtype, device=self.device)
                expected = {name: case.results(kind) for name, case in cases.items()}
        for entry in entries:
            if yardstick.status != "ok":
                entry.status = f"not checked: torch.nn {yardstick.status}"
                continue
            with self.noting(entry):
                case = entry.case
                if other:
                    case = entry.provider.case(w, arithmetic.dtype, self.device)
                # Only entries that have a case come here.
                found = case.results(kind)  # type: ignore[union-attr]
                told = expected[TORCH], expected["oracle"]
                compared = check.compare_results(entry.name, found, *told, arithmetic.eps)
                if w.cell == "rnn_relu":  # a gradient that jumps: see check.py
                    compared = [c for c in compared if not c.where.startswith(f"{entry.name}: d ")]
                entry.error = max((c.share for c in compared), key=lambda x: (x != x, x))
                wrong = [c for c in compared if not c.ok]
                if wrong:
                    entry.status = f"wrong: {wrong[0]}"
        for entry in entries:
            if entry.status != "ok":
                entry.case = None

    def rotating(self, case: Case, kind: str) -> Callable[[], object]:
        """The call on inputs in turn, as many as the CPU's caches do not hold, up to a limit. A
        GPU's are overwritten before each call, and two will do."""
        case.call(kind)()
        data = case.leaves["input"]
        copies = timing.cache_bytes() // (data.numel() * data.element_size()) + 1
        if self.device == "cuda":
            copies = 1
        cases = [case, *(case.another() for _ in range(min(copies, MOST_INPUTS - 1)))]
        calls = cycle([case.call(kind) for case in cases])
        return lambda: next(calls)()

    def peak(self, call: Callable[[], object], threads: int) -> int | None:
        if self.device == "cuda":
            return timing.peak_cuda_memory(call)
        return timing.peak_memory(call, 3 if threads == 1 else 1)

    @property
    def calibration_size(self) -> int:
        return CUDA_CALIBRATION_SIZE if self.device == "cuda" else timing.CALIBRATION_SIZE

    def products(self, point: Point) -> dict[str, Turn]:
        """The calibration's turns: on a GPU in the row's dtype, on a CPU, which computes half types
        in float32, in that or float64."""
        dtype = DTYPES[point.dtype].dtype
        if self.device != "cuda" and dtype != torch.float64:
            dtype = torch.float32
        product = timing.calibration(self.calibration_size, dtype, self.device)
        product()
        return {f"sgemm on {count}": Turn(product, count) for count in {1, point.threads}}

    def statistics(
        self, point: Point, samples: dict[str, list[float]], entry: Entry
    ) -> dict[str, Any]:
        """The columns that come from a point's samples, and what they are measured by."""
        w, rates = entry.provider.workload(point.workload), self.rates[point.threads]
        gflop = w.gflop(point.kind, input_gradient=self.input_gradient)
        size = DTYPES[point.dtype].dtype.itemsize
        mbyte = w.mbyte(point.kind, size, input_gradient=self.input_gradient)
        columns: dict[str, Any] = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "repeats", "ratio"))
        columns |= {"calibration_gflops": None, "calibration_speedup": None, "counts": False}
        columns |= {"gflop": gflop, "mbyte": mbyte, **vars(rates)}
        seconds = samples.get(entry.name)
        if seconds is None or entry.status != "ok":
            return columns
        single, these = samples["sgemm on 1"], samples[f"sgemm on {point.threads}"]
        product = timing.calibration_gflops(these, self.calibration_size)
        least = max(gflop / product, 1e-3 * mbyte / rates.copy_gb_s)
        columns |= statistics_of(seconds, samples.get(TORCH))
        p50 = columns["p50_ms"] * 1e-3
        return columns | {
            "us_per_step": 1e6 * p50 / w.T,
            "gflops": gflop / p50,
            "roofline": least / p50,
            "calibration_gflops": product,
            "calibration_speedup": timing.median_ratio(single, these),
            "counts": timing.counts(point.threads, single, these),
        }

    @contextmanager
    def noting(self, entry: Entry) -> Iterator[None]:
        """What fails inside becomes the entry's status, and measuring goes on."""
        try:
            yield
            if self.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # becomes a row, which fails the run
            first = (str(error).splitlines() or [type(error).__name__])[0]
            memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
            entry.status = "out of memory" if memory else f"failed: {first}"
            entry.case = None
        if entry.status == "out of memory":
            gc.collect()  # what failed may hang on the exception's frames
            if self.device == "cuda":
                torch.cuda.empty_cache()


def statistics_of(seconds: list[float], torch_seconds: list[float] | None) -> dict[str, Any]:
    """The columns of a row that come from its samples alone."""
    q = Quantiles.of(seconds)
    return {
        "p20_ms": q.p20 * 1e3,
        "p50_ms": q.p50 * 1e3,
        "p80_ms": q.p80 * 1e3,
        "repeats": len(seconds),
        "ratio": timing.median_ratio(torch_seconds, seconds) if torch_seconds else None,
    }


def run(
    bench: Bench,
    wanted: list[Point],
    writer: Writer,
    *,
    budget: float | None = None,
    least: int = LEAST,
    progress: Callable[[list[Point]], Iterable[Point]] = iter,
    say: Callable[[str], object] = print,
) -> tuple[list[Row], dict[str, str]]:
    """Measures the points, writes and says each row. A ``budget`` in seconds is shared out, first
    to the rows on the first number of threads; what gets nothing of it is left out.

    Returns:
        the rows, and what was left out with the reason.
    """
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    start = time.perf_counter()
    early = [point for point in wanted if point.threads == wanted[0].threads]
    for i, point in enumerate(progress(wanted)):
        seconds = ROW_S
        if budget is not None:
            first = i < len(early)
            share = budget * (FIRST_SHARE if first and len(early) < len(wanted) else 1)
            left = start + share - time.perf_counter()
            if left <= 0 and not first:
                what = f"{point.workload.name} {point.kind}, {point.threads} threads"
                left_out[what] = "no time left, see --budget"
                continue
            seconds = left / ((len(early) if first else len(wanted)) - i)
        for row in bench.rows(point, seconds, least):
            writer.write(row)
            rows.append(row)
            say(line(row))
    return rows, left_out


HEAD = (
    f"{'workload':19} {'shape':32} {'pass':7} {'dtype':8} thr {'provider':20} {'p50 ms':>9} "
    f"{'ratio':>8} {'us/step':>8} {'GFLOP/s':>8} {'roof':>6} {'peak MiB':>8}  ran"
)


def line(row: Row) -> str:
    """A row for the eye; the ratio is in parentheses where it does not count."""
    start = f"{row.workload:19} {row.shape:32} {row.kind:7} {row.dtype:8} {row.threads:3} "
    start += f"{row.provider:20} "
    if row.status != "ok":
        return start + row.status
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}×"
    return start + (
        f"{row.p50_ms:9.4g} {ratio if row.counts else f'({ratio})':>8} {row.us_per_step:8.3g} "
        f"{row.gflops:8.3g} {row.roofline:6.1%} {row.peak_mib:>8}  {row.backend}"
    )
