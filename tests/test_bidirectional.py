"""Both directions of a layer in one call of the op: the same as one call each."""

import re

import pytest
import torch
from devices import DEVICES, device_of
from directions import make_directions, run_directions
from layers import projects
from numerics import DTYPES, cases, needs_native
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import name_of

import fused_rnn
from fused_rnn import backends, bidirectional
from fused_rnn.cells import CELLS
from fused_rnn.plan import KNOWN_DEVICES

pytestmark = [pytest.mark.op, needs_native]

ops = torch.ops.fused_rnn
OWN = ("w_ih", "b_ih", "w_hh", "b_hh", "h0", "c0", "control", "w_hr", "h_mask", "keep")


@cases(
    projects,
    cell=CELLS,
    device=DEVICES,
    dtype=DTYPES,
    shape=((4, 3, 9), (1, 1, 8), (3, 0, 8)),
    P=(0, 5),
    states=(False, True),
    bias=(False, True),
    control=(False, True),
    rows=("", "packed", "scattered"),
    product=(False, True),
    h_mask=(False, True),
    keep=(False, True),
)
def test_results_are_those_of_one_call_each(case):
    device, case = device_of(case)
    pair = make_directions(**case)
    one, two = (run_directions(*pair, together=t, device=device) for t in (True, False))
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert torch.equal(x, two[name]), f"{name} of {pair[0]} and back"


def arguments(*, save=True, **options):
    """Of the op and, from its results, of its backward."""
    given = {"product": True, "control": True, "rows": "packed"} | options
    pair = make_directions("lstm", torch.float32, (3, 2, 8), **given)
    x, rows = pair[0].operands["x"], pair[0].options.get("rows")
    own = [[(p.operands | p.options).get(name) for name in OWN] for p in pair]
    forward = [pair[0].cell.id, x, *own, save, rows, 0, False]
    results = ops.bidirectional(*forward)
    grads = [p.grads[name] for p in pair for name in ("h", "c", "h_n", "c_n")]
    kept = [results[i] for i in (0, 1, 4, 5, 6, 9)]
    return forward, [pair[0].cell.id, [63, 63], grads, kept, x, *own, rows, 0, False]


@pytest.mark.parametrize("options", [{}, {"P": 5}, {"rows": "", "product": False}], ids=str)
def test_fakes_agree_with_the_ops(options):
    forward, backward = arguments(**options)
    inference = [*forward[:4], False, *forward[5:]]
    backward_of_one = [backward[0], [1 | 8, 0], *backward[2:]]
    for op, inputs in (
        (ops.bidirectional, forward),
        (ops.bidirectional, inference),
        (ops.bidirectional_backward, backward),
        (ops.bidirectional_backward, backward_of_one),
    ):
        real = op(*inputs)
        with FakeTensorMode() as mode:
            fake = op(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs))
        for place, (a, b) in enumerate(zip(real, fake, strict=True)):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), place


@pytest.mark.parametrize("place", [0, 1], ids=["bidirectional", "bidirectional_backward"])
def test_opcheck(place):
    op = (ops.bidirectional, ops.bidirectional_backward)[place]
    found = torch.library.opcheck(op.default, tuple(arguments()[place]))
    assert set(found.values()) == {"SUCCESS"}


def change(place, of, to):
    def changed(forward):
        forward[place][of] = to(forward[place][of])

    return changed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda forward: forward[3].pop(), "all but w_hh may be None"),
        (change(3, 2, lambda _: None), "all but w_hh may be None"),
        (change(3, 3, lambda b: b[1:]), "b_hh has size"),
        (change(2, 0, lambda w: w[:, 1:]), "w_ih has size"),
        (change(3, 4, lambda h: h[1:]), "h0 has size"),
    ],
)
def test_wrong_operands_are_refused_in_a_sentence(changed, words):
    forward, _ = arguments()
    changed(forward)
    with pytest.raises(RuntimeError, match=f"fused_rnn: .*{words}"):
        ops.bidirectional(*forward)


def test_directions_of_different_sizes_are_refused():
    forward, _ = arguments(rows="", product=False)
    smaller = make_directions("lstm", torch.float32, (3, 2, 8), P=5)[1]
    forward[3] = [(smaller.operands | smaller.options).get(name) for name in OWN]
    with pytest.raises(RuntimeError, match="the weights of both directions must have the same"):
        ops.bidirectional(*forward)


def module_of(kind, **options):
    name, extra = name_of(kind)
    return getattr(fused_rnn, name)(4, 5, backend="cpu", **extra, **options)


@pytest.fixture
def together(monkeypatch):
    """The CPU's backend with one call for both directions, as the GPU's has it."""
    calls = []

    def both(*arguments, **keywords):
        calls.append(keywords)
        return bidirectional.both(*arguments, **keywords)

    monkeypatch.setattr(backends.cpu, "both", both, raising=False)
    monkeypatch.delattr(backends.cpu, "plain_layer")  # which a GPU's backend has not
    return calls


def results_of(module, inputs, **options):
    """Output, states and gradients of the parameters and of the input."""
    inputs = inputs.detach().requires_grad_()
    torch.manual_seed(7)
    output, states = module(inputs, **options)
    states = states if isinstance(states, tuple) else (states,)
    found = [output, *states]
    leaves = [inputs, *module.parameters()]
    return found + list(torch.autograd.grad([x.square().sum() for x in found], leaves))


FORMS = {
    "plain": {},
    "layers": {"num_layers": 2, "dropout": 0.5},
    "recurrent dropout": {"num_layers": 2, "recurrent_dropout": 0.3},
    "learned": {"learn_initial_state": True},
    "ragged": {},
    "reset": {},
    "projected": {"proj_size": 3},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_modules_run_it_where_the_backend_has_it(kind, form, together, monkeypatch):
    if form == "projected" and kind != "lstm":
        pytest.skip("only the LSTM has a projection")
    options = {"bidirectional": True, "dtype": torch.float64} | FORMS[form]
    module = module_of(kind, **options)
    x, call = torch.randn(6, 3, 4, dtype=torch.float64), {}
    if form == "ragged":
        call["lengths"] = torch.tensor([2, 6, 0])
    if form == "reset":
        call["reset"] = torch.rand(6, 3) < 0.3
    one = results_of(module, x, **call)
    assert len(together) == module.num_layers
    monkeypatch.delattr(backends.cpu, "both")
    for a, b in zip(one, results_of(module, x, **call), strict=True):
        assert torch.equal(a, b)


def test_one_direction_is_one_call_of_its_own(together):
    module = module_of("gru")
    module(torch.randn(3, 2, 4))
    assert together == []


def test_under_autocast_both_run_in_its_dtype(together):
    module = module_of("lstm", bidirectional=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(torch.randn(3, 2, 4))
    assert (len(together), output.dtype) == (1, torch.bfloat16)
    output.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_frozen_weights_have_no_gradient():
    pair = make_directions("gru", torch.float32, (3, 2, 5), product=True)
    own = [{name: p.operands[name].clone() for name in ("w_ih", "w_hh", "h0")} for p in pair]
    own[1]["w_hh"].requires_grad_()
    outputs = bidirectional.both(pair[0].cell, pair[0].operands["x"], *own)
    sum(h.sum() for h, *_ in outputs).backward()
    has = [name for given in own for name, x in given.items() if x.grad is not None]
    assert has == ["w_hh"]
    assert own[1]["w_hh"].grad.abs().sum() > 0


def test_second_derivatives():
    forward, reverse = make_directions("lstm", torch.float64, (2, 1, 2), product=True)
    names = ("w_ih", "w_hh", "b_hh", "h0", "c0")
    own = [p.operands[name].requires_grad_() for p in (forward, reverse) for name in names]

    def outputs(x, *operands):
        given = (dict(zip(names, some, strict=True)) for some in (operands[:5], operands[5:]))
        found = bidirectional.both(forward.cell, x, *given)
        return tuple(y for results in found for y in results)

    inputs = (forward.operands["x"].requires_grad_(), *own)
    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


def test_compiled_without_a_break(together):
    module = module_of("lstm", bidirectional=True)
    x = torch.randn(3, 2, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(results_of(compiled, x), results_of(module, x), strict=True):
        assert torch.equal(a, b)


def test_a_transform_sees_one_direction_at_a_time(together):
    module = module_of("gru", bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    found = torch.func.grad(lambda x: module(x)[0].square().sum())(x)
    assert together == []
    leaf = x.clone().requires_grad_()
    module(leaf)[0].square().sum().backward()
    torch.testing.assert_close(found, leaf.grad)


def test_the_gpus_backend_has_it_and_explains_it(monkeypatch):
    cuda = backends.cuda
    monkeypatch.setattr(cuda, "describe", lambda _: KNOWN_DEVICES["H200"])
    assert cuda.both is bidirectional.both
    problem = backends.Problem(
        "lstm", torch.bfloat16, "cuda", 1024, 16, 512, 512, 0, 1, 2, True, False, False
    )
    text = cuda.explain(problem, "cluster")
    assert text.count("T=1024 N=16 H=512, both directions") == 2
    assert re.search(r"both directions in one launch; \d clusters of 16 CTAs", text)
    assert "both" not in cuda.explain(problem._replace(directions=1), "cluster")
