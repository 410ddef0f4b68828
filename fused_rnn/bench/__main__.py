"""Checks and times recurrent layers: each provider against torch.nn in float64, then in turn.

    python -m fused_rnn.bench                                   the small workloads
    python -m fused_rnn.bench --workload rnnoise,'lstm-*'       some, whatever their size
    python -m fused_rnn.bench --grid H=64,256 N=1,16 --cell gru --providers fused_rnn:cpu,torch,loop
    python -m fused_rnn.bench --dtype float32,bfloat16 --pass forward --threads 1,2 --out rows.csv

Rows are in the file the moment they are measured. A run that was interrupted goes on when the same
command is given again: rows of the same code, build, device and torch are not measured twice.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

import fused_rnn

from . import workloads
from .arithmetic import DTYPES
from .measure import HEAD, LEAST, Bench, Point, points, run
from .providers import KNOWN, find
from .rows import Writer, cores, earlier, provenance
from .workloads import GATES

try:
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        "python -m fused_rnn.bench needs tqdm: pip install 'fused_rnn[bench]'"
    ) from error

KINDS = ("forward", "train", "step")
GRID_CELLS = ("rnn_tanh", "lstm", "gru")


def names(text: str) -> list[str]:
    return text.split(",")


def parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--workload", type=names, default=[], metavar="A,B", help="names or patterns (lstm-*)")
    add("--all", action="store_true", help="the large workloads too")
    add("--today", action="store_true", help="tasks of today.py instead (providers: plain, too)")
    add(
        "--grid",
        nargs="+",
        metavar="X=A,B",
        help="sizes instead (T N I H L D P; I is H by default)",
    )
    add("--cell", type=names, default=[], metavar="A,B", help=f"of {', '.join(GATES)}")
    add("--dtype", type=names, default=["float32"], metavar="A,B", help=f"of {', '.join(DTYPES)}")
    add("--pass", type=names, default=[], dest="kinds", metavar="A,B", help=", ".join(KINDS))
    add(
        "--providers",
        type=names,
        default=["fused_rnn", "torch"],
        metavar="A,B",
        help=f"of {', '.join(KNOWN)} (default: fused_rnn,torch)",
    )
    add("--threads", type=names, default=["1"], metavar="A,B", help="default: 1")
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--input-gradient", action="store_true", help="layer 0's input needs one too, in training")
    add("--budget", type=float, metavar="S", help="seconds for all (default: one a row)")
    add("--least", type=int, default=LEAST, help=f"repeats at least (default: {LEAST})")
    add("--out", type=Path, default=Path("rows.csv"), help="file of rows (default: rows.csv)")
    return made


def chosen(arguments: argparse.Namespace) -> tuple[list[Point], dict[str, str]]:
    """What the options ask for, and what is left out with the reason.

    Raises:
        ValueError: an option names what there is not.
    """
    for given, known in (
        (arguments.cell, GATES),
        (arguments.dtype, DTYPES),
        (arguments.kinds, KINDS),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"unknown {name!r}: expected one of {', '.join(known)}")
    if arguments.grid:
        left_out: dict[str, str] = {}
        cells = arguments.cell or GRID_CELLS
        found = workloads.grid(cells, arguments.grid, arguments.kinds)
    else:
        found, left_out = workloads.select(
            workloads.load(workloads.TODAY if arguments.today else workloads.FILE),
            only=arguments.workload,
            everything=arguments.all,
        )
        found = [w for w in found if not arguments.cell or w.cell in arguments.cell]
    threads = sorted({int(count) for count in arguments.threads})
    if threads[0] < 1 or threads[-1] > cores():
        raise ValueError(f"--threads {threads}: this process may use {cores()} cores")
    if arguments.device == "cpu" and "tf32" in arguments.dtype:
        raise ValueError("--dtype tf32 is a GPU's: give --device cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: torch {torch.__version__} sees no GPU")
    return points(found, arguments.dtype, arguments.kinds or KINDS, threads), left_out


def main(argv: list[str] | None = None) -> int:
    reader = parser()
    arguments = reader.parse_args(argv)
    try:
        wanted, left_out = chosen(arguments)
        providers = [find(name) for name in arguments.providers]
    except ValueError as error:
        reader.error(str(error))
    if not wanted:
        reader.error("nothing is left to measure: no workload has that cell and pass")
    silence()
    origin = provenance(fused_rnn, arguments.device)
    bench = Bench(providers, arguments.device, arguments.input_gradient)
    done = {row.key for row in earlier(arguments.out, origin)}
    missing = [point for point in wanted if not bench.keys(point) <= done]
    print(f"{origin.device}; torch {origin.torch}, Python {origin.python}, commit {origin.commit}")
    print(f"{len(missing)} of {len(wanted)} points to measure, into {arguments.out}\n{HEAD}")
    try:
        with Writer(arguments.out, origin, append=True) as writer:
            rows, late = run(
                bench,
                missing,
                writer,
                budget=arguments.budget,
                least=arguments.least,
                progress=progress,
                say=tqdm.write,
            )
    except KeyboardInterrupt:
        print(f"\nstopped; what was measured is in {arguments.out}, the same command goes on")
        return 130
    except ValueError as error:  # a file of another version
        reader.error(str(error))
    for name, reason in (left_out | late).items():
        print(f"left out: {name}: {reason}")
    bad = [f"{r.workload} {r.kind} {r.provider}: {r.status}" for r in rows if r.is_bad]
    print(f"{len(rows)} rows in {arguments.out}, {len(bad)} wrong or failed", *bad, sep="\n   ")
    return 1 if bad else 0


def progress(wanted: list[Point]) -> Iterable[Point]:
    """A bar with the time left, on a terminal."""
    return tqdm(wanted, unit="point", disable=None, dynamic_ncols=True)


def silence() -> None:
    """torch.nn's word that its own projections are slow; the oracle hears it too."""
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")


if __name__ == "__main__":
    sys.exit(main())
