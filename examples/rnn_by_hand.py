"""A recurrent network written by hand from three linear layers, against ``fused_rnn.RNN``.

    h_t = tanh(i2h(x_t) + h2h(h_{t-1}))        y_t = h2o(h_t)

The task needs memory: the network hears a random signal and must repeat it two steps late. Both
networks start from the same weights, see the same batches and are trained with Adam on the mean
squared error, so their losses must agree from the first step to the last.

A correction to the tutorial this follows: there the output head reads ``i2h(x_t)`` and so reaches
past the hidden state. Such a network is a plain linear map of the present input. It cannot
remember, and its ``h2h`` never receives a gradient. The head belongs on the hidden state, as
here; the uncorrected network is trained beside it to show the difference.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fused_rnn

DELAY = 2
TIME, BATCH, HIDDEN = 20, 32, 32


class HandRNN(nn.Module):
    """Three linear layers and a loop over time. ``x`` is ``[T, N, I]``."""

    def __init__(self, inputs: int, hidden: int, outputs: int, head_reads_past: bool = False):
        super().__init__()
        self.i2h = nn.Linear(inputs, hidden)
        self.h2h = nn.Linear(hidden, hidden)
        self.h2o = nn.Linear(hidden, outputs)
        self.head_reads_past = head_reads_past

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], self.h2h.in_features)
        y = []
        for x_t in x:
            drive = self.i2h(x_t)
            h = torch.tanh(drive + self.h2h(h))
            y.append(self.h2o(drive if self.head_reads_past else h))
        return torch.stack(y)


class FusedRNN(nn.Module):
    """The same network: one call runs the whole loop, and the head reads all its states."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.rnn = fused_rnn.RNN(inputs, hidden)
        self.h2o = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(x)
        return self.h2o(h)

    @torch.no_grad()
    def copy_from(self, hand: HandRNN) -> None:
        self.rnn.weight_ih_l0.copy_(hand.i2h.weight)
        self.rnn.bias_ih_l0.copy_(hand.i2h.bias)
        self.rnn.weight_hh_l0.copy_(hand.h2h.weight)
        self.rnn.bias_hh_l0.copy_(hand.h2h.bias)
        self.h2o.load_state_dict(hand.h2o.state_dict())


def delayed_signal(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform noise in [-1, 1], and the same noise ``DELAY`` steps late (zeros first)."""
    x = torch.rand(TIME, BATCH, 1, generator=generator) * 2 - 1
    y = torch.zeros_like(x)
    y[DELAY:] = x[:-DELAY]
    return x, y


def train(model: nn.Module, steps: int, seed: int) -> tuple[list[float], float]:
    """The loss of every step, and the seconds they took."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    start = time.perf_counter()
    for _ in range(steps):
        x, y = delayed_signal(generator)
        loss = mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


class Result(NamedTuple):
    hand: list[float]  # losses, one a step
    fused: list[float]
    past: list[float]  # of the network whose head reads past the hidden state
    silence: float  # error of always answering zero: what a network without memory can reach
    past_h2h_has_grad: bool


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    hand = HandRNN(1, HIDDEN, 1)
    fused = FusedRNN(1, HIDDEN, 1)
    fused.copy_from(hand)
    past = HandRNN(1, HIDDEN, 1, head_reads_past=True)
    past.load_state_dict(hand.state_dict())

    hand_losses, hand_seconds = train(hand, args.steps, args.seed)
    fused_losses, fused_seconds = train(fused, args.steps, args.seed)
    past_losses, _ = train(past, args.steps, args.seed)

    _, y = delayed_signal(torch.Generator().manual_seed(args.seed + 1))
    silence = y.square().mean().item()

    print(f"Repeat a random signal {DELAY} steps late: mean squared error")
    print(f"{'step':>6}  {'by hand':>10}  {'fused_rnn':>10}  {'head past h':>11}")
    for step in sorted({*range(0, args.steps, max(1, args.steps // 6)), args.steps - 1}):
        print(
            f"{step:>6}  {hand_losses[step]:>10.6f}  {fused_losses[step]:>10.6f}"
            f"  {past_losses[step]:>11.6f}"
        )
    apart = max(abs(a - b) for a, b in zip(hand_losses, fused_losses, strict=True))
    has_grad = past.h2h.weight.grad is not None
    print(f"largest difference between the first two, all steps: {apart:.1e}")
    print(f"always answering zero: {silence:.6f}, the best that a network without memory can do")
    print(f"with the head past h, h2h received a gradient: {'yes' if has_grad else 'no'}")
    print(f"training took {hand_seconds:.2f} s by hand, {fused_seconds:.2f} s with fused_rnn.RNN")
    return Result(hand_losses, fused_losses, past_losses, silence, has_grad)


if __name__ == "__main__":
    main()
