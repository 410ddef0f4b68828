"""Kernels that nobody asked for run where they agree with the reference, else torch.nn does."""

import re
from types import SimpleNamespace

import pytest
import torch
from numerics import DTYPES, grid, needs_native
from torch.utils._python_dispatch import TorchDispatchMode

from fused_rnn import backends
from fused_rnn.backends import BACKENDS, cpu, cuda, torch_nn, triton, trust
from fused_rnn.backends.trust import doubts
from fused_rnn.cells import CELLS

pytestmark = needs_native


def problem(**changed) -> backends.Problem:
    plain = {
        "cell": "lstm", "dtype": torch.float32, "device": "cpu", "T": 7, "N": 3, "I": 5, "H": 33,
        "P": 0, "layers": 1, "directions": 1, "grad": True, "packed": False, "compiling": False,
    }  # fmt: skip
    return backends.Problem(**plain | changed)


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch):
    monkeypatch.setattr(trust, "_FOUND", {})


def stand_in(**wrong):
    return SimpleNamespace(
        NAME="stand-in", **({"layer": cpu.layer, "cell_step": cpu.cell_step} | wrong)
    )


@grid(cell=CELLS, dtype=[d for d in DTYPES if d != torch.float64], T=(0, 9), grad=(True, False))
def test_what_is_right_is_not_doubted(cell, dtype, T, grad):
    asked = problem(cell=cell, dtype=dtype, T=T, grad=grad, N=1 if T else 4)
    assert doubts(stand_in(), asked) is None
    with torch.inference_mode():
        assert trust._disagreement(stand_in(), asked) is None


def states_off(*arguments, **options):
    y, c, h_n, c_n = cpu.layer(*arguments, **options)
    return y, c, h_n * 1.05, c_n


def nan_somewhere(*arguments, **options):
    y, *states = cpu.layer(*arguments, **options)
    return y * torch.where(torch.arange(y.size(-1)) == 31, torch.nan, 1.0), *states


def gradient_lost(cell, x, *arguments, **options):
    return cpu.layer(cell, x * 0.5 + x.detach() * 0.5, *arguments, **options)


def none_at_all(*arguments, **options):
    raise RuntimeError("ptxas: no such architecture")


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (states_off, "h_n is .* off the reference"),
        (nan_somewhere, "output is nan off"),
        (gradient_lost, "d x is .* off"),
        (none_at_all, "RuntimeError: ptxas: no such architecture"),
    ],
)
def test_what_is_wrong_is_doubted(layer, sentence):
    assert re.match(sentence, doubts(stand_in(layer=layer), problem()))


def test_a_wrong_step_is_doubted():
    def wrong(cell, x, h, c, *weights):
        return cpu.cell_step(cell, x, c, h, *weights)

    assert "off the reference" in doubts(stand_in(cell_step=wrong), problem(T=0))


def test_each_size_is_compared_once_and_never_where_somebody_watches():
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return cpu.layer(*arguments, **options)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            return function(*arguments, **keywords or {})

    backend = stand_in(layer=counted)
    with Watch():
        assert "not compared yet" in doubts(backend, problem())
    assert not calls
    for T in (7, 8, 9):
        assert doubts(backend, problem(T=T)) is None
    with Watch():
        assert doubts(backend, problem()) is None
    assert len(calls) == 1
    assert doubts(backend, problem(H=34)) is None
    assert len(calls) == 2


def test_auto_takes_torch_nn_where_there_are_doubts(monkeypatch):
    monkeypatch.setattr(triton, "UNAVAILABLE", None)
    monkeypatch.setattr(triton, "INTERPRETS", False)
    monkeypatch.setattr(cuda, "available", lambda: "there is no library")
    on_gpu = problem(device="cuda")
    found = {}

    def told(backend, asked):
        assert (backend, asked) == (BACKENDS["triton"], on_gpu)
        return found["doubt"]

    monkeypatch.setattr(backends, "doubts", told)
    found["doubt"] = None
    assert backends.choose(on_gpu, "auto")[0] is triton
    found["doubt"] = "h_n is off"
    chosen, why = backends.choose(on_gpu, "auto")
    assert chosen is torch_nn
    assert why.endswith("Triton's kernels: h_n is off")
