"""Puts the measurements of a GPU into the table by which ``backend="auto"`` chooses there.

``python benchmarks/tune.py benchmarks/results/<device>`` takes ``grid.csv`` of that folder, what
``make gpu-check PIECE=bench`` measured, and replaces the GPU's rows in
``fused_rnn/backends/tuning.csv``. Points where ours was wrong, failed or has no time leave none.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import gpu_rows
from gpu_points import ARITHMETICS

from fused_rnn.backends import tuning
from fused_rnn.backends.tuning import Key, Row

OURS = "cuda"
"""The provider that "auto" would run instead of torch.nn."""


def rows(lines: Iterable[dict[str, str]], source: str) -> Iterator[Row]:
    """What the lines of a ``grid.csv`` say of ours."""
    for line in lines:
        told = line["provider"] == OURS and line["status"] == "ok" and line["ratio"]
        if not told or line["kind"] == "step" or line["projection"] != "0":
            continue
        arithmetic = ARITHMETICS[line["dtype"]]
        key = Key(
            device=line["device"],
            cell=line["cell"],
            dtype=str(arithmetic.dtype).removeprefix("torch."),
            tf32=arithmetic.tf32,
            grad=line["kind"] == "train",
            layers=int(line["layers"]),
            directions=int(line["directions"]),
            packed=bool(line["lengths"]),
        )
        sizes = (int(line["T"]), int(line["N"]), int(line["H"]))
        algorithm = line["algorithm"].partition(":")[0]
        yield Row(key, *sizes, round(float(line["ratio"]), 3), algorithm, source)


def newest(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """The lines of the sources that were measured last."""
    last = max(lines, key=lambda line: line["date"], default={"sources": ""})
    return [line for line in lines if line["sources"] == last["sources"]]


def write(path: Path, table: Iterable[Row]) -> None:
    """The table as :func:`fused_rnn.backends.tuning.read` reads it."""
    columns = (*Key._fields, *Row._fields[1:])
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in sorted(table):
            writer.writerow(int(x) if isinstance(x, bool) else x for x in (*row.key, *row[1:]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a device's folder under benchmarks/results")
    parser.add_argument("--table", type=Path, default=tuning.TABLE, help="default: the package's")
    arguments = parser.parse_args(argv)
    path = arguments.folder / "grid.csv"
    lines = newest(gpu_rows.lines(path))
    found = list(rows(lines, f"benchmarks/results/{arguments.folder.name}/grid.csv"))
    if not found:
        print(f"{path} holds no measurement of ours", file=sys.stderr)
        return 1
    devices = {row.key.device for row in found}
    with arguments.table.open(newline="") as file:
        kept = [r for r in tuning.read(csv.DictReader(file)) if r.key.device not in devices]
    write(arguments.table, [*kept, *found])
    print(f"{len(found)} rows of {', '.join(sorted(devices))} in {arguments.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
