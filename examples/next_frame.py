"""Predict the next frame of a 2x2 video, by an RNN and by the MLPs that it unrolls into.

A bright pixel circles through the four places of the frame, from a random start, clockwise or
counter-clockwise, over 50 frames with some noise: 1,000 such videos, in batches of 10. The network
is 4x5x4: four pixels in, five hidden units, four pixels out. From one frame alone the pixel's next
place is one of two. From two it is certain: always opposite to where it was a frame ago.

Unrolled in time the RNN is a chain of 50 MLPs. Each takes a frame and the hidden units of the MLP
before it, and all 50 have the same weights. The program compares outputs and gradients with such a
chain twice: with one MLP used 50 times, and with 50 MLPs that merely start out equal. The gradient
of a shared weight is the sum of what its copies receive, which is all that backpropagation through
time is.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fused_rnn

FRAMES, PIXELS, HIDDEN, BATCH = 50, 4, 5, 10
CLOCKWISE = torch.tensor([0, 1, 3, 2])  # pixel 0 1 above 2 3


class NextFrame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fused_rnn.RNN(PIXELS, HIDDEN)
        self.head = nn.Linear(HIDDEN, PIXELS)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames ``[T, N, 4]`` to the predicted next frames, ``[T, N, 4]``."""
        h, _ = self.rnn(frames)
        return self.head(h)


class MLP(nn.Module):
    """One link of the chain: (frame, hidden units before) to (next frame, hidden units)."""

    def __init__(self, model: NextFrame):
        super().__init__()
        rnn = model.rnn
        self.hidden = nn.Linear(PIXELS + HIDDEN, HIDDEN, dtype=rnn.weight_ih_l0.dtype)
        self.head = copy.deepcopy(model.head)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.cat([rnn.weight_ih_l0, rnn.weight_hh_l0], dim=1))
            self.hidden.bias.copy_(rnn.bias_ih_l0 + rnn.bias_hh_l0)

    def forward(self, frame: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.hidden(torch.cat([frame, h], dim=1)))
        return self.head(h), h


def run_chain(chain: Sequence[MLP], frames: Tensor) -> Tensor:
    h = frames.new_zeros(frames.shape[1], HIDDEN)
    predicted = []
    for mlp, frame in zip(chain, frames, strict=True):
        y, h = mlp(frame, h)
        predicted.append(y)
    return torch.stack(predicted)


def videos(count: int, noise: float, generator: torch.Generator) -> Tensor:
    """``[FRAMES + 1, count, 4]``: one frame more than is shown, to be predicted last."""
    start = torch.randint(4, (count,), generator=generator)
    direction = torch.randint(2, (count,), generator=generator) * 2 - 1
    place = (start + direction * torch.arange(FRAMES + 1).unsqueeze(1)) % 4
    bright = nn.functional.one_hot(CLOCKWISE[place], PIXELS).float()
    return bright + noise * torch.randn(bright.shape, generator=generator)


def batches(video: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    for index in torch.randperm(video.shape[1], generator=generator).split(BATCH):
        yield video[:-1, index], video[1:, index]


def train(model: NextFrame, video: Tensor, epochs: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(epochs):
        total = 0.0
        for x, y in batches(video, generator):
            loss = mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * x.shape[1]
        print(f"  epoch {epoch + 1}  mean squared error {total / video.shape[1]:.5f}")


def max_difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest absolute difference, in units of the largest entry of the tensor compared with."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))


def compare_with_chain(model: NextFrame, x: Tensor, y: Tensor) -> dict[str, float]:
    """Largest differences to the unrolled chain, in float64, where rounding hides little."""
    model = copy.deepcopy(model).double()
    x, y = x.double(), y.double()
    predicted = model(x)
    rnn, head = model.rnn, model.head
    weights = [rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, head.weight, head.bias]
    w_ih, w_hh, bias, *heads = torch.autograd.grad(mse_loss(predicted, y), weights)
    want = [torch.cat([w_ih, w_hh], dim=1), bias, *heads]

    mlp = MLP(model)
    shared = run_chain([mlp] * len(x), x)
    shared_grads = torch.autograd.grad(mse_loss(shared, y), list(mlp.parameters()))

    links = [copy.deepcopy(mlp) for _ in x]
    mse_loss(run_chain(links, x), y).backward()
    # Link by link the same four parameters: hidden.weight, hidden.bias, head.weight, head.bias.
    per_parameter = zip(*(link.parameters() for link in links), strict=True)
    summed = [sum(p.grad for p in copies) for copies in per_parameter]
    return {
        "outputs": max_difference([shared], [predicted]),
        "gradients, one MLP": max_difference(shared_grads, want),
        "gradients, sum over 50 MLPs": max_difference(summed, want),
    }


def plot(path: Path, x: Tensor, y: Tensor, predicted: Tensor, count: int = 8) -> None:
    """The first frames of one video: shown, next, predicted next."""
    figure = Figure(figsize=(count, 3.4), layout="constrained")
    axes = figure.subplots(3, count)
    rows = {"shown": x, "next": y, "predicted": predicted}
    for row, (name, frames) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name)
        for axis, frame in zip(row, frames[:, 0], strict=False):
            axis.imshow(frame.view(2, 2).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


class Result(NamedTuple):
    error: float  # mean squared error on unseen videos
    copy_last: float  # of predicting that nothing moves
    floor: float  # what no predictor can go below
    chain: dict[str, float]
    plot: Path


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.05, help="standard deviation per pixel")
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder of the plot")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = NextFrame()
    print("training on 1000 videos")
    train(model, videos(1000, args.noise, generator), args.epochs, generator)

    unseen = videos(200, args.noise, generator)
    x, y = unseen[:-1], unseen[1:]
    with torch.no_grad():
        predicted = model(x)
    args.out.mkdir(parents=True, exist_ok=True)
    result = Result(
        error=mse_loss(predicted, y).item(),
        copy_last=mse_loss(x, y).item(),
        # Each frame's noise is new, and at the first step two of the four pixels are a coin
        # toss: 0.5 off each at best, hence 1/8 on average over the frame, in one step of FRAMES.
        floor=args.noise**2 + 1 / 8 / FRAMES,
        chain=compare_with_chain(model, x[:, :BATCH], y[:, :BATCH]),
        plot=args.out / "next_frame.png",
    )
    plot(result.plot, x, y, predicted)

    print("unseen videos, mean squared error")
    print(f"  the network           {result.error:.5f}")
    print(f"  copy the last frame   {result.copy_last:.5f}")
    print(f"  the least possible    {result.floor:.5f}")
    print("RNN against the chain of MLPs, largest relative difference")
    for name, difference in result.chain.items():
        print(f"  {name:<28} {difference:.1e}")
    print(f"plot: {result.plot}")
    return result


if __name__ == "__main__":
    main()
