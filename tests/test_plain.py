"""The common case takes a short way, ``functional._plain_rnn``: the general one's results, bit for
bit, and nothing else goes there."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from numerics import DTYPES, grid
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from twins import H, I, P, states, step, tensors, twins

from fused_rnn import autograd, functional
from fused_rnn.backends import cpu
from fused_rnn.cells import CELLS

RESET = torch.tensor(
    [[0, 0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0]], dtype=torch.bool
)  # [N,T]


@pytest.fixture
def plain(monkeypatch):
    """The layers that went the short way, as they come."""
    seen, real = [], cpu.plain_layer

    def plain_layer(*operands):
        seen.append(operands)
        return real(*operands)

    monkeypatch.setattr(cpu, "plain_layer", plain_layer)
    return seen


@grid(
    lambda kind, proj_size, **_: not proj_size or kind == "lstm",
    kind=CELLS, dtype=DTYPES, num_layers=(1, 3), bidirectional=(False, True), bias=(True, False),
    proj_size=(0, P), dropout=(0.0, 0.4), given=(True, False), training=(True, False),
    layout=("dense", "batch_first", "packed", "sorted"),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_the_short_way_gives_the_bits_of_the_general_one(
    kind, dtype, num_layers, bidirectional, bias, proj_size, dropout, given, training, layout,
    plain, monkeypatch,
):  # fmt: skip
    batch_first = layout == "batch_first"
    options = {"proj_size": proj_size} if proj_size else {}
    options |= {"num_layers": num_layers, "bias": bias, "batch_first": batch_first}
    options |= {"dropout": dropout, "bidirectional": bidirectional}
    _, module = twins(kind, dtype=dtype, **options)
    module.train(training)
    input = torch.randn(3, 7, I, dtype=dtype)
    hx = states(kind, module, 3 if batch_first else 7, dtype=dtype) if given else None
    if layout in ("packed", "sorted"):
        lengths = [2, 3, 1, 3, 1, 1, 2] if layout == "packed" else [3, 3, 2, 2, 1, 1, 1]
        input = pack_padded_sequence(input, lengths, enforce_sorted=layout == "sorted")

    def results():
        with torch.no_grad():
            torch.manual_seed(5)
            without = dict(enumerate(tensors(module(input, hx))))
        return step(module, input, hx, seed=5) | without

    short, layers = results(), 2 * num_layers * (1 + bidirectional)
    assert len(plain) == layers
    monkeypatch.setattr(functional, "is_plain", lambda: False)
    general = results()
    assert len(plain) == layers, "the general way was not taken"
    assert list(short) == list(general)
    for name, value in general.items():
        assert short[name].dtype is value.dtype, name
        assert torch.equal(short[name], value), name


CONTROLLED = {
    "lengths": {"lengths": [4, 7, 1]},
    "padded": {"lengths": [0, 5, 7], "padding_value": -2.5},
    "reset": {"reset": RESET},
    "tbptt": {"tbptt": 3},
    "all": {"lengths": [6, 2, 7], "reset": RESET, "tbptt": 2, "padding_value": 1.5},
}


@grid(
    lambda asked, layout, **_: layout != "packed" or asked == "tbptt",
    kind=CELLS, dtype=DTYPES, asked=CONTROLLED, num_layers=(1, 2), bidirectional=(False, True),
    dropout=(0.0, 0.4), given=(True, False), layout=("dense", "batch_first", "packed"),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_ends_resets_and_cuts_go_the_short_way(
    kind, dtype, asked, num_layers, bidirectional, dropout, given, layout, plain, monkeypatch
):
    batch_first = layout == "batch_first"
    options = {"num_layers": num_layers, "dropout": dropout, "batch_first": batch_first}
    _, module = twins(kind, dtype=dtype, bidirectional=bidirectional, **options)
    hx = states(kind, module, 3, dtype=dtype) if given else None
    call = dict(CONTROLLED[asked])
    if "reset" in call and not batch_first:
        call["reset"] = call["reset"].t()
    input = torch.randn(3, 7, I, dtype=dtype)
    for row, length in zip(input, call.get("lengths", ()), strict=False):
        row[length:] = float("nan")
    input = input if batch_first else input.transpose(0, 1)

    def results():
        leaf, leaves, found = input.detach().requires_grad_(), [*module.parameters()], []
        given = pack_padded_sequence(leaf, [7, 5, 2]) if layout == "packed" else leaf
        for mode in (torch.no_grad(), torch.enable_grad()):
            torch.manual_seed(5)
            with mode:
                found += tensors(module(given, hx, **call))
        half = len(found) // 2
        upstream = [torch.sin(t.detach().float()).to(dtype) for t in found[half:]]
        return [*found, *torch.autograd.grad(found[half:], [leaf, *leaves], upstream)]

    short, layers = results(), 2 * num_layers * (1 + bidirectional)
    assert len(plain) == layers
    monkeypatch.setattr(functional, "is_plain", lambda: False)
    general = results()
    assert len(plain) == layers, "the general way was not taken"
    assert all(not t.isnan().any() for t in short)
    for value, expected in zip(short, general, strict=True):
        assert value.dtype is expected.dtype
        assert torch.equal(value, expected)


@grid(kind=CELLS, frozen=("weight_ih_l0", "l0", "l1", "reverse"), plainly=(True, False))
def test_only_layers_with_a_gradient_save_for_it(kind, frozen, plainly, monkeypatch):
    _, module = twins(kind, num_layers=2, bidirectional=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen not in name)
    saved, real = [], autograd.ops

    def layer(*operands):
        saved.append(operands[9])
        return real.layer(*operands)

    monkeypatch.setattr(autograd, "ops", SimpleNamespace(layer=layer))
    if not plainly:
        monkeypatch.setattr(functional, "is_plain", lambda: False)
    module(torch.randn(4, 3, I))
    reads_gradient = {"l0": [False, False, True, True], "l1": [True] * 4}
    reads_gradient |= {"weight_ih_l0": [True] * 4, "reverse": [True, False, True, True]}
    assert saved == reads_gradient[frozen]


@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference", "auto"])
def test_no_steps_at_all_are_refused_as_torch_does(backend, plain):
    module = twins("gru")[1]
    module.backend = backend
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        module(torch.randn(0, 3, I))
    assert not plain


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


OTHERS = {
    "autocast": lambda m, x: torch.autocast("cpu", torch.bfloat16),
    "a dispatch mode": lambda m, x: Watching(),
    "forward-mode AD": lambda m, x: forward_ad.dual_level(),
}


@grid(kind=CELLS, other=OTHERS)
def test_what_has_to_see_each_operation_takes_the_general_way(kind, other, plain):
    _, module = twins(kind)
    x = torch.randn(4, 3, I)
    with OTHERS[other](module, x):
        module(x)
    assert not plain
    module(x)
    assert plain


@grid(kind=CELLS, transform=("grad", "vmap", "trace"))
def test_transforms_take_the_general_way(kind, transform, plain):
    _, module = twins(kind)
    x = torch.randn(4, 3, I)
    with torch.no_grad() if transform == "trace" else nullcontext():
        if transform == "grad":
            torch.func.grad(lambda x: module(x)[0].sum())(x)
        elif transform == "vmap":
            torch.func.vmap(lambda x: module(x)[0])(x.expand(2, 4, 3, I))
        else:
            torch.jit.trace(module, x, check_trace=False)
    assert not plain


OWN = {
    "reverse": {"direction": "reverse"},
    "zoneout": {"zoneout": 0.2},
    "recurrent_dropout": {"recurrent_dropout": 0.2},
    "weight_dropout": {"weight_dropout": 0.2},
    "recompute": {"recompute": True},
    "learned": {"learn_initial_state": True},
}


@grid(kind=CELLS, asked=(*OWN, "last_step", "jagged", "unlike"), controlled=(False, True))
def test_options_and_other_layouts_take_the_general_way(kind, asked, controlled, plain):
    _, torchs = twins(kind)
    module = type(torchs)(I, H, **OWN.get(asked, {}))
    x, call = torch.randn(4, 3, I), {"tbptt": 2} if controlled else {}
    if asked == "learned":
        call["reset"] = torch.rand(4, 3) < 0.3
    if asked == "recompute" and not torchs._cell.saved:
        pytest.skip("this cell saves nothing but its states anyway")
    if asked == "last_step":
        call["last_step_only"] = True
    if asked == "jagged":
        x = torch.nested.nested_tensor([x[:, 0], x[:2, 1]], layout=torch.jagged)
    if asked == "unlike":
        with pytest.raises(RuntimeError):
            module(x, states(kind, module, 3, dtype=torch.float64))
    else:
        module(x, **call)
    assert not plain


@grid(kind=CELLS, backend=("torch", "reference"))
def test_other_backends_have_no_short_way(kind, backend, plain):
    _, module = twins(kind, backend=backend)
    module(torch.randn(4, 3, I))
    assert not plain
