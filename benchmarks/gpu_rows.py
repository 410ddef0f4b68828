"""Rows of ``gpu_grid.py``: what one measurement on a GPU records, and reading them back."""

import csv
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import check
import results
import timing
import torch
from gpu_points import Point
from timing import Quantiles

TORCH = "torch.nn"
SAME = ("device", "sources", "torch")
"""Rows that agree in these are of one series: a run goes on with it, and a table is made of it."""


@dataclass(frozen=True)
class GpuProvenance(results.Provenance):
    """Where and on what the rows of a GPU were measured. Rows of the same ``sources`` belong
    together; the commit tells people which those were."""

    cudnn: str
    driver: str
    sources: str


@dataclass(frozen=True)
class GpuRow(results.Line):
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


def provenance(fused_rnn: ModuleType, device: str) -> GpuProvenance:
    here = asdict(results.provenance(fused_rnn)) | {"sources": results.source_hash()}
    if device == "cuda":
        here["device"] = torch.cuda.get_device_name()
    cudnn = str(torch.backends.cudnn.version() or "none")
    return GpuProvenance(**here, cudnn=cudnn, driver=driver_version())


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.split("\n")[0].strip() or "unknown"


def lines(path: Path) -> list[dict[str, str]]:
    """The lines of a file of rows, less one that a run was cut in; none of a file whose columns are
    another version's."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        wanted = {field.name for field in (*fields(GpuRow), *fields(GpuProvenance))}
        if not wanted <= set(reader.fieldnames or ()):
            return []
        return [line for line in reader if None not in line.values()]


def read(path: Path, origin: GpuProvenance) -> list[GpuRow]:
    """The rows that this code measured on this device before."""
    here = [x for x in lines(path) if all(x[k] == getattr(origin, k) for k in SAME)]
    return [GpuRow.parse(line) for line in here]


def line(point: Point, rows: list[GpuRow]) -> str:
    def told(row: GpuRow) -> str:
        if row.p50_ms is None:
            return f"{row.provider} {row.status}"
        ratio = "" if row.provider == TORCH or row.ratio is None else f" ({row.ratio:.2f}×)"
        return f"{row.provider} {row.p50_ms:.4g} ms{ratio}"

    return f"{point!s:58} {', '.join(map(told, rows))}"
