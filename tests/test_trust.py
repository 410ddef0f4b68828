"""Kernels that nobody asked for run where they agree with the reference, else torch.nn does."""

import re
from types import SimpleNamespace

import pytest
import torch
from numerics import DTYPES, grid, needs_native
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import backends, steps
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


FORMS = {
    "plain": {},
    "one row": {"N": 1},
    "packed": {"packed": True},
    "both directions": {"directions": 2, "N": 150},
    "a cell": {"T": 0},
}


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch):
    monkeypatch.setattr(trust, "_FOUND", {})


def stand_in(layer=cpu.layer, cell_step=cpu.cell_step):
    return SimpleNamespace(NAME="stand-in", layer=layer, cell_step=cell_step)


@grid(cell=CELLS, dtype=[d for d in DTYPES if d != torch.float64], grad=(True, False), form=FORMS)
def test_what_is_right_is_not_doubted(cell, dtype, grad, form):
    asked = problem(cell=cell, dtype=dtype, grad=grad, **FORMS[form])
    assert doubts(stand_in(), asked) is None
    with torch.inference_mode():
        assert trust._disagreement(stand_in(), asked) is None


def states_off(*arguments, **options):
    y, c, h_n, c_n = cpu.layer(*arguments, **options)
    return y, c, h_n * 1.1, c_n


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
        (nan_somewhere, "output is nan% off"),
        (gradient_lost, "d x is .* off"),
        (none_at_all, "RuntimeError: ptxas: no such architecture"),
    ],
)
def test_what_is_wrong_is_doubted(layer, sentence):
    assert re.match(sentence, doubts(stand_in(layer), problem()))


def test_a_wrong_cell_is_doubted_and_the_sequence_is_not():
    def off(*arguments):
        h, c = cpu.cell_step(*arguments)
        return h, c * 1.2

    backend = stand_in(cell_step=off)
    assert "c_n is" in doubts(backend, problem(T=0))
    assert doubts(backend, problem()) is None


def test_a_cell_is_tried_as_a_sequence_too():
    """Under autocast that is what runs it."""
    assert "output is nan%" in doubts(stand_in(nan_somewhere), problem(T=0))


def wrong_backwards(*arguments, reverse=False, **options):
    return cpu.layer(*arguments, reverse=False, **options)


def no_rows(cell, x, *arguments, rows=None, **options):
    if rows is not None:
        x = x.flip(0)
    return cpu.layer(cell, x, *arguments, rows=rows, **options)


def test_each_form_is_compared_on_its_own():
    for layer, form in ((wrong_backwards, "both directions"), (no_rows, "packed")):
        assert doubts(stand_in(layer), problem()) is None
        assert "off the reference" in doubts(stand_in(layer), problem(**FORMS[form]))


def test_a_kernel_with_tf32_is_not_doubted():
    def tf32(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def with_tf32(cell, x, w_hh, *arguments, w_ih, **options):
        x, w_hh, w_ih = (x + (tf32(x.detach()) - x.detach()) for x in (x, w_hh, w_ih))
        return cpu.layer(cell, x, w_hh, *arguments, w_ih=w_ih, **options)

    for cell in CELLS:
        for sizes in ({"N": 16, "H": 1024, "I": 64}, {"N": 32, "H": 512}):
            assert doubts(stand_in(with_tf32), problem(cell=cell, **sizes)) is None


def test_a_callers_contexts_do_not_see_it():
    seen = []

    def block(x):
        seen.append(doubts(stand_in(), problem()))
        return x.tanh()

    torch.set_default_device("cpu")  # a mode of functions, for the whole process
    try:
        x = torch.randn(3, requires_grad=True)
        checkpoint(block, x, use_reentrant=False).sum().backward()
    finally:
        torch.set_default_device(None)
    assert seen == [None, None]
    assert x.grad is not None


def test_what_did_not_fit_is_asked_again(monkeypatch):
    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("no memory")

    backend = stand_in(no_memory)
    assert "no memory" in doubts(backend, problem())
    backend.layer = cpu.layer
    assert doubts(backend, problem()) is None


def test_each_size_is_compared_once_and_never_where_somebody_watches():
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return cpu.layer(*arguments, **options)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            return function(*arguments, **keywords or {})

    backend = stand_in(counted)
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


@grid(T=(7, 0))
def test_auto_takes_torch_nn_where_there_are_doubts(T, monkeypatch):
    monkeypatch.setattr(triton, "UNAVAILABLE", None)
    monkeypatch.setattr(triton, "INTERPRETS", False)
    monkeypatch.setattr(cuda, "available", lambda: "there is no library")
    on_gpu = problem(device="cuda", T=T)
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


def test_a_choice_that_a_trial_may_change_is_not_kept(monkeypatch):
    asked, select = [], steps.select
    monkeypatch.setattr(steps, "select", lambda *a: (asked.append(a), select(*a))[1])
    monkeypatch.setattr(cuda, "available", lambda: "there is no library")
    steps._cell_step.cache_clear()
    for device, backend, times in (("meta", "auto", 2), ("meta", "torch", 1), ("cpu", "auto", 1)):
        cell = fused_rnn.GRUCell(5, 33, device=device, backend=backend)
        for _ in range(2):
            cell(torch.randn(3, 5, device=device), torch.randn(3, 33, device=device))
        assert len(asked) == times
        asked.clear()
