"""Layers of a stack side by side, against one after the other and torch.nn's, on a GPU.

``make gpu-check PIECE=stacks``. The first rows are those of ``docs/kernels/wavefront.md``. Each is
checked against the layers one after the other, then timed as in ``gpu_grid.py``; the rows are in
``<out>/<device>/stacks.csv``. ``--device cpu --tiny`` runs the same code on any machine, where
layers always run one after the other.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import results
import torch
from torch import nn

import fused_rnn
from fused_rnn.backends import cuda
from fused_rnn.bench import timing
from fused_rnn.bench.rows import Line, Writer, provenance
from fused_rnn.bench.timing import Turn

# Cell, T, N, H, layers.
STACKS = (
    ("GRU", 2000, 32, 256, 3), ("GRU", 100, 1, 256, 3), ("LSTM", 150, 4, 512, 2),
    ("LSTM", 1024, 16, 512, 2), ("LSTM", 1024, 16, 512, 4), ("LSTM", 1024, 16, 768, 2),
    ("LSTM", 1024, 64, 256, 3), ("LSTM", 1024, 64, 512, 2),
)  # fmt: skip
TINY = (("LSTM", 6, 3, 8, 2),)
SIDE_BY_SIDE, ONE_BY_ONE, TORCH = "side by side", "one by one", "torch.nn"
TOLERANCE = 0.02
"""Of a gradient's or output's norm: bf16, and the plan may cut up both ways differently."""


@dataclass(frozen=True)
class StackRow(Line):
    """``ratio`` is the time of one layer after the other over this one's, by the repeats' median;
    ``chunks`` the steps of a chunk, forward and backward."""

    cell: str
    T: int
    N: int
    H: int
    L: int
    kind: str
    provider: str
    chunks: str
    p50_ms: float
    ratio: float
    difference: float
    status: str


def one_by_one() -> AbstractContextManager[Any]:
    return patch.object(cuda, "chunks", lambda *_: (0, 0))


def call(module: nn.Module, x: torch.Tensor, how: Callable[[], Any], train: bool) -> list[Any]:
    """The output and, in training, all gradients."""
    with how(), torch.set_grad_enabled(train):
        output, _ = module(x)
        if not train:
            return [output]
        inputs = [x, *module.parameters()]
        return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output))]


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest, as a share of the norm; NaN if there is one."""
    pairs = zip(found, expected, strict=True)
    norms = [((a - b).detach().double().norm(), b.detach().double().norm()) for a, b in pairs]
    shares = [float(apart / norm) for apart, norm in norms]
    return max(shares, key=lambda share: (share != share, share))


def measure(device: str, sizes: tuple[str, int, int, int, int], row_s: float) -> list[StackRow]:
    name, T, N, H, L = sizes
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    backend = "cuda:cluster" if device == "cuda" else "cpu"
    ours = getattr(fused_rnn, name)(H, H, num_layers=L, backend=backend)
    ours = ours.to(device, dtype)
    theirs = getattr(nn, name)(H, H, num_layers=L).to(device, dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, N, H).to(device, dtype).requires_grad_()
    how = {ONE_BY_ONE: (ours, one_by_one), SIDE_BY_SIDE: (ours, nullcontext)}
    how[TORCH] = (theirs, nullcontext)
    stopwatch = timing.CudaStopwatch() if device == "cuda" else timing.wall_clock
    rows = []
    for train in (False, True):
        calls = {p: partial(call, module, x, way, train) for p, (module, way) in how.items()}
        expected = calls[ONE_BY_ONE]()
        apart = {provider: difference(run(), expected) for provider, run in calls.items()}
        turns = {provider: Turn(run) for provider, run in calls.items()}
        samples = timing.interleave(turns, row_s, measure=stopwatch)
        with torch.set_grad_enabled(train):
            problem = ours.describe(x)
        chunks = cuda.chunks(problem, "cluster") if device == "cuda" else (0, 0)
        for provider, seconds in samples.items():
            rows.append(
                StackRow(
                    *sizes,
                    kind="train" if train else "forward",
                    provider=provider,
                    chunks=" ".join(map(str, chunks)) if provider == SIDE_BY_SIDE else "",
                    p50_ms=1e3 * statistics.median(seconds),
                    ratio=timing.median_ratio(samples[ONE_BY_ONE], seconds),
                    difference=apart[provider],
                    status="ok" if apart[provider] <= TOLERANCE else "wrong",  # NaN is
                )
            )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: does it run")
    arguments = parser.parse_args(argv)
    origin = provenance(fused_rnn, arguments.device)
    wrong = count = 0
    path = arguments.out / origin.slug / "stacks.csv"
    with Writer(path, origin, StackRow) as writer:
        for sizes in TINY if arguments.tiny else STACKS:
            for row in measure(arguments.device, sizes, 0.0 if arguments.tiny else 1.0):
                writer.write(row)
                count, wrong = count + 1, wrong + (row.status != "ok")
                print(row, flush=True)
    print(f"{count} rows, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
