"""``step``: one step of all layers on the sequence module's own weights."""

import pytest
import torch
from devices import DEVICES, without_cudnn
from numerics import DTYPES, HALF, cases, grid, needs_native
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close
from twins import (
    BACKEND_NAMES,
    MODULE_KINDS,
    H,
    I,
    P,
    mapped,
    name_of,
    states,
    step,
    tensors,
    twins,
)

import fused_rnn
from fused_rnn import steps
from fused_rnn.backends import cpu
from fused_rnn.cells import CELLS

T, N = 5, 3
MODULES = {
    "plain": {},
    "three layers": {"num_layers": 3, "bias": False},
    "batch first": {"batch_first": True, "num_layers": 2},
    "projected": {"proj_size": P, "num_layers": 2},
    "learned": {"learn_initial_state": True, "num_layers": 2},
}


def exists(kind, form="plain", backend="auto", **_):
    return form != "projected" or kind == "lstm"


def module_of(kind, **options):
    name, extra = name_of(kind)
    module = getattr(fused_rnn, name)(I, H, **extra, **options)
    for parameter in module._initial() or ():
        nn.init.uniform_(parameter, -1, 1)
    return module


def streamed(module):
    """``forward`` made of steps."""

    def call(input, hx):
        dim = 1 if module.batch_first else 0
        outputs, state = [], hx
        for x in input.unbind(dim):
            y, state = module.step(x, state)
            outputs.append(y)
        return torch.stack(outputs, dim), state

    return call


@cases(
    exists, kind=CELLS, backend=BACKEND_NAMES, device=DEVICES, form=MODULES, given=(True, False),
    grad=(True, False), dtype=(torch.float32, torch.float64),
)  # fmt: skip
@without_cudnn()
def test_steps_are_the_forward(case):
    """Results, states and all gradients: those of torch.nn's module, or of ours where it learns."""
    device, dtype, kind = case["device"], case["dtype"], case["kind"]
    options = {"device": device, "dtype": dtype} | MODULES[case["form"]]
    ours = module_of(kind, backend=case["backend"], **options)
    other = ours
    if not ours.learn_initial_state:
        name, extra = name_of(kind)
        other = getattr(nn, name)(I, H, **extra, **options)
        other.load_state_dict(ours.state_dict())
    input = torch.randn((N, T, I) if ours.batch_first else (T, N, I), dtype=dtype, device=device)
    hx = states(kind, ours, N, dtype=dtype) if case["given"] else None
    with torch.set_grad_enabled(case["grad"]):
        if case["grad"]:
            got, expected = step(ours, input, hx, call=streamed(ours)), step(other, input, hx)
        else:
            got, expected = streamed(ours)(input, hx), other(input, hx)
            got, expected = list(tensors(got)), list(tensors(expected))
    assert_close(got, expected)


@grid(lambda kind, dtype: kind != "rnn_relu" or dtype not in HALF, kind=CELLS, dtype=DTYPES)
def test_a_state_goes_from_forward_to_steps_and_back(kind, dtype):
    ours = module_of(kind, dtype=dtype, num_layers=2)
    input = torch.randn(8, N, I, dtype=dtype)
    whole, final = ours(input)
    first, state = ours(input[:3])
    middle, state = streamed(ours)(input[3:5], state)
    assert [t.dtype for t in tensors(state)] == [t.dtype for t in tensors(final)]
    last, state = ours(input[5:], state)
    # A half type's state is rounded at each border.
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    assert_close(torch.cat([first, middle, last]), whole, **tolerance)
    assert_close(list(tensors(state)), list(tensors(final)), **tolerance)


@needs_native
@grid(kind=CELLS, bias=(True, False))
def test_a_step_of_all_layers_is_one_call_where_nothing_watches(kind, bias, monkeypatch):
    calls, real = [], cpu.small_step

    def watched(*operands):
        calls.append(real(*operands))
        return calls[-1]

    module, parametrized = (module_of(kind, num_layers=3, bias=bias, backend="cpu") for _ in "12")
    parametrized.load_state_dict(module.state_dict())
    x, state = torch.randn(N, I), states(kind, module, N)
    expected = tensors(module.step(x, state))  # with gradients, layer by layer
    weight_norm(parametrized, "weight_hh_l1")
    monkeypatch.setitem(steps.SMALL_STEPS, "cpu", watched)
    with torch.no_grad():
        ours = tensors(module.step(x, state))
        assert len(calls) == 1
        assert calls[0] is not None
        theirs = tensors(parametrized.step(x, state))
    assert [stepped is not None for stepped in calls] == [True, False, True, True, True]
    for value, other, want in zip(ours, theirs, expected, strict=True):
        assert_close(value, want)
        assert_close(other, want)


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_refuses_the_states_of_layers(kind):
    name, extra = name_of(kind)
    cell = getattr(fused_rnn, f"{name}Cell")(I, H, **extra)
    with torch.no_grad(), pytest.raises(ValueError, match="to be 1D or 2D, got 3D instead"):
        cell(torch.randn(N, I), states(kind, cell, 1, N))


@grid(kind=CELLS, grad=(False, True), batched=(False, True), given=(False, True))
def test_what_is_around_step_runs_once(kind, grad, batched, given):
    base = module_of(kind)
    calls = []

    class Watched(type(base)):
        def step(self, x, state=None):
            calls.append(x)
            return super().step(x, state)

    _, extra = name_of(kind)
    module = Watched(I, H, **extra)
    state = states(kind, module, *((N,) if batched else ())) if given else None
    with torch.set_grad_enabled(grad):
        module.step(torch.randn(N, I) if batched else torch.randn(I), state)
    assert len(calls) == 1


@grid(lambda kind, **_: kind != "lstm", kind=CELLS, grad=(False, True))
def test_one_state_is_no_tuple(kind, grad):
    name, extra = name_of(kind)
    cell, module = getattr(fused_rnn, f"{name}Cell")(I, H, **extra), module_of(kind)
    with torch.set_grad_enabled(grad):
        with pytest.raises((RuntimeError, AttributeError, TypeError)):
            cell(torch.randn(N, I), (torch.zeros(N, H),))
        with pytest.raises((RuntimeError, AttributeError, TypeError)):
            module.step(torch.randn(N, I), (torch.zeros(1, N, H),))


@grid(exists, kind=CELLS, backend=BACKEND_NAMES, device=DEVICES, form=MODULES)
def test_a_step_without_batch(kind, backend, device, form):
    options = {"backend": backend, "device": device, "dtype": torch.float64} | MODULES[form]
    ours = module_of(kind, **options)
    x = torch.randn(I, dtype=torch.float64, device=device)
    for hx in (None, states(kind, ours, dtype=torch.float64)):
        y, state = ours.step(x, hx)
        batched = mapped(hx, lambda s: s.unsqueeze(1))
        expected, final = ours.step(x.unsqueeze(0), batched)
        assert_close(y, expected[0])
        assert_close(list(tensors(state)), [s[:, 0] for s in tensors(final)])


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_dropout_acts_between_the_layers_of_a_step(kind):
    ours = module_of(kind, num_layers=2, dropout=0.5)
    x = torch.randn(N, I)
    assert not torch.equal(ours.step(x)[0], ours.step(x)[0])
    ours.eval()
    assert_close(ours.step(x)[0], ours(x.unsqueeze(0))[0][0])


@grid(kind=MODULE_KINDS, device=DEVICES, half=("bfloat16", "float16"), proj=(False, True))
def test_autocast(kind, device, half, proj):
    proj = {"proj_size": P} if proj and kind == "lstm" else {}
    ours = module_of(kind, device=device, num_layers=2, **proj)
    x = torch.randn(N, I, device=device)
    name, extra = name_of(kind, cell=True)
    cell = getattr(nn, name)(I, H, device=device, **extra)
    with torch.autocast(device, getattr(torch, half)):
        y, _ = ours.step(x)
        like = next(tensors(cell(x)))
    assert y.dtype == (getattr(torch, half) if proj else like.dtype)
    assert_close(y.float(), ours.step(x)[0], rtol=0, atol=0.02)


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
def test_what_makes_no_sense_is_refused(kind, backend, device):
    for reads_from_the_end in ({"bidirectional": True}, {"direction": "reverse"}):
        ours = module_of(kind, device=device, **reads_from_the_end)
        with pytest.raises(ValueError, match="step goes forward in time"):
            ours.step(torch.zeros(N, I, device=device))
    ours = module_of(kind, backend=backend, device=device, num_layers=2)
    x = torch.zeros(N, I, device=device)
    for wrong, got in ((torch.zeros(T, N, I), "3D"), (torch.zeros(()), "0D"), ([1.0], "list")):
        with pytest.raises(ValueError, match=f"2D .* or 1D .*got {got}"):
            ours.step(wrong)
    with pytest.raises(RuntimeError, match="inconsistent input_size: got 6 expected 5"):
        ours.step(torch.zeros(N, I + 1, device=device))
    one = torch.zeros(1, N, H, device=device)
    with pytest.raises(RuntimeError, match=r"a state of \[2, N, \*\], got \(1, 3, 6\)"):
        ours.step(x, (one, one) if kind == "lstm" else one)
    wide = torch.zeros(2, N, H + 1, device=device)
    with pytest.raises(RuntimeError, match="inconsistent hidden_size: got 7, expected 6"):
        ours.step(x, (wide, wide) if kind == "lstm" else wide)
    few = torch.zeros(2, 1, H, device=device)
    with pytest.raises(RuntimeError, match="batch size"):
        ours.step(x, (few, few) if kind == "lstm" else few)
    with pytest.raises((TypeError, RuntimeError, AttributeError)):
        ours.step(x, torch.zeros(2, N, H) if kind == "lstm" else (few, few))
    assert ours.step(x)[0].shape == (N, H)


def test_a_projected_step_asks_for_nothing_beyond_torch():
    """Which runs it, where asked for by name."""
    steps = {}
    for backend in ("torch", "reference"):
        torch.manual_seed(0)
        module = fused_rnn.LSTM(4, 8, proj_size=3, backend=backend).eval()
        x, states = torch.randn(2, 4), (torch.randn(1, 2, 3), torch.randn(1, 2, 8))
        steps[backend] = module.step(x, states)
    assert_close(steps["torch"], steps["reference"])


def test_a_projected_step_refuses_wrong_sizes():
    ours = module_of("lstm", proj_size=P)
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        ours.step(torch.zeros(N, I + 1))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        ours.step(torch.zeros(N, I), (torch.zeros(1, N, H), torch.zeros(1, N, H)))


def test_weights_made_by_something_else_are_read_anew():
    theirs, ours = twins("gru", dtype=torch.float64)
    for module in (theirs, ours):
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    input = torch.randn(T, N, I, dtype=torch.float64)
    assert_close(streamed(ours)(input, None), theirs(input))
