"""``make sentinel``: whether a change lost speed against torch.nn, on six shapes and one thread.

Each shape's ratio is measured anew, as ``make bench`` measures it, and held against that of the
latest run of ``make bench`` whose rows are kept for this processor, build and torch. The exit
status is 1 where it stays more than 30 % below in each of three tries, or where a result is wrong.
On a processor without rows, or with ``--count``, valgrind counts the instructions of such calls
instead, as the AVX2 build runs them: the same on every machine but for the compiler. They are told
beside those that are kept (``--keep`` keeps new ones), and fail nothing.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import results

import fused_rnn
from fused_rnn.bench import rows, workloads
from fused_rnn.bench.measure import Bench, Point
from fused_rnn.bench.providers import find
from fused_rnn.bench.rows import Line, Provenance, Row, Writer
from fused_rnn.cells import CELLS

LOSS, TRIES = 0.3, 3
SENTINELS = (
    ("lstm-128-16-64", "train"),
    ("lstm-128-16-256", "forward"),
    ("gru-128-1-64", "train"),
    ("rnn-128-16-256", "train"),
    ("lstm-packed", "train"),
    ("gru-step", "step"),
)
COUNTED = (
    ("lstm", 16, 16, 64, "train"),
    ("lstm", 16, 16, 256, "forward"),
    ("gru", 16, 1, 64, "train"),
    ("rnn_tanh", 16, 16, 256, "train"),
    ("lstm", 16, 32, 128, "train"),
    ("gru", 16, 16, 256, "forward"),
)
COUNTS = results.RESULTS / "instructions.csv"
OURS = "fused_rnn"
SAME = ("cpu", "build", "torch")


def before(here: Provenance, folder: Path = results.RESULTS) -> tuple[Path, dict[object, Row]]:
    """The latest run kept for a processor, build and torch, and our rows in it.

    Raises:
        LookupError: there is none.
    """
    for path in results.complete(folder):
        found, there = rows.read(path)
        kept = {row.key: row for row in found if row.provider == OURS and row.ratio and row.counts}
        if kept and all(getattr(there, name) == getattr(here, name) for name in SAME):
            return path, kept
    what = ", ".join(getattr(here, name) for name in SAME)
    raise LookupError(f"no rows are kept of {what}: nothing to compare")


@dataclass(frozen=True)
class Count(Line):
    """Instructions of the loops of one call."""

    call: str
    instructions: int


def counts(program: Path) -> Iterator[Count]:
    """One for each of :data:`COUNTED`.

    Raises:
        LookupError: there is no valgrind, no compiler, or no AVX2 build of the loops.
    """
    built = [*results.ROOT.parent.glob("build/release-*/kernels.avx2.float.o")]
    if not built:
        raise LookupError("nothing is counted: build/ holds no kernels.avx2.float.o")
    compiler = [os.environ.get("CXX") or "g++", "-std=c++17", "-O1"]
    source, newest = results.ROOT / "count.cpp", max(built, key=lambda path: path.stat().st_mtime)
    try:
        subprocess.run([*compiler, source, newest, "-o", program], check=True)
        for cell, *sizes, kind in COUNTED:
            call = [str(program), *map(str, (CELLS[cell].id, *sizes)), kind]
            tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
            tool.append("--toggle-collect=counted")
            done = subprocess.run([*tool, *call], check=True, capture_output=True, text=True)
            told = re.search(r"Collected : (\d+)", done.stderr)
            assert told, done.stderr
            yield Count(f"{cell} {':'.join(map(str, sizes))} {kind}", int(told[1]))
    except FileNotFoundError as error:
        raise LookupError(f"nothing is counted: there is no {error.filename}") from error
    except subprocess.CalledProcessError as error:
        raise LookupError(f"nothing is counted: {error}\n{error.stderr or ''}") from error


def count(keep: bool) -> None:
    """Tells the counts, and keeps them where asked to."""
    lines = rows.lines(COUNTS) if COUNTS.exists() else []
    kept = {line["call"]: Count.parse(line) for line in lines}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for now in counts(Path(folder) / "count"):
                old = kept.get(now.call)
                change = f"{now.instructions / old.instructions - 1:+.1%}" if old else "none kept"
                print(f"  {now.call}: {now.instructions / 1e6:.1f} million instructions, {change}")
                found.append(now)
        except LookupError as nothing:
            print(nothing)
            return
    if keep:
        with Writer(COUNTS, rows.provenance(fused_rnn), Count) as writer:
            for now in found:
                writer.write(now)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", action="store_true", help="count instructions, time nothing")
    parser.add_argument("--keep", action="store_true", help=f"in {COUNTS.name}, with --count")
    arguments = parser.parse_args(argv)
    if arguments.count:
        count(arguments.keep)
        return 0
    try:
        path, kept = before(rows.provenance(fused_rnn))
    except LookupError as nothing:
        print(nothing)
        count(keep=False)
        return 0
    print(f"against {path.relative_to(results.ROOT)}; lost: under {1 - LOSS:.0%} of that ratio")
    bench, by_name = Bench([find(OURS), find("torch")]), {w.name: w for w in workloads.load()}
    lost = 0
    for name, kind in SENTINELS:
        point, ratios = Point(by_name[name], "float32", kind), []
        for _ in range(TRIES):
            row = next(row for row in bench.rows(point) if row.provider == OURS)
            old = kept.get(row.key)
            ratios.append(row.ratio or 0.0)
            if row.is_bad or old is None or ratios[-1] >= (1 - LOSS) * (old.ratio or 0.0):
                break
        else:
            lost += 1
        lost += row.is_bad
        told = "no row" if old is None else f"{old.ratio:.2f}×"
        tries = ", ".join(f"{ratio:.2f}×" for ratio in ratios)
        print(f"  {name} {kind}: {told} -> {tries}{'' if row.status == 'ok' else ' ' + row.status}")
    print(f"{lost} of {len(SENTINELS)} lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
