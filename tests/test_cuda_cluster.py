"""The cluster algorithm, forward and backward: from the kernels' own source on the emulator, and
where there is a GPU of sm_90 and the library, on that."""

import functools

import numerics
import pytest
import torch
from emulator import build
from layers import check, make_problem, oracle_layer, run
from numerics import cases

from fused_rnn import autograd
from fused_rnn.backends import cuda
from fused_rnn.cells import CELLS

CLUSTER = 2
EVERY = (132, 66, 30, 15, 7)


@pytest.fixture(params=["emulator", "gpu"])
def layer(request, monkeypatch):
    """``autograd.layer`` by clusters, for tensors of the CPU."""
    device = "cpu"
    if request.param == "emulator":
        if build.compiler() is None:
            pytest.skip("there is no C++ compiler to compile the emulator")
        monkeypatch.setattr(autograd, "ops", build.ops())
        build.clusters(*EVERY)
    else:
        missing = cuda.available() or ("" if torch.cuda.is_available() else "there is no GPU")
        if missing or torch.cuda.get_device_capability() < (9, 0):
            pytest.skip(missing or "this GPU has no clusters")
        device = "cuda"

    def there(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    def run_there(*operands, **options):
        options = {name: there(x) for name, x in options.items()}
        outputs = autograd.layer(*map(there, operands), **options, algorithm=CLUSTER)
        return tuple(x if x is None else x.cpu() for x in outputs)

    return run_there


def team(size, active=None):
    """An emulated GPU that has clusters of this size alone, and room for so many at a time."""
    build.clusters(*((active or n) * (2**i == size) for i, n in enumerate(EVERY)))


# A block alone with all units, one or two blocks of 8 units a warp; several blocks, odd sizes, a
# last block with fewer units; more rows than a tile has, and than one. With room for one cluster,
# a tile of 16 rows pays where there are as many.
SIZES = ((1, 20), (1, 72), (1, 124), (2, 33), (4, 70), (4, 100), (8, 125))


@cases(
    cell=CELLS,
    dtype=(torch.bfloat16, torch.float16),
    size=SIZES,
    N=(1, 3, 19),
    reverse=(False, True),
    control=(False, True),
    rows=("", "packed", "scattered"),
    states=(False, True),
    bias=(False, True),
    product=(False, True),
    h_mask=(False, True),
    keep=(False, True),
    active=(1, None),
)
def test_outputs_and_gradients(case, layer):
    case = dict(case)
    (size, H), N = case.pop("size"), case.pop("N")
    team(size, case.pop("active"))
    check(layer, make_problem(shape=(3, N, H), **case))


# Sixteen blocks; four and six tiles of units a warp in the backward, their weights in registers and
# in shared memory; and with tiles of 16 rows.
LARGE = {
    "sixteen": ("gru", 16, (2, 1, 250), None),
    "four": ("lstm", 4, (2, 3, 270), None),
    "wide": ("rnn_tanh", 4, (2, 11, 260), 1),
    "six": ("rnn_relu", 8, (2, 2, 530), None),
}


@pytest.mark.parametrize("name", LARGE if numerics.FULL else ["sixteen", "six"])
def test_many_units(name, layer):
    cell, size, shape, active = LARGE[name]
    team(size, active)
    build.cluster_launches()
    check(layer, make_problem(cell, torch.bfloat16, shape, product=True, control=True))
    if autograd.ops is not torch.ops.fused_rnn:
        assert build.cluster_launches() == 2  # forward and backward


def test_a_backward_that_does_not_fit_is_stepwise(layer):
    """Eight blocks deal 61 units in eights; in sixteens there are not enough."""
    team(8)
    build.cluster_launches()
    check(layer, make_problem("gru", torch.bfloat16, (3, 3, 61)))
    if autograd.ops is not torch.ops.fused_rnn:
        assert build.cluster_launches() == 1


@pytest.fixture
def emulated(layer):
    """The ops on the emulator."""
    if autograd.ops is torch.ops.fused_rnn:
        pytest.skip("the GPU's turn is in the other test")
    return autograd.ops


class Tf32:
    """The ops with TF32 allowed: the last of their arguments."""

    def __init__(self, ops):
        self.ops = ops

    def __getattr__(self, name):
        return lambda *arguments: getattr(self.ops, name)(*arguments[:-1], True)


@pytest.mark.parametrize(("size", "H"), SIZES if numerics.FULL else SIZES[1::3])
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_is_as_far_from_float64_as_stepwise(cell, size, H, emulated, monkeypatch):
    """To the rule, with stepwise in TF32 in the place of torch."""
    monkeypatch.setattr(autograd, "ops", Tf32(emulated))
    team(size)
    # A ReLU's derivative flips with rounding: its problems in a half type are exact integers.
    drawn = torch.bfloat16 if cell == "rnn_relu" else torch.float32
    problem = make_problem(cell, drawn, (4, 9, H), product=True, control=True).to(torch.float32)
    ours, stepwise = (
        run(functools.partial(autograd.layer, algorithm=algorithm), problem)
        for algorithm in (CLUSTER, 1)
    )
    for name, exact in run(oracle_layer, problem.to(torch.float64)).items():
        if exact.numel():
            errors = [float((x[name] - exact).abs().max()) for x in (ours, stepwise)]
            assert errors[0] <= 2 * errors[1] + 1e-6, name
            assert errors[1] < 1e-2 * max(1.0, float(exact.abs().max())), name


@pytest.mark.parametrize("cell", CELLS)
def test_results_are_bit_equal_under_every_schedule(cell, layer):
    problem = make_problem(
        cell, torch.bfloat16, (4, 11, 64), product=True, control=True, rows="packed"
    )
    for size in (1, 2, 4):
        team(size)
        build.seed(0)
        first = run(layer, problem)
        for seed in range(1, 4):
            build.seed(seed)
            for name, x in run(layer, problem).items():
                assert torch.equal(x, first[name]), f"{name}, {size} blocks, seed {seed}"


def test_an_input_made_in_chunks_is_a_launch_each(layer):
    """8,192 rows at a time, here of 4,100: the states are carried from launch to launch."""
    team(1)
    case = {"cell": "gru", "shape": (3, 4100, 3), "product": True, "reverse": True}
    check(layer, make_problem(dtype=torch.bfloat16, **case))


def asked(problem, ops, *, algorithm=CLUSTER, tf32=False):
    arguments = problem.op_arguments(tf32=tf32)
    arguments[-2] = algorithm
    return ops.layer(*arguments)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dtype": torch.float64}, "does not compute in fp64"),
        ({"dtype": torch.float32}, "TF32 is not allowed"),
        ({"cell": "lstm", "P": 5}, "no projection"),
        ({"shape": (3, 2, 1024)}, "does not fit"),
    ],
    ids=str,
)
def test_what_it_cannot_run_is_refused_with_the_plans_reason(changed, words, emulated):
    given = {"cell": "gru", "dtype": torch.bfloat16, "shape": (3, 2, 24)} | changed
    with pytest.raises(RuntimeError, match=f"'cluster' cannot run this: .*{words}"):
        asked(make_problem(**given), emulated)


def test_the_grid_is_not_built_yet(emulated):
    problem = make_problem("gru", torch.bfloat16, (3, 2, 24))
    with pytest.raises(RuntimeError, match="'grid' cannot run this: it is not built yet"):
        asked(problem, emulated, algorithm=3)
