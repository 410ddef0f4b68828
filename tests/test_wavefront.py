"""Layers of a stack side by side: the same bits as one layer after the other. On the emulator the
order of the layers' work is drawn; on a GPU it is the streams'."""

import functools
import re
from pathlib import Path

import pytest
import torch
from devices import MISSING_GPU
from emulator import build
from numerics import cases, needs_native
from persistent import EVERY
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import name_of

import fused_rnn
from fused_rnn import autograd, backends, functional, wavefront
from fused_rnn.cells import CELLS, carry_dtype
from fused_rnn.plan import ALGORITHMS, KNOWN_DEVICES, plan

pytestmark = needs_native

OWN = tuple(wavefront.BITS)
H200 = KNOWN_DEVICES["H200"]


@pytest.fixture(scope="module")
def emulated():
    """The ops on the emulator, whose GPU has clusters of two blocks alone."""
    if build.compiler() is None:
        pytest.skip("there is no C++ compiler to compile the emulator")
    ops = build.ops()
    build.clusters(*(n * (i == 1) for i, n in enumerate(EVERY)))
    build.sms(6)
    yield ops
    build.clusters(*EVERY)
    build.sms(EVERY[0])


def make_stack(
    cell, dtype, *, layers=3, shape=(7, 3, 33), reverse=False, dropout=False, control=True
):
    """``x``, the operands of each layer by name, and the masks below all but the first."""
    T, N, H = shape
    gates, has_c = CELLS[cell].gates * H, CELLS[cell].states == 2

    def layer(width):
        def draw(*size):
            return ((torch.rand(size) * 2 - 1) / size[-1] ** 0.5).to(dtype)

        own = {"w_ih": draw(gates, width), "w_hh": draw(gates, H), "reverse": reverse}
        own |= {"b_ih": draw(gates), "b_hh": draw(gates), "h0": draw(N, H), "c0": None}
        if has_c:
            own["c0"] = draw(N, H).to(carry_dtype(dtype))
        if control:
            own["control"] = torch.randint(8, (T, N), dtype=torch.uint8)
            own["h_mask"] = (torch.rand(N, H) < 0.7).to(dtype) / 0.7
            own["keep"] = (torch.rand(T, N, H * (1 + has_c)) < 0.3).byte()
        return own

    passed = [(torch.rand(T, N, H) < 0.7).byte() for _ in range(layers - 1)] if dropout else []
    return torch.randn(T, N, 5).to(dtype), [layer(H if i else 5) for i in range(layers)], passed


def by_layers(cell, x, layers, passed, *, library, algorithm):
    """One call of the op ``layer`` after the other."""
    found = []
    for i, given in enumerate(layers):
        own = {name: y for name, y in given.items() if name not in ("w_hh", "b_hh", "h0", "c0")}
        if i and passed:
            wide = carry_dtype(x.dtype)
            x = (x.to(wide) * passed[i - 1] * torch.tensor(1 / 0.7, dtype=wide)).to(x.dtype)
        operands = (x, given["w_hh"], given["b_hh"], given["h0"], given["c0"])
        found.append(autograd.layer(cell, *operands, **own, library=library, algorithm=algorithm))
        x = found[-1][0]
    return found


def results_of(run, cell, stack, device="cpu"):
    """The last h and c, the states of all layers, and all gradients, by name."""
    x, layers, passed = stack

    def leaf(y):
        if not isinstance(y, torch.Tensor):
            return y
        return y.detach().clone().to(device).requires_grad_(y.is_floating_point())

    x, passed = leaf(x), [mask.to(device) for mask in passed]
    layers = [{name: leaf(y) for name, y in own.items()} for own in layers]
    found = run(CELLS[cell], x, layers, passed)
    h, c = found[-1][:2]
    outputs = {"h": h, "c": c} | {f"h_n {i}": y[2] for i, y in enumerate(found)}
    outputs |= {f"c_n {i}": y[3] for i, y in enumerate(found)}
    outputs = {name: y for name, y in outputs.items() if y is not None}
    torch.manual_seed(5)
    grads = [torch.randn(y.shape).to(y) for y in outputs.values()]
    torch.autograd.backward(list(outputs.values()), grads)
    gradients = {"dx": x.grad} | {
        f"d{name} {i}": y.grad
        for i, own in enumerate(layers)
        for name, y in own.items()
        if isinstance(y, torch.Tensor) and y.grad is not None
    }
    return {name: y.detach().cpu() for name, y in (outputs | gradients).items()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        assert torch.equal(found[name], y), name


def run_stack(chunks, *, side_by_side=True, library=None, algorithm=0):
    """``run`` for :func:`results_of`, by the op ``stack``."""

    def run(cell, x, layers, passed):
        how = {"chunks": chunks, "side_by_side": side_by_side}
        how |= {"scales": (1 / 0.7, 1 / 0.7), "library": library, "algorithm": algorithm}
        return wavefront.wavefront(cell, x, layers, passed=passed, **how)

    return run


@cases(
    lambda algorithm, dtype, **_: algorithm == "stepwise" or dtype is not torch.float64,
    cell=CELLS,
    algorithm=ALGORITHMS,
    dtype=(torch.bfloat16, torch.float16, torch.float64),
    layers=(1, 2, 3),
    reverse=(False, True),
    dropout=(False, True),
    control=(False, True),
)
def test_the_same_bits_as_one_layer_after_the_other(case, emulated):
    case = dict(case)
    number = ALGORITHMS.index(case.pop("algorithm")) + 1
    stack, by = make_stack(**case), {"library": emulated, "algorithm": number}
    build.seed(0)
    expected = results_of(functools.partial(by_layers, **by), case["cell"], stack)
    for seed, chunks in enumerate([(0, 0), (2, 3), (1, 1), (7, 2), (4, 0), (100, 100)]):
        build.seed(seed)
        assert_same_bits(results_of(run_stack(chunks, **by), case["cell"], stack), expected)


def test_layers_run_beside_those_below_them(emulated):
    stack = make_stack("gru", torch.bfloat16)
    by = {"library": emulated, "algorithm": 1 + ALGORITHMS.index("cluster")}
    build.cluster_launches()
    for side_by_side in (False, True):
        build.overlaps()
        results_of(run_stack((2, 3), side_by_side=side_by_side, **by), "gru", stack)
        # Chunks of 2 of 7 steps forward, of 3 back, of each of three layers.
        assert build.cluster_launches() == 3 * 4 + 3 * 3
        assert (build.overlaps() > 0) == side_by_side


def test_every_order_of_the_layers_gives_the_same_bits(emulated):
    stack = make_stack("lstm", torch.bfloat16, dropout=True)
    by = {"library": emulated, "algorithm": 1 + ALGORITHMS.index("cluster")}
    overlaps = set()
    found = []
    for seed in range(8):
        build.seed(seed)
        build.overlaps()
        found.append(results_of(run_stack((2, 2), **by), "lstm", stack))
        overlaps.add(build.overlaps())
        assert_same_bits(found[-1], found[0])
    assert len(overlaps) > 2  # the orders did differ


def test_streams_are_used_again_but_not_while_a_graph_is_captured_of_them(emulated):
    stack = make_stack("gru", torch.float64, shape=(4, 2, 5))

    def streams_after(calls):
        for _ in range(calls):
            results_of(run_stack((1, 1), library=emulated), "gru", stack)
        return build.streams()

    count = streams_after(1)
    assert streams_after(3) == count
    assert build.streams(captured=True) == count
    results_of(run_stack((1, 0), library=emulated), "gru", stack)
    assert build.streams() == count + 3  # of three layers; free again from here on
    assert streams_after(3) == count + 3


# Modules


@pytest.fixture
def waves(emulated, monkeypatch):
    """The CPU's backend with stacks as the GPU's has them, on the emulator."""
    calls = []

    def counted(*arguments, **keywords):
        calls.append(keywords)
        return wavefront.wavefront(*arguments, **keywords)

    monkeypatch.setattr(autograd, "ops", emulated)
    monkeypatch.setattr(backends.cpu, "wavefront", counted, raising=False)

    def chunks(problem, algorithm):
        assert algorithm == ""
        return (2, 3) if backends.cuda._is_stack(problem) else (0, 0)

    monkeypatch.setattr(backends.cpu, "chunks", chunks, raising=False)
    monkeypatch.delattr(backends.cpu, "plain_layer")  # which a GPU's backend has not
    return calls


FORMS = {
    "dropout": {"dropout": 0.5},
    "regularised": {"dropout": 0.3, "recurrent_dropout": 0.3, "weight_dropout": 0.2},
    "zoneout": {"zoneout": 0.2},
    "learned": {"learn_initial_state": True},
    "reverse": {"direction": "reverse"},
    "batch first": {"batch_first": True, "bias": False},
    "ragged": {},
    "reset": {},
    "tbptt": {},
    "cells": {},
    "reset to learned": {"learn_initial_state": True},
    "all dropped": {"dropout": 1.0},
}
# Rows of episodes lie anywhere.
BY_LAYERS = {"reset to learned"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["lstm", "rnn_relu"])
@pytest.mark.parametrize("layers", [2, 3])
def test_modules_run_it_where_the_backend_has_it(kind, form, layers, waves, monkeypatch):
    if form == "cells" and kind != "lstm":
        pytest.skip("only an LSTM has cell states")
    name, extra = name_of(kind)
    options = {"num_layers": layers, "dtype": torch.float64, "backend": "cpu"} | FORMS[form]
    module = getattr(fused_rnn, name)(4, 5, **extra, **options)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    call = {
        "ragged": {"lengths": torch.tensor([2, 6, 0])},
        "reset": {"reset": torch.rand(6, 3) < 0.3},
        "reset to learned": {"reset": torch.rand(6, 3) < 0.3},
        "tbptt": {"tbptt": 2},
        "cells": {"return_cell_states": True},
    }.get(form, {})

    def results():
        inputs = x.clone().requires_grad_()
        torch.manual_seed(7)
        output, states, *cells = module(inputs, **call)
        found = [output, *cells, *(states if isinstance(states, tuple) else (states,))]
        loss = sum(y.square().sum() for y in found)
        return found + list(torch.autograd.grad(loss, [inputs, *module.parameters()]))

    one = results()
    assert len(waves) == (0 if form in BY_LAYERS else 1)
    monkeypatch.delattr(backends.cpu, "chunks")
    for place, (a, b) in enumerate(zip(one, results(), strict=True)):
        assert torch.equal(a, b), place
    assert len(waves) <= 1


def test_inference_and_autocast(waves, monkeypatch):
    module = fused_rnn.LSTM(4, 5, num_layers=2, dropout=0.5, backend="cpu").eval()
    x = torch.randn(6, 3, 4)

    def results():
        with torch.no_grad():
            plain = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = module(x)
        return [plain[0], *plain[1], low[0], *low[1]]

    one = results()
    assert len(waves) == 2
    monkeypatch.delattr(backends.cpu, "chunks")
    for a, b in zip(one, results(), strict=True):
        assert (a.dtype, a.tolist()) == (b.dtype, b.tolist())


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("trained", [0, 1, 2])
def test_below_what_is_trained_nothing_runs_back(trained, dropout, emulated):
    """One weight alone: the same gradient as with all of them, and no launches for the layers
    below."""
    stack = make_stack("gru", torch.bfloat16, dropout=dropout)
    by = {"library": emulated, "algorithm": 1 + ALGORITHMS.index("cluster")}
    expected = results_of(run_stack((2, 3), **by), "gru", stack)[f"dw_hh {trained}"]
    x, layers, passed = stack
    weight = layers[trained]["w_hh"].requires_grad_()
    found = run_stack((2, 3), **by)(CELLS["gru"], x, layers, passed)
    outputs = [found[-1][0], *(y[2] for y in found)]
    torch.manual_seed(5)
    grads = [torch.randn(y.shape).to(y) for y in outputs]
    pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
    build.cluster_launches()
    torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    assert build.cluster_launches() == 3 * (3 - trained)
    assert torch.equal(weight.grad, expected)
    assert not any(
        y.grad is not None
        for own in layers
        for y in own.values()
        if isinstance(y, torch.Tensor) and y is not weight
    )


def test_the_final_state_of_a_lower_layer_has_a_gradient_alone(emulated):
    x, layers, passed = make_stack("lstm", torch.float64, dropout=True)
    leaf = x.requires_grad_()
    ways = (run_stack((2, 3), library=emulated),
            functools.partial(by_layers, library=emulated, algorithm=1))  # fmt: skip
    found = []
    for run in ways:
        h_n = run(CELLS["lstm"], leaf, layers, passed)[0][2]
        found.append(torch.autograd.grad(h_n.square().sum(), leaf)[0])
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dropout", [False, True])
def test_second_derivatives(cell, dropout, emulated):
    x, layers, passed = make_stack(
        cell, torch.float64, layers=2, shape=(3, 1, 2), dropout=dropout, control=False
    )
    names = [name for name in ("w_ih", "w_hh", "b_hh", "h0", "c0") if layers[0][name] is not None]
    own = [given[name].requires_grad_() for given in layers for name in names]

    def outputs(x, *operands):
        n = len(names)
        given = [dict(zip(names, operands[i : i + n], strict=True)) for i in (0, n)]
        how = {"passed": passed, "scales": (2.0, 2.0), "chunks": (2, 2), "library": emulated}
        found = wavefront.wavefront(CELLS[cell], x, given, **how)
        return tuple(y for results in found for y in results if y is not None)

    inputs = (x.requires_grad_(), *own)
    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


def test_a_transform_sees_one_layer_at_a_time(waves):
    module = fused_rnn.GRU(4, 5, num_layers=2, backend="cpu", dtype=torch.float64)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    found = torch.func.grad(lambda x: module(x)[0].square().sum())(x)
    assert waves == []
    leaf = x.clone().requires_grad_()
    module(leaf)[0].square().sum().backward()
    assert len(waves) == 1
    torch.testing.assert_close(found, leaf.grad)


def test_after_a_refusal_all_is_as_before(emulated):
    """The second layer's plan refuses, when the first one's work has been given out."""
    stack = make_stack("gru", torch.bfloat16, layers=2)
    by = {"library": emulated, "algorithm": 1 + ALGORITHMS.index("cluster")}
    expected = results_of(run_stack((2, 3), **by), "gru", stack)
    x, layers, passed = stack
    H = layers[1]["w_hh"].size(1)
    large = {"w_ih": torch.randn(3 * 1100, H), "w_hh": torch.randn(3 * 1100, 1100)}
    large = {name: w.bfloat16() for name, w in large.items()}
    with pytest.raises(RuntimeError, match="'cluster' cannot run this"):
        run_stack((2, 3), **by)(CELLS["gru"], x, [layers[0], large], passed)
    assert_same_bits(results_of(run_stack((2, 3), **by), "gru", stack), expected)


# The ops


def arguments(emulated, dropout=True):
    """Of the op and, from its results, of its backward."""
    x, layers, passed = make_stack(
        "lstm", torch.float32, layers=2, shape=(3, 2, 8), dropout=dropout
    )
    operands = [own.get(name) for own in layers for name in OWN]
    forward = [CELLS["lstm"].id, x, operands, passed, 2.0, False, True, 2, True, 0, False]
    results = emulated.stack(*forward)
    h, c, h_n, c_n = results[7:11]
    grads = [None, None, results[3], results[4], h, c, h_n, c_n]
    kept = [results[6 * i + place] for i in (0, 1) for place in (0, 1, 2, 5)]
    backward = [CELLS["lstm"].id, [63, 2], grads, kept, x, operands, passed, 2.0]
    return forward, [*backward, False, 2, True, 0, False]


@pytest.mark.parametrize("dropout", [False, True])
def test_fakes_agree_with_the_ops(dropout, emulated):
    forward, backward = arguments(emulated, dropout)
    inference = [*forward[:6], False, *forward[7:]]
    names = ("stack", "stack", "stack_backward")
    for name, inputs in zip(names, (forward, inference, backward), strict=True):
        real = getattr(emulated, name)(*inputs)
        with FakeTensorMode() as mode:
            given = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs)
            fake = getattr(torch.ops.fused_rnn, name)(*given)
        for place, (a, b) in enumerate(zip(real, fake, strict=True)):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), place


def change(place, value):
    def changed(given):
        given[place] = value(given[place])

    return changed


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (change(2, lambda own: own[:-1]), "a layer of a stack is w_ih"),
        (change(2, lambda own: [None, *own[1:]]), "needs w_ih and w_hh"),
        (change(2, lambda own: [*own[:13], own[13][1:], *own[14:]]), "b_hh has size"),
        (change(2, lambda own: [*own[:10], own[10][:, 1:], *own[11:]]), "w_ih has size"),
        (change(3, lambda masks: masks * 2), "passed is empty or has a mask"),
        (change(3, lambda masks: [masks[0].bool()]), "passed has another dtype"),
        (change(7, lambda _: -1), "chunk must not be negative"),
        (change(9, lambda _: 9), "no algorithm 9"),
    ],
)
def test_wrong_operands_are_refused_in_a_sentence(changed, words, emulated):
    forward, _ = arguments(emulated)
    changed(forward)
    with pytest.raises(RuntimeError, match=f"fused_rnn: .*{words}"):
        emulated.stack(*forward)


def test_only_the_last_layer_has_an_outputs_gradient(emulated):
    _, backward = arguments(emulated)
    backward[2] = [backward[2][4], *backward[2][1:]]
    with pytest.raises(RuntimeError, match="only the last layer of a stack has an output"):
        emulated.stack_backward(*backward)


def test_the_cpu_runs_no_stacks(emulated):
    forward, _ = arguments(emulated)
    with pytest.raises(NotImplementedError, match="CPU"):
        torch.ops.fused_rnn.stack(*forward)


# The plan


def wave(N, H, layers, cell="lstm", T=1024, **options):
    options = {"algorithm": "cluster", "device": H200, "layers": layers} | options
    return plan(cell, torch.bfloat16, T, N, H, **options)


@pytest.mark.parametrize("backward", [False, True])
def test_layers_run_side_by_side_where_clusters_have_room(backward):
    one, two, four = (wave(16, 512, layers, backward=backward) for layers in (1, 2, 4))
    assert (one.chunk, one.stack_us) == (0, one.setup_us + 1024 * one.us_per_step)
    assert 0 < two.chunk < 1024
    # Sixteen CTAs hold a layer best, and two such layers fit at a time. So that four do, a layer
    # takes eight, and longer for a step.
    assert (one.team, two.team, four.team) == (16, 16, 8)
    assert four.us_per_step > one.us_per_step
    for p, layers in ((two, 2), (four, 4)):
        assert layers * p.tiles <= H200.clusters[p.team.bit_length() - 1]
        assert 1 + 0.4 * (layers - 1) < layers * one.stack_us / p.stack_us < layers
    assert "side by side" in str(two)
    assert "side by side" not in str(one)


@pytest.mark.parametrize(
    "other",
    [
        {"N": 256},  # clusters for a second layer are not there
        {"directions": 2},  # the layer above needs both ends
        {"algorithm": "grid"},  # which fills the chip
        {"algorithm": "stepwise"},
        {"T": 1},
        {"T": 4},  # the launches would cost more
    ],
    ids=str,
)
def test_elsewhere_one_layer_after_the_other(other):
    found = wave(**{"N": 16, "H": 512, "layers": 2} | other)
    assert found.chunk == 0
    assert found.stack_us == 2 * (found.setup_us + other.get("T", 1024) * found.us_per_step)


def test_the_page_holds_what_the_plan_predicts():
    """Rows: | GRU | 2000 | 32 | 256 | 3 | 2370 | 1007 (87, 8) | 3202 | the same |"""
    page = Path(__file__).parents[1] / "docs" / "kernels" / "wavefront.md"
    rows = re.findall(r"^\| (LSTM|GRU) \| (.*) \|$", page.read_text(), re.MULTILINE)
    assert len(rows) == 8
    for cell, columns in rows:
        *sizes, one, both, one_back, both_back = columns.split(" | ")
        T, N, H, layers = map(int, sizes)
        for said, together, backward in ((one, both, False), (one_back, both_back, True)):
            options = {"T": T, "backward": backward, "device": KNOWN_DEVICES["H100 SXM"]}
            alone, p = (wave(N, H, n, cell.lower(), **options) for n in (1, layers))
            assert said == f"{layers * alone.stack_us:.0f}"
            side = f"{p.stack_us:.0f} ({p.chunk}, {p.team})" if p.chunk else "the same"
            assert together == side


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        wave(16, 512, 0)


def problem_of(**changed):
    problem = backends.Problem(
        "lstm", torch.bfloat16, "cuda", 1024, 16, 512, 512, 0, 2, 1, True, False, False
    )
    return problem._replace(**changed)


@pytest.fixture
def h200(monkeypatch):
    """The GPU's backend as it would plan for one that is not there."""
    monkeypatch.setattr(backends.cuda, "describe", lambda _: H200)
    backends.cuda._chunks.cache_clear()
    yield backends.cuda
    backends.cuda._chunks.cache_clear()


def test_the_gpus_backend_has_it_and_explains_it(h200):
    assert h200.wavefront is wavefront.wavefront
    plans = tuple(wave(16, 512, 2, backward=b).chunk for b in (False, True))

    def chunks(name="cuda:cluster", **changed):
        return backends.chunks(h200, problem_of(**changed), name)

    assert chunks() == plans
    assert chunks(grad=False) == (plans[0], 0)
    for changed in (
        {"layers": 1}, {"directions": 2}, {"packed": True}, {"compiling": True}, {"vmapped": True},
        {"transformed": True}, {"options": ("recompute",)}, {"options": ("episodes",)}, {"T": 0},
    ):  # fmt: skip
        assert chunks(**changed) == (0, 0), changed
        if changed not in ({"T": 0}, {"compiling": True}):
            assert "side by side" not in h200.explain(problem_of(**changed), "cluster")
    # By itself the device still chooses stepwise.
    for name in ("auto", "cuda", "cuda:stepwise", "cuda:grid"):
        assert chunks(name) == (0, 0)
    text = h200.explain(problem_of(), "cluster")
    assert len(re.findall(r"2 layers, on H200.*\n(?:.*\n)*?.*side by side, \d+ steps", text)) == 2


def test_a_module_asks_the_gpus_backend_by_name(h200, monkeypatch):
    """All of the way but the kernels, which are not there."""
    asked = []

    def wavefront(cell, x, layers, **how):
        asked.append((len(layers), how["chunks"], how["algorithm"]))
        states = [(None, None, x.new_zeros(16, 512), x.new_zeros(16, 512)) for _ in layers]
        return [*states[:-1], (x.new_zeros(1024, 16, 512), *states[-1][1:])]

    problem = problem_of()
    monkeypatch.setattr(h200, "available", lambda: None)
    monkeypatch.setattr(h200, "wavefront", wavefront)
    monkeypatch.setattr(functional, "describe", lambda *_: problem)
    monkeypatch.setattr(functional, "is_plain", lambda: False)  # input on a GPU is not
    module = fused_rnn.LSTM(512, 512, num_layers=2, backend="cuda:cluster", dtype=torch.bfloat16)
    module(torch.zeros(1024, 16, 512, dtype=torch.bfloat16))
    assert asked == [(2, h200.chunks(problem, "cluster"), 1 + ALGORITHMS.index("cluster"))]
    assert min(asked[0][1]) > 0


# A GPU


@pytest.mark.skipif(MISSING_GPU is not None, reason=f"needs a GPU: {MISSING_GPU}")
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("algorithm", ["stepwise", "cluster"])
def test_on_gpu_streams_give_the_same_bits(algorithm, dropout):
    if algorithm == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU is before sm_90")
    stack = make_stack("lstm", torch.bfloat16, shape=(96, 16, 256), dropout=dropout)
    by = {"algorithm": 1 + ALGORITHMS.index(algorithm)}
    apart = run_stack((16, 24), side_by_side=False, **by)
    expected = results_of(apart, "lstm", stack, "cuda")
    for _ in range(20):
        assert_same_bits(results_of(run_stack((16, 24), **by), "lstm", stack, "cuda"), expected)


@pytest.mark.skipif(MISSING_GPU is not None, reason=f"needs a GPU: {MISSING_GPU}")
@pytest.mark.parametrize("algorithm", ["stepwise", "cluster", "grid"])
def test_on_gpu_a_stack_replays_in_a_graph(algorithm):
    if algorithm == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU is before sm_90")
    x, layers, passed = make_stack("gru", torch.bfloat16, shape=(64, 16, 256), dropout=True)
    x, passed = x.cuda().requires_grad_(), [mask.cuda() for mask in passed]
    layers = [
        {name: y.cuda() if isinstance(y, torch.Tensor) else y for name, y in own.items()}
        for own in layers
    ]
    run = run_stack((16, 16), algorithm=1 + ALGORITHMS.index(algorithm))

    def step():
        h = run(CELLS["gru"], x, layers, passed)[-1][0]
        return h, torch.autograd.grad(h.float().square().sum(), x)[0]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(MISSING_GPU is not None, reason=f"needs a GPU: {MISSING_GPU}")
@pytest.mark.parametrize("p", [0.0, 0.15, 0.5])
def test_on_gpu_modules_drop_what_torch_drops(p, monkeypatch):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU is before sm_90")
    options = {"num_layers": 3, "dropout": p, "device": "cuda", "dtype": torch.bfloat16}
    module = fused_rnn.GRU(64, 128, backend="cuda:cluster", **options)
    x = torch.randn(256, 4, 64, device="cuda", dtype=torch.bfloat16)
    assert min(backends.chunks(backends.cuda, module.describe(x), "cuda:cluster")) > 0

    def results():
        torch.manual_seed(3)
        module.zero_grad()
        output, _ = module(x)
        output.float().square().sum().backward()
        return [output, *(w.grad for w in module.parameters())]

    one = results()
    monkeypatch.setattr(backends.cuda, "chunks", lambda *_: (0, 0))
    for a, b in zip(one, results(), strict=True):
        # Another random element dropped is a difference of its own size.
        assert float((a - b).norm()) <= 0.01 * float(b.norm())
