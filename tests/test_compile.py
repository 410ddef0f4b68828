"""torch.compile(fullgraph=True): training and inference, dynamic sizes, one graph."""

import contextlib

import pytest
import torch
from devices import DEVICES
from numerics import grid
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from twins import MODULE_KINDS, H, I, P, mapped, states, step, tensors, twins

import fused_rnn
from fused_rnn.cells import CELLS


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def input_of(cell, T=5, N=3, device="cpu"):
    return torch.randn(*((N,) if cell else (T, N)), I, dtype=torch.float64, device=device)


def compiled(module, backend="aot_eager", **options):
    return torch.compile(module, fullgraph=True, backend=backend, **options)


def op_names(graph_module):
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"}


@grid(
    lambda kind, cell, form, **_: not cell or form == "plain",
    kind=CELLS, device=DEVICES, cell=(False, True), given=(True, False),
    form=("plain", "bidirectional", "batch_first", "two layers", "unbatched"),
)  # fmt: skip
def test_training_equals_eager(kind, device, cell, given, form):
    options = {
        "bidirectional": {"bidirectional": True},
        "batch_first": {"batch_first": True},
        "two layers": {"num_layers": 2},
    }.get(form, {})
    _, ours = twins(kind, cell=cell, dtype=torch.float64, device=device, **options)
    input = input_of(cell, device=device)
    input = input[:, 0] if form == "unbatched" else input
    batch = {"unbatched": (), "batch_first": (5,)}.get(form, (3,))
    hx = states(kind, ours, *batch, dtype=torch.float64) if given else None
    expected = step(ours, input, hx)
    assert_close(step(ours, input, hx, call=compiled(ours)), expected)


@grid(kind=CELLS, device=DEVICES, cell=(False, True), how=("no_grad", "inference_mode", "frozen"))
def test_inference_equals_eager(kind, device, cell, how):
    _, ours = twins(kind, cell=cell, dtype=torch.float64, device=device)
    ours.eval()
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(
        how, contextlib.nullcontext
    )
    if how == "frozen":
        ours.requires_grad_(False)
    call = compiled(ours)
    with context():
        for _ in range(2):
            input = input_of(cell, device=device)
            assert_close(call(input), ours(input))


@pytest.mark.parametrize("device", DEVICES)
def test_projection_dropout_and_no_bias_compile(device):
    options = {"proj_size": P, "bias": False, "dropout": 0.5, "dtype": torch.float64}
    _, ours = twins("lstm", I, H, 2, device=device, **options)
    call, input = compiled(ours), input_of(False, device=device)
    assert not torch.equal(call(input)[0], call(input)[0]), "dropout is not drawn anew"
    ours.eval()
    assert_close(step(ours, input, call=call), step(ours, input))


@pytest.mark.parametrize("kind", MODULE_KINDS)
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_sizes_marked_dynamic_never_recompile(kind, cell, grad, given, device):
    _, ours = twins(kind, cell=cell, dtype=torch.float64, device=device)
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(ours, counter)
    with torch.set_grad_enabled(grad):
        for T, N in ((5, 3), (2, 9), (11, 4), (7, 7)):
            input = input_of(cell, T, N, device)
            hx = states(kind, ours, N, dtype=torch.float64) if given else None
            for tensor in (input, *tensors(hx)):
                torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2)
            if not cell:
                torch._dynamo.mark_dynamic(input, 0)
            assert_close(call(input, hx), ours(input, hx))
    assert counter.frame_count == 1


@grid(kind=MODULE_KINDS, device=DEVICES)
def test_sizes_that_change_recompile_once(kind, device):
    _, ours = twins(kind, dtype=torch.float64, device=device)
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(ours, counter)
    for T, N in ((5, 3), (8, 6), (11, 4), (6, 12), (9, 2)):
        input = input_of(False, T, N, device)
        assert_close(call(input), ours(input))
    assert counter.frame_count == 2


@grid(kind=MODULE_KINDS, device=DEVICES)
def test_a_model_with_other_layers_is_one_graph(kind, device):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, I)
            _, self.rnn = twins(kind, device=device)
            self.head = nn.Linear(H, 11)
            self.to(device)

        def forward(self, tokens):
            return self.head(self.rnn(self.embedding(tokens))[0])

    model, counter = Model(), CompileCounterWithBackend("aot_eager")
    call, tokens = compiled(model, counter), torch.randint(11, (6, 2), device=device)
    gradients = []
    for function in (model, call):
        model.zero_grad()
        nn.functional.cross_entropy(function(tokens).flatten(0, 1), tokens.flatten()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert_close(gradients[1], gradients[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
def test_parametrized_weights_compile(device):
    _, ours = twins("gru", dtype=torch.float64, device=device)
    parametrizations.weight_norm(ours, "weight_hh_l0")
    input = input_of(False, device=device)
    assert_close(step(ours, input, call=compiled(ours)), step(ours, input))


@grid(kind=MODULE_KINDS, device=DEVICES, half=("bfloat16", "float16"))
def test_autocast_inside_the_compiled_region(kind, device, half):
    _, ours = twins(kind, device=device)

    def call(input, hx):
        with torch.autocast(device, getattr(torch, half)):
            return ours(input, hx)

    input = torch.randn(5, 3, I, device=device)
    expected = step(ours, input, call=call)
    got = step(ours, input, call=compiled(call))
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in expected.items()}
    assert_close(got, expected, rtol=0, atol=0)


def graph_ops(call, *args):
    """Names of the functions in the graph that dynamo and AOT autograd make of the forward."""
    seen = set()

    def collect(graph_module, _):
        seen.update(op_names(graph_module))
        return graph_module.forward

    aot = torch._dynamo.backends.common.aot_autograd(fw_compiler=collect)
    with torch.no_grad():
        torch.compile(call, fullgraph=True, backend=aot)(*args)
    return seen


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_the_choice_of_a_backend_is_honoured(kind):
    """By keyword and by context; the reference shows as its equations, not as our op."""
    _, ours = twins(kind)
    input = torch.randn(3, 2, I)
    for name, native in (("cpu", True), ("reference", False), ("auto", True)):
        with fused_rnn.use_backend(name):
            ops = graph_ops(ours, input)
        assert any("fused_rnn" in op for op in ops) == native, (name, ops)
        _, explicit = twins(kind, backend=name)
        ops = graph_ops(explicit, input)
        assert any("fused_rnn" in op for op in ops) == native, (name, ops)
        torch._dynamo.reset()


def test_a_changed_choice_is_noticed_by_a_compiled_module():
    _, ours = twins("lstm")
    counter = CompileCounterWithBackend("aot_eager")
    call, input = compiled(ours, counter), torch.randn(3, 2, I)
    with torch.no_grad():
        call(input)
        with fused_rnn.use_backend("reference"):
            call(input)
    first, second = (op_names(graph) for graph in counter.graphs)
    assert any("fused_rnn" in op for op in first)
    assert not any("fused_rnn" in op for op in second)


@grid(kind=MODULE_KINDS, T=(1, 3, 50))
def test_auto_never_chooses_torch_while_compiling(kind, T):
    """torch's loops unroll there, T steps of them."""
    _, ours = twins(kind)
    ops = graph_ops(ours, torch.randn(T, 2, I))
    assert any(op.startswith("fused_rnn.") for op in ops)
    assert len(ops) < 12, "the steps stand in the graph one by one"


@grid(kind=("lstm", "gru"), device=DEVICES)
def test_inductor_trains(kind, device):
    if device == "cuda":
        pytest.importorskip("triton", reason="on CUDA inductor needs triton")
    _, ours = twins(kind, dtype=torch.float64, device=device)
    input = input_of(False, device=device)
    hx = states(kind, ours, 3, dtype=torch.float64)
    expected = step(ours, input, hx)
    assert_close(step(ours, input, hx, call=compiled(ours, "inductor")), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_packed_input_compiles(device):
    """Its batch sizes are data, so they are constants of the graph or a graph break is allowed."""
    options = {"dtype": torch.float64, "device": device}
    _, ours = twins("gru", **options)
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, I, **options) for n in (4, 2, 1)])
    call = torch.compile(ours, backend="aot_eager")
    expected, got = ours(packed), call(packed)
    assert_close(list(tensors(got)), list(tensors(expected)))
    doubled = mapped(packed, lambda t: t * 2)
    assert_close(list(tensors(call(doubled))), list(tensors(ours(doubled))))
