"""Errors against float64, ours and torch.nn's, by cell and dtype.

``python benchmarks/errors.py`` runs the forms of ``fused_rnn/bench/check.py`` on the CPU's
backends, writes ``results/<device>/errors.csv`` and docs/numerics.md. Nothing is timed.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import results
import torch
from torch import nn

import fused_rnn
from fused_rnn.backends import BACKENDS
from fused_rnn.bench import check, rows
from fused_rnn.bench.__main__ import silence
from fused_rnn.bench.check import Comparison

PAGE = results.ROOT.parent / "docs" / "numerics.md"
RULE = f"""# Numerics

The rule, for every cell, dtype, option and backend: the largest error of each output, final state
and gradient, against torch.nn in float64, is at most {check.FACTOR} times that of torch.nn in the
same dtype, plus {check.ULPS} units in the last place of the tensor's largest value
({check.FLOAT64_ULPS} in float64, where torch.nn is the oracle and two orders of summation may
differ). The tests hold all backends to it; `make bench` checks it before it times anything.

Half types are stored in half and computed in float32: operands are widened at load, results rounded
once at store, and the state that goes from step to step stays float32. So there ours can err less
than torch.nn. On the CPU sums over many rows are made of sums over blocks of at most 256 rows.

The table has the largest errors over {len(check.FORMS)} forms (odd sizes, layers, directions,
dropout, packed input, projections, cells, with and without first states), in units of the dtype's
epsilon times the tensor's largest value. A ReLU in half types runs on integers, where forward is
exact: elsewhere rounding flips signs, and its gradient jumps."""


@dataclass(frozen=True)
class Errors(rows.Line):
    """The largest errors of one kind of result. ``ours`` and ``torch_nn`` are in units of epsilon
    times the oracle's largest value; ``share`` is the worst tensor's error over the allowed one."""

    backend: str
    cell: str
    dtype: str
    result: str
    tensors: int
    ours: float
    torch_nn: float
    share: float

    @classmethod
    def of(cls, result: str, compared: list[Comparison], **where: str) -> "Errors":
        eps = torch.finfo(getattr(torch, where["dtype"])).eps
        unit = [(c, eps * (c.scale or 1.0)) for c in compared]
        return cls(
            **where,
            result=result,
            tensors=len(compared),
            ours=max(c.error / u for c, u in unit),
            torch_nn=max(c.torch_error / u for c, u in unit),
            share=max(c.share for c in compared),
        )


def measure(backend: str) -> list[Errors]:
    """The errors of a backend of the CPU."""
    found = []
    providers, options = {"fused_rnn": fused_rnn, "torch": nn}, {"fused_rnn": {"backend": backend}}
    for cell, dtype, compared in check.check_all(providers, options):
        where = {"backend": backend, "cell": cell, "dtype": dtype}
        gradients = [c for c in compared if ": d " in c.where]
        outputs = [c for c in compared if c not in gradients]
        found += [
            Errors.of("outputs", outputs, **where),
            Errors.of("gradients", gradients, **where),
        ]
    return found


def page(path: Path) -> str:
    """docs/numerics.md, of a file of errors."""
    lines = rows.lines(path)
    origin = lines[0]
    head = ("backend", "cell", "dtype", "result", "tensors", "ours", "torch.nn", "of the allowed")
    table = [f"| {' | '.join(head)} |", "|---|---|---|---|---:|---:|---:|---:|"]
    for line in lines:
        e = Errors.parse(line)
        numbers = f"{e.tensors} | {e.ours:.3g} | {e.torch_nn:.3g} | {e.share:.0%}"
        table.append(f"| {e.backend} | {e.cell} | {e.dtype} | {e.result} | {numbers} |")
    told = (
        f"Found on {origin['device']}, {origin['date'][:10]}, commit {origin['commit']}; torch "
        f"{origin['torch']}, {origin['build']}. Command: `{origin['command']}`; rows: "
        f"`{path.relative_to(results.ROOT.parent)}`. On GPUs: not yet found."
    )
    return "\n\n".join([RULE, "\n".join(table), told]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="results folder")
    arguments = parser.parse_args(argv)
    silence()
    torch.set_num_threads(1)
    origin = rows.provenance(fused_rnn)
    path = arguments.out / origin.slug / "errors.csv"
    worst = 0.0
    with rows.Writer(path, origin, Errors) as writer:
        for name in ("cpu", "reference"):
            if BACKENDS[name].available() is None:
                for errors in measure(name):
                    writer.write(errors)
                    worst = max(worst, errors.share)
                    print(errors)
    if arguments.out == results.RESULTS:
        PAGE.write_text(page(path))
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
