"""``gradient_flow``: each step's total gradient, against autograd on loops of torch's cells."""

from functools import partial

import pytest
import torch
from layers import make_problem, projects
from numerics import cases, grid, needs_native
from torch import nn
from torch.testing import assert_close
from twins import MODULE_KINDS, H, I, P, name_of, step

import fused_rnn
from fused_rnn import autograd, recompute
from fused_rnn.backends import cuda, reference, triton
from fused_rnn.cells import CELLS

T, N = 12, 3


def module_of(kind, *args, **options):
    name, extra = name_of(kind)
    return getattr(fused_rnn, name)(*(args or (I, H)), **extra, **options)


def layer_by_cells(kind, ours, layer, x):
    """Every step's h of a layer of ours, by torch's cell."""
    name, extra = name_of(kind, cell=True)
    cell = getattr(nn, name)(x.size(-1), H, dtype=torch.float64, **extra)
    cell.load_state_dict(
        {n.removesuffix(f"_l{layer}"): p for n, p in ours.state_dict().items() if f"_l{layer}" in n}
    )
    state, seen = None, []
    for x_t in x:
        state = cell(x_t, state)
        h = state[0] if isinstance(state, tuple) else state
        h.retain_grad()
        seen.append(h)
    return seen


def norms_of(seen):
    return torch.stack([h.grad.norm(dim=-1) for h in seen])


@grid(kind=CELLS, backend=("auto", "reference"))
def test_it_is_autograds_gradient_of_each_step(kind, backend):
    ours = module_of(kind, num_layers=2, dtype=torch.float64, backend=backend)
    input = torch.randn(T, N, I, dtype=torch.float64)
    weight = torch.randn(T, N, H, dtype=torch.float64)
    with fused_rnn.gradient_flow(ours) as flow:
        (ours(input)[0] * weight).sum().backward()
    first = layer_by_cells(kind, ours, 0, input)
    second = layer_by_cells(kind, ours, 1, torch.stack(first))
    (torch.stack(second) * weight).sum().backward()
    assert list(flow.norms) == ["l0", "l1"]
    assert_close(flow.norms["l0"], norms_of(first))
    assert_close(flow.norms["l1"], norms_of(second))


@needs_native
@cases(
    projects, cell=CELLS, P=(0, 5), reverse=(False, True), control=(False, True),
    rows=("", "packed", "scattered"), regularised=(False, True), recomputes=(False, True),
    shape=((19, 3, 9), (7, 2, 33), (1, 4, 6)),
)  # fmt: skip
def test_the_native_norms_are_the_references(case, monkeypatch):
    monkeypatch.setattr(recompute, "ROWS", 1)
    regularised, recomputes = case.pop("regularised"), case.pop("recomputes")
    options = {"h_mask": regularised, "keep": regularised, "product": True}
    problem = make_problem(dtype=torch.float64, **case, **options)
    found = []
    for layer in (partial(autograd.layer, recompute=recomputes, cells=True), reference.layer):
        norms = torch.full(problem.operands["x"].shape[:-1], torch.nan, dtype=torch.float64)
        if layer is reference.layer:
            norms.zero_()
        problem.operands["w_hh"].requires_grad_()
        outputs = layer(*problem.arguments(), **problem.keywords(), dh_norm=norms)
        named = zip(("h", "c", "h_n", "c_n"), outputs, strict=True)
        pairs = [(x, problem.grads[name]) for name, x in named if x is not None]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        found.append(norms)
    assert_close(*found)


FORMS = {
    "two directions": ({"bidirectional": True, "num_layers": 2, "dropout": 0.5}, {}),
    "batch first": ({"batch_first": True, "direction": "reverse"}, {"tbptt": 5}),
    "masked": ({"recurrent_dropout": 0.3, "weight_dropout": 0.2}, {}),
    "ragged": ({"bidirectional": True}, {"lengths": [0, T, 7]}),
    "episodes": ({"bidirectional": True}, {"reset": torch.arange(T * N).view(T, N) % 7 == 0}),
    "learned": ({"learn_initial_state": True}, {"reset": torch.arange(T * N).view(T, N) % 7 == 0}),
    "last step": ({"recompute": True}, {"last_step_only": True, "lengths": [T, 1, 3]}),
    "projected": ({"proj_size": P, "bidirectional": True}, {}),
}


@grid(lambda kind, form: kind == "lstm" or form != "projected", kind=MODULE_KINDS, form=FORMS)
def test_it_composes(kind, form):
    """And what is recorded stays what it was: outputs and gradients to the bit."""
    options, call = FORMS[form]
    ours = module_of(kind, dtype=torch.float64, **options)
    input = torch.randn((N, T, I) if ours.batch_first else (T, N, I), dtype=torch.float64)
    expected, norms = step(ours, input, seed=3, call=partial(ours, **call)), []
    for backend in ("auto", "reference"):
        with fused_rnn.use_backend(backend), fused_rnn.gradient_flow(ours) as flow:
            found = step(ours, input, seed=3, call=partial(ours, **call))
        norms.append(flow.norms)
        if backend == "auto":
            assert_close(found, expected, rtol=0, atol=0)
    assert_close(*norms)
    for name, norm in norms[0].items():
        assert norm.shape == (T, N), name
        ended = torch.arange(T).unsqueeze(1) >= torch.tensor(call.get("lengths", [T] * N))
        assert (norm[ended] == 0).all()
        assert (norm[~ended] > 0).all()


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_packed_input_in_the_callers_order(kind):
    ours = module_of(kind, dtype=torch.float64)
    lengths = [4, 12, 7]
    input = torch.randn(T, N, I, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(input, lengths, enforce_sorted=False)
    found = []
    for given, options in ((packed, {}), (input, {"lengths": lengths})):
        with fused_rnn.gradient_flow(ours) as flow:
            y = ours(given, **options)[0]
            (y.data if given is packed else y).square().sum().backward()
        found.append(flow.norms)
    assert_close(*found)
    values = torch.cat([input[:length, n] for n, length in enumerate(lengths)])
    with fused_rnn.gradient_flow(ours) as flow:
        offsets = torch.tensor([0, 4, 16, 23])
        y, _ = ours(torch.nested.nested_tensor_from_jagged(values, offsets))
        y.values().square().sum().backward()
    assert_close(flow.norms, found[0])


@grid(dtype=(torch.float32, torch.bfloat16, torch.float16), backend=("auto", "reference"))
def test_what_has_nearly_vanished_is_not_nothing(dtype, backend):
    """Norms whose squares are no numbers of the dtype that they are in."""
    ours = fused_rnn.RNN(I, H, dtype=dtype, backend=backend)
    with torch.no_grad():
        ours.weight_hh_l0.mul_(0.25)
    exact = fused_rnn.RNN(I, H, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())
    input, found = torch.randn(25, N, I, dtype=dtype), []
    for module, x in ((ours, input), (exact, input.double())):
        with fused_rnn.gradient_flow(module) as flow:
            module(x)[0][-1].sum().backward()
        found.append(flow.norms["l0"])
    assert found[1][0].max() < 1e-19
    assert found[0].dtype == torch.float32
    tolerance = 1e-4 if dtype is torch.float32 else 0.5
    assert_close(found[0].double(), found[1], rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_other_ways_to_differentiate(kind):
    ours = module_of(kind, dtype=torch.float64)
    input, found = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True), []
    for graph in (None, False, True):
        with fused_rnn.gradient_flow(ours) as flow:
            loss = ours(input)[0].square().sum()
        if graph is None:
            loss.backward()
        else:
            torch.autograd.grad(loss, input, create_graph=graph)
        found.append(flow.norms)
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


@needs_native
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell):
    problem = make_problem(cell, torch.float32, (5, 3, 4), rows="packed", product=True)
    op = torch.ops.fused_rnn
    cell_id, x, w_ih, _, w_hh, _, h0, c0, reverse, _, *options = problem.op_arguments()
    h, c, _, _, saved = op.layer(*problem.op_arguments())
    grads = [problem.grads.get(name) for name in ("h", "c", "h_n", "c_n")]
    kept = (h, c, saved, x, w_ih, w_hh, h0, c0, reverse, *options)
    torch.library.opcheck(op.layer_backward.default, (cell_id, 127, *grads, *kept))


def test_names_and_the_last_forward():
    model = nn.ModuleDict({"a": fused_rnn.GRU(I, H, bidirectional=True), "b": nn.Linear(2, 2)})
    with fused_rnn.gradient_flow(model) as flow:
        assert flow.norms == {}
        for steps in (3, 5):
            model["a"](torch.randn(steps, N, I))[0].sum().backward()
        with torch.no_grad():
            model["a"](torch.randn(7, N, I))
        asked = fused_rnn.explain(model["a"], torch.randn(9, N, I)).problem.options
        assert "gradient_flow" in asked
        with fused_rnn.gradient_flow(model["a"]) as inner:
            model["a"](torch.randn(2, N, I))[0].sum().backward()
    assert {name: norm.shape for name, norm in flow.norms.items()} == {
        "a.l0": (5, N), "a.l0_reverse": (5, N)
    }  # fmt: skip
    assert list(inner.norms) == ["l0", "l0_reverse"]
    model["a"](torch.randn(9, N, I))  # after the context nothing is recorded
    assert flow.norms["a.l0"].shape == (5, N)


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(TypeError, match="expects a module with an RNN, LSTM or GRU of fused_rnn"):
        fused_rnn.gradient_flow(nn.LSTM(I, H))
    lstm, input = fused_rnn.LSTM(I, H), torch.randn(T, N, I)
    with fused_rnn.gradient_flow(lstm):
        with pytest.raises(RuntimeError, match="gradient_flow records plain backwards"):
            torch.func.grad(lambda x: lstm(x)[0].sum())(input)
        with pytest.raises(RuntimeError, match="gradient_flow records plain backwards"):
            torch.compile(lstm, backend="eager", fullgraph=True)(input)
        with (
            fused_rnn.use_backend("torch"),
            pytest.raises(RuntimeError, match=r"torch\.nn has no norms for gradient_flow"),
        ):
            lstm(input)
        problem = fused_rnn.explain(lstm, input).problem._replace(device="cuda")
    assert cuda.supports(problem) == "it lacks the norms that gradient_flow records"
    if not triton.INTERPRETS:
        assert triton.supports(problem) == "it lacks the norms that gradient_flow records"


def test_it_draws_a_line_for_each_layer():
    matplotlib = pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    matplotlib.use("Agg")
    lstm = fused_rnn.LSTM(I, H, num_layers=2)
    with fused_rnn.gradient_flow(lstm) as flow:
        lstm(torch.randn(T, N, I))[0].sum().backward()
    axes = flow.plot()
    assert [line.get_label() for line in axes.lines] == ["l0", "l1"]
    for line, norm in zip(axes.lines, flow.norms.values(), strict=True):
        assert_close(torch.as_tensor(line.get_ydata()), norm.double().norm(dim=1))
    assert axes.get_yscale() == "log"
    assert flow.plot(axes) is axes
    matplotlib.pyplot.close(axes.figure)
