"""torch.export, torch.jit.trace and FX."""

import io
import subprocess
import sys

import pytest
import torch
from numerics import grid
from torch import nn
from torch.export import Dim
from torch.testing import assert_close
from twins import MODULE_KINDS, H, I, P, states, twins

import fused_rnn

# Tracing says that it is on the way out, and that sizes which are only checked become constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

SIZES = ((5, 3), (2, 7), (9, 2), (4, 11))
FORMS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "stacked": {"num_layers": 2, "dropout": 0.5},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
}


def input_of(module, T, N, **options):
    if not hasattr(module, "num_layers"):
        return torch.randn(N, I, **options)
    return torch.randn(*((N, T) if module.batch_first else (T, N)), I, **options)


class Head(nn.Module):
    """A model around the module under test: what people export."""

    def __init__(self, rnn, width):
        super().__init__()
        self.rnn = rnn
        self.linear = nn.Linear(width, 2)

    def forward(self, x):
        return self.linear(self.rnn(x)[0])


def run_again(exported):
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    return torch.export.load(file).module()


@grid(kind=MODULE_KINDS, form=FORMS, given=(False, True))
def test_export_with_dynamic_sizes(kind, form, given):
    _, ours = twins(kind, **FORMS[form])
    ours.eval()
    T, N = Dim("T", min=2, max=4096), Dim("N", min=2, max=4096)
    axes = {0: N, 1: T} if ours.batch_first else {0: T, 1: N}
    hx = states(kind, ours, 3) if given else None
    state_axes = {1: N} if kind != "lstm" else ({1: N}, {1: N})
    exported = torch.export.export(
        ours,
        (input_of(ours, 5, 3), hx),
        dynamic_shapes=(axes, state_axes if given else None),
    )
    again = run_again(exported)
    for t, n in SIZES:
        input = input_of(ours, t, n)
        hx = states(kind, ours, n) if given else None
        expected = ours(input, hx)
        assert_close(exported.module()(input, hx), expected)
        assert_close(again(input, hx), expected)


LOADER = """
import sys
import torch
import fused_rnn  # has the ops that the package calls

package, cases = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
for inputs, expected in torch.load(cases):
    torch.testing.assert_close(run(*inputs), expected)
"""


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_aotinductor_package_runs_in_another_process(tmp_path):
    """Cure: import fused_rnn where it is loaded."""

    class Ragged(Head):
        def forward(self, x, lengths):
            return self.linear(self.rnn(x, lengths=lengths)[0])

    model = Ragged(fused_rnn.GRU(I, H, 2, bidirectional=True), 2 * H).eval()
    cases = [(torch.randn(t, n, I), torch.randint(t + 1, (n,))) for t, n in SIZES]
    T, N = Dim("T", min=2, max=4096), Dim("N", min=2, max=4096)
    with torch.no_grad():
        exported = torch.export.export(model, cases[0], dynamic_shapes=({0: T, 1: N}, {0: N}))
        package = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        torch.save([(inputs, model(*inputs)) for inputs in cases], tmp_path / "cases.pt")
    command = [sys.executable, "-c", LOADER, package, tmp_path / "cases.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    without = LOADER.replace("import fused_rnn", "import math")
    done = subprocess.run([*command[:2], without, *command[3:]], capture_output=True, check=False)
    assert done.returncode != 0


def test_export_of_a_projected_lstm():
    _, ours = twins("lstm", I, H, proj_size=P)
    T, N = Dim("T", min=2, max=4096), Dim("N", min=2, max=4096)
    exported = torch.export.export(ours, (input_of(ours, 5, 3),), dynamic_shapes=({0: T, 1: N},))
    for t, n in SIZES:
        input = input_of(ours, t, n)
        assert_close(exported.module()(input), ours(input))


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_export_of_a_cell(kind):
    _, ours = twins(kind, cell=True)
    N = Dim("N", min=2, max=4096)
    exported = torch.export.export(ours, (input_of(ours, 0, 3),), dynamic_shapes=({0: N},))
    again = run_again(exported)
    for _, n in SIZES:
        input = input_of(ours, 0, n)
        assert_close(again(input), ours(input))


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_export_does_not_unroll(kind):
    """The graph's length does not depend on T; torch's loop, chosen by auto, would unroll."""
    _, ours = twins(kind)
    lengths = {len(torch.export.export(ours, (input_of(ours, T, 3),)).graph.nodes) for T in (2, 64)}
    assert len(lengths) == 1


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_an_exported_program_is_for_inference(kind):
    """README, "What differs". Cure: train the module itself."""
    _, ours = twins(kind, dtype=torch.float64)
    input = input_of(ours, 5, 3, dtype=torch.float64)
    exported = torch.export.export(ours, (input,)).module()
    output, _ = exported(input)
    assert_close(output, ours(input)[0])
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        output.sum().backward()
    assert all(p.grad is None for p in exported.parameters())


@grid(kind=MODULE_KINDS, form=FORMS)
def test_trace_saves_and_loads(kind, form):
    _, rnn = twins(kind, **FORMS[form])
    model = Head(rnn, H * (2 if rnn.bidirectional else 1)).eval()
    file = io.BytesIO()
    with torch.no_grad():
        traced = torch.jit.trace(model, (input_of(rnn, 5, 3),))
        torch.jit.save(traced, file)
        file.seek(0)
        again = torch.jit.load(file)
        for t, n in SIZES:
            input = input_of(rnn, t, n)
            expected = model(input)
            assert_close(traced(input), expected, msg=lambda m, at=(t, n): f"{at}: {m}")
            assert_close(again(input), expected)


@grid(kind=MODULE_KINDS, cell=(False, True))
def test_trace_with_states(kind, cell):
    _, ours = twins(kind, cell=cell)
    with torch.no_grad():
        traced = torch.jit.trace(ours, (input_of(ours, 5, 3), states(kind, ours, 3)))
        for t, n in SIZES:
            input, hx = input_of(ours, t, n), states(kind, ours, n)
            assert_close(traced(input, hx), ours(input, hx))


@pytest.mark.parametrize("kind", MODULE_KINDS)
@pytest.mark.parametrize("cell", [False, True])
def test_fx_traces_a_model(kind, cell):
    """torch.nn's modules are leaves of a graph because of where they stand; ours must be too."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            _, self.rnn = twins(kind, cell=cell)
            self.linear = nn.Linear(I, I)

        def forward(self, x):
            return self.rnn(self.linear(x))

    model = Model()
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == [
        "linear",
        "rnn",
    ]
    for t, n in SIZES:
        input = input_of(model.rnn, t, n)
        assert_close(graph(input), model(input))
