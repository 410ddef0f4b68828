"""Recompute RNN, LSTM and GRU gate by gate from their parameters, and compare.

    RNN   h' = tanh(W_ih x + b_ih + W_hh h + b_hh)
    LSTM  i, f, o = σ(...), g = tanh(...);  c' = f c + i g;  h' = o tanh(c')
    GRU   r, z = σ(...), n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h' = (1 - z) n + z h

Two results are compared by the largest absolute difference. Their sum of signed differences proves
nothing: a wrong result may be too high in one place and too low in another. The last lines of the
report show one that is plainly wrong, and whose signed differences add up to zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import fused_rnn

TIME, BATCH, INPUT, HIDDEN = 7, 3, 5, 6


def gates(module: nn.Module, x: Tensor, h: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The input's and the state's share of each gate before its nonlinearity.

    ``weight_ih_l0`` is ``[G*H, I]``: the gates' matrices stacked in the order of the formulas
    above (LSTM i f g o, GRU r z n), so one product serves all and ``chunk`` takes it apart.
    """
    gx = x @ module.weight_ih_l0.T + module.bias_ih_l0
    gh = h @ module.weight_hh_l0.T + module.bias_hh_l0
    count = module.weight_hh_l0.shape[0] // module.hidden_size
    return gx.chunk(count, dim=-1), gh.chunk(count, dim=-1)


def rnn_by_gates(rnn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = x.new_zeros(x.shape[1], rnn.hidden_size)
    out = []
    for x_t in x:
        (gx,), (gh,) = gates(rnn, x_t, h)
        h = torch.tanh(gx + gh)
        out.append(h)
    return torch.stack(out), h


def rnn_concatenated(rnn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The textbooks' form, tanh(W [x, h] + b): the two matrices side by side, one bias for both.

    Two biases that are added are one bias. torch keeps two because cuDNN does.
    """
    w = torch.cat([rnn.weight_ih_l0, rnn.weight_hh_l0], dim=1)  # [H, I + H]
    b = rnn.bias_ih_l0 + rnn.bias_hh_l0
    h = x.new_zeros(x.shape[1], rnn.hidden_size)
    out = []
    for x_t in x:
        h = torch.tanh(torch.cat([x_t, h], dim=1) @ w.T + b)
        out.append(h)
    return torch.stack(out), h


def lstm_by_gates(lstm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = c = x.new_zeros(x.shape[1], lstm.hidden_size)
    out = []
    for x_t in x:
        gx, gh = gates(lstm, x_t, h)
        i, f, g, o = (a + b for a, b in zip(gx, gh, strict=True))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out), h, c


def gru_by_gates(gru: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = x.new_zeros(x.shape[1], gru.hidden_size)
    out = []
    for x_t in x:
        (rx, zx, nx), (rh, zh, nh) = gates(gru, x_t, h)
        r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
        # The reset multiplies the product W_hn h + b_hn, bias included, not the state before it:
        # this is why GRU's two biases, unlike the other cells', cannot be added into one.
        n = torch.tanh(nx + r * nh)
        h = (1 - z) * n + z * h
        out.append(h)
    return torch.stack(out), h


def max_difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the largest difference of each check, and both measures of the wrong result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    options = {"dtype": getattr(torch, args.dtype)}
    x = torch.randn(TIME, BATCH, INPUT, **options)
    rnn = fused_rnn.RNN(INPUT, HIDDEN, **options)
    lstm = fused_rnn.LSTM(INPUT, HIDDEN, **options)
    gru = fused_rnn.GRU(INPUT, HIDDEN, **options)

    rnn_out, rnn_h = rnn(x)
    lstm_out, (lstm_h, lstm_c) = lstm(x)
    gru_out, gru_h = gru(x)
    lstm_result = (lstm_out, lstm_h[0], lstm_c[0])
    results = {
        "RNN": max_difference(rnn_by_gates(rnn, x), (rnn_out, rnn_h[0])),
        "RNN, tanh(W [x, h] + b)": max_difference(rnn_concatenated(rnn, x), (rnn_out, rnn_h[0])),
        "LSTM": max_difference(lstm_by_gates(lstm, x), lstm_result),
        "GRU": max_difference(gru_by_gates(gru, x), (gru_out, gru_h[0])),
    }

    # The smallest case to follow on paper: RNN(5, 6, 1) is 5 inputs, 6 hidden units, 1 layer. The
    # same (1, 3, 5) is one step of three sequences, or with batch_first three steps of one.
    x = torch.randn(1, 3, 5, **options)
    small = fused_rnn.RNN(5, 6, 1, **options)
    out, h = small(x)
    results["RNN(5, 6, 1) on (1, 3, 5)"] = max_difference(rnn_by_gates(small, x), (out, h[0]))
    torch_rnn = nn.RNN(5, 6, 1, **options)
    torch_rnn.load_state_dict(small.state_dict())
    results["the same, against nn.RNN"] = max_difference((out, h), torch_rnn(x))

    print(f"largest difference, {args.dtype}")
    for name, difference in results.items():
        print(f"  {name:<27} {difference:.1e}")

    print("RNN(5, 6, 1) on (1, 3, 5): out", tuple(out.shape), "h_n", tuple(h.shape))
    for name, parameter in small.named_parameters():
        print(f"  {name:<13} {tuple(parameter.shape)}")

    # Every number right, every number in another unit's place.
    wrong = rnn_out.flip(-1)
    results["wrong, signed sum"] = (wrong - rnn_out).sum().item()
    results["wrong, max"] = max_difference([wrong], [rnn_out])
    print("a wrong result: the RNN's output with its hidden units in reverse order")
    print(f"  sum of signed differences   {results['wrong, signed sum']:.1e}  looks equal")
    print(f"  largest difference          {results['wrong, max']:.1e}  is not")
    return results


if __name__ == "__main__":
    main()
