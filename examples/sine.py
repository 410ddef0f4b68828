"""Predict the next sample of a sine wave, the hidden state carried from chunk to chunk.

The wave is one endless sequence, trained in chunks. Each chunk starts from the state in which the
last one ended, so the network's memory is longer than what fits into a backward pass. The state is
detached in between: its value goes on, its graph does not (truncated backpropagation through
time). Without ``detach`` the second ``backward`` would walk into a graph that the first has freed.

One sample does not tell whether the wave is rising or falling. The best guess from ``sin t`` alone
is ``cos δ sin t``, with a mean squared error of ``sin²δ / 2``; less takes a memory. The report sets
the trained network beside this bound, and also beside itself with the state cleared before each
chunk: then the first prediction of a chunk is as ambiguous again as it ever was.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fused_rnn

CHUNK, HIDDEN = 20, 32
STEP = 0.3  # δ, in radians; a chunk is 0.95 periods, so that each starts at another phase

State = Tensor | tuple[Tensor, ...] | None


class Predictor(nn.Module):
    def __init__(self, cell: str):
        super().__init__()
        self.rnn = getattr(fused_rnn, cell)(1, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        h, state = self.rnn(x, state)
        return self.head(h), state


def detach(state: State) -> State:
    """LSTM's state is a pair (h, c); RNN's and GRU's is one tensor."""
    if isinstance(state, tuple):
        return tuple(part.detach() for part in state)
    return None if state is None else state.detach()


def chunk(index: int) -> tuple[Tensor, Tensor]:
    """Samples of chunk ``index``, and the sample after each: both ``[T, 1, 1]``."""
    t = torch.arange(index * CHUNK, (index + 1) * CHUNK + 1, dtype=torch.float64)
    wave = torch.sin(t * STEP).float().view(-1, 1, 1)
    return wave[:-1], wave[1:]


def train(model: Predictor, steps: int) -> tuple[list[float], State]:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    state: State = None
    losses = []
    for index in range(steps):
        x, y = chunk(index)
        predicted, state = model(x, detach(state))
        loss = mse_loss(predicted, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, detach(state)


@torch.no_grad()
def follow(model: Predictor, state: State, start: int, chunks: int, carry: bool) -> Tensor:
    """Predictions of the chunks that follow the training, ``[chunks * CHUNK]``."""
    predictions = []
    for index in range(start, start + chunks):
        y, state = model(chunk(index)[0], state if carry else None)
        predictions.append(y.flatten())
    return torch.cat(predictions)


@torch.no_grad()
def dream(model: Predictor, state: State, start: int, length: int) -> Tensor:
    """Hear one true sample, then each time the network's own last prediction."""
    x = chunk(start)[0][:1]
    wave = []
    for _ in range(length):
        x, state = model(x, state)
        wave.append(x.flatten())
    return torch.cat(wave)


def plot(path: Path, losses: list[float], waves: dict[str, Tensor]) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    top.semilogy(losses)
    top.axhline(math.sin(STEP) ** 2 / 2, color="gray", linestyle=":", label="sin²δ / 2")
    top.set(xlabel="chunk", ylabel="mean squared error", title="training")
    top.legend()
    for (name, wave), style in zip(waves.items(), ["k-", "o", "x", "--"], strict=True):
        bottom.plot(wave.numpy(), style, label=name, markersize=4)
    bottom.set(xlabel="sample after training", title="next sample", ylim=(-1.8, 1.3))
    bottom.legend(loc="lower left", ncols=4)
    figure.savefig(path, dpi=120)


class Result(NamedTuple):
    losses: list[float]
    memoryless: float  # sin²δ / 2
    carried: float  # mean squared error after training
    first_carried: float  # of the first sample of each chunk
    first_cleared: float
    dreamed: float
    plot: Path


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500, help="chunks to train on")
    parser.add_argument("--cell", choices=["RNN", "LSTM", "GRU"], default="RNN")
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder of the plot")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    model = Predictor(args.cell)
    losses, state = train(model, args.steps)

    chunks = 4
    truth = torch.cat([chunk(args.steps + i)[1].flatten() for i in range(chunks)])
    carried = follow(model, state, args.steps, chunks, carry=True)
    cleared = follow(model, state, args.steps, chunks, carry=False)
    dreamed = dream(model, state, args.steps, chunks * CHUNK)

    args.out.mkdir(parents=True, exist_ok=True)
    result = Result(
        losses=losses,
        memoryless=math.sin(STEP) ** 2 / 2,
        carried=mse_loss(carried, truth).item(),
        first_carried=mse_loss(carried[::CHUNK], truth[::CHUNK]).item(),
        first_cleared=mse_loss(cleared[::CHUNK], truth[::CHUNK]).item(),
        dreamed=mse_loss(dreamed, truth).item(),
        plot=args.out / f"sine_{args.cell.lower()}.png",
    )
    waves = {"truth": truth, "carried": carried, "cleared": cleared, "dreamed": dreamed}
    plot(result.plot, losses, waves)

    print(f"{args.cell}: next sample of a sine, mean squared error")
    for step in sorted({*range(0, args.steps, max(1, args.steps // 5)), args.steps - 1}):
        print(f"  chunk {step:>4}  {losses[step]:.6f}")
    print(f"after training, state carried     {result.carried:.6f}")
    print(f"best without a memory, sin²δ / 2  {result.memoryless:.6f}")
    print(f"first of each chunk, carried      {result.first_carried:.6f}")
    print(f"first of each chunk, cleared      {result.first_cleared:.6f}")
    print(f"fed its own predictions           {result.dreamed:.6f}")
    print(f"plot: {result.plot}")
    return result


if __name__ == "__main__":
    main()
