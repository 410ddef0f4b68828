"""First and second derivatives of the native ops, as functions."""

import pytest
import torch
from devices import DEVICES, device_of, layer_on
from layers import KEYWORDS, OPERANDS, Problem, make_problem, oracle_layer
from numerics import cases, grid, needs_native
from torch.autograd import grad, gradcheck, gradgradcheck

from fused_rnn.autograd import layer, step
from fused_rnn.cells import CELLS

pytestmark = [pytest.mark.op, needs_native]

SHAPE = (3, 2, 4)


def projects(cell, P, **_):
    return not P or cell == "lstm"


def away_from_the_kink(problem: Problem) -> Problem:
    """Finite differences must not cross a ReLU's kink: with an input so large none is near.

    The first half of the units stays positive and the second negative, whatever the products add.
    """
    if problem.cell.name == "rnn_relu":
        half = problem.H // 2
        sign = torch.tensor([1.0] * half + [-1.0] * (problem.H - half), dtype=torch.float64)
        problem.operands["x"] = problem.operands["x"].clamp(-1, 1) + 9 * sign
        problem.operands["w_hh"] = problem.operands["w_hh"].clamp(-0.1, 0.1)
    return problem


def as_function(problem: Problem, run=layer):
    """``problem`` as a function of the tensors it is differentiated at, and those tensors."""
    every = {name: problem.operands[name] for name in OPERANDS + KEYWORDS}
    names = [name for name, x in every.items() if x is not None]

    def function(*tensors):
        given = every | dict(zip(names, tensors, strict=True))
        positional = [given.pop(name) for name in OPERANDS]
        outputs = run(problem.cell, *positional, **given, **problem.options)
        return tuple(x for x in outputs if x is not None)

    return function, [every[name].detach().requires_grad_() for name in names], names


@cases(
    projects,
    cell=CELLS,
    device=DEVICES,
    P=(0, 3),
    reverse=(False, True),
    control=(False, True),
    rows=("", "scattered"),
    states=(False, True),
    bias=(False, True),
    product=(False,),
)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_are_finite_differences(case, check):
    device, case = device_of(case)
    problem = make_problem(shape=SHAPE, dtype=torch.float64, **case)
    problem = away_from_the_kink(without_cuts(problem))
    function, tensors, _ = as_function(problem, layer_on(device))
    assert check(function, tensors)


def without_cuts(problem: Problem) -> Problem:
    """A cut gradient is no finite difference; test_layer.py compares those with the reference."""
    if "control" in problem.options:
        problem.options["control"] = problem.options["control"] & 3
    return problem


@grid(
    cell=[name for name in CELLS if name != "rnn_relu"], states=(False, True), device=DEVICES
)  # fmt: skip
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_with_the_product_inside_are_finite_differences(cell, states, device, check):
    problem = make_problem(cell, torch.float64, SHAPE, states=states, product=True)
    function, tensors, _ = as_function(problem, layer_on(device))
    assert check(function, tensors)


@grid(cell=CELLS, device=DEVICES)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives_of_a_step_are_finite_differences(cell, device, check):
    spec = CELLS[cell]
    gx, gh = (torch.randn(2, spec.gates * 4, dtype=torch.float64) for _ in range(2))
    if cell == "rnn_relu":
        gx = gx.sign() * (3 + gx.abs())
        gh = gh.clamp(-1, 1)
    states = torch.randn(spec.states, 2, 4, dtype=torch.float64).unbind()
    tensors = [x.clone().to(device).requires_grad_() for x in (gx, gh, *states)]

    def function(gx, gh, h, c=None):
        return tuple(x for x in step(spec, gx, gh, h, c) if x is not None)

    assert check(function, tensors)


@cases(
    projects,
    cell=CELLS,
    device=DEVICES,
    P=(0, 3),
    control=(False, True),
    rows=("", "packed"),
    product=(False, True),
)
def test_a_second_backward_gives_the_same(case):
    device, case = device_of(case)
    problem = make_problem(shape=(5, 3, 33), dtype=torch.float32, **case)
    function, tensors, _ = as_function(problem, layer_on(device))
    loss = sum(y.sin().sum() for y in function(*tensors))
    first = grad(loss, tensors, retain_graph=True)
    second = grad(loss, tensors)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@cases(
    projects,
    cell=CELLS,
    device=DEVICES,
    P=(0, 3),
    control=(False, True),
    rows=("", "packed"),
    product=(False, True),
)
def test_each_output_alone_and_each_input_alone(case):
    """Gradients that are not there are zeros, those that nobody needs are left out."""
    device, case = device_of(case)
    problem = make_problem(shape=(4, 3, 9), dtype=torch.float64, **case)
    function, tensors, names = as_function(problem, layer_on(device))
    expected_function, *_ = as_function(problem, oracle_layer)
    for place, (y, expected) in enumerate(
        zip(function(*tensors), expected_function(*tensors), strict=True)
    ):
        pairs = zip(
            names,
            grad(y.sin().sum(), tensors, retain_graph=True, allow_unused=True),
            grad(expected.sin().sum(), tensors, retain_graph=True, allow_unused=True),
            strict=True,
        )
        for name, ours, other in pairs:
            assert_near(ours, other, f"d{name} from output {place} of {problem}")
    for name, tensor in zip(names, tensors, strict=True):
        found = []
        for run in (function, expected_function):
            alone = [x if x is tensor else x.detach() for x in tensors]
            loss = sum(y.sin().sum() for y in run(*alone))
            found.append(grad(loss, tensor)[0])
        assert_near(*found, f"d{name} alone of {problem}")


def assert_near(ours, expected, what):
    """Two float64 computations: rounding apart."""
    ours = torch.zeros_like(expected) if ours is None and expected is not None else ours
    expected = torch.zeros_like(ours) if expected is None and ours is not None else expected
    torch.testing.assert_close(
        ours, expected, rtol=1e-11, atol=1e-12, msg=lambda text: f"{what}: {text}"
    )


@cases(
    projects,
    cell=CELLS,
    device=DEVICES,
    P=(0, 3),
    reverse=(False, True),
    control=(False, True),
    rows=("", "scattered"),
    product=(False, True),
)
def test_double_backward_is_the_references(case):
    device, case = device_of(case)
    problem = make_problem(shape=(4, 3, 5), dtype=torch.float64, **case)
    found = []
    for run in (layer_on(device), oracle_layer):
        function, tensors, names = as_function(problem, run)
        loss = sum(y.sin().sum() for y in function(*tensors))
        first = grad(loss, tensors, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append((*first, *grad(penalty, tensors)))
    for place, (ours, expected) in enumerate(zip(*found, strict=True)):
        order, name = divmod(place, len(names))
        assert_near(ours, expected, f"derivative {order + 1} at {names[name]} of {problem}")


@pytest.mark.parametrize("cell", CELLS)
def test_an_input_computed_from_another_counts_once(cell):
    """In the second derivative: the backward sees both as inputs of their own."""
    problem = make_problem(cell, torch.float64, (4, 3, 5), product=False)
    problem.operands["h0"] = None
    found = []
    for run in (layer, oracle_layer):
        x = problem.operands["x"].detach().requires_grad_()
        h0 = x[0, :, :5].sin()
        w_hh = problem.operands["w_hh"] * (1 + x.mean())
        outputs = run(problem.cell, x, w_hh, problem.operands["b_hh"], h0, problem.operands["c0"])
        loss = sum(y.sin().sum() for y in outputs if y is not None)
        (first,) = grad(loss, x, create_graph=True)
        (second,) = grad(first.square().sum(), x)
        found.append((first, second))
    for order, (ours, expected) in enumerate(zip(*found, strict=True)):
        assert_near(ours, expected, f"derivative {order + 1} of {problem}")


@grid(cell=CELLS, dtype=(torch.float32, torch.bfloat16))
def test_gradients_have_the_dtype_of_their_inputs(cell, dtype):
    """States come in the dtype of the weights or in the carry dtype, float32."""
    for carried in (dtype, torch.float32):
        problem = make_problem(cell, dtype, (3, 2, 9))
        for name in ("h0", "c0"):
            x = problem.operands[name]
            problem.operands[name] = x if x is None else x.to(carried)
        function, tensors, names = as_function(problem)
        loss = sum(y.float().sum() for y in function(*tensors))
        for name, x, dx in zip(names, tensors, grad(loss, tensors), strict=True):
            assert (dx.dtype, dx.shape) == (x.dtype, x.shape), name


@pytest.mark.parametrize("cell", CELLS)
def test_without_grad_there_is_no_graph(cell):
    function, tensors, _ = as_function(make_problem(cell, torch.float32, (3, 2, 9)))
    with torch.no_grad():
        assert not any(y.requires_grad for y in function(*tensors))
    assert all(y.requires_grad for y in function(*tensors))


@pytest.mark.parametrize("cell", CELLS)
def test_an_input_changed_in_place_before_backward_is_noticed(cell):
    function, tensors, names = as_function(make_problem(cell, torch.float32, (3, 2, 9)))
    outputs = function(*tensors)
    with torch.no_grad():
        tensors[names.index("w_hh")].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(outputs[0].sum(), tensors[0])
