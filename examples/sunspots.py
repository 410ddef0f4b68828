"""Forecast sunspots for a whole cycle, and ask whether the network is worth its while.

The data are real: the yearly sunspot numbers from 1700 to 2008 that come with statsmodels. From
what it has read up to a year, a GRU forecasts the next eleven, about one solar cycle. It learns
from the years before 1920; those before 1950 say when to stop; the rest it never sees.

Simple forecasts of this series are not bad. So the report sets four beside the network's, from one
to eleven years ahead: the last number again, the mean, the last cycle again, and a linear
autoregression over eleven years (Yule, 1927, doi:10.1098/rsta.1927.0007, fitted the first one, to
this very series), which is one least-squares problem.

The cycles after 1950 are higher than all that the network has learned from. It is therefore shown
the past with its amplitude changed at random; ``--vary 0`` shows what becomes of it without.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fused_rnn

FIRST, STOP, UNSEEN = 1700, 1920, 1950  # the first years of the data and of its last two parts
AHEAD = 11
WINDOW, BATCH = 80, 16  # years that are read in training, and how many such windows at once
NOISE = 0.3  # on what is read in training


class Forecaster(nn.Module):
    def __init__(self, namespace: ModuleType, hidden: int):
        super().__init__()
        self.gru = namespace.GRU(1, hidden)
        self.head = nn.Linear(hidden, AHEAD)

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers ``[T, N]`` to the forecasts made in each year, ``[T, N, AHEAD]``."""
        h, _ = self.gru(numbers.unsqueeze(-1))
        return self.head(h)


def read_numbers() -> Tensor:
    """One number a year, ``[years]``."""
    try:
        from statsmodels.datasets import sunspots
    except ModuleNotFoundError:
        sys.exit("sunspots.py reads the data that come with statsmodels: pip install statsmodels")
    data = sunspots.load_pandas().data
    assert data["YEAR"].iloc[0] == FIRST
    return torch.tensor(data["SUNACTIVITY"].to_numpy(), dtype=torch.float32)


def next_years(numbers: Tensor) -> Tensor:
    """What is to be forecast in each year, ``[years, AHEAD]``; NaN where the data end."""
    return torch.cat([numbers, numbers.new_full((AHEAD,), math.nan)]).unfold(0, AHEAD, 1)[1:]


def forecast_years(years: int) -> Tensor:
    """The years that are forecast in each year, ``[years, AHEAD]``."""
    return FIRST + 1 + torch.arange(years).unsqueeze(1) + torch.arange(AHEAD)


def errors(forecasts: Tensor, numbers: Tensor, start: int, end: int) -> Tensor:
    """Root mean squared error of forecasts of the years ``start`` to ``end - 1``, ``[AHEAD]``."""
    year = forecast_years(len(numbers))
    square = (forecasts - next_years(numbers)).square()
    return square.where((start <= year) & (year < end), math.nan).nanmean(0).sqrt()


def scaled(numbers: Tensor) -> Tensor:
    """What the network reads and forecasts: the spread of counts grows with their root."""
    return (numbers / 50).sqrt() * 2 - 1.6


def unscaled(values: Tensor) -> Tensor:
    return ((values + 1.6) / 2).clamp(min=0).square() * 50


class Training(NamedTuple):
    losses: list[float]
    stopping: list[float]  # errors on the years that say when to stop, every tenth step
    forecasts: Tensor  # [years, AHEAD], of the network as it was when that error was least


def train(model: Forecaster, numbers: Tensor, steps: int, vary: float) -> Training:
    goals, may_learn = next_years(numbers), forecast_years(len(numbers)) < STOP
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses, stopping, best = [], [], (math.inf, torch.empty(0))
    for step in range(steps):
        window = torch.randint(STOP - FIRST - WINDOW, (BATCH,)) + torch.arange(WINDOW).unsqueeze(1)
        amplitude = (vary * torch.randn(BATCH)).exp()
        x = scaled(numbers[window] * amplitude)
        wanted = scaled(goals[window] * amplitude.unsqueeze(-1))
        # In its first years the network has not yet read what it needs.
        counts = may_learn[window] & (torch.arange(WINDOW) >= AHEAD).view(-1, 1, 1)
        miss = model(x + NOISE * torch.randn(x.shape)) - wanted
        loss = miss[counts].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            with torch.no_grad():
                forecasts = unscaled(model(scaled(numbers).unsqueeze(1)).squeeze(1))
            stopping.append(errors(forecasts, numbers, STOP, UNSEEN).mean().item())
            best = min(best, (stopping[-1], forecasts), key=lambda found: found[0])
    return Training(losses, stopping, best[1])


def autoregression(numbers: Tensor) -> Tensor:
    """Each of the next years as a linear function of the last ``AHEAD``, fitted before 1950."""
    past = torch.cat([numbers.new_full((AHEAD - 1,), math.nan), numbers]).unfold(0, AHEAD, 1)
    x = torch.cat([past, torch.ones(len(past), 1)], dim=1).double()
    known = (forecast_years(len(numbers)) < UNSEEN) & ~past.isnan().any(1, keepdim=True)
    columns = []
    for goal, rows in zip(next_years(numbers).double().T, known.T, strict=True):
        columns.append(x @ torch.linalg.lstsq(x[rows], goal[rows].unsqueeze(1)).solution)
    return torch.cat(columns, dim=1).float()


def simple_forecasts(numbers: Tensor) -> dict[str, Tensor]:
    """``[years, AHEAD]`` each."""
    before = torch.cat([numbers.new_full((AHEAD - 1,), math.nan), numbers])
    return {
        "the last number again": numbers.unsqueeze(1).expand(-1, AHEAD),
        "the mean": numbers[: UNSEEN - FIRST].mean().expand(len(numbers), AHEAD),
        "the last cycle again": before.unfold(0, AHEAD, 1),
        "autoregression": autoregression(numbers),
    }


def plot(path: Path, numbers: Tensor, training: Training, table: dict[str, Tensor]) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        sys.exit("sunspots.py draws with matplotlib: pip install matplotlib")
    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    years = FIRST + torch.arange(len(numbers))
    shown = years >= STOP
    top.plot(years[shown], numbers[shown], "k.-", label="counted")
    one_ahead = training.forecasts[:-1, 0]
    top.plot(years[1:][shown[1:]], one_ahead[shown[1:]], "C0--", label="forecast a year before")
    for start in range(UNSEEN - 1, FIRST + len(numbers) - AHEAD, AHEAD):
        ahead = start + 1 + torch.arange(AHEAD)
        label = "forecast for a cycle" if start == UNSEEN - 1 else None
        top.plot(ahead, training.forecasts[start - FIRST], "C1o-", markersize=3, label=label)
    top.axvspan(STOP, UNSEEN - 1, color="0.93", label="says when to stop")
    top.set(xlabel="year", ylabel="sunspots")
    top.legend(loc="upper left", fontsize="small")
    for name, row in table.items():
        bottom.plot(1 + torch.arange(AHEAD), row, "o-", label=name)
    bottom.set(xlabel="years ahead", ylabel="error from 1950 on (RMS)", ylim=(0, None))
    bottom.legend(fontsize="small")
    figure.savefig(path, dpi=120)


class Result(NamedTuple):
    training: Training
    table: dict[str, Tensor]  # RMS error on the unseen years, [AHEAD] each
    plot: Path


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--vary", type=float, default=0.5, help="spread of the log amplitude")
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder of the plot")
    parser.add_argument("--torch", action="store_true", help="use torch.nn.GRU")
    args = parser.parse_args(argv)

    numbers = read_numbers()
    torch.manual_seed(args.seed)
    model = Forecaster(nn if args.torch else fused_rnn, args.hidden)
    training = train(model, numbers, args.steps, args.vary)
    forecasts = {"the network": training.forecasts, **simple_forecasts(numbers)}
    end = FIRST + len(numbers)
    table = {name: errors(found, numbers, UNSEEN, end) for name, found in forecasts.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    result = Result(training, table, args.out / "sunspots.png")
    plot(result.plot, numbers, training, table)

    least = min(training.stopping)
    print(f"loss {training.losses[0]:.3f} -> {training.losses[-1]:.3f}; least error in the years")
    print(
        f"that say when to stop: {least:.1f}, after step {10 * training.stopping.index(least) + 10}"
    )
    print(f"sunspots from {UNSEEN} to {end - 1}, root mean squared error, by years ahead")
    print(f"{'':<22}" + "".join(f"{ahead:>6}" for ahead in range(1, AHEAD + 1)) + "   mean")
    for name, row in table.items():
        print(f"{name:<22}" + "".join(f"{e:>6.1f}" for e in row.tolist()) + f"{row.mean():>7.1f}")
    print(f"plot: {result.plot}")
    return result


if __name__ == "__main__":
    main()
