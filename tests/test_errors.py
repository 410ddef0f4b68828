"""What torch.nn refuses, ours refuses with the same exception and the same sentence."""

import pytest
import torch
from devices import DEVICES, native, there
from numerics import grid
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torchs_cases import module_cases, module_info
from twins import BACKEND_NAMES, MODULE_KINDS, H, I, name_of, states, twins

import fused_rnn
from fused_rnn.backends import BACKENDS

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


def assert_same_refusal(theirs, ours):
    """Both calls raise; the types and the sentences are equal."""
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs()
    with pytest.raises(type(expected.value)) as got:
        ours()
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_torchs_own_error_cases(name, dtype, device):
    info = module_info(name)
    cases = info.module_error_inputs_func(
        info, device=device, dtype=dtype, requires_grad=False, training=True
    )
    assert cases
    for case in cases:
        constructor = case.module_error_input.constructor_input
        forward = case.module_error_input.forward_input
        make = getattr(fused_rnn, name)
        if case.error_on == module_cases().ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                make(*constructor.args, **constructor.kwargs)
        else:
            options = {"dtype": dtype, "device": device, "backend": native(device)}
            options |= constructor.kwargs
            # torch's cell cases pass "relu" where bias stands: a true value, as torch takes it.
            ours = make(*constructor.args, **options)
            with pytest.raises(case.error_type, match=case.error_regex):
                ours(*forward.args, **forward.kwargs)


WRONG_ARGUMENTS = [
    {"hidden_size": 0},
    {"hidden_size": -1},
    {"hidden_size": 2.0},
    {"input_size": 0},
    {"input_size": "3"},
    {"num_layers": 0},
    {"num_layers": -2},
    {"bias": 1},
    {"batch_first": None},
    {"dropout": -0.1},
    {"dropout": 1.5},
    {"dropout": True},
    {"dropout": "0.5"},
    {"unknown": 1},
]


@grid(kind=MODULE_KINDS, wrong=WRONG_ARGUMENTS)
def test_wrong_constructor_arguments(kind, wrong):
    name, options = name_of(kind)
    arguments = {"input_size": I, "hidden_size": H} | options | wrong
    if wrong == {"unknown": 1}:
        with pytest.raises(TypeError, match="unexpected keyword argument 'unknown'"):
            getattr(fused_rnn, name)(**arguments)
        return
    assert_same_refusal(
        lambda: getattr(nn, name)(**arguments), lambda: getattr(fused_rnn, name)(**arguments)
    )


@pytest.mark.parametrize("size", [-1, H, H + 1])
def test_wrong_projections(size):
    assert_same_refusal(
        lambda: nn.LSTM(I, H, proj_size=size), lambda: fused_rnn.LSTM(I, H, proj_size=size)
    )


@pytest.mark.parametrize("name", ["RNN", "GRU"])
@pytest.mark.parametrize("size", [0, 3])
def test_only_lstms_project(name, size):
    assert_same_refusal(
        lambda: getattr(nn, name)(I, H, proj_size=size),
        lambda: getattr(fused_rnn, name)(I, H, proj_size=size),
    )


def test_unknown_nonlinearity():
    for wrong in ("sigmoid", "Tanh", None):
        assert_same_refusal(
            lambda wrong=wrong: nn.RNN(I, H, nonlinearity=wrong),
            lambda wrong=wrong: fused_rnn.RNN(I, H, nonlinearity=wrong),
        )
    # torch's cell finds out when it is called.
    assert_same_refusal(
        lambda: nn.RNNCell(I, H, nonlinearity="sigmoid")(torch.randn(2, I)),
        lambda: fused_rnn.RNNCell(I, H, nonlinearity="sigmoid")(torch.randn(2, I)),
    )


def pairs(kind, *shapes, **options):
    """``hx`` of these shapes: the last one is repeated where a second state is wanted."""
    made = [torch.zeros(shape, **options) for shape in shapes]
    return (made[0], made[-1]) if kind == "lstm" else made[0]


# name -> (input, hx) for a kind; the modules have 2 layers, one direction
WRONG_CALLS = {
    "no steps": lambda kind: (torch.zeros(0, 3, I),),
    "no steps, unbatched": lambda kind: (torch.zeros(0, I),),
    "no steps, no sequences": lambda kind: (torch.zeros(0, 0, I),),
    "input of one dimension": lambda kind: (torch.zeros(I),),
    "input of four dimensions": lambda kind: (torch.zeros(1, 2, 3, I),),
    "input size": lambda kind: (torch.zeros(4, 3, I + 1),),
    "input size, unbatched": lambda kind: (torch.zeros(4, I + 1),),
    "input dtype": lambda kind: (torch.zeros(4, 3, I, dtype=torch.float64),),
    "integers": lambda kind: (torch.zeros(4, 3, I, dtype=torch.long),),
    "input device": lambda kind: (torch.zeros(4, 3, I, device="meta"),),
    "no tensor": lambda kind: ([[1.0]],),
    "hx without batch": lambda kind: (torch.zeros(4, 3, I), pairs(kind, (2, H))),
    "hx with batch": lambda kind: (torch.zeros(4, I), pairs(kind, (2, 1, H))),
    "hidden size": lambda kind: (torch.zeros(4, 3, I), pairs(kind, (2, 3, H + 1))),
    "cell size": lambda kind: (torch.zeros(4, 3, I), pairs(kind, (2, 3, H), (2, 3, H + 1))),
    "batch of hx": lambda kind: (torch.zeros(4, 3, I), pairs(kind, (2, 1, H))),
    "layers of hx": lambda kind: (torch.zeros(4, 3, I), pairs(kind, (1, 3, H))),
    "hidden size, unbatched": lambda kind: (torch.zeros(4, I), pairs(kind, (2, H + 1))),
    "hx of the other kind": lambda kind: (
        torch.zeros(4, 3, I),
        torch.zeros(1, 3, H) if kind == "lstm" else (torch.zeros(2, 3, H),) * 2,
    ),
    "packed batch of hx, to be permuted": lambda kind: (
        pack_sequence([torch.zeros(2, I), torch.zeros(3, I)], enforce_sorted=False),
        pairs(kind, (2, 1, H)),
    ),
}


@grid(
    lambda kind, wrong, **_: kind == "lstm" or wrong != "cell size",
    kind=MODULE_KINDS, wrong=WRONG_CALLS, backend=BACKEND_NAMES, device=DEVICES,
)  # fmt: skip
def test_wrong_calls(kind, wrong, backend, device):
    theirs, ours = twins(kind, I, H, 2, backend=backend, device=device)
    args = there(WRONG_CALLS[wrong](kind), device)
    assert_same_refusal(lambda: theirs(*args), lambda: ours(*args))


# Sentences of RNNBase. torch's LSTM forgets to check packed input: it reads past each row's end.
WRONG_PACKED_CALLS = {
    "input size": (
        lambda kind: (pack_sequence([torch.zeros(3, I + 1)]),),
        (RuntimeError, rf"input.size\(-1\) must be equal to input_size. Expected {I}, got {I + 1}"),
    ),
    "input of three dimensions": (
        lambda kind: (PackedSequence(torch.zeros(3, 2, I), torch.tensor([1, 1, 1])),),
        (RuntimeError, "input must have 2 dimensions, got 3"),
    ),
    "input dtype": (
        lambda kind: (pack_sequence([torch.zeros(3, I).double()]),),
        (ValueError, "RNN input dtype .* does not match weight dtype .*"),
    ),
    "batch of hx": (
        lambda kind: (
            pack_sequence([torch.zeros(3, I), torch.zeros(2, I)]),
            pairs(kind, (2, 3, H)),
        ),
        (RuntimeError, rf"Expected hidden.* size \(2, 2, {H}\), got \[2, 3, {H}\]"),
    ),
}


@grid(kind=MODULE_KINDS, wrong=WRONG_PACKED_CALLS, backend=BACKEND_NAMES, device=DEVICES)
def test_wrong_packed_calls(kind, wrong, backend, device):
    theirs, ours = twins(kind, I, H, 2, backend=backend, device=device)
    make, (error, sentence) = WRONG_PACKED_CALLS[wrong]
    args = there(make(kind), device)
    with pytest.raises(error, match=sentence):
        ours(*args)
    if kind != "lstm":
        assert_same_refusal(lambda: theirs(*args), lambda: ours(*args))


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
def test_states_of_another_dtype_or_device_are_refused(kind, backend, device):
    _, ours = twins(kind, I, H, backend=backend, device=device)
    input = torch.zeros(4, 3, I, device=device)
    for wrong in ({"dtype": torch.float64}, {"device": "meta"}):
        with pytest.raises(RuntimeError):
            ours(input, states(kind, ours, 3, **wrong))


def vectors(kind, *shapes, **options):
    return pairs(kind, *shapes, **options)


WRONG_STEPS = {
    "input of three dimensions": lambda kind: (torch.zeros(1, 2, I),),
    "input of no dimension": lambda kind: (torch.zeros(()),),
    "input size": lambda kind: (torch.zeros(3, I + 1),),
    "hidden of three dimensions": lambda kind: (torch.zeros(3, I), vectors(kind, (1, 3, H))),
    "hidden size": lambda kind: (torch.zeros(3, I), vectors(kind, (3, H + 1))),
    "cell size": lambda kind: (torch.zeros(3, I), vectors(kind, (3, H), (3, H + 1))),
    "batch": lambda kind: (torch.zeros(3, I), vectors(kind, (2, H))),
    "input size, unbatched": lambda kind: (torch.zeros(I + 1),),
    "hidden size, unbatched": lambda kind: (torch.zeros(I), vectors(kind, (H + 1,))),
    "input dtype": lambda kind: (torch.zeros(3, I, dtype=torch.float64),),
    "hidden dtype": lambda kind: (
        torch.zeros(3, I),
        vectors(kind, (3, H), dtype=torch.float64),
    ),
    "hx of the other kind": lambda kind: (
        torch.zeros(3, I),
        torch.zeros(3, H) if kind == "lstm" else (torch.zeros(3, H),) * 2,
    ),
}
# torch's own answer there comes out of its kernels ("mat1 and mat2 must have the same dtype"), or
# names things that ours does not have: the type is what can be promised.
TYPE_ONLY = {"input dtype", "hidden dtype", "cell size", "hx of the other kind"}


@grid(kind=MODULE_KINDS, wrong=WRONG_STEPS, backend=BACKEND_NAMES, device=DEVICES)
def test_wrong_cell_calls(kind, wrong, backend, device):
    if wrong == "cell size" and kind != "lstm":
        wrong = "hidden size"
    theirs, ours = twins(kind, cell=True, backend=backend, device=device)
    args = there(WRONG_STEPS[wrong](kind), device)
    if wrong in TYPE_ONLY:
        with pytest.raises(Exception) as expected:  # noqa: PT011
            theirs(*args)
        with pytest.raises(type(expected.value)):
            ours(*args)
        return
    assert_same_refusal(lambda: theirs(*args), lambda: ours(*args))


@grid(kind=MODULE_KINDS, cell=(False, True), made=("constructor", "context"))
def test_an_unknown_backend_is_refused_with_the_known_names(kind, cell, made):
    name, options = name_of(kind, cell=cell)
    make = getattr(fused_rnn, name) if made == "constructor" else fused_rnn.use_backend
    arguments = (
        {"input_size": I, "hidden_size": H, "backend": "fortran"} | options
        if made == "constructor"
        else {"name": "fortran"}
    )
    with pytest.raises(ValueError, match="fortran") as refusal:
        make(**arguments)
    for known in (*BACKENDS, "auto"):
        assert repr(known) in str(refusal.value)


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
def test_a_refused_call_leaves_the_module_usable(kind, backend, device):
    theirs, ours = twins(kind, I, H, backend=backend, device=device)
    with pytest.raises(RuntimeError, match="input_size"):
        ours(torch.zeros(4, 3, I + 1, device=device))
    input = torch.randn(4, 3, I, device=device)
    torch.testing.assert_close(ours(input), theirs(input))
