"""The cluster algorithm, forward and backward: from the kernels' own source on the emulator, and
where there is a GPU of sm_90 and the library, on that."""

import numerics
import pytest
import torch
from directions import make_directions
from emulator import build
from layers import check, make_problem
from numerics import cases
from persistent import (
    EVERY,
    asked,
    check_both,
    check_schedules,
    check_tf32,
    is_emulated,
    layer_by,
)

from fused_rnn import autograd
from fused_rnn.cells import CELLS
from fused_rnn.plan import ALGORITHMS


@pytest.fixture(params=["emulator", "gpu"])
def layer(request, monkeypatch):
    return layer_by("cluster", request.param, (9, 0), monkeypatch)


def team(size, active=None):
    """An emulated GPU that has clusters of this size alone, and room for so many at a time."""
    build.clusters(*((active or n) * (2**i == size) for i, n in enumerate(EVERY)))


# A block alone with all units, one or two blocks of 8 units a warp; several blocks, odd sizes, a
# last block with fewer units; more rows than a tile has, and than one. With room for one cluster,
# a tile of 16 rows pays where there are as many.
# Of 40 and 72 units outputs are written in pieces of 16 bytes, of the others one by one.
SIZES = ((1, 20), (1, 72), (1, 124), (2, 33), (2, 40), (4, 70), (4, 100), (8, 125))


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


@cases(cell=CELLS, dtype=(torch.bfloat16, torch.float16), control=(False, True))
def test_a_share_of_each_state_stays(case, layer):
    team(2)
    check(layer, make_problem(shape=(3, 3, 33), share=True, **case))


# Sixteen blocks; four to ten tiles of units a warp in the backward, their weights in registers and
# in shared memory; and with tiles of 16 rows.
LARGE = {
    "sixteen": ("gru", 16, (2, 1, 250), None),
    "four": ("lstm", 4, (2, 3, 270), None),
    "wide": ("rnn_tanh", 4, (2, 11, 260), 1),
    "six": ("rnn_relu", 8, (2, 2, 530), None),
    "eight": ("rnn_tanh", 16, (2, 2, 780), None),
    "ten": ("rnn_relu", 16, (2, 1, 1030), None),
}


@pytest.mark.parametrize("name", LARGE if numerics.FULL else ["sixteen", "six", "ten"])
def test_many_units(name, layer):
    cell, size, shape, active = LARGE[name]
    team(size, active)
    build.cluster_launches()
    check(layer, make_problem(cell, torch.bfloat16, shape, product=True, control=True))
    if is_emulated():
        assert build.cluster_launches() == 2  # forward and backward


# Several tiles of 8 rows; one of 16 in each direction, one cluster after the other; a block alone.
BOTH = {
    "tiles": ("lstm", torch.bfloat16, 2, (2, 9, 33), None),
    "wide": ("gru", torch.float16, 2, (2, 11, 33), 1),
    "alone": ("rnn_relu", torch.bfloat16, 1, (3, 2, 72), None),
    "sixteen": ("lstm", torch.bfloat16, 16, (2, 1, 250), None),
}


@pytest.mark.parametrize("name", BOTH if numerics.FULL else ["tiles", "wide"])
def test_both_directions_are_one_launch(name, layer):
    cell, dtype, size, shape, active = BOTH[name]
    team(size, active)
    options = {"product": True, "control": True, "h_mask": True, "keep": True}
    check_both("cluster", *make_directions(cell, dtype, shape, **options), build.cluster_launches)


def test_both_directions_of_packed_input_in_chunks(layer):
    team(2)
    pair = make_directions("gru", torch.bfloat16, (4, 11, 33), product=True, rows="packed")
    check_both("cluster", *pair, build.cluster_launches)


def test_a_backward_that_does_not_fit_is_stepwise(layer):
    """Eight blocks deal 61 units in eights; in sixteens there are not enough."""
    team(8)
    build.cluster_launches()
    check(layer, make_problem("gru", torch.bfloat16, (3, 3, 61)))
    if is_emulated():
        assert build.cluster_launches() == 1


@pytest.fixture
def emulated(layer):
    """The ops on the emulator."""
    if not is_emulated():
        pytest.skip("the GPU's turn is in the other test")
    return autograd.ops


@pytest.mark.parametrize(("size", "H"), SIZES if numerics.FULL else SIZES[1::3])
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_is_as_far_from_float64_as_stepwise(cell, size, H, emulated, monkeypatch):
    team(size)
    # A ReLU's derivative flips with rounding: its problems in a half type are exact integers.
    drawn = torch.bfloat16 if cell == "rnn_relu" else torch.float32
    # Units come in granules of half the size, and weights take twice the room.
    shape = (4, 9, (H + 1) // 2)
    problem = make_problem(cell, drawn, shape, product=True, control=True).to(torch.float32)
    check_tf32("cluster", problem, monkeypatch)


@pytest.mark.parametrize("H", [25, 40])
@pytest.mark.parametrize("cell", CELLS)
def test_what_no_backward_needs_is_not_written(cell, H, emulated):
    """A forward alone has nothing else to write, and the same h."""
    team(2)
    problem = make_problem(
        cell, torch.bfloat16, (3, 11, H), product=True, control=True, rows="packed"
    )
    arguments = problem.op_arguments(save=False)
    arguments[-2] = ALGORITHMS.index("cluster") + 1
    h, c, h_n, c_n, saved = emulated.layer(*arguments)
    assert c.numel() == saved.numel() == 0
    kept = asked(problem, emulated, "cluster")
    assert torch.equal(h, kept[0])
    assert torch.equal(h_n, kept[2])
    assert torch.equal(c_n, kept[3])


@pytest.mark.parametrize("cell", CELLS)
def test_results_are_bit_equal_under_every_schedule(cell, layer):
    problem = make_problem(
        cell, torch.bfloat16, (4, 11, 64), product=True, control=True, rows="packed"
    )
    for size in (1, 2, 4):
        team(size)
        check_schedules(layer, problem)


def test_an_input_made_in_chunks_is_a_launch_each(layer):
    """8,192 rows at a time, here of 4,100: the states are carried from launch to launch."""
    team(1)
    case = {"cell": "gru", "shape": (3, 4100, 3), "product": True, "reverse": True}
    check(layer, make_problem(dtype=torch.bfloat16, **case))


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
        asked(make_problem(**given), emulated, "cluster")
