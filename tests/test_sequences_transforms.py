"""Lengths, resets and their kin under torch.compile, double backward and torch.func."""

from functools import partial

import numerics
import pytest
import torch
from devices import DEVICES
from numerics import grid
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from twins import MODULE_KINDS, H, I, P, mapped, name_of, states, step, tensors

import fused_rnn
from fused_rnn.cells import CELLS

T, N = 5, 3
MODULES = {
    "plain": {},
    "bidirectional": {"bidirectional": True, "num_layers": 2, "batch_first": True},
    "reverse": {"direction": "reverse"},
    "learned": {"learn_initial_state": True},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module_of(kind, **options):
    name, extra = name_of(kind)
    return getattr(fused_rnn, name)(I, H, **extra, dtype=torch.float64, **options)


def asked_of(what, module, T=T, N=N, device="cpu"):
    """Keywords of a call."""
    generator = torch.Generator().manual_seed(T)
    lengths = torch.randint(T + 1, (N,), generator=generator).to(device)
    reset = (torch.rand(T, N, generator=generator) < 0.3).to(device)
    lstm = module.mode == "LSTM"
    return {
        "lengths": {"lengths": lengths, "padding_value": -1.0},
        "list": {"lengths": lengths.tolist()},
        "reset": {"reset": reset.t() if module.batch_first else reset},
        "tbptt": {"tbptt": 2},
        "cell states": {"return_cell_states": lstm, "lengths": lengths},
        "last step": {"last_step_only": True, "lengths": lengths},
    }[what]


def everything(module, *sizes, **options):
    """All keywords but ``last_step_only`` in one call."""
    found = {}
    for what in ("lengths", "reset", "tbptt", "cell states"):
        found |= asked_of(what, module, *sizes, **options)
    if module.learn_initial_state:
        del found["reset"]
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "asked", "form"),
    [
        ("lstm", "all", "bidirectional"),
        ("gru", "list", "reverse"),
        ("rnn_tanh", "last step", "learned"),
    ],
)
def test_compiled_training_equals_eager(kind, device, asked, form):
    ours = module_of(kind, device=device, **MODULES[form])
    shape = (N, T, I) if ours.batch_first else (T, N, I)
    input = torch.randn(shape, dtype=torch.float64, device=device)
    hx = states(kind, ours, N, dtype=torch.float64)
    asked = (everything if asked == "all" else partial(asked_of, asked))(ours, device=device)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    got = step(ours, input, hx, call=lambda x, hx: compiled(x, hx, **asked))
    assert_close(got, step(ours, input, hx, call=lambda x, hx: ours(x, hx, **asked)))


@pytest.mark.parametrize("grad", [True] if not numerics.FULL else [False, True])
def test_other_sizes_do_not_recompile(grad):
    ours, counter = module_of("lstm", bidirectional=True), CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter), []
    with torch.set_grad_enabled(grad):
        # No two sizes are equal at first: equal ones are taken for one.
        for T, N in ((8, 3), (2, 9), (7, 7)):
            input, asked = torch.randn(T, N, I, dtype=torch.float64), everything(ours, T, N)
            assert_close(compiled(input, **asked), ours(input, **asked))
            counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_lengths_outside_stop_a_compiled_call():
    ours = module_of("gru")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    input = torch.randn(T, N, I, dtype=torch.float64)
    compiled(input, lengths=torch.tensor([1, 0, T]))
    for wrong in (-1, T + 1):
        with pytest.raises(RuntimeError, match="lengths must be from 0 to the number of steps"):
            compiled(input, lengths=torch.tensor([1, 2, wrong]))


def test_inductor_trains():
    ours = module_of("gru")
    input = torch.randn(T, N, I, dtype=torch.float64)
    asked = asked_of("lengths", ours) | asked_of("reset", ours)
    compiled = torch.compile(ours, fullgraph=True)
    got = step(ours, input, call=lambda x, hx: compiled(x, hx, **asked))
    assert_close(got, step(ours, input, call=lambda x, hx: ours(x, hx, **asked)))


@pytest.mark.parametrize(("kind", "grad"), [("lstm", True), ("gru", False)])
def test_step_compiles(kind, grad):
    proj = {"proj_size": P} if kind == "lstm" else {}
    ours = module_of(kind, num_layers=2, **proj)
    compiled = torch.compile(ours.step, fullgraph=True, dynamic=True, backend="aot_eager")
    x, hx = torch.randn(N, I, dtype=torch.float64), states(kind, ours, N, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        for state in (None, hx):
            got, expected = list(tensors(compiled(x, state))), list(tensors(ours.step(x, state)))
            assert_close(got, expected)


@pytest.mark.parametrize("grad", [True] if not numerics.FULL else [False, True])
def test_jagged_input_compiles(grad):
    ours = module_of("lstm", bidirectional=True)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    values = torch.randn(9, I, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(grad):
        for lengths in ((3, 0, 6), (1, 2, 2, 4)):
            offsets = torch.tensor([0, *lengths]).cumsum(0)
            outputs = [
                call(torch.nested.nested_tensor_from_jagged(values, offsets))[0].values()
                for call in (compiled, ours)
            ]
            assert_close(*outputs)
            if grad:
                assert_close(*(torch.autograd.grad(y.square().sum(), values) for y in outputs))


def test_what_cannot_be_compiled_says_so():
    ours = module_of("gru", learn_initial_state=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    input = torch.randn(T, N, I, dtype=torch.float64)
    with pytest.raises(Exception, match="number of episodes decides the shapes"):
        compiled(input, **asked_of("reset", ours))


def function_of(ours, asked):
    """The module as a function of its input, its state and its parameters, for gradcheck."""
    names = [name for name, _ in ours.named_parameters()]

    def call(x, *rest):
        hx, weights = rest[: CELLS[ours.mode.lower()].states], rest[-len(names) :]
        hx = hx if len(hx) == 2 else hx[0]
        named = dict(zip(names, weights, strict=True))
        result = torch.func.functional_call(ours, named, (x, hx), asked)
        return tuple(tensors(result))

    return call


@grid(kind=CELLS, device=DEVICES, form=("plain", "bidirectional", "learned"),
      asked=("reset", "cell states", "last step", "all"))  # fmt: skip
def test_second_derivatives(kind, device, form, asked):
    ours = module_of(kind, device=device, backend="auto", **MODULES[form])
    if asked == "all":
        asked = asked_of("cell states", ours, device=device) | asked_of(
            "reset", ours, device=device
        )
    else:
        asked = asked_of(asked, ours, device=device)
    shape = (N, T, I) if ours.batch_first else (T, N, I)
    input = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    hx = mapped(states(kind, ours, N, dtype=torch.float64), lambda s: s.requires_grad_())
    inputs = (input, *tensors(hx), *ours.parameters())
    call = function_of(ours, asked)
    assert gradcheck(call, inputs, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


@grid(kind=MODULE_KINDS, asked=("list", "reset", "tbptt", "cell states"), form=MODULES)
def test_torch_func(kind, asked, form):
    """grad, jvp and vmap over inputs, against autograd and a loop."""
    ours = module_of(kind, **MODULES[form])
    asked = asked_of(asked, ours)
    shape = (N, T, I) if ours.batch_first else (T, N, I)
    x, direction = torch.randn(2, *shape, dtype=torch.float64)

    def loss(x):
        return sum(t.square().sum() for t in tensors(ours(x, **asked)))

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(torch.func.grad(loss)(x), expected)
    if "tbptt" not in asked:
        # A cut changes the gradient and not the function: forward mode sees no cut.
        _, along = torch.func.jvp(loss, (x,), (direction,))
        assert_close(along, (expected * direction).sum())
    many = torch.stack([x, direction])
    assert_close(torch.func.vmap(loss)(many), torch.stack([loss(x), loss(direction)]))


def test_vmap_over_lengths_and_resets():
    ours, x = module_of("lstm", bidirectional=True), torch.randn(2, T, N, I, dtype=torch.float64)
    lengths, reset = torch.tensor([[1, 0, T], [T, 2, 3]]), torch.rand(2, T, N) < 0.3

    def call(x, lengths, reset):
        return ours(x, lengths=lengths, reset=reset, return_cell_states=True)

    got = torch.func.vmap(call)(x, lengths, reset)
    for at, each in enumerate(zip(x, lengths, reset, strict=True)):
        assert_close([t[at] for t in tensors(got)], list(tensors(call(*each))))
    with pytest.raises(ValueError, match=r"from 0 to 5.*got 6"):
        torch.func.vmap(call)(x, lengths + 1, reset)
