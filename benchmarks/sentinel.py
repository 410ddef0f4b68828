"""``make sentinel``: whether a change lost speed against torch.nn, on six shapes and one thread.

Each shape's ratio is measured anew, as ``make bench`` measures it, and held against that of the
latest run of ``make bench`` whose rows are kept for this processor, build and torch. The exit
status is 1 where it stays more than 30 % below in each of three tries, or where a result is wrong.
On a processor without rows there is nothing to compare, and that is said.
"""

import sys
from pathlib import Path

import results

import fused_rnn
from fused_rnn.bench import rows, workloads
from fused_rnn.bench.measure import Bench, Point
from fused_rnn.bench.providers import find
from fused_rnn.bench.rows import Provenance, Row

LOSS, TRIES = 0.3, 3
SENTINELS = (
    ("lstm-128-16-64", "train"),
    ("lstm-128-16-256", "forward"),
    ("gru-128-1-64", "train"),
    ("rnn-128-16-256", "train"),
    ("lstm-packed", "train"),
    ("gru-step", "step"),
)
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


def main() -> int:
    try:
        path, kept = before(rows.provenance(fused_rnn))
    except LookupError as nothing:
        print(nothing)
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
