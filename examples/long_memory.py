"""How far back can a recurrent network learn? The gradient through time, and what it decides.

For h_t = σ(z_t), z_t = W_ih x_t + W_hh h_{t-1} + b, and a loss at the last step, the chain rule is

    dL_T/dx_t = W_ihᵀ D_t (W_hhᵀ D_{t+1}) ... (W_hhᵀ D_T) dL/dh_T,    D_t = diag(σ'(z_t))

With one unit each bracket is the number σ'(z)·w: below one the gradient vanishes with the distance
T - t, above one it explodes. With many units the brackets are matrices, each of a spectral norm of
at most ‖W_hh‖₂ max σ'. Their product is a bound: below one it proves that the gradient vanishes,
above one it proves nothing, as the report shows. LSTM and GRU have a path beside it that multiplies
by a gate, and a gate near one forgets little: its bias decides how far the gradient reaches.

    1. ‖dL_T/dx_t‖ by autograd beside the formula and its bound, for RNN, LSTM and GRU
    2. an exploding gradient, with and without clipping
    3. recalling the first symbol of a short and of a long sequence: parameters, time, result

The gates' biases for a memory of T steps are those of Tallec and Ollivier, "Can recurrent neural
networks warp time?" (2018): forget gate log U(1, T - 1), input gate minus that.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import fused_rnn

HIDDEN = 32
SYMBOLS = 4
MEAN_LEVEL_ERROR = 1 / 12  # variance of the levels of part 2: what answering their mean costs


@torch.no_grad()
def remember(rnn: nn.Module, time_steps: int) -> None:
    """Biases for a memory of ``time_steps``. A plain RNN has no gate to set."""
    size = rnn.hidden_size
    bias = torch.empty(size).uniform_(1, time_steps - 1).log_()
    if isinstance(rnn, fused_rnn.LSTM):
        rnn.bias_ih_l0[:size] -= bias  # i
        rnn.bias_ih_l0[size : 2 * size] += bias  # f
    elif isinstance(rnn, fused_rnn.GRU):
        rnn.bias_ih_l0[size : 2 * size] += bias  # z, the share of the old state


def gradient(rnn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``dL_T/dx`` by autograd for ``x [T, 1, I]`` and L_T = sum of h_T, and the states h."""
    x = x.clone().requires_grad_()
    h, _ = rnn(x)
    (dx,) = torch.autograd.grad(h[-1].sum(), x)
    return dx[:, 0], h[:, 0].detach()


@torch.no_grad()
def scalar_formula(rnn: nn.Module, h: Tensor) -> Tensor:
    """``dL_T/dx`` of an RNN with one input and one unit: products of σ'(z)·w, for all t."""
    h = h.flatten()
    slope = (h > 0).to(h) if rnn.nonlinearity == "relu" else 1 - h**2  # tanh' = 1 - tanh²
    factors = slope * rnn.weight_hh_l0.item()
    after = torch.cat([factors[1:], factors.new_ones(1)])  # the factors of steps t+1 ... T
    return rnn.weight_ih_l0.item() * slope * after.flip(0).cumprod(0).flip(0)


@torch.no_grad()
def matrix_formula(rnn: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    """``dL_T/dx`` of a tanh RNN of any size, and the bound on its norm from spectral norms."""
    slope = 1 - h**2
    norm_ih = torch.linalg.matrix_norm(rnn.weight_ih_l0, ord=2)
    norm_hh = torch.linalg.matrix_norm(rnn.weight_hh_l0, ord=2)
    dh = torch.ones_like(h[0])
    bound = dh.norm()
    dx, bounds = [], []
    for slope_t in slope.flip(0):
        dz = slope_t * dh
        bound = bound * slope_t.max()
        dx.append(dz @ rnn.weight_ih_l0)
        bounds.append(bound * norm_ih)
        dh = dz @ rnn.weight_hh_l0
        bound = bound * norm_hh
    return torch.stack(dx).flip(0), torch.stack(bounds).flip(0)


def gradient_norms(time_steps: int) -> dict[str, Tensor]:
    """‖dL_T/dx_t‖ for t = 1 ... T, in float64: the smallest would be zero in float32."""
    curves = {}
    x = torch.randn(time_steps, 1, 4, dtype=torch.float64)
    for nonlinearity, w in (("tanh", 0.9), ("relu", 1.1)):
        one = fused_rnn.RNN(1, 1, bias=False, nonlinearity=nonlinearity, dtype=torch.float64)
        with torch.no_grad():
            one.weight_ih_l0.fill_(0.1)
            one.weight_hh_l0.fill_(w)
        dx, h = gradient(one, x[..., :1].abs())  # input above zero keeps the ReLU unit on
        curves[f"one {nonlinearity}, w = {w}"] = dx.abs().flatten()
        curves[f"  product of σ'(z)·{w}"] = scalar_formula(one, h).abs()

    rnn = fused_rnn.RNN(4, HIDDEN, dtype=torch.float64)
    dx, h = gradient(rnn, x)
    curves["RNN"] = dx.norm(dim=1)
    dx, bound = matrix_formula(rnn, h)
    curves["  product of matrices"] = dx.norm(dim=1)
    curves["  spectral bound"] = bound
    for cell in (fused_rnn.LSTM, fused_rnn.GRU):
        gated = cell(4, HIDDEN, dtype=torch.float64)
        curves[cell.__name__] = gradient(gated, x)[0].norm(dim=1)
        remember(gated, time_steps)
        curves[f"{cell.__name__}, biases for T"] = gradient(gated, x)[0].norm(dim=1)
    return curves


def levels(time_steps: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy sequences ``[T, N, 1]``, each around a level of its own, and the levels ``[N, 1]``."""
    level = torch.rand(batch, 1, generator=generator)
    return 2 * level * torch.rand(time_steps, batch, 1, generator=generator), level


def explode(time_steps: int, clip: float, seed: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of 100 training steps, or of those up to the first NaN.

    ReLU passes gradients whole, and W_hh starts as the identity: w = 1, the edge. The gradient of
    the ill-chosen start is large, one step of plain SGD along it sets w well above one, and w to
    the power of T is more than float32 holds: infinity, and infinity minus infinity.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rnn, head = fused_rnn.RNN(1, HIDDEN, nonlinearity="relu"), nn.Linear(HIDDEN, 1)
    with torch.no_grad():
        nn.init.eye_(rnn.weight_hh_l0)
        rnn.bias_ih_l0.zero_()
        rnn.bias_hh_l0.zero_()
    parameters = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    history: list[tuple[float, float]] = []
    while len(history) < 100 and not (history and math.isnan(history[-1][0])):
        x, y = levels(time_steps, 16, generator)
        loss = mse_loss(head(rnn(x)[0][-1]), y)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip)  # returns the norm before clipping
        optimizer.step()
        history.append((loss.item(), norm.item()))
    return history


class Recall(NamedTuple):
    parameters: int
    seconds: float
    loss: float
    right: float  # share of unseen sequences answered rightly; 1 / SYMBOLS by chance


def first_symbol(time_steps: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of four symbols at the first step, noise on a fifth input at all others."""
    symbol = torch.randint(SYMBOLS, (batch,), generator=generator)
    x = torch.zeros(time_steps, batch, SYMBOLS + 1)
    x[0, torch.arange(batch), symbol] = 1
    x[1:, :, SYMBOLS] = torch.randn(time_steps - 1, batch, generator=generator)
    return x, symbol


def recall(cell: type[nn.Module], time_steps: int, steps: int, seed: int) -> Recall:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rnn, head = cell(SYMBOLS + 1, HIDDEN), nn.Linear(HIDDEN, SYMBOLS)
    remember(rnn, time_steps)
    parameters = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    start = time.perf_counter()
    for _ in range(steps):
        x, symbol = first_symbol(time_steps, 32, generator)
        loss = cross_entropy(head(rnn(x)[0][-1]), symbol)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        x, symbol = first_symbol(time_steps, 500, generator)
        scores = head(rnn(x)[0][-1])
        right = (scores.argmax(dim=1) == symbol).double().mean().item()
        unseen_loss = cross_entropy(scores, symbol).item()
    return Recall(sum(p.numel() for p in rnn.parameters()), seconds, unseen_loss, right)


class Result(NamedTuple):
    curves: dict[str, Tensor]  # ‖dL_T/dx_t‖, [T] each
    exploding: list[tuple[float, float]]  # loss and gradient norm, up to the first NaN
    clipped: list[tuple[float, float]]
    recall: dict[tuple[str, int], Recall]  # by cell and sequence length
    plot: Path


def plot(result: Result) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in result.curves.items():
        style = "k:" if name.startswith("  ") else "-"  # the formula's curves lie on autograd's
        left.semilogy(curve.flip(0).numpy(), style, label=name.strip())
    left.set(xlabel="distance T - t", title="‖dL_T/dx_t‖")
    left.legend(fontsize="x-small")
    for name, history in {"plain": result.exploding, "clipped": result.clipped}.items():
        right.semilogy([loss for loss, _ in history], "o-", markersize=3, label=name)
    right.set(xlabel="step", title="loss of an exploding RNN, until NaN")
    right.legend()
    figure.savefig(result.plot, dpi=120)


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="training steps of part 3")
    parser.add_argument("--short", type=int, default=10, help="short sequence of part 3")
    parser.add_argument("--long", type=int, default=100, help="the long one, also of parts 1 and 2")
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder of the plot")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    curves = gradient_norms(args.long)
    distances = [d for d in (0, 10, 25, 50, 75, 99, 150, 199) if d < args.long]
    print(f"1. ‖dL_T/dx_t‖, T = {args.long}, by distance T - t")
    print(f"{'':<22}" + "".join(f"{distance:>9}" for distance in distances))
    for name, curve in curves.items():
        print(f"{name:<22}" + "".join(f"{curve[-1 - d].item():>9.1e}" for d in distances))

    exploding = explode(args.long, math.inf, args.seed)
    clipped = explode(args.long, 1.0, args.seed)
    print(f"2. ReLU RNN, W_hh = identity, T = {args.long}, plain SGD")
    for step, (loss, norm) in enumerate(exploding):
        print(f"  step {step}  loss {loss:.3g}  gradient norm {norm:.3g}")
    last = sum(loss for loss, _ in clipped[-10:]) / 10
    print(
        f"  norm clipped to 1: loss {clipped[0][0]:.3g} -> {last:.3g}, mean of the last ten steps"
    )
    print(f"  always answering the mean level: {MEAN_LEVEL_ERROR:.3g}")

    print(f"3. name the first of T symbols after {args.steps} steps of training")
    print("  cell      T  parameters  seconds    loss  right")
    table = {}
    for time_steps in (args.short, args.long):
        for cell in (fused_rnn.RNN, fused_rnn.LSTM, fused_rnn.GRU):
            row = recall(cell, time_steps, args.steps, args.seed)
            table[cell.__name__, time_steps] = row
            print(
                f"  {cell.__name__:<5} {time_steps:>5}  {row.parameters:>10}  {row.seconds:>7.2f}"
                f"  {row.loss:>6.3f}  {row.right:>5.0%}"
            )

    args.out.mkdir(parents=True, exist_ok=True)
    result = Result(curves, exploding, clipped, table, args.out / "long_memory.png")
    plot(result)
    print(f"plot: {result.plot}")
    return result


if __name__ == "__main__":
    main()
