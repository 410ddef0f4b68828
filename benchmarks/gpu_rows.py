"""Rows of ``gpu_grid.py``: what one measurement on a GPU records, and reading them back."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gpu_points import Point

from fused_rnn.bench import check, rows, timing
from fused_rnn.bench.rows import SAME, Provenance
from fused_rnn.bench.timing import Quantiles

TORCH = "torch.nn"


@dataclass(frozen=True)
class GpuRow(rows.Line):
    """One provider at one point. Times are milliseconds a call; ``ratio`` is torch.nn's time over
    this provider's, by the repeats' median; errors are the largest of any tensor, relative to the
    float64 oracle's largest value in it. ``status`` is ``ok`` or why there is no time."""

    group: str
    workload: str
    key: str
    cell: str
    dtype: str
    kind: str
    H: int
    I: int  # noqa: E741
    N: int
    T: int
    layers: int
    directions: int
    projection: int
    lengths: str
    provider: str
    requested: str
    backend: str
    algorithm: str
    status: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    us_per_step: float | None = None
    repeats: int | None = None
    ratio: float | None = None
    peak_mib: float | None = None
    error_output: float | None = None
    error_gradient: float | None = None
    calibration_tflops: float | None = None


def worst(compared: list[check.Comparison]) -> float | None:
    """The largest relative error; NaN is larger than any."""
    errors = [c.error / c.scale if c.scale else c.error for c in compared]
    return max(errors, key=lambda error: (error != error, error)) if errors else None


def describe(point: Point) -> dict[str, Any]:
    w = point.workload
    return {
        "group": point.group,
        "workload": w.name,
        "key": " ".join(point.key),
        "cell": w.cell,
        "dtype": point.dtype,
        "kind": point.kind,
        "H": w.H,
        "I": w.I,
        "N": w.N,
        "T": w.T,
        "layers": w.L,
        "directions": w.D,
        "projection": w.P,
        "lengths": w.lengths or "",
    }


def statistics_of(point: Point, name: str, samples: dict[str, list[float]]) -> dict[str, Any]:
    if name not in samples:
        return {}
    q = Quantiles.of(samples[name])
    ratio = timing.median_ratio(samples[TORCH], samples[name]) if TORCH in samples else None
    return {
        "p20_ms": q.p20 * 1e3,
        "p50_ms": q.p50 * 1e3,
        "p80_ms": q.p80 * 1e3,
        "us_per_step": q.p50 * 1e6 / point.workload.T,
        "repeats": len(samples[name]),
        "ratio": ratio,
    }


def lines(path: Path) -> list[dict[str, str]]:
    """The lines of a file of rows, less one that a run was cut in; none of a file whose columns are
    another version's."""
    found = rows.lines(path) if path.exists() else []
    wanted = {field.name for field in (*fields(GpuRow), *fields(Provenance))}
    return found if found and wanted <= found[0].keys() else []


def read(path: Path, origin: Provenance) -> list[GpuRow]:
    """The rows that this code measured on this device before."""
    here = [x for x in lines(path) if all(x[k] == getattr(origin, k) for k in SAME)]
    return [GpuRow.parse(line) for line in here]


def line(point: Point, measured: list[GpuRow]) -> str:
    def told(row: GpuRow) -> str:
        if row.p50_ms is None:
            return f"{row.provider} {row.status}"
        ratio = "" if row.provider == TORCH or row.ratio is None else f" ({row.ratio:.2f}×)"
        return f"{row.provider} {row.p50_ms:.4g} ms{ratio}"

    return f"{point!s:58} {', '.join(map(told, measured))}"
