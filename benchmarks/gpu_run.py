"""How ``gpu_check.py`` runs a piece: commands that end in time, and what is kept of them."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import gpu_summary
import results

from fused_rnn.bench.rows import source_hash

ROOT = results.ROOT.parent
PIECE_S = 470.0
"""Seconds a piece may take; what is left of eight minutes is for ending what runs."""
GRACE_S = 8.0
"""Seconds that a command has to write down what it knows, after it was interrupted."""
STATE, LOG = "gpu-check.json", "gpu-check.log"
LOG_BYTES = 4 << 20
HANGS_ON = {
    "test": ("tests", "fused_rnn/backends/tuning.csv"),
    "sanitize": ("benchmarks/gpu_sanitize.py", "benchmarks/micro/planted_errors.cu"),
}
"""What a piece's findings hang on, beside the sources of the library."""


class Finished(NamedTuple):
    """How a command ended. ``status`` is its exit status, or ``None`` if its time was over."""

    status: int | None
    output: str

    @property
    def ok(self) -> bool:
        return self.status == 0

    @property
    def how(self) -> str:
        return "cut by the time limit" if self.status is None else f"exit status {self.status}"


class Outcome(NamedTuple):
    """What a piece found: ``passed``, ``failed``, or ``cut`` where running it again goes on."""

    status: str
    sentence: str


@dataclass
class Check:
    """What the pieces share. ``state`` is what ``gpu-check.json`` holds, by piece; a piece keeps
    its own findings in ``found``, which start empty when the sources are not what they were. The
    commit is only told: it changes when results are committed."""

    folder: Path
    device: dict[str, Any]
    commit: str
    options: argparse.Namespace
    deadline: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, piece: str, work: Callable[["Check"], Outcome], limit: float = PIECE_S) -> bool:
        """Runs a piece, keeps what it found; whether it passed."""
        say(f"== {piece}")
        start = time.monotonic()
        self.deadline = start + limit
        before, stamp = self.state.get(piece, {}), self.stamp(piece)
        same = all(before.get(k) == v for k, v in stamp.items())
        self.found = before.get("found", {}) if same else {}
        over = {"status": "cut", "sentence": "it was ended from outside", "date": now()}
        self.state[piece] = {**stamp, "commit": self.commit, **over, "found": self.found}
        try:
            outcome = work(self)
        except Exception as error:  # the other pieces' results are worth having all the same
            traceback.print_exc()
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        self.state[piece] |= {
            "status": outcome.status,
            "sentence": outcome.sentence,
            "seconds": round(time.monotonic() - start, 1),
            "date": now(),
        }
        self.save()
        say(f"== {piece}: {outcome.status}, {outcome.sentence}")
        return outcome.status == "passed"

    def stamp(self, piece: str) -> dict[str, Any]:
        sources = source_hash(*HANGS_ON.get(piece, ()))
        return {"sources": sources, "device": self.device}

    def save(self) -> None:
        """Writes down what is known so far, and the summary of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STATE).write_text(json.dumps(self.state, indent=1) + "\n")
        (self.folder / "summary.md").write_text(gpu_summary.summary(self.folder))

    def command(
        self, *command: str | Path, limit: float | None = None, env: Mapping[str, str] | None = None
    ) -> Finished:
        """Runs a command in the checkout's root, its output shown, and ended with all its children
        at the piece's deadline or after ``limit`` seconds."""
        seconds = max(0.0, min(self.left, self.left if limit is None else limit))
        shown = " ".join(map(str, command))
        say(f"$ {shown if len(shown) < 200 else shown[:200] + ' ...'}")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(env or {})
        try:
            process = subprocess.Popen(
                [*map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                # A shell's job in the background ignores it, and so would its children.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        except OSError as error:
            return Finished(127, str(error))
        lines: list[str] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / LOG
        reader = threading.Thread(target=show, args=(process, lines, log, shown), daemon=True)
        reader.start()
        status: int | None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            end(process)
        except KeyboardInterrupt:  # its session is its own: the terminal does not end it
            end(process)
            raise
        reader.join(GRACE_S)
        return Finished(status, "".join(lines))


def show(process: subprocess.Popen[str], lines: list[str], log: Path, command: str) -> None:
    """Output as it comes: to the caller, the screen and the log, which begins anew when large."""
    large = log.exists() and log.stat().st_size > LOG_BYTES
    with log.open("w" if large else "a") as file:
        print(f"$ {command}", file=file)
        for line in process.stdout or ():
            lines.append(line)
            print(line, end="", flush=True)
            print(line, end="", file=file, flush=True)


def end(process: subprocess.Popen[str]) -> None:
    """Asks the command and its children to stop, then stops them."""
    for number, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 2.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def say(text: str) -> None:
    print(text, flush=True)
