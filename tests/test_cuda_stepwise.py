"""The CUDA ops, run from the kernels' own source on the emulator, hold what every backend holds."""

import pytest
import torch
from emulator import build
from layers import check, make_problem, run
from numerics import DTYPES, cases

from fused_rnn import autograd
from fused_rnn.cells import CELLS

pytestmark = pytest.mark.skipif(
    build.compiler() is None, reason="needs a C++ compiler to compile the emulator"
)

# Two blocks of units; more rows than the grid has; one of everything.
SHAPES = ((1, 1, 1), (5, 3, 25), (3, 2, 130), (6, 7, 8), (4, 19, 31))
EMPTY = ((0, 3, 5), (2, 0, 5))


@pytest.fixture(scope="module")
def emulated():
    return build.ops()


@pytest.fixture
def layer(emulated, monkeypatch):
    monkeypatch.setattr(autograd, "ops", emulated)
    return autograd.layer


def projects(cell, P, shape, **_):
    """Only the LSTM has a projection, to fewer than H."""
    return not P or (cell == "lstm" and shape[2] > P)


@cases(
    projects,
    cell=CELLS,
    dtype=DTYPES,
    shape=SHAPES,
    P=(0, 1, 19),
    reverse=(False, True),
    control=(False, True),
    rows=("", "packed", "scattered"),
    states=(False, True),
    bias=(False, True),
    product=(False, True),
)
def test_outputs_and_gradients(case, layer):
    check(layer, make_problem(**case))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("rows", ["", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_or_no_batch(cell, rows, shape, layer):
    """As the CPU's op: final states are the initial ones, gradients of weights are zero."""
    for control in (False, True):
        problem = make_problem(cell, torch.float32, shape, product=True, rows=rows, control=control)
        for name, x in run(layer, problem).items():
            if name in ("h_n", "c_n"):
                assert torch.equal(x, problem.operands[f"{name[0]}0"]), name
            elif name in ("dh0", "dc0"):
                assert torch.equal(x, problem.grads[f"{name[1]}_n"]), name
            else:
                assert not x.any(), name


def test_the_inputs_product_is_made_in_chunks(layer):
    """More rows than one product makes, forward and from the end; and sums of sums."""
    for reverse in (False, True):
        case = {"cell": "gru", "shape": (5, 4100, 2), "product": True, "reverse": reverse}
        check(layer, make_problem(dtype=torch.float32, **case))


@pytest.mark.parametrize("cell", CELLS)
def test_results_are_bit_equal_under_every_schedule(cell, layer):
    problem = make_problem(
        cell=cell, dtype=torch.float32, shape=(4, 5, 33), product=True, control=True, rows="packed"
    )
    build.seed(0)
    first = run(layer, problem)
    for seed in range(1, 4):
        build.seed(seed)
        for name, x in run(layer, problem).items():
            assert torch.equal(x, first[name]), f"{name} of {problem} under seed {seed}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_whose_products_are_given(cell, dtype, emulated):
    """What the CPU's op gives, up to the two machines' exp and tanh and a last rounding."""
    spec, N, H = CELLS[cell], 3, 131
    gx, gh = torch.randn(2, N, spec.gates * H).to(dtype).unbind()
    h, c = torch.randn(2, N, H).to(dtype).unbind()
    c = c if spec.states == 2 else None
    dh1, dc1 = torch.randn(2, N, H).to(dtype).unbind()
    dc1 = dc1 if spec.states == 2 else None
    results = []
    for ops in (emulated, torch.ops.fused_rnn):
        h1, c1, saved = ops.step(spec.id, gx, gh, h, c, True)
        gradients = ops.step_backward(spec.id, dh1, dc1, h1, c1, saved, h, c)
        results.append((h1, c1, saved, *gradients))
    for ours, theirs in zip(*results, strict=True):
        ulps = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=ulps, atol=ulps)
