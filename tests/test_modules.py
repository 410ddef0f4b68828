"""RNN, LSTM and GRU are torch.nn's in all that can be seen from outside."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from devices import DEVICES, native, without_cudnn
from numerics import DTYPES, HALF, grid
from torch import nn
from torch.nn.modules.rnn import RNNBase
from torch.testing import assert_close
from torchs_cases import module_info
from twins import BACKEND_NAMES, MODULE_KINDS, H, I, P, assert_twins, name_of, states, step, twins

import fused_rnn
from fused_rnn.cells import CELLS

NAMES = ("RNN", "LSTM", "GRU")


def makes_sense(kind, proj_size=0, dtype=None, **_):
    """Only LSTMs project; ReLU in the half types is left to numerics.signed_permutation."""
    return (not proj_size or kind == "lstm") and not (kind == "rnn_relu" and dtype in HALF)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_stand_in_torchs_order(name):
    nonlinearity = ("relu",) if name == "RNN" else ()
    projection = (3,) if name == "LSTM" else (0,)
    args = (4, 5, 2, *nonlinearity, False, True, 0.25, True, *projection, "cpu", torch.float64)
    theirs, ours = getattr(nn, name)(*args), getattr(fused_rnn, name)(*args)
    for attribute in RNNBase.__constants__:
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert repr(ours) == repr(theirs)
    assert [(n, p.shape, p.dtype) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in theirs.named_parameters()
    ]


@grid(
    makes_sense,
    kind=CELLS,
    num_layers=(1, 3),
    bias=(True, False),
    batch_first=(False, True),
    dropout=(0.0, 0.5),
    bidirectional=(False, True),
    proj_size=(0, P),
)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_same_seed_makes_the_same_module(
    kind, num_layers, bias, batch_first, dropout, bidirectional, proj_size
):
    name, options = name_of(kind)
    options |= {"num_layers": num_layers, "bias": bias, "batch_first": batch_first}
    options |= {"dropout": dropout, "bidirectional": bidirectional}
    options |= {"proj_size": proj_size} if proj_size else {}
    made = []
    for package in (nn, fused_rnn):
        torch.manual_seed(3)
        made.append((getattr(package, name)(I, H, **options), torch.get_rng_state()))
    (theirs, their_random), (ours, our_random) = made
    assert torch.equal(our_random, their_random)
    assert repr(ours) == repr(theirs)
    assert {a: getattr(ours, a) for a in RNNBase.__constants__} == {
        a: getattr(theirs, a) for a in RNNBase.__constants__
    }
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert [list(map(torch.Tensor.size, layer)) for layer in ours.all_weights] == [
        list(map(torch.Tensor.size, layer)) for layer in theirs.all_weights
    ]


@grid(
    makes_sense,
    kind=CELLS,
    backend=BACKEND_NAMES,
    device=DEVICES,
    dtype=DTYPES,
    num_layers=(1, 2),
    bidirectional=(False, True),
    batch_first=(False, True),
    bias=(True, False),
    proj_size=(0, P),
    batched=(True, False),
    given=(True, False),
)
def test_results_and_gradients_are_torchs(
    kind, backend, device, dtype, num_layers, bidirectional, batch_first, bias, proj_size, batched,
    given,
):  # fmt: skip
    options = {"proj_size": proj_size} if proj_size else {}
    theirs, ours = twins(
        kind, I, H, num_layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias,
        dtype=dtype, backend=backend, device=device, **options,
    )  # fmt: skip
    N = (3,) if batched else ()
    shape = (*N, 7, I) if batch_first else (7, *N, I)
    input = torch.randn(shape, dtype=dtype, device=device)
    hx = states(kind, ours, *N, dtype=dtype) if given else None
    assert_twins(theirs, ours, input, hx, what=(kind, backend, device))


@grid(makes_sense, kind=CELLS, backend=BACKEND_NAMES, device=DEVICES, bidirectional=(False, True),
      batch_first=(False, True), proj_size=(0, P))  # fmt: skip
@without_cudnn()
def test_dropout_draws_torchs_random_numbers(
    kind, backend, device, bidirectional, batch_first, proj_size
):
    options = {"proj_size": proj_size} if proj_size else {}
    theirs, ours = twins(
        kind, I, H, 3, dropout=0.4, bidirectional=bidirectional, batch_first=batch_first,
        dtype=torch.float64, backend=backend, device=device, **options,
    )  # fmt: skip
    input = torch.randn(4, 5, I, dtype=torch.float64, device=device)
    assert_twins(theirs, ours, input, what=(kind, backend, device), seed=11)
    drawn_from = torch.cuda if device == "cuda" else torch
    after = []
    for module in (theirs, ours):
        torch.manual_seed(11)
        module(input)
        after.append(drawn_from.get_rng_state())
    assert torch.equal(*after), "another number of draws than torch"
    first, second = ours(input)[0], ours(input)[0]
    assert not torch.equal(first, second)
    ours.eval()
    assert torch.equal(ours(input)[0], ours(input)[0])


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES, dropout=(0.0, 1.0))
@without_cudnn()
def test_dropout_of_everything_leaves_what_torch_leaves(kind, backend, device, dropout):
    theirs, ours = twins(
        kind, I, H, 2, dropout=dropout, backend=backend, device=device, dtype=torch.float64
    )
    input = torch.randn(4, 2, I, dtype=torch.float64, device=device)
    assert_twins(theirs, ours, input, what=(kind, backend, device, dropout), seed=5)


def test_dropout_on_a_single_layer_warns_as_torch_does():
    with pytest.warns(UserWarning, match="dropout option") as theirs:
        nn.GRU(I, H, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option") as ours:
        fused_rnn.GRU(I, H, dropout=0.5)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]


@grid(kind=CELLS, backend=BACKEND_NAMES, device=DEVICES, T=(1, 4), given=(True, False),
      grad=(True, False))  # fmt: skip
def test_a_batch_of_zero_gives_empty_results_and_zero_gradients(
    kind, backend, device, T, given, grad
):
    theirs, ours = twins(kind, I, H, 2, bidirectional=True, backend=backend, device=device)
    input = torch.randn(T, 0, I, device=device)
    hx = states(kind, ours, 0) if given else None
    if not grad:
        with torch.no_grad():
            expected, got = theirs(input, hx), ours(input, hx)
        assert_close(got, expected, rtol=0, atol=0)
        return
    expected, got = step(theirs, input, hx), step(ours, input, hx)
    for name in expected:
        assert got[name].shape == expected[name].shape, name
        assert not got[name].any(), name


def layouts(tensor):
    """The same values in other layouts."""
    wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1]).normal_()
    wide[..., ::2] = tensor
    yield "every other column", wide[..., ::2]
    yield "transposed", tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield "reversed order of sizes", tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    offset = tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor)
    yield "unaligned", offset.copy_(tensor)


@grid(kind=CELLS, backend=BACKEND_NAMES, device=DEVICES)
def test_strides_of_input_and_states_do_not_matter(kind, backend, device):
    _, ours = twins(
        kind, I, H, 2, bidirectional=True, backend=backend, device=device, dtype=torch.float64
    )
    input = torch.randn(5, 3, I, dtype=torch.float64, device=device)
    hx = states(kind, ours, 3, dtype=torch.float64)
    expected = step(ours, input, hx)
    for layout, other in layouts(input):
        got = step(ours, other, hx)
        for name, value in expected.items():
            assert_close(got[name], value, msg=lambda m, at=(layout, name): f"{at}: {m}")
    lists = [list(layouts(h)) for h in (hx if isinstance(hx, tuple) else (hx,))]
    for other in zip(*lists, strict=True):
        given = tuple(h for _, h in other)
        got = step(ours, input, given if isinstance(hx, tuple) else given[0])
        for name, value in expected.items():
            assert_close(got[name], value, msg=lambda m, at=(other[0][0], name): f"{at}: {m}")


@grid(kind=CELLS, backend=BACKEND_NAMES, device=DEVICES)
def test_expanded_input_and_states_give_summed_gradients(kind, backend, device):
    _, ours = twins(kind, I, H, backend=backend, device=device, dtype=torch.float64)
    one = torch.randn(5, 1, I, dtype=torch.float64, device=device, requires_grad=True)
    start = torch.randn(1, 1, H, dtype=torch.float64, device=device, requires_grad=True)
    gradients = []
    for widen in (lambda t: t.expand(-1, 4, -1), lambda t: t.repeat(1, 4, 1)):
        h0 = widen(start)
        output, _ = ours(widen(one), (h0, h0) if CELLS[kind].states == 2 else h0)
        weight = torch.linspace(-1, 1, output.numel()).to(output).view_as(output)
        gradients.append(torch.autograd.grad((output * weight).sum(), (one, start)))
    assert_close(gradients[0], gradients[1])


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
@without_cudnn()
def test_backward_works_in_eval_mode(kind, backend, device):
    theirs, ours = twins(
        kind, I, H, 2, dropout=0.5, backend=backend, device=device, dtype=torch.float64
    )
    theirs.eval()
    ours.eval()
    input = torch.randn(4, 2, I, dtype=torch.float64, device=device)
    assert_twins(theirs, ours, input, what=(kind, backend, device))


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
@without_cudnn()
def test_training_repeats_bit_for_bit(kind, backend, device):
    def train():
        torch.manual_seed(0)
        _, ours = twins(
            kind, I, H, 2, dropout=0.3, bidirectional=True, backend=backend, device=device
        )
        optimizer = torch.optim.Adam(ours.parameters(), lr=0.01)
        input = torch.randn(6, 3, I, device=device)
        for _ in range(5):
            optimizer.zero_grad()
            ours(input)[0].square().sum().backward()
            optimizer.step()
        return ours.state_dict()

    first, second = train(), train()
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@grid(kind=MODULE_KINDS, dtype=DTYPES, device=DEVICES)
def test_checkpoints_load_both_ways(kind, dtype, device):
    name, options = name_of(kind)
    options |= {"bidirectional": True, "dtype": dtype, "device": device}
    made = [getattr(package, name)(I, H, 2, **options) for package in (nn, fused_rnn, nn)]
    for source, target in itertools.pairwise(made):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        assert str(target.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value), key


COPIES = {
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": lambda module: saved_and_loaded(module),
}


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@grid(kind=MODULE_KINDS, way=COPIES, device=DEVICES)
def test_copies_keep_weights_options_and_backend(kind, way, device):
    backend = "cuda" if device == "cuda" else "reference"
    _, ours = twins(kind, I, H, 2, batch_first=True, backend=backend, device=device)
    model = nn.Sequential(nn.Linear(3, I, device=device), ours)
    x = torch.randn(2, 4, 3, device=device)
    model(x)  # whatever a call leaves behind must not stop the copy
    again = COPIES[way](model)
    assert repr(again) == repr(model)
    assert again[1].backend == backend
    expected, got = model(x), again(x)
    assert_close(got, expected, rtol=0, atol=0)
    if way != "copy":
        with torch.no_grad():
            again[1].weight_hh_l0.add_(1)
        assert torch.equal(model(x)[0], expected[0]), "the copy shares weights with the original"
        assert not torch.equal(again(x)[0], expected[0]), "the copy does not use its own weights"


@grid(kind=MODULE_KINDS, to=("half", "double", "bfloat16", "float"), device=DEVICES)
def test_dtype_changes_reach_the_weights_in_use(kind, to, device):
    theirs, ours = twins(kind, I, H, 2, device=device)
    assert getattr(theirs, to)() is theirs
    assert getattr(ours, to)() is ours
    input = torch.randn(4, 2, I, dtype=theirs.weight_hh_l0.dtype, device=device)
    assert_twins(theirs, ours, input, what=(kind, to, device))
    ours.to(torch.float64)
    assert ours(input.double())[0].dtype == torch.float64


@grid(kind=MODULE_KINDS, device=DEVICES)
def test_a_new_parameter_is_the_one_in_use(kind, device):
    theirs, ours = twins(kind, dtype=torch.float64, device=device)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(torch.full_like(module.weight_hh_l0, 0.25))
        with torch.no_grad():
            module.weight_ih_l0.mul_(0.5)
            module.bias_ih_l0.data = torch.ones_like(module.bias_ih_l0)
    input = torch.randn(4, 2, I, dtype=torch.float64, device=device)
    assert_twins(theirs, ours, input, what=(kind, device))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_torchs_own_cases(name, training, dtype, device):
    info = module_info(name)
    cases = info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=training
    )
    options = {"dtype": dtype, "device": device, "backend": native(device)}
    assert cases
    for case in cases:
        args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
        ours = getattr(fused_rnn, name)(*args, **kwargs, **options).train(training)
        args = case.forward_input.args
        expected = case.reference_fn(ours, *args)
        assert_close(ours(*args), expected)


def test_flatten_parameters_does_nothing_and_nothing_warns():
    lstm = fused_rnn.LSTM(I, H, 2)
    before = [p.data_ptr() for p in lstm.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lstm.flatten_parameters() is None
        copy.deepcopy(lstm)(torch.randn(3, 2, I))
    assert [p.data_ptr() for p in lstm.parameters()] == before
