"""RNNCell, LSTMCell and GRUCell are torch.nn's in all that can be seen from outside."""

import copy
import io
import pickle

import pytest
import torch
from devices import DEVICES, native
from numerics import DTYPES, HALF, assert_as_good_as, grid
from torch import nn
from torch.nn.modules.rnn import RNNCellBase
from torch.testing import assert_close
from torchs_cases import module_info
from twins import (
    BACKEND_NAMES,
    MODULE_KINDS,
    H,
    I,
    assert_twins,
    mapped,
    name_of,
    states,
    step,
    tensors,
    twins,
)

import fused_rnn
from fused_rnn.cells import CELLS

NAMES = ("RNNCell", "LSTMCell", "GRUCell")


@pytest.mark.parametrize("name", NAMES)
def test_arguments_stand_in_torchs_order(name):
    nonlinearity = ("relu",) if name == "RNNCell" else ()
    args = (4, 5, False, *nonlinearity, "cpu", torch.float64)
    theirs, ours = getattr(nn, name)(*args), getattr(fused_rnn, name)(*args)
    attributes = [*RNNCellBase.__constants__, *["nonlinearity"][: len(nonlinearity)]]
    for attribute in attributes:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.bias_ih is None
    assert ours.bias_hh is None
    assert ours.weight_hh.dtype == torch.float64
    assert repr(ours) == repr(theirs)


@grid(kind=CELLS, bias=(True, False), dtype=DTYPES)
def test_same_seed_makes_the_same_cell(kind, bias, dtype):
    name, options = name_of(kind, cell=True)
    made = []
    for package in (nn, fused_rnn):
        torch.manual_seed(3)
        cell = getattr(package, name)(I, H, bias=bias, dtype=dtype, **options)
        made.append((cell, torch.get_rng_state()))
    (theirs, their_random), (ours, our_random) = made
    assert torch.equal(our_random, their_random)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    theirs.load_state_dict(ours.state_dict())


@grid(
    lambda kind, dtype, **_: not (kind == "rnn_relu" and dtype in HALF),
    kind=CELLS,
    backend=BACKEND_NAMES,
    device=DEVICES,
    dtype=DTYPES,
    bias=(True, False),
    batch=((3,), (1,), ()),
    given=(True, False),
    grad=(True, False),
)
def test_results_and_gradients_are_torchs(kind, backend, device, dtype, bias, batch, given, grad):
    theirs, ours = twins(kind, cell=True, bias=bias, dtype=dtype, backend=backend, device=device)
    input = torch.randn(*batch, I, dtype=dtype, device=device)
    hx = states(kind, ours, *batch, dtype=dtype) if given else None
    if grad:
        assert_twins(theirs, ours, input, hx, what=(kind, backend, device))
        return
    with torch.no_grad():
        expected, got = theirs(input, hx), ours(input, hx)
    exact = copy.deepcopy(ours).double()
    exact.backend = "reference"
    with torch.no_grad():
        right = exact(input.double(), mapped(hx, torch.Tensor.double))
    assert type(got) is type(expected)
    for a, b, c in zip(tensors(got), tensors(expected), tensors(right), strict=True):
        assert a.dtype == b.dtype
        assert_as_good_as(a, b, c, (kind, backend, device, "no_grad"), length=I + H)


@grid(
    kind=CELLS, backend=BACKEND_NAMES, device=DEVICES, given=(True, False), grad=(True, False)
)  # fmt: skip
def test_a_batch_of_zero_gives_empty_results(kind, backend, device, given, grad):
    theirs, ours = twins(kind, cell=True, backend=backend, device=device)
    input, hx = torch.randn(0, I, device=device), states(kind, ours, 0) if given else None
    if grad:
        expected, got = step(theirs, input, hx), step(ours, input, hx)
        assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in expected.items()}
        assert not any(t.any() for t in got.values())
        return
    with torch.no_grad():
        assert_close(ours(input, hx), theirs(input, hx), rtol=0, atol=0)


@grid(kind=CELLS, backend=BACKEND_NAMES, device=DEVICES, grad=(True, False))
def test_strides_do_not_matter(kind, backend, device, grad):
    theirs, ours = twins(kind, cell=True, backend=backend, device=device, dtype=torch.float64)
    input = torch.randn(I, 4, dtype=torch.float64, device=device).T
    hx = mapped(states(kind, ours, 1, dtype=torch.float64), lambda h: h.expand(4, -1))
    apart = mapped(
        states(kind, ours, 4, dtype=torch.float64), lambda h: h.repeat(1, 2).view(4, H, 2)[..., 0]
    )
    for state in (hx, apart):
        if grad:
            assert_twins(theirs, ours, input, state, what=(kind, backend, device))
        else:
            with torch.no_grad():
                assert_close(ours(input, state), theirs(input, state))


@grid(kind=CELLS, backend=BACKEND_NAMES, device=DEVICES, dtype=(torch.float32, torch.float64))
def test_a_loop_of_cells_is_the_sequence_module(kind, backend, device, dtype):
    """Twenty steps, backward through all of them, against the time loop over the same weights."""
    options = {"backend": backend, "device": device, "dtype": dtype}
    _, ours = twins(kind, cell=True, **options)
    theirs, sequence = twins(kind, **options)
    for module in (theirs, sequence):
        module.load_state_dict({f"{name}_l0": value for name, value in ours.state_dict().items()})
    input = torch.randn(20, 3, I, dtype=dtype, device=device)

    def loop(input, hx):
        outputs, state = [], hx
        for x in input:
            state = ours(x, state)
            outputs.append(next(tensors(state)))
        return torch.stack(outputs), mapped(state, lambda h: h.unsqueeze(0))

    got = step(ours, input, call=loop)
    got = {name if "weight" not in name and "bias" not in name else f"{name}_l0": value
           for name, value in got.items()}  # fmt: skip
    expected = step(theirs, input)
    exact = step(copy.deepcopy(theirs).double(), input.double())
    assert got.keys() == expected.keys()
    for name, value in got.items():
        what = (kind, backend, device, name)
        assert_as_good_as(value, expected[name], exact[name], what, length=300)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_torchs_own_cases(name, dtype, device):
    info = module_info(name)
    cases = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=True
    )
    options = {"dtype": dtype, "device": device, "backend": native(device)}
    assert cases
    for case in cases:
        constructor = case.constructor_input
        ours = getattr(fused_rnn, name)(*constructor.args, **constructor.kwargs, **options)
        args = case.forward_input.args
        assert_close(ours(*args), case.reference_fn(ours, *args))


@grid(kind=MODULE_KINDS)
def test_copies_keep_weights_and_backend(kind):
    _, ours = twins(kind, cell=True, backend="reference")
    x = torch.randn(3, I)
    expected = ours(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    )
    for again in copies:
        assert again.backend == "reference"
        assert_close(again(x), expected, rtol=0, atol=0)
        again.double()
        assert next(tensors(again(x.double()))).dtype == torch.float64
    assert ours.weight_hh.dtype == torch.float32


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
def test_weights_are_read_at_each_call(kind, backend, device):
    theirs, ours = twins(kind, cell=True, backend=backend, device=device, dtype=torch.float64)
    x = torch.randn(3, I, dtype=torch.float64, device=device)
    with torch.no_grad():
        for module in (theirs, ours):
            module(x)
            module.weight_hh.mul_(2)
            module.weight_ih = nn.Parameter(module.weight_ih * 0.5)
            module.bias_hh.data = module.bias_hh + 1
        assert_close(ours(x), theirs(x))
    scaled = {name: p * 0.5 for name, p in theirs.named_parameters()}
    got = torch.func.functional_call(ours, scaled, (x,))
    assert_close(got, torch.func.functional_call(theirs, scaled, (x,)))
    assert_twins(theirs, ours, x, what=(kind, backend, device))


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES,
      frozen=("weight_hh", "weight_ih", "bias_hh"))  # fmt: skip
def test_frozen_weights_get_no_gradient_and_change_no_other(kind, backend, device, frozen):
    theirs, ours = twins(kind, cell=True, backend=backend, device=device, dtype=torch.float64)
    for module in (theirs, ours):
        getattr(module, frozen).requires_grad_(False)
    x = torch.randn(3, I, dtype=torch.float64, device=device)
    hx = states(kind, ours, 3, dtype=torch.float64)
    assert_twins(theirs, ours, x, hx, what=(kind, backend, device, frozen))


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
def test_states_passed_in_are_not_written_to(kind, backend, device):
    _, ours = twins(kind, cell=True, backend=backend, device=device)
    x, hx = torch.randn(3, I, device=device), states(kind, ours, 3)
    before = [h.clone() for h in tensors(hx)]
    with torch.no_grad():
        first = ours(x, hx)
        kept = [h.clone() for h in tensors(first)]
        ours(x, first)
    for now, then in zip((*tensors(hx), *tensors(first)), (*before, *kept), strict=True):
        assert torch.equal(now, then)
