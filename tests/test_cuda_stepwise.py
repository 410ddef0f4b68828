"""The CUDA ops hold what every backend holds: from the kernels' own source on the emulator, and
where there is a GPU and the library, on that."""

import numerics
import pytest
import torch
from emulator import build
from layers import check, make_problem, oracle_layer, projects, run
from numerics import DTYPES, cases

from fused_rnn import autograd
from fused_rnn.backends import cuda
from fused_rnn.cells import CELLS

# Two blocks of units; more rows than the grid has; one of everything.
SHAPES = ((1, 1, 1), (5, 3, 25), (3, 2, 130), (6, 7, 8), (4, 19, 31))
EMPTY = ((0, 3, 5), (2, 0, 5))


@pytest.fixture(scope="module", params=["emulator", "gpu"])
def machine(request):
    """The ops, and the device of their tensors."""
    if request.param == "emulator":
        if build.compiler() is None:
            pytest.skip("there is no C++ compiler to compile the emulator")
        return build.ops(), "cpu"
    missing = cuda.available() or ("" if torch.cuda.is_available() else "there is no GPU")
    if missing:
        pytest.skip(missing)
    return torch.ops.fused_rnn, "cuda"


@pytest.fixture
def layer(machine, monkeypatch):
    """``autograd.layer`` on that machine, for tensors of the CPU."""
    ops, device = machine
    if device == "cpu":
        build.seed(numerics.SEED)
    monkeypatch.setattr(autograd, "ops", ops)

    def there(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    def run_there(*operands, **options):
        options = {name: there(x) for name, x in options.items()}
        outputs = autograd.layer(*map(there, operands), **options)
        return tuple(x if x is None else x.cpu() for x in outputs)

    return run_there


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


@pytest.mark.parametrize(
    ("cell", "dtype", "H"),
    [
        ("lstm", torch.bfloat16, 60),
        ("gru", torch.float16, 1150),
        ("lstm", torch.float32, 1150),
        ("rnn_tanh", torch.bfloat16, 4096),
    ],
)
def test_large_sizes(cell, dtype, H, layer):
    check(layer, make_problem(cell, dtype, (2, 1, H), states=True))


@cases(
    projects,
    cell=CELLS,
    dtype=DTYPES,
    P=(0, 19),
    control=(False, True),
    rows=("", "scattered"),
    h_mask=(False, True),
    keep=(False, True),
)
def test_dropout_and_zoneout(case, layer):
    check(layer, make_problem(shape=(5, 3, 33), product=True, **case))


@cases(
    projects,
    cell=CELLS,
    dtype=DTYPES,
    P=(0, 19),
    reverse=(False, True),
    control=(False, True),
    rows=("", "scattered"),
)
def test_a_share_of_each_state_stays(case, layer):
    check(layer, make_problem(shape=(5, 3, 33), product=True, share=True, **case))


@cases(
    projects,
    cell=CELLS,
    P=(0, 19),
    reverse=(False, True),
    control=(False, True),
    rows=("", "packed", "scattered"),
    h_mask=(False, True),
    keep=(False, True),
)
def test_dropout_and_zoneout_in_float64(case, layer):
    """Where a gradient that goes astray cannot hide in rounding."""
    problem = make_problem(dtype=torch.float64, shape=(6, 3, 20), product=True, **case)
    ours, oracle = run(layer, problem), run(oracle_layer, problem)
    for name, expected in oracle.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12, msg=name)


def error(problem, ops, device, *, tf32):
    """Largest error of a layer's output and of its weight's gradient."""
    exact = run(oracle_layer, problem.to(torch.float64))
    forward = [
        x.to(device) if isinstance(x, torch.Tensor) else x for x in problem.op_arguments(tf32=tf32)
    ]
    h, c, _, _, saved = ops.layer(*forward)
    _, x, w_ih, _, w_hh, _, h0, c0, reverse, _, *options = forward
    dh, dc, dh_n, dc_n = (problem.grads[name].to(device) for name in ("h", "c", "h_n", "c_n"))
    kept, inputs = (h, c, saved), (x, w_ih, w_hh, h0, c0, reverse)
    found = ops.layer_backward(problem.cell.id, 63, dh, dc, dh_n, dc_n, *kept, *inputs, *options)
    pairs = (h, exact["h"]), (found[3], exact["dw_hh"])
    return [float((ours.cpu().double() - right).abs().max()) for ours, right in pairs]


def test_tf32_only_where_it_is_allowed(machine):
    """float32 has a mantissa of 24 bits, TF32 one of 11."""
    # Large enough on a GPU that cuBLAS takes a kernel with tensor cores, as it may.
    size = (5, 64, 256) if machine[1] == "cuda" else (5, 4, 64)
    problem = make_problem("lstm", torch.float32, size, product=True)
    if machine[1] == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    for exact, coarse in zip(
        error(problem, *machine, tf32=False), error(problem, *machine, tf32=True), strict=True
    ):
        assert exact < 2e-5
        assert 2e-4 < coarse < 2e-2


@pytest.mark.parametrize("rows", ["", "packed"])
@pytest.mark.parametrize("name", ["h_mask", "keep"])
def test_masks_of_wrong_sizes_or_dtypes_are_refused(name, rows, machine):
    ops, device = machine
    problem = make_problem(
        "lstm", torch.float32, (3, 2, 8), P=5, rows=rows, h_mask=True, keep=True, product=True
    )
    mask = problem.options[name]
    wrong = [mask[:-1], mask[..., :-1], torch.cat([mask, mask[:1]]), mask.unsqueeze(0)]
    wrong += [mask.to(torch.float64), mask.to(torch.int32)]
    for value in wrong:
        problem.options[name] = value
        arguments = problem.op_arguments()
        arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        with pytest.raises(RuntimeError, match=f"fused_rnn: {name} has"):
            ops.layer(*arguments)


@pytest.mark.parametrize("number", [-1, 4, 99])
def test_an_algorithm_that_does_not_exist_is_refused(number, machine):
    ops, device = machine
    arguments = make_problem("gru", torch.float32, (3, 2, 8)).op_arguments()
    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
    arguments[-2] = number
    with pytest.raises(RuntimeError, match=f"this device has no algorithm {number}"):
        ops.layer(*arguments)
    arguments[-2] = 1
    assert len(ops.layer(*arguments)) == 5


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
def test_a_step_whose_products_are_given(cell, dtype, machine):
    """What the CPU's op gives, up to the two machines' exp and tanh and a last rounding."""
    spec, N, H = CELLS[cell], 3, 131
    gx, gh = torch.randn(2, N, spec.gates * H).to(dtype).unbind()
    h, c = torch.randn(2, N, H).to(dtype).unbind()
    c = c if spec.states == 2 else None
    dh1, dc1 = torch.randn(2, N, H).to(dtype).unbind()
    dc1 = dc1 if spec.states == 2 else None
    results = []
    for ops, device in (machine, (torch.ops.fused_rnn, "cpu")):

        def there(*tensors, device=device):
            return [x if x is None else x.to(device) for x in tensors]

        h1, c1, saved = ops.step(spec.id, *there(gx, gh, h, c), True)
        kept = (h1, c1, saved, *there(h, c))
        results.append((h1, c1, saved, *ops.step_backward(spec.id, *there(dh1, dc1), *kept)))
    for ours, theirs in zip(*results, strict=True):
        ulps = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.cpu(), theirs, rtol=ulps, atol=ulps)
