"""Rows, not adjectives: what one measurement records, and the files under ``results/<device>/``.

A run writes ``<date>.csv`` there, a line the moment it is measured, so an interrupted run keeps
what it has; names sort by date, and the newest file is what the README's table is made of. A run
of chosen parts only writes ``<date>-part.csv``, which never is.
"""

import csv
import hashlib
import importlib
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Self

import torch

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")


@dataclass(frozen=True)
class Provenance:
    """Where and on what the rows of a run were measured."""

    date: str
    commit: str
    device: str
    python: str
    torch: str
    fused_rnn: str
    build: str
    command: str

    @property
    def slug(self) -> str:
        return slug(self.device)


def slug(device: str) -> str:
    """The name of a device's folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


class Line:
    """What the dataclasses of rows share."""

    @classmethod
    def parse(cls, line: dict[str, str]) -> Self:
        convert = {
            int: int,
            float: float,
            str: str,
            bool: "True".__eq__,
            int | None: lambda text: int(text) if text else None,
            float | None: lambda text: float(text) if text else None,
        }
        return cls(**{f.name: convert[f.type](line[f.name]) for f in fields(cls)})  # type: ignore


@dataclass(frozen=True)
class Row(Line):
    """One provider on one workload, pass and thread count. Times are milliseconds a call;
    ``ratio`` is torch.nn's time over this provider's, by the repeats' median; ``counts`` is false
    where the calibration says that the threads were not cores."""

    workload: str
    cell: str
    shape: str
    kind: str
    dtype: str
    threads: int
    provider: str
    requested: str
    backend: str
    algorithm: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int
    ratio: float
    peak_kib: int | None
    calibration_gflops: float
    calibration_speedup: float
    counts: bool
    note: str = ""

    @property
    def peak_mib(self) -> str:
        return "?" if self.peak_kib is None else f"{self.peak_kib / 1024:.1f}"


class Writer:
    """Writes rows to one CSV file, each with the run's provenance, a line at once. With ``append``
    it goes on behind the rows of earlier runs, less a last line that a run was cut in."""

    def __init__(
        self, path: Path, provenance: Provenance, kind: type[Line] = Row, *, append: bool = False
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.provenance = asdict(provenance)
        names = [f.name for f in fields(kind)] + list(self.provenance)  # type: ignore[arg-type]
        header = ",".join(names) + "\n"
        before = path.read_text() if append and path.exists() else ""
        before = before[: before.rfind("\n") + 1]
        if before and not before.startswith(header):
            raise ValueError(f"{path} has other columns than this version writes: move it away")
        path.write_text(before or header)
        self.file = path.open("a", newline="")
        self.csv = csv.DictWriter(self.file, names, lineterminator="\n")

    def write(self, row: Line) -> None:
        values: dict[str, Any] = asdict(row)  # type: ignore[call-overload]
        numbers = {k: f"{v:.6g}" for k, v in values.items() if isinstance(v, float)}
        self.csv.writerow(values | numbers | self.provenance)
        self.file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()


def read(path: Path) -> tuple[list[Row], Provenance]:
    """The rows of a file and the provenance that all of them share."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines:
        raise ValueError(f"{path} holds no rows: the run was cut before its first one")
    provenance = Provenance(**{f.name: lines[0][f.name] for f in fields(Provenance)})
    return [Row.parse(line) for line in lines], provenance


def newest(folder: Path = RESULTS) -> Path:
    """The latest complete run below ``folder``."""
    # Those of `make gpu-check` have names without a date.
    dated = [path for path in folder.rglob("*.csv") if re.match(r"\d{4}-\d\d-\d\d", path.stem)]
    files = [path for path in dated if not path.stem.endswith(("-part", "-losses"))]
    if not files:
        raise FileNotFoundError(f"no results under {folder}: run `make bench` first")
    return max(files, key=lambda path: path.name)


def losses_path(rows: Path) -> Path:
    """Where the loss curves of the run that wrote ``rows`` are."""
    return rows.with_name(f"{rows.stem}-losses.csv")


def provenance(fused_rnn: Any) -> Provenance:
    return Provenance(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=git_commit(),
        device=device_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        fused_rnn=fused_rnn.__version__,
        build=build_info(fused_rnn),
        command=shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    )


def build_info(fused_rnn: Any) -> str:
    """What the native library was built with, and the instruction set it chose here."""
    try:
        native = importlib.import_module(f"{fused_rnn.__name__}._C")
    except ImportError:  # FUSED_RNN_PURE_PYTHON
        return "native module not built"
    return f"{native.build_info()['compiler']}, {native.instruction_set()}"


def device_name() -> str:
    """Processor model and the cores this process may use, as ``Xeon Gold 6338, 2 cores``."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = found.group(1) if found else model
    model = re.sub(r"\((?:R|TM|r|tm)\)", "", model)
    return f"{' '.join(model.split())}, {cores()} cores"


def cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def source_hash(*more: str) -> str:
    """First digits of the sha256 of the code that a result hangs on: setup.py, csrc, fused_rnn and
    ``more`` files or folders. Unlike a commit, it stays the same when results are committed, and a
    copy without git has it too. Without ``tuning.csv``, which is made of results."""
    house = ROOT.parent
    files: set[Path] = set()
    for path in (house / name for name in ("setup.py", "csrc", "fused_rnn", *more)):
        below = (p for p in path.rglob("*") if p.suffix in SOURCES)
        files.update(below if path.is_dir() else [path])
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(house).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def git_commit() -> str:
    """The commit of the tree that is measured, with ``+dirty`` if it holds other changes than
    results; ``unknown`` outside a checkout and without git. ``FUSED_RNN_COMMIT`` names the commit
    of a copy without its history."""

    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:  # there is no git
            return ""
        return run.stdout.strip() if run.returncode == 0 else ""

    if os.environ.get("FUSED_RNN_COMMIT"):
        return os.environ["FUSED_RNN_COMMIT"]
    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    changes = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    return commit + ("+dirty" if changes else "")
