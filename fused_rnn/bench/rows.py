"""Rows, not adjectives: what one measurement records, and the file of rows.

A line is written the moment it is measured, with where and on what it was: so a run that was cut
keeps what it has, and the next one goes on behind it.
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
from typing import Any

import torch
from typing_extensions import Self

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")
SAME = ("device", "sources", "torch", "build")
"""Rows that agree in these are of one series: a run goes on with it."""


@dataclass(frozen=True)
class Provenance:
    """Where and on what the rows of a run were measured. Rows of the same ``sources`` belong
    together; the commit tells people which those were."""

    date: str
    commit: str
    device: str
    python: str
    torch: str
    fused_rnn: str
    build: str
    command: str
    cpu: str = ""
    cudnn: str = ""
    driver: str = ""
    sources: str = ""

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
        """The row of a line; columns that an older version did not write have their defaults."""
        convert: dict[Any, Any] = {
            int: int,
            float: float,
            str: str,
            bool: "True".__eq__,
            int | None: lambda text: int(text) if text else None,
            float | None: lambda text: float(text) if text else None,
        }
        # Every subclass is a dataclass, which mypy cannot know of this base; below likewise.
        here = [f for f in fields(cls) if f.name in line]  # type: ignore[arg-type]
        return cls(**{f.name: convert[f.type](line[f.name]) for f in here})


@dataclass(frozen=True)
class Row(Line):
    """One provider on one workload, dtype, pass and thread count. Times are milliseconds a call;
    ``ratio`` is torch.nn's time over this provider's, by the repeats' median; ``counts`` is false
    where the calibration says that the threads were not cores; ``status`` is ``ok`` or why there is
    no time. ``roofline`` is the least time that the machine's product and copy rates, measured in
    the same run, allow the call's ``gflop`` and ``mbyte``, as a share of ``p50_ms``; ``error`` the
    largest error of any result as a share of what is allowed; ``task`` one of ``today.py``: then
    torch.nn's row is what people write."""

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
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    repeats: int | None
    ratio: float | None
    peak_kib: int | None
    calibration_gflops: float | None
    calibration_speedup: float | None
    counts: bool
    note: str = ""
    status: str = "ok"
    us_per_step: float | None = None
    gflop: float | None = None
    mbyte: float | None = None
    gflops: float | None = None
    roofline: float | None = None
    copy_gb_s: float | None = None
    launch_us: float | None = None
    sync_us: float | None = None
    error: float | None = None
    input_gradient: bool = False
    task: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two rows the same measurement, on one machine and code."""
        what = (self.workload, self.cell, self.shape, self.kind, self.dtype, self.threads)
        return (*what, self.input_gradient, self.provider)

    @property
    def is_bad(self) -> bool:
        """Whether the provider gave no right result; having no memory for one is no fault."""
        return self.status.startswith(("wrong", "failed", "not checked"))

    @property
    def sizes(self) -> dict[str, int]:
        """The letters of the shape: T, N, I, H, L, D and P where there is a projection."""
        return {letter: int(size) for letter, size in re.findall(r"\b([A-Z])(\d+)", self.shape)}

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
    found = lines(path)
    if not found:
        raise ValueError(f"{path} holds no rows: the run was cut before its first one")
    origin = {f.name: found[0].get(f.name, "") for f in fields(Provenance)}
    # What was measured again counts.
    rows = {row.key: row for row in map(Row.parse, found)}
    return [*rows.values()], Provenance(**origin)


def lines(path: Path) -> list[dict[str, str]]:
    """The lines of a file of rows, less one that a run was cut in."""
    with path.open(newline="") as file:
        return [line for line in csv.DictReader(file) if None not in line.values()]


def earlier(path: Path, origin: Provenance) -> list[Row]:
    """The rows in ``path``, if there are any, that this code measured on this device before."""
    here = lines(path) if path.exists() else []
    return [Row.parse(x) for x in here if all(x.get(k) == getattr(origin, k) for k in SAME)]


def provenance(fused_rnn: Any, device: str = "cpu") -> Provenance:
    """Where this process measures. ``device`` is ``"cpu"`` or ``"cuda"``."""
    cuda = device == "cuda"
    # A module's own name, where Python was asked to run one.
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = (
        ["-m", module.name.removesuffix(".__main__")] if module else [os.path.relpath(sys.argv[0])]
    )
    return Provenance(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=git_commit(),
        device=torch.cuda.get_device_name() if cuda else device_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        fused_rnn=fused_rnn.__version__,
        build=build_info(fused_rnn),
        command=shlex.join(["python", *program, *sys.argv[1:]]),
        cpu=processor(),
        cudnn=str(torch.backends.cudnn.version() or "none"),
        driver=driver_version() if cuda else "",
        sources=source_hash(),
    )


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.split("\n")[0].strip() or "unknown"


def build_info(fused_rnn: Any) -> str:
    """What the native library was built with, and the instruction set it chose here."""
    try:
        native = importlib.import_module(f"{fused_rnn.__name__}._C")
    except ImportError:  # FUSED_RNN_PURE_PYTHON
        return "native module not built"
    return f"{native.build_info()['compiler']}, {native.instruction_set()}"


def device_name() -> str:
    """Processor model and the cores this process may use, as ``Xeon Gold 6338, 2 cores``."""
    model = _cpuinfo("model name") or platform.processor() or platform.machine()
    model = re.sub(r"\((?:R|TM|r|tm)\)", "", model)
    return f"{' '.join(model.split())}, {cores()} cores"


def processor() -> str:
    """:func:`device_name`, and where Linux tells the family and model: a virtual machine may call
    several processors by one name."""
    told = [f"{name} {value}" for name in ("cpu family", "model") if (value := _cpuinfo(name))]
    return ", ".join([device_name(), *told])


def _cpuinfo(name: str) -> str:
    """A line of the first processor in /proc/cpuinfo; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else ""


def cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def source_hash(*more: str) -> str:
    """First digits of the sha256 of the code that a result hangs on: setup.py, csrc, fused_rnn and
    ``more`` files or folders. Unlike a commit, it stays the same when results are committed, and a
    copy without git has it too. Without ``tuning.csv``, which is made of results, and without what
    measures."""
    house = PACKAGE.parent
    files: set[Path] = set()
    for path in (house / name for name in ("setup.py", "csrc", "fused_rnn", *more)):
        below = (
            p for p in path.rglob("*") if p.suffix in SOURCES and p.parent != PACKAGE / "bench"
        )
        files.update(below if path.is_dir() else [path] if path.exists() else [])
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
            run = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True)
        except OSError:  # there is no git
            return ""
        return run.stdout.strip() if run.returncode == 0 else ""

    if os.environ.get("FUSED_RNN_COMMIT"):
        return os.environ["FUSED_RNN_COMMIT"]
    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit or not git("ls-files", "__init__.py"):  # an environment inside of some checkout
        return "unknown"
    changes = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    return commit + ("+dirty" if changes else "")
