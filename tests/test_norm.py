"""The native op of the cells with layer norms: results, derivatives, schema, threads.

Its error is measured against that of the same steps by torch's own ops, all in one dtype.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from layers import Problem, check, make_problem, run, torch_layer
from numerics import DTYPES, assert_as_good_as, cases, grid, needs_native
from test_gradients import assert_near
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.functional import linear

from fused_rnn.backends import reference
from fused_rnn.norm_autograd import norm_layer
from fused_rnn.norm_cells import NORM_CELLS, Norm

pytestmark = [pytest.mark.op, needs_native]

ops = torch.ops.fused_rnn

# What rounding does to a row without variance is multiplied by 1 / sqrt(eps), from step to step,
# torch's and ours: with torch's 1e-5 one random problem says little of the next.
EPS = 1e-2
# A small h that is brought to size 1 brings its rounding along. With gains around 1 an LSTM's steps
# multiplied it to 100 ulp, torch's as ours, in one random problem and not in the next; with these
# torch's largest errors are mostly below 10.
GAIN = 0.5
NORMS = ("gain", "bias", "c_gain", "c_bias")
# The last one is of several chunks.
SHAPES = ((7, 5, 33), (1, 1, 8), (3, 2, 3), (4, 130, 16))


class NormProblem(Problem):
    """As the other problems, with operands for the norms and no bias of the product."""

    def arguments(self):
        x, w_hh, h0, c0, *norms = (
            self.operands[name] for name in ("x", "w_hh", "h0", "c0", *NORMS)
        )
        return self.cell, x, w_hh, Norm(*norms, eps=EPS), h0, c0

    def keywords(self):
        return self.options

    def op_arguments(self, *, save=True):
        _, x, w_hh, norm, h0, c0 = self.arguments()
        masks = [self.options.get(name) for name in ("control", "rows", "h_mask")]
        reverse = self.options["reverse"]
        return [self.cell.id, EPS, x, w_hh, *norm.tensors, h0, c0, reverse, save, *masks]


def make_norm_problem(cell, dtype, shape, *, bias=True, **options):
    """The arguments are those of make_problem."""
    spec = NORM_CELLS[cell]
    base = make_problem(spec.mode.lower(), torch.float32, shape, bias=bias, **options)
    operands = {name: base.operands[name] for name in ("x", "w_hh", "h0", "c0")}
    sizes = (spec.gates * shape[2], shape[2] if spec.states == 2 else 0)
    for name, size in zip(NORMS, (sizes[0], *sizes, sizes[1]), strict=True):
        wanted = size and (bias or "gain" in name)
        around = GAIN if "gain" in name else 0.0
        operands[name] = around + 0.15 * torch.randn(size) if wanted else None
    problem = NormProblem(spec, *shape, operands, base.grads, base.options)
    return problem.to(dtype)


def norm_step(norm, cell, x, entering, weights, _, h_mask):
    operand = entering[0] if h_mask is None else entering[0] * h_mask
    return list(cell.step(x, linear(operand, weights[1]), tuple(entering), norm))


def steps_by_torch(cell, gx, w_hh, norm, h0, c0, **options):
    step = partial(norm_step, norm)
    return torch_layer(cell, gx, w_hh, None, h0, c0, step=step, **options)


@cases(
    cell=NORM_CELLS,
    dtype=DTYPES,
    shape=SHAPES,
    reverse=(False, True),
    control=(False, True),
    rows=("", "packed", "scattered"),
    states=(True, False),
    bias=(True, False),
    h_mask=(False, True),
)
def test_outputs_and_gradients_are_as_good_as_torchs(case):
    problem = make_norm_problem(**case)
    check(norm_layer, problem, steps_by_torch, reference.norm_layer)


@grid(cell=NORM_CELLS, dtype=DTYPES)
def test_a_norm_of_one_value_is_its_bias(cell, dtype):
    """The gradient through it is 0, where the oracle's is rounding times 1 / eps."""
    problem = make_norm_problem(cell, dtype, (3, 2, 1))
    ours = run(norm_layer, problem)
    assert all(x.isfinite().all() for x in ours.values())
    exact = reference.norm_layer(*problem.to(torch.float64).arguments())[0]
    torchs = steps_by_torch(*problem.arguments())[0]
    assert_as_good_as(ours["h"], torchs.detach(), exact, cell, scale=1.0)
    if cell == "layer_norm_lstm":
        assert not ours["dc_gain"].any()


@grid(cell=NORM_CELLS, dtype=DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(cell, dtype, value):
    """From the step at which they come, in every unit: a norm spreads them over a row."""
    problem = make_norm_problem(cell, dtype, (4, 3, 9))
    clean = norm_layer(*problem.arguments())[0]
    with torch.no_grad():
        problem.operands["h0"][1, 2] = value
    h = norm_layer(*problem.arguments())[0]
    assert h[:, 1].isnan().all()
    assert torch.equal(h[:, ::2], clean[:, ::2])


def as_function(problem, layer=norm_layer):
    """``problem`` as a function of the tensors that it has, those tensors and their names."""
    names = [name for name, x in problem.operands.items() if x is not None]

    def function(*tensors):
        given = problem.operands | dict(zip(names, tensors, strict=True))
        changed = replace(problem, operands=given)
        return tuple(x for x in layer(*changed.arguments(), **changed.options) if x is not None)

    return function, [problem.operands[n].detach().requires_grad_() for n in names], names


@cases(
    cell=NORM_CELLS,
    reverse=(False, True),
    control=(False, True),
    rows=("", "scattered"),
    states=(True, False),
    bias=(True, False),
    h_mask=(False, True),
)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_are_finite_differences(case, check):
    problem = make_norm_problem(dtype=torch.float64, shape=(3, 2, 3), **case)
    if "control" in problem.options:  # a cut gradient is no finite difference
        problem.options["control"] = problem.options["control"] & 3
    function, tensors, _ = as_function(problem)
    assert check(function, tensors)


@cases(cell=NORM_CELLS, control=(False, True), rows=("", "packed"), h_mask=(False, True))
def test_each_output_alone_and_each_input_alone(case):
    problem = make_norm_problem(dtype=torch.float64, shape=(4, 3, 9), **case)
    function, tensors, names = as_function(problem)
    expected_function, *_ = as_function(problem, reference.norm_layer)
    outputs = zip(function(*tensors), expected_function(*tensors), strict=True)
    for place, (y, expected) in enumerate(outputs):
        found = [
            grad(x.sin().sum(), tensors, retain_graph=True, allow_unused=True)
            for x in (y, expected)
        ]
        for name, ours, other in zip(names, *found, strict=True):
            assert_near(ours, other, f"d{name} from output {place} of {problem}")
    for name, tensor in zip(names, tensors, strict=True):
        alone = [x if x is tensor else x.detach() for x in tensors]
        losses = [sum(y.sin().sum() for y in f(*alone)) for f in (function, expected_function)]
        assert_near(*(grad(loss, tensor)[0] for loss in losses), f"d{name} alone of {problem}")


@cases(cell=NORM_CELLS, control=(False, True), rows=("", "scattered"))
def test_double_backward_is_the_references(case):
    problem = make_norm_problem(dtype=torch.float64, shape=(4, 3, 5), **case)
    found = []
    for layer in (norm_layer, reference.norm_layer):
        function, tensors, names = as_function(problem, layer)
        first = grad(sum(y.sin().sum() for y in function(*tensors)), tensors, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append((*first, *grad(penalty, tensors)))
    for place, (ours, expected) in enumerate(zip(*found, strict=True)):
        assert_near(ours, expected, f"{place} at {names[place % len(names)]} of {problem}")


def op_calls(problem, wanted=7):
    """Arguments of both ops, the forward's with and without ``save``, and their results."""
    forward = problem.op_arguments()
    outputs = h, c, _, _, saved, stats = ops.norm_layer(*forward)
    grads = [problem.grads.get(name) for name in ("h", "c", "h_n", "c_n")]
    grads = [x if x is None or i < 2 else x.to(stats.dtype) for i, x in enumerate(grads)]
    _, _, _, *weights, reverse, _, control, rows, h_mask = forward
    backward = [problem.cell.id, wanted, *grads, h, c, saved, stats, *weights, reverse]
    backward += [control, rows, h_mask]
    unsaved = problem.op_arguments(save=False)
    return (
        (ops.norm_layer, forward, outputs),
        (ops.norm_layer, unsaved, ops.norm_layer(*unsaved)),
        (ops.norm_layer_backward, backward, ops.norm_layer_backward(*backward)),
    )


@cases(
    cell=NORM_CELLS,
    dtype=DTYPES,
    shape=((3, 2, 25), (2, 0, 8)),
    control=(False, True),
    rows=("", "scattered"),
    states=(True, False),
)
def test_fakes_agree_with_the_ops(case):
    for op, inputs, real in op_calls(make_norm_problem(**case)):
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs))
        for place, (a, b) in enumerate(zip(real, fake, strict=True)):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), (op, place)


@cases(cell=NORM_CELLS, dtype=(torch.float32, torch.bfloat16), rows=("", "scattered"))
def test_opcheck(case):
    problem = make_norm_problem(shape=(3, 2, 8), control=True, h_mask=True, **case)
    for op, inputs, _ in op_calls(problem):
        assert set(torch.library.opcheck(op.default, tuple(inputs)).values()) == {"SUCCESS"}


@cases(cell=NORM_CELLS, dtype=DTYPES, shape=((3, 2, 25), (2, 0, 8)))
def test_backward_gives_what_is_wanted_and_nothing_else(case):
    problem = make_norm_problem(**case)
    *_, (op, inputs, everything) = op_calls(problem)
    belongs = {0: 1, 1: 2, 2: 4, 3: 4, 4: 4, 5: 4}
    for bit in (1, 2, 4):
        inputs[1] = bit
        for place, x in enumerate(op(*inputs)):
            if belongs.get(place, bit) == bit:
                assert torch.equal(x, everything[place]), f"output {place} of {problem}"
            else:
                assert x.shape == (0,), f"output {place} of {problem}"


@cases(
    cell=NORM_CELLS,
    dtype=(torch.float32, torch.bfloat16),
    shape=((40, 7, 96), (200, 3, 64)),
    control=(False, True),
    rows=("", "packed"),
)
def test_the_same_bits_on_any_number_of_threads(case):
    problem = make_norm_problem(**case)
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(run(norm_layer, problem))
    for several in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, several[name]), f"{name} of {problem}"


# The ops' arguments, in the order of their schemas.
WEIGHTS = ["w_hh", "gain", "bias", "c_gain", "c_bias", "h0", "c0", "reverse"]
MASKS = ["control", "rows", "h_mask"]
FORWARD = ["cell", "eps", "gx", *WEIGHTS, "save", *MASKS]
GIVEN = ["dh", "dc", "dh_n", "dc_n", "h", "c", "saved", "stats"]
BACKWARD = ["cell", "wanted", *GIVEN, *WEIGHTS, *MASKS]
RESIZED = {
    "narrow": lambda x: x[..., :-1].contiguous(),
    "wide": lambda x: torch.cat([x, x[..., :1]], -1),
    "short": lambda x: x[1:].contiguous(),
    "with one dimension more": lambda x: x.unsqueeze(0),
}


@pytest.mark.parametrize("rows", ["", "scattered"])
@pytest.mark.parametrize("backward", [False, True])
def test_wrong_operands_are_refused_in_a_sentence(rows, backward):
    problem = make_norm_problem(
        "layer_norm_lstm", torch.float32, (3, 2, 8), control=True, rows=rows, h_mask=True
    )
    op, inputs, _ = op_calls(problem)[2 if backward else 0]
    names = BACKWARD if backward else FORWARD
    changes = RESIZED | {"in int64": torch.Tensor.long, "elsewhere": lambda x: x.to("meta")}
    for place, name in enumerate(names):
        for how, change in changes.items():
            given = list(inputs)
            if not isinstance(given[place], torch.Tensor):
                continue
            given[place] = change(given[place])
            with pytest.raises(RuntimeError, match="fused_rnn: ") as raised:
                op(*given)
            # What the rest is compared with is not always what is wrong.
            if name not in ("gx", "h", "w_hh", "rows"):
                assert f"fused_rnn: {name} " in str(raised.value), (name, how)


def test_what_does_not_belong_together_is_refused():
    lstm, gru = (
        make_norm_problem(f"layer_norm_{name}", torch.float32, (3, 2, 8)).op_arguments()
        for name in ("lstm", "gru")
    )

    def refused(sentence, inputs, **changed):
        given = list(inputs)
        for name, value in changed.items():
            given[FORWARD.index(name)] = value
        with pytest.raises(RuntimeError, match=sentence):
            ops.norm_layer(*given)

    refused("no cell has number 3", gru, cell=3)
    refused("layer_norm_lstm needs c_gain", lstm, c_gain=None)
    refused("layer_norm_gru has no c to normalise", gru, c_gain=torch.ones(8))
    refused("c_bias needs c_gain", gru, c_bias=torch.ones(8))
    refused("float32, float64, bfloat16 or float16", gru, gx=torch.ones(3, 2, 24).int())
    rows = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32)
    flat = gru[FORWARD.index("gx")].flatten(0, 1)
    refused("names row 0 twice", gru, gx=flat, rows=rows.clone().fill_(0))
    refused("names 5 of the 6 rows", gru, gx=flat, rows=torch.where(rows == 3, -1, rows))
