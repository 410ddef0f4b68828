"""The grid algorithm, forward and backward: from the kernels' own source on the emulator, and where
there is a GPU of sm_80 and the library, on that."""

import numerics
import pytest
import torch
from directions import make_directions
from emulator import build
from layers import check, make_problem
from numerics import cases
from persistent import asked, check_both, check_schedules, check_tf32, is_emulated, layer_by

from fused_rnn import autograd
from fused_rnn.cells import CELLS
from fused_rnn.plan import describe, plan


@pytest.fixture(params=["emulator", "gpu"])
def layer(request, monkeypatch):
    return layer_by("grid", request.param, (8, 0), monkeypatch)


def sms(count):
    """An emulated GPU of so many SMs; a real one has its own."""
    if is_emulated():
        build.sms(count)


# SMs and units: fewer units than a granule, a last block with fewer units, a last granule with
# fewer, one to twelve blocks in one group and in several, granules of 4 and of 8.
SIZES = ((2, 1), (2, 16), (5, 33), (3, 45), (12, 70), (8, 100), (11, 125))


@cases(
    cell=CELLS,
    dtype=(torch.bfloat16, torch.float16, torch.float32),
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
)
def test_outputs_and_gradients(case, layer):
    case = dict(case)
    (count, H), N = case.pop("size"), case.pop("N")
    # Exact float32 has half as many values on a multiprocessor.
    sms(count * (2 if case["dtype"] == torch.float32 else 1))
    if is_emulated():
        build.grid_launches()
    check(layer, make_problem(shape=(3, N, H), **case))
    if is_emulated():
        assert build.grid_launches() == 2  # forward and backward


@cases(cell=CELLS, dtype=(torch.bfloat16, torch.float16, torch.float32), control=(False, True))
def test_a_share_of_each_state_stays(case, layer):
    sms(5)
    check(layer, make_problem(shape=(3, 3, 33), share=True, **case))


# Blocks with as many units as kernels are compiled for; 8 or 16 rows of the batch; backward, lines
# whose rows are five tiles. A warp has more of K than the two tiles that registers hold on the
# emulator, each 16 of K: the rest stands in shared memory.
LARGE = {
    "lstm": ("lstm", torch.bfloat16, 19, (2, 9, 300)),
    "gru": ("gru", torch.float16, 14, (2, 9, 280)),
    "rnn_tanh": ("rnn_tanh", torch.bfloat16, 32, (2, 3, 1000)),
    "exact": ("lstm", torch.float32, 33, (2, 3, 264)),
    "lines": ("gru", torch.bfloat16, 24, (2, 3, 480)),
}


@pytest.mark.parametrize("name", LARGE if numerics.FULL else ["lstm", "exact"])
def test_many_units(name, layer):
    cell, dtype, count, shape = LARGE[name]
    assert shape[-1] > 8 * 2 * 16
    sms(count)
    check(layer, make_problem(cell, dtype, shape, product=True, control=True))


# With room for all, both directions are cut up as one is.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_directions_are_one_launch(dtype, layer):
    options = {"product": True, "control": True, "h_mask": True}
    pair = make_directions("gru", dtype, (3, 3, 25), **options)
    check_both("grid", *pair, build.grid_launches)


def test_groups_of_both_directions_take_their_tiles_in_turn(layer):
    if not is_emulated():
        pytest.skip("a GPU has more SMs")
    pair = make_directions("rnn_tanh", torch.bfloat16, (2, 35, 33), product=True, keep=True)
    sms(5)
    check_both("grid", *pair, build.grid_launches, make_room=lambda: sms(10))


# On a GPU, whose SMs are as many as they are: blocks with the most units, and tiles in turn.
ON_A_GPU = (
    ("lstm", torch.bfloat16, (3, 40, 2048)),
    ("gru", torch.float16, (3, 19, 2048)),
    ("rnn_tanh", torch.bfloat16, (3, 8, 4096)),
    ("lstm", torch.float32, (3, 8, 1024)),
)


@pytest.mark.parametrize(("cell", "dtype", "shape"), ON_A_GPU)
def test_what_no_cluster_holds_on_a_gpu(cell, dtype, shape, layer):
    if is_emulated():
        pytest.skip("so many units take the emulator minutes")
    device = describe(0)
    for backward in (False, True):
        plan(cell, dtype, *shape, device=device, backward=backward, algorithm="grid")  # or raises
    check(layer, make_problem(cell, dtype, shape, product=True, control=True))


@pytest.mark.parametrize("T", [1, 2])
def test_a_single_step_and_more_tiles_than_groups(T, layer):
    sms(3)
    check(layer, make_problem("gru", torch.bfloat16, (T, 40, 30), product=True, states=True))


@pytest.fixture
def emulated(layer):
    """The ops on the emulator."""
    if not is_emulated():
        pytest.skip("the GPU's turn is in the other test")
    return autograd.ops


@pytest.mark.parametrize(("count", "H"), SIZES if numerics.FULL else SIZES[2::3])
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_is_as_far_from_float64_as_stepwise(cell, count, H, emulated, monkeypatch):
    sms(2 * count)
    # A ReLU's derivative flips with rounding: its problems in a half type are exact integers.
    drawn = torch.bfloat16 if cell == "rnn_relu" else torch.float32
    problem = make_problem(cell, drawn, (4, 9, H), product=True, control=True).to(torch.float32)
    check_tf32("grid", problem, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cell", CELLS)
def test_results_are_bit_equal_under_every_schedule(cell, dtype, layer):
    problem = make_problem(cell, dtype, (4, 11, 40), product=True, control=True, rows="packed")
    for count in (3, 10):
        sms(2 * count)
        check_schedules(layer, problem)


def test_an_input_made_in_chunks_is_a_launch_each(layer):
    """8,192 rows at a time, here of 4,100; the third step is a launch of its own."""
    sms(4)
    if is_emulated():
        build.grid_launches()
    case = {"cell": "gru", "shape": (3, 4100, 3), "product": True, "reverse": True}
    check(layer, make_problem(dtype=torch.bfloat16, **case))
    if is_emulated():
        assert build.grid_launches() == 3  # of two steps, of one, and the backward


def test_numbers_of_turns_wrap(layer):
    """Those of the half types have 16 bits."""
    sms(2)
    T = 65600 if numerics.FULL or not is_emulated() else 12
    check(layer, make_problem("rnn_tanh", torch.bfloat16, (T, 1, 5)))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dtype": torch.float64}, "does not compute in fp64"),
        ({"cell": "lstm", "P": 5}, "no projection"),
        ({"shape": (3, 2, 4096)}, "does not fit"),
    ],
    ids=str,
)
def test_what_it_cannot_run_is_refused_with_the_plans_reason(changed, words, emulated):
    given = {"cell": "gru", "dtype": torch.bfloat16, "shape": (3, 2, 24)} | changed
    with pytest.raises(RuntimeError, match=f"'grid' cannot run this: .*{words}"):
        asked(make_problem(**given), emulated, "grid")
