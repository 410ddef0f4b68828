"""Weights that something else makes, holds or watches: norms, replicas, hooks, frozen ones."""

import itertools

import pytest
import torch
from devices import DEVICES, without_cudnn
from numerics import grid
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from twins import BACKEND_NAMES, MODULE_KINDS, H, I, assert_twins, states, tensors, twins

import fused_rnn


class Doubled(nn.Module):
    """Counts how often the weight is computed."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


WRAPPERS = {
    "weight_norm, old": pytest.param(
        nn.utils.weight_norm,
        marks=pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    ),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "doubled": lambda module, name: parametrize.register_parametrization(module, name, Doubled()),
}


def gradients(module, plain, weights, input, hx):
    """Of the parameters of ``module``, with ``plain`` doing the computation on ``weights``."""
    result = torch.func.functional_call(plain, weights, (input, hx))
    outputs = list(tensors(result))
    loss = sum(
        (out * torch.linspace(-1, 1, out.numel()).to(out).view_as(out)).sum() for out in outputs
    )
    # torch's old weight_norm keeps the weight, and so its graph, until the next call.
    return outputs, torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


@grid(backend=BACKEND_NAMES, device=DEVICES)
@pytest.mark.parametrize("kind", MODULE_KINDS)
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
@without_cudnn()
def test_made_weights_are_used_and_differentiated(kind, backend, device, cell, wrap):
    """Against torch's module on the weights as they come out of the parametrization."""
    torch.set_default_dtype(torch.float64)
    try:
        theirs, ours = twins(kind, cell=cell, backend=backend, device=device)
        suffix = "" if cell else "_l0"
        for name in (f"weight_hh{suffix}", f"weight_ih{suffix}"):
            wrap(ours, name)
        ours.eval()  # spectral_norm moves on at each access while training
        input = torch.randn(*((3,) if cell else (5, 3)), I, device=device)
        hx = states(kind, ours, 3)
        got = gradients(ours, ours, {}, input, hx)
        made = {name: getattr(ours, name) for name, _ in theirs.named_parameters()}
        expected = gradients(ours, theirs, made, input, hx)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(got, expected)


@grid(kind=MODULE_KINDS, cell=(False, True), backend=BACKEND_NAMES, device=DEVICES)
def test_a_parametrized_weight_is_computed_once_a_call(kind, cell, backend, device):
    """It may be dear, and spectral_norm takes a step of its power iteration each time."""
    _, ours = twins(kind, cell=cell, backend=backend, device=device)
    name = "weight_hh" if cell else "weight_hh_l0"
    doubled = Doubled()
    parametrize.register_parametrization(ours, name, doubled)
    input = torch.randn(*((3,) if cell else (5, 3)), I, device=device)
    doubled.calls = 0
    for _ in range(2):
        ours(input)
    assert doubled.calls == 2


@grid(kind=MODULE_KINDS, cell=(False, True), backend=BACKEND_NAMES, device=DEVICES)
def test_functional_call(kind, cell, backend, device):
    theirs, ours = twins(kind, cell=cell, backend=backend, device=device, dtype=torch.float64)
    input = torch.randn(*((3,) if cell else (5, 3)), I, dtype=torch.float64, device=device)
    ours(input)  # on its own weights first: nothing of them may stay behind
    weights = {
        name: torch.randn_like(p).mul_(0.3).requires_grad_() for name, p in ours.named_parameters()
    }
    results = []
    for module in (theirs, ours):
        outputs = list(tensors(torch.func.functional_call(module, weights, (input,))))
        loss = sum(out.square().sum() for out in outputs)
        results.append((outputs, torch.autograd.grad(loss, list(weights.values()))))
    assert_close(results[1], results[0])
    assert all(p.grad is None for p in ours.parameters())


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
def test_replicas_compute_with_their_own_weights(kind, backend, device):
    """As torch.nn.parallel.replicate makes them: plain tensors in place of the parameters."""
    _, ours = twins(kind, I, H, 2, backend=backend, device=device)
    input = torch.randn(4, 3, I, device=device)
    ours(input)
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours.named_parameters():
        setattr(replica, name, parameter * 1)
    expected = ours(input)
    got = replica(input)
    assert_close(got, expected, rtol=0, atol=0)
    got[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    for name, _ in ours.named_parameters():
        setattr(replica, name, getattr(ours, name) * 0)
    assert not torch.equal(replica(input)[0], expected[0])
    assert_close(ours(input), expected, rtol=0, atol=0)


@grid(kind=MODULE_KINDS, cell=(False, True), backend=BACKEND_NAMES, device=DEVICES)
def test_hooks_are_called_as_torchs(kind, cell, backend, device):
    theirs, ours = twins(kind, cell=cell, backend=backend, device=device, dtype=torch.float64)
    input = torch.randn(*((3,) if cell else (5, 3)), I, dtype=torch.float64, device=device)

    def calls(module):
        seen = []
        module.register_forward_pre_hook(lambda m, args: seen.append(("pre", args)))
        module.register_forward_hook(lambda m, args, out: seen.append(("forward", out)))
        module.register_full_backward_hook(lambda m, gin, gout: seen.append(("backward", gin)))
        x = input.clone().requires_grad_()
        sum(out.square().sum() for out in tensors(module(x))).backward()
        return seen

    expected, got = calls(theirs), calls(ours)
    assert [name for name, _ in got] == [name for name, _ in expected]
    for (name, a), (_, b) in zip(got, expected, strict=True):
        assert_close(list(tensors(a)), list(tensors(b)), msg=lambda m, name=name: f"{name}: {m}")


FROZEN = [
    names
    for size in (1, 2, 4)
    for names in itertools.combinations(
        ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), size
    )
]


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES, frozen=FROZEN)
def test_frozen_weights_get_no_gradient_and_change_no_other(kind, backend, device, frozen):
    theirs, ours = twins(kind, backend=backend, device=device, dtype=torch.float64)
    for module in (theirs, ours):
        for name in frozen:
            getattr(module, name).requires_grad_(False)
    input = torch.randn(4, 3, I, dtype=torch.float64, device=device)
    hx = states(kind, ours, 3, dtype=torch.float64)
    assert_twins(theirs, ours, input, hx, what=(kind, backend, device, frozen))


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES,
      wants=("input", "h0", "weights", "nothing"))  # fmt: skip
def test_only_what_wants_a_gradient_gets_one(kind, backend, device, wants):
    results = []
    options = {"dtype": torch.float64, "device": device}
    for module in twins(kind, backend=backend, **options):
        module.requires_grad_(wants == "weights")
        torch.manual_seed(2)
        input = torch.randn(4, 3, I, **options, requires_grad=wants == "input")
        hx = states(kind, module, 3, **options, requires_grad=wants == "h0")
        outputs = list(tensors(module(input, hx)))
        assert all(out.requires_grad == (wants != "nothing") for out in outputs)
        leaves = [t for t in (input, *tensors(hx), *module.parameters()) if t.requires_grad]
        if leaves:
            results.append(torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves))
    if results:
        assert_close(results[1], results[0])


@grid(
    kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES, part=("output", "h_n", "c_n")
)  # fmt: skip
def test_backward_from_one_result_alone(kind, backend, device, part):
    if part == "c_n" and kind != "lstm":
        part = "h_n"
    results = []
    at = ("output", "h_n", "c_n").index(part)
    options = {"dtype": torch.float64, "device": device}
    for module in twins(kind, I, H, 2, bidirectional=True, backend=backend, **options):
        torch.manual_seed(2)
        input = torch.randn(4, 3, I, **options, requires_grad=True)
        result = list(tensors(module(input)))[at]
        leaves = [input, *module.parameters()]
        results.append(
            torch.autograd.grad(
                result.square().sum(), leaves, allow_unused=True, materialize_grads=True
            )
        )
    assert_close(results[1], results[0])


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
@without_cudnn()
def test_backward_twice_over_a_kept_graph_and_gradients_add_up(kind, backend, device):
    _, ours = twins(kind, backend=backend, device=device, dtype=torch.float64)
    loss = ours(torch.randn(4, 3, I, dtype=torch.float64, device=device))[0].square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in ours.parameters()]
    loss.backward()
    assert_close([p.grad for p in ours.parameters()], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
def test_a_weight_changed_between_forward_and_backward_is_noticed(kind, backend, device):
    _, ours = twins(kind, backend=backend, device=device)
    output, _ = ours(torch.randn(4, 3, I, device=device))
    with torch.no_grad():
        ours.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class Masked(fused_rnn.GRU):
    """Its weight is the parameter of that name, made otherwise."""

    @property
    def weight_hh_l0(self):
        return nn.Module.__getattr__(self, "weight_hh_l0") * self.mask


@pytest.mark.parametrize("options", [{}, {"reset": torch.tensor([[True], [False], [True]])}])
def test_a_subclass_may_make_a_weight_by_its_name(options):
    ours, plain = Masked(3, 4), fused_rnn.GRU(3, 4)
    ours.mask = (torch.arange(4) % 2).float()
    with torch.no_grad():
        parameter = nn.Module.__getattr__(ours, "weight_hh_l0")
        for name, w in ours.named_parameters():
            getattr(plain, name).copy_(w * ours.mask if w is parameter else w)
    x = torch.randn(3, 1, 3)
    assert_close(ours(x, **options)[0], plain(x, **options)[0], rtol=0, atol=0)
    with torch.no_grad():
        h = torch.randn(1, 1, 4)
        assert_close(ours.step(x[0], h), plain.step(x[0], h), rtol=0, atol=0)


@pytest.mark.parametrize("made", ["a property", "__getattr__"])
def test_a_subclass_of_a_cell_likewise(made):
    if made == "a property":
        more = {"weight_hh": property(lambda self: 2 * nn.Module.__getattr__(self, "weight_hh"))}
    else:

        def getattr_of(self, name):
            found = nn.Module.__getattr__(self, name)
            return 2 * found if name == "weight_hh" else found

        more = {"__getattr__": getattr_of}
    ours, plain = type("Doubled", (fused_rnn.GRUCell,), more)(3, 4), fused_rnn.GRUCell(3, 4)
    plain.load_state_dict(ours.state_dict())
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    with torch.no_grad():
        plain.weight_hh *= 2
        assert_close(ours(x, h), plain(x, h), rtol=0, atol=0)
    assert_close(ours(x, h), plain(x, h))


def test_fx_does_not_freeze_what_a_module_makes_of_a_constant():
    """Its parameters stand in the way, as of any module of the caller's own."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fused_rnn.LSTM(3, 4)
            self.register_buffer("x", torch.randn(2, 1, 3))

        def forward(self, y):
            return self.rnn(self.x)[0] + y

    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(Model())
