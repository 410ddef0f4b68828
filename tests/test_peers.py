"""Other packages' layers in the bench, against torch.nn. The packages stand here as their
documentation has them: they need a GPU to be installed."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from numerics import grid
from torch import nn

pytest.importorskip("tqdm", reason="fused_rnn.bench needs tqdm")

from fused_rnn.bench import check
from fused_rnn.bench.providers import find
from fused_rnn.bench.workloads import Workload, make_cases
from fused_rnn.cells import CELLS


class HasteLSTM(nn.Module):
    """As its documentation has it: ``[I,4H]``, ``[H,4H]`` and one bias, the gates i, g, f, o."""

    gates, biases = (0, 2, 1, 3), 1

    def __init__(self, I, H):  # noqa: E741
        super().__init__()
        for name, K in (("kernel", I), ("recurrent_kernel", H)):
            self.register_parameter(name, nn.Parameter(torch.empty(K, len(self.gates) * H)))
        for name in ("bias", "recurrent_bias")[: self.biases]:
            self.register_parameter(name, nn.Parameter(torch.empty(len(self.gates) * H)))

    def ordered(self, x):
        return torch.cat([x.chunk(len(self.gates))[gate] for gate in self.gates])

    def from_native_weights(self, w_ih, w_hh, b_ih, b_hh):
        self.kernel = nn.Parameter(self.ordered(w_ih).t().contiguous())
        self.recurrent_kernel = nn.Parameter(self.ordered(w_hh).t().contiguous())
        self.bias = nn.Parameter(self.ordered(b_ih + b_hh if self.biases == 1 else b_ih))
        if self.biases == 2:
            self.recurrent_bias = nn.Parameter(self.ordered(b_hh))

    def forward(self, input, state=None):
        size = (input.size(1), self.recurrent_kernel.size(0))
        h, c = [input.new_zeros(size)] * 2 if state is None else [s[0] for s in state]
        outputs = []
        for x in input:
            i, g, f, o = (x @ self.kernel + h @ self.recurrent_kernel + self.bias).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


class HasteGRU(HasteLSTM):
    """Two biases, the gates z, r, n."""

    gates, biases = (1, 0, 2), 2

    def forward(self, input, state=None):
        h = input.new_zeros(input.size(1), self.recurrent_kernel.size(0))
        h = h if state is None else state[0]
        outputs = []
        for x in input:
            xz, xr, xn = (x @ self.kernel + self.bias).chunk(3, -1)
            hz, hr, hn = (h @ self.recurrent_kernel + self.recurrent_bias).chunk(3, -1)
            z = (xz + hz).sigmoid()
            h = z * h + (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh()
            outputs.append(h)
        return torch.stack(outputs), h[None]


def flashrnn(Wx, R, b, states=None, *, function, backend, dtype):
    """As its README and its code have it: ``[B,T,G,1,H]``, ``[G,1,H,H]``, ``[G,1,H]`` and states
    ``[S,B,1,1,H]``; of a GRU the recurrent gates n, r, z, the input's r, z, n, biases of all."""
    assert dtype == str(Wx.dtype).removeprefix("torch.")
    assert backend in ("cuda_fused", "vanilla")
    B, T, _, _, H = Wx.shape
    count = 2 if function == "lstm" else 1
    s = Wx.new_zeros(count, B, H) if states is None else states[:, :, 0, 0]
    steps = []
    for t in range(T):
        x, y, h = Wx[:, t, :, 0], torch.einsum("gdp,bp->bgd", R[:, 0], s[0]), s[0]
        if function == "gru":
            n, r, z, own = (b[k, 0] for k in range(4))
            r, z = (x[:, 0] + y[:, 1] + r).sigmoid(), (x[:, 1] + y[:, 2] + z).sigmoid()
            s = (z * h + (1 - z) * (x[:, 2] + own + r * (y[:, 0] + n)).tanh())[None]
        elif function == "lstm":
            i, f, g, o = (x + y + b[:, 0]).unbind(1)
            c = f.sigmoid() * s[1] + i.sigmoid() * g.tanh()
            s = torch.stack([o.sigmoid() * c.tanh(), c])
        else:
            s = (x + y + b[:, 0]).unbind(1)[0].tanh()[None]
        steps.append(s)
    found = torch.stack(steps, 2).unsqueeze(3)
    return found, found[:, :, -1:]


@pytest.fixture
def packages(monkeypatch):
    haste = SimpleNamespace(LSTM=HasteLSTM, GRU=HasteGRU)
    monkeypatch.setitem(sys.modules, "haste_pytorch", haste)
    monkeypatch.setitem(sys.modules, "flashrnn", SimpleNamespace(flashrnn=flashrnn))


@grid(name=("haste", "flashrnn", "flashrnn:vanilla"), cell=("lstm", "gru", "rnn_tanh", "rnn_relu"),
      given=(False, True))  # fmt: skip
def test_peers_give_torchs_results(name, cell, given, packages):
    w = Workload("w", cell, I=4, H=9, T=5, N=3, mode="train")
    peer = find(name)
    if cell == "rnn_relu" or (name, cell) == ("haste", "rnn_tanh"):
        assert "has no rnn" in peer.refusal(w)
        return
    assert peer.refusal(w) is None
    providers = {"torch": nn, "fused_rnn": peer.namespace}
    cases = make_cases(w, providers, torch.float32, with_states=given)
    compared = check.compare_cases(name, cases, "train")
    states = CELLS[cell].states
    assert len(compared) == 6 + states + given * states, "output, states, input and four weights"
    assert all(one.ok for one in compared), [str(one) for one in compared if not one.ok]


@pytest.mark.parametrize(
    "more", [{"L": 2}, {"D": 2}, {"bias": False}, {"batch_first": True}, {"lengths": "full"},
             {"dropout": 0.1, "L": 2}, {"mode": "step", "T": 1}],
)  # fmt: skip
def test_peers_say_what_they_cannot_run(more, packages):
    w = replace(Workload("w", "lstm", I=4, H=9, T=5, N=3, mode="train"), **more)
    for name in ("haste", "flashrnn"):
        assert "one layer in one direction" in find(name).refusal(w)
