"""The CUDA plan fits every device, covers every problem, and says why; no GPU is needed."""

import dataclasses
import itertools
import re
from pathlib import Path

import numerics
import pytest
import torch

from fused_rnn.cells import CELLS
from fused_rnn.plan import ALGORITHMS, KNOWN_DEVICES, Device, Plan, plan

pytest.importorskip("fused_rnn._C", reason="needs the native module")

H100 = KNOWN_DEVICES["H100 SXM"]
CLUSTER_SIZES = (1, 2, 4, 8, 16)
# (dtype, tf32): what the product is computed in.
ARITHMETICS = {
    "fp64": (torch.float64, False),
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
}
SIZES = (1, 25, 31, 60, 64, 128, 235, 256, 400, 512, 768, 1024, 1150, 2048, 2560, 4096)
BATCHES = (1, 8, 16, 19, 64, 128, 256, 1024)
BYTES = {"fp64": 8, "fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}


def plan_all(cell: str, arithmetic: str, T: int, N: int, H: int, **options) -> Plan:
    """A plan as if every algorithm had run on a GPU."""
    dtype, tf32 = ARITHMETICS[arithmetic]
    return plan(cell, dtype, T, N, H, tf32=tf32, proven_only=False, **options)


def total_us(p: Plan, T: int = 512) -> float:
    return p.setup_us + T * p.us_per_step


def check_covers(p: Plan, cell: str, arithmetic: str, N: int, H: int, backward: bool) -> None:
    """Every row of the batch and every unit belongs to one CTA of one team, and none is idle."""
    bounds = p.unit_bounds
    assert len(bounds) == p.team + 1
    assert (bounds[0], bounds[-1]) == (0, H)
    owned = [end - begin for begin, end in itertools.pairwise(bounds)]
    assert min(owned) >= 1
    assert max(owned) == p.units
    assert p.rows == CELLS[cell].gates * p.units
    tiles = p.tiles / p.directions
    assert (tiles - 1) * p.batch_tile < N <= tiles * p.batch_tile
    assert p.teams <= p.tiles <= p.teams * p.waves
    assert p.weight_bytes >= p.rows * H * BYTES[arithmetic]
    # Beside weights a CTA has at least its product's input.
    summed = H
    if backward and p.algorithm == "cluster":
        summed = p.rows
    elif backward:
        parts = itertools.pairwise(bounds[:: p.team // p.line])
        summed = CELLS[cell].gates * max(end - begin for begin, end in parts)
    room = p.shared_bytes - p.shared_weight_bytes
    assert room >= p.batch_tile * summed * BYTES[arithmetic]


def check_fits(p: Plan, device: Device) -> None:
    """A CTA has room, and whoever waits for each other is there at the same time."""
    assert p.weight_bytes == p.register_bytes + p.shared_weight_bytes
    assert 32 <= p.threads <= device.threads_per_block
    assert p.registers <= 255
    assert p.threads * p.registers <= min(device.registers_per_block, device.registers_per_sm)
    assert p.register_bytes <= 4 * p.threads * (p.registers - 64)  # 64 to work with
    assert p.shared_weight_bytes < p.shared_bytes <= device.shared_per_block
    assert p.workspace_bytes <= device.l2_bytes
    if p.algorithm == "grid":
        assert device.capability >= 80
        assert p.ctas == p.team * p.teams <= device.sms
        assert p.workspace_bytes > 0
    else:
        assert device.capability >= (90 if p.team > 1 else 80)
        assert p.team in CLUSTER_SIZES
        assert 1 <= p.teams <= active(p, device)
        assert p.ctas == p.team * p.tiles
        assert p.workspace_bytes == 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("device", KNOWN_DEVICES.values(), ids=lambda device: device.name)
def test_every_plan_covers_the_problem_and_fits_the_device(device, cell, backward):
    seen = set()
    for arithmetic, H, N in numerics.combinations(A=ARITHMETICS, H=SIZES, N=BATCHES):
        dtype, tf32 = ARITHMETICS[arithmetic]
        how = {"device": device, "backward": backward}
        best = plan_all(cell, arithmetic, 512, N, H, **how)
        runs = plan(cell, dtype, 512, N, H, tf32=tf32, **how)
        assert (runs.algorithm, runs.tiles, runs.batch_tile) == ("stepwise", 1, N)
        assert (runs.wanted is None) == (best.algorithm == "stepwise")
        plans = {best.algorithm: best}
        for algorithm in ALGORITHMS:
            if algorithm not in best.refusals:
                p = plan_all(cell, arithmetic, 512, N, H, **how, algorithm=algorithm)
                plans[algorithm] = p
        for p in plans.values():
            context = f"{p}\nregisters={p.registers} bounds={p.unit_bounds}"
            if p.algorithm != "stepwise":
                try:
                    check_covers(p, cell, arithmetic, N, H, backward)
                    check_fits(p, device)
                except AssertionError as error:
                    raise AssertionError(f"{error}\n{context}") from error
            # Within 10 % the simpler launch wins.
            assert 0.9 * total_us(best) <= total_us(p)
            assert p.limit == max(p.costs, key=lambda cost: cost[1])[0], context
        assert "stepwise" in plans
        seen |= {(name, arithmetic) for name in plans}
    if device.capability < 80:
        assert seen == {("stepwise", arithmetic) for arithmetic in ARITHMETICS}
    else:
        cluster = {("cluster", arithmetic) for arithmetic in ("tf32", "bf16", "fp16")}
        grid = {("grid", arithmetic) for arithmetic in ("fp32", "tf32", "bf16", "fp16")}
        assert seen == cluster | grid | {("stepwise", arithmetic) for arithmetic in ARITHMETICS}


@pytest.mark.parametrize(
    ("H", "kb", "in_registers", "warps"), [(256, 32, 32, 8), (512, 128, 128, 8), (768, 288, 108, 6)]
)
def test_a_cluster_of_16_holds_an_lstm_of_the_design_sizes(H, kb, in_registers, warps):
    only_16 = dataclasses.replace(H100, clusters=(0, 0, 0, 0, 7))
    p = plan_all("lstm", "bf16", 512, 8, H, device=only_16, algorithm="cluster")
    assert (p.team, p.units, p.rows) == (16, H // 16, H // 4)
    assert p.weight_bytes == 8 * H * H // 16 == kb * 1024
    assert p.register_bytes == in_registers * 1024
    assert p.threads == 32 * warps
    assert p.registers == 106 + in_registers * 1024 // (4 * p.threads)
    assert p.shared_weight_bytes == (kb - in_registers) * 1024


@pytest.mark.parametrize(
    ("backward", "parts"),
    [
        # h of two steps, its rows 16 bytes apart; one of two sums over K; h, c, gates; mbarriers.
        (False, [2 * 8 * (512 * 2 + 16), 128 * 8 * 4, 6 * 8 * 32 * 2, 2 * 8]),
        # Own gate gradients of two steps, rows 16 bytes apart; sums of 16 CTAs for two; mbarriers.
        (True, [2 * 8 * (128 * 2 + 16), 2 * 16 * 8 * 32 * 4, 2 * 8]),
    ],
    ids=["forward", "backward"],
)
def test_shared_memory_holds_what_a_step_needs(backward, parts):
    only_16 = dataclasses.replace(H100, clusters=(0, 0, 0, 0, 7))
    p = plan_all(
        "lstm", "bf16", 512, 8, 512, device=only_16, algorithm="cluster", backward=backward
    )
    assert (p.batch_tile, p.units, p.shared_weight_bytes) == (8, 32, 0)
    assert p.shared_bytes == sum(parts)


@pytest.mark.parametrize(("H", "staged"), [(768, 5), (761, 1), (832, 1)])
def test_outputs_are_staged_where_weights_leave_room_and_rows_are_whole_pieces(H, staged):
    """A GRU's h and gates, of warps that own 16 units; only what is sent needs its place."""
    only_16 = dataclasses.replace(H100, clusters=(0, 0, 0, 0, 7))
    p = plan_all("gru", "bf16", 512, 8, H, device=only_16, algorithm="cluster")
    operand = 2 * 8 * (-(-H // 32) * 64 + 16)
    groups = -(-p.units // 16)
    room = p.shared_bytes - p.shared_weight_bytes - operand - 2 * 8
    sums = (p.k_split - 1) * groups * 3 * 4 * 32 * 4
    assert room - sums == staged * groups * 8 * 16 * 2


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", SIZES)
def test_without_clusters_of_16_smaller_ones_or_none(cell, H):
    no_16 = dataclasses.replace(H100, clusters=(132, 66, 30, 15, 0))
    p = plan_all(cell, "bf16", 512, 8, H, device=no_16)
    assert p.algorithm != "cluster" or p.team <= 8
    if "cluster" not in p.refusals:
        assert plan_all(cell, "bf16", 512, 8, H, device=no_16, algorithm="cluster").team <= 8
    if cell == "lstm" and H == 768:
        assert "8 CTAs each hold 576 KB" in p.refusals["cluster"]


@pytest.mark.parametrize(
    ("cell", "H", "backward"),
    [
        ("lstm", 2048, False),
        ("lstm", 2048, True),
        ("gru", 2560, False),
        ("gru", 2560, True),
        ("rnn_tanh", 4096, False),
        ("rnn_tanh", 4096, True),
    ],
)
def test_the_grid_reaches_what_no_cluster_holds(cell, H, backward):
    p = plan_all(cell, "bf16", 512, 8, H, device=H100, backward=backward)
    assert p.algorithm == "grid"
    assert p.teams == 1
    assert p.shared_weight_bytes > 0
    assert p.overlaid == (H == 2560)
    assert (p.line > 1) == backward
    assert "does not fit" in p.refusals["cluster"]


def test_beyond_the_chip_there_is_stepwise():
    p = plan_all("lstm", "bf16", 512, 8, 4096, device=H100)
    assert p.algorithm == "stepwise"
    assert set(p.refusals) == {"cluster", "grid"}
    assert all("does not fit" in reason for reason in p.refusals.values())
    assert p.limit == "131072 KB of weights read from DRAM"


@pytest.mark.parametrize(
    ("cell", "dtype", "options", "words"),
    [
        ("lstm", torch.float64, {}, "fp64"),
        ("lstm", torch.bfloat16, {"P": 32}, "proj_size"),
        ("gru", torch.bfloat16, {"device": KNOWN_DEVICES["T4"]}, "sm_80"),
        ("gru", torch.bfloat16, {"T": 0}, "no step"),
        ("gru", torch.bfloat16, {"N": 0}, "no step"),
    ],
)
def test_what_persistent_kernels_lack_runs_stepwise(cell, dtype, options, words):
    arguments = {"T": 512, "N": 8, "H": 64, "device": H100, "proven_only": False} | options
    p = plan(cell, dtype, **arguments)
    assert p.algorithm == "stepwise"
    for algorithm in ("cluster", "grid"):
        assert words in p.refusals[algorithm]
        with pytest.raises(RuntimeError, match=f"'{algorithm}' cannot run this: .*{words}"):
            plan(cell, dtype, **arguments, algorithm=algorithm)


def test_exact_fp32_needs_the_grid_and_tf32_may_use_clusters():
    exact = plan_all("lstm", "fp32", 512, 8, 256, device=H100)
    assert "TF32 is not allowed" in exact.refusals["cluster"]
    assert "grid" not in exact.refusals
    assert plan_all("lstm", "tf32", 512, 8, 256, device=H100).refusals == {}


def test_one_step_does_not_pay_for_loading_the_weights_onto_the_chip():
    assert plan_all("lstm", "bf16", 1, 8, 2048, device=H100).algorithm == "stepwise"
    assert plan_all("lstm", "bf16", 8, 8, 2048, device=H100).algorithm == "grid"


def test_the_simpler_launch_wins_a_tie():
    cluster = plan_all("gru", "bf16", 512, 8, 576, device=H100)
    grid = plan_all("gru", "bf16", 512, 8, 576, device=H100, algorithm="grid")
    assert 0.9 * total_us(cluster) < total_us(grid) < total_us(cluster)
    assert cluster.algorithm == "cluster"
    assert "as fast as grid" in cluster.why


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("algorithm", "H"), [("cluster", 512), ("grid", 1024)])
def test_what_has_not_run_on_a_gpu_runs_only_by_name(algorithm, H, backward):
    problem = {"T": 512, "N": 8, "H": H, "device": H100, "backward": backward}
    p = plan("lstm", torch.bfloat16, **problem)
    assert (p.algorithm, p.proven) == ("stepwise", True)
    assert (p.wanted.algorithm, p.wanted.proven) == (algorithm, False)
    assert p.wanted.us_per_step < p.us_per_step
    assert f"{algorithm} is predicted to be faster" in p.why
    assert "has not run on a GPU yet: ask for it by name" in p.why
    asked = plan("lstm", torch.bfloat16, **problem, algorithm=algorithm)
    assert (asked.algorithm, asked.team, asked.why) == (algorithm, p.wanted.team, "asked for")


def test_stepwise_can_be_asked_for():
    p = plan_all("lstm", "bf16", 512, 8, 512, device=H100, algorithm="stepwise")
    assert (p.algorithm, p.why, p.wanted) == ("stepwise", "asked for", None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"algorithm": "fast"}, "unknown algorithm 'fast'"),
        ({"cell": "lstn"}, "unknown cell 'lstn'"),
        ({"dtype": torch.int64}, "dtype is int64"),
        ({"H": 0}, "H must be"),
        ({"H": 2**25}, "H must be"),
        ({"N": -1}, "must not be negative"),
        ({"P": 64}, "P must be"),
        ({"directions": 3}, "one direction or two"),
        ({"cell": "gru", "P": 32}, "only the LSTM"),
        ({"device": dataclasses.replace(H100, capability=70)}, "sm_75"),
        ({"device": dataclasses.replace(H100, sms=0)}, "at least one SM"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(changed, words):
    arguments = {"cell": "lstm", "dtype": torch.bfloat16, "T": 512, "N": 8, "H": 64, "device": H100}
    with pytest.raises(ValueError, match=words):
        plan(**arguments | changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"registers_per_block": 8192}, "255 registers"),
        ({"threads_per_block": 128}, "255 registers"),
        ({"shared_per_block": 4096}, "does not fit"),
        ({"clusters": (0, 0, 0, 0, 0)}, "no cluster fits the device"),
    ],
    ids=str,
)
def test_a_device_without_room_gets_no_persistent_plan(changed, words):
    device = dataclasses.replace(H100, **changed)
    assert words in plan_all("lstm", "bf16", 512, 8, 512, device=device).refusals["cluster"]


def test_no_cta_of_a_cluster_is_without_a_unit():
    only_16 = dataclasses.replace(H100, clusters=(0, 0, 0, 0, 7))
    words = plan_all("lstm", "bf16", 512, 8, 120, device=only_16).refusals["cluster"]
    assert "no cluster fits the device and has a unit for each of its CTAs" in words
    p = plan_all("lstm", "bf16", 512, 8, 121, device=only_16, algorithm="cluster")
    assert (p.team, p.units, p.unit_bounds[-2:]) == (16, 8, (120, 121))


def test_before_sm_90_a_cluster_is_one_cta():
    device = dataclasses.replace(H100, capability=80)
    assert plan_all("lstm", "bf16", 512, 8, 128, device=device, algorithm="cluster").team == 1
    assert "1 CTA holds" in plan_all("lstm", "bf16", 512, 8, 512, device=device).refusals["cluster"]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("algorithm", ["cluster", "grid"])
@pytest.mark.parametrize("device", KNOWN_DEVICES.values(), ids=lambda device: device.name)
def test_both_directions_cover_and_fit_too(device, algorithm, backward):
    launches = set()
    for cell, arithmetic in (("lstm", "bf16"), ("gru", "tf32"), ("lstm", "fp32")):
        for H, N in itertools.product(SIZES, (1, 19, 128)):
            how = {"device": device, "backward": backward}
            best = plan_all(cell, arithmetic, 512, N, H, **how, directions=2)
            assert (best.directions == 1) or best.algorithm != "stepwise"
            if algorithm in best.refusals:
                continue
            one, two = (
                plan_all(cell, arithmetic, 512, N, H, **how, algorithm=algorithm, directions=d)
                for d in (1, 2)
            )
            check_covers(two, cell, arithmetic, N, H, backward)
            check_fits(two, device)
            assert total_us(two) <= 2.0001 * total_us(one)
            launches.add(two.directions)
            if algorithm == "cluster" and 2 * one.tiles <= active(one, device):
                assert two.us_per_step == one.us_per_step
    if device.capability >= 80:
        assert launches == ({2} if algorithm == "cluster" else {1, 2})


def active(p: Plan, device: Device) -> int:
    return device.clusters[CLUSTER_SIZES.index(p.team)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("algorithm", ["cluster", "grid"])
def test_there_are_no_kernels_for_fewer_registers(algorithm, backward):
    device = dataclasses.replace(H100, registers_per_block=32768)
    how = {"device": device, "algorithm": algorithm, "backward": backward}
    with pytest.raises(RuntimeError, match="255 registers"):
        plan_all("lstm", "bf16", 512, 8, 512, **how)


@pytest.mark.parametrize("N", [8, 16])
def test_a_backward_is_refused_for_the_cut_that_is_nearest(N):
    """There is no kernel for 16 rows and 640 units; that is not what is wrong."""
    words = plan_all("lstm", "tf32", 512, N, 640, device=H100, backward=True).refusals["cluster"]
    assert "of shared memory" in words


@pytest.mark.parametrize(
    ("cell", "arithmetic", "most"),
    [
        ("rnn_tanh", "bf16", 1280),
        ("rnn_relu", "fp16", 1280),
        ("rnn_tanh", "tf32", 1024),
        ("gru", "bf16", 768),
        ("lstm", "bf16", 768),
    ],
)
def test_the_most_units_of_a_backward(cell, arithmetic, most):
    how = {"device": H100, "backward": True}
    p = plan_all(cell, arithmetic, 512, 8, most, **how, algorithm="cluster")
    assert (p.team, p.threads) == (16, 256)
    check_fits(p, H100)
    words = plan_all(cell, arithmetic, 512, 8, most + 1, **how).refusals["cluster"]
    assert f"{most + 1} units are more than its warps take back" in words


def test_warps_that_multiply_nothing_have_no_weights():
    """Four warps multiply 128 units, eight own them."""
    device = KNOWN_DEVICES["RTX 4090"]
    p = plan_all("lstm", "bf16", 512, 8, 128, device=device, algorithm="cluster", backward=True)
    assert (p.threads, p.weight_bytes) == (256, 128 * 1024)


def test_no_more_units_than_the_warps_take():
    one = dataclasses.replace(H100, clusters=(132, 0, 0, 0, 0))
    p = plan_all("rnn_tanh", "bf16", 512, 8, 128, device=one, algorithm="cluster")
    assert (p.team, p.units, p.threads) == (1, 128, 256)
    words = plan_all("rnn_tanh", "bf16", 512, 8, 129, device=one).refusals["cluster"]
    assert "its 129 units are more than its warps take" in words


# µs a step, LSTM forward in bf16: latencies and bandwidths of an H100, added up by hand.
@pytest.mark.parametrize(
    ("H", "team", "N", "floor"),
    [
        (256, 8, 2, 0.37),
        (256, 8, 8, 0.48),
        (256, 8, 16, 0.72),
        (512, 16, 2, 0.52),
        (512, 16, 8, 0.74),
        (512, 16, 16, 1.25),
    ],
)
def test_the_cost_of_a_cluster_is_near_its_floor(H, team, N, floor):
    only_one = dataclasses.replace(
        H100, clusters=tuple(int(size == team) for size in CLUSTER_SIZES)
    )
    p = plan_all("lstm", "bf16", 512, N, H, device=only_one, algorithm="cluster")
    assert p.waves == 1
    assert p.us_per_step == pytest.approx(floor, rel=0.15)


@pytest.mark.parametrize(("H", "floor"), [(256, 0.55), (512, 0.7), (1024, 1.1)])
def test_the_cost_of_the_grid_is_near_its_floor(H, floor):
    p = plan_all("lstm", "bf16", 512, 8, H, device=H100, algorithm="grid")
    assert p.us_per_step == pytest.approx(floor, rel=0.2)


def test_more_rows_than_clusters_run_in_waves():
    only_16 = dataclasses.replace(H100, clusters=(0, 0, 0, 0, 7))
    p = plan_all("lstm", "bf16", 512, 64, 512, device=only_16, algorithm="cluster")
    assert (p.batch_tile, p.tiles, p.teams, p.waves) == (16, 4, 4, 1)
    p = plan_all("lstm", "bf16", 512, 1024, 512, device=only_16, algorithm="cluster")
    assert p.waves > 1
    assert p.ctas == 16 * p.tiles


def test_the_explanation_names_algorithm_limit_and_reason():
    p = plan("lstm", torch.bfloat16, 1024, 16, 512, device=H100)
    text = str(p)
    assert "lstm forward, bf16, T=1024 N=16 H=512, on H100 SXM (sm_90): stepwise" in text
    assert "cluster is predicted to be faster" in text
    assert "but has not run on a GPU yet" in text
    assert "limit     2 kernels a step" in text
    assert f"by name   cluster, predicted {p.wanted.us_per_step:.2f} µs a step" in text
    assert "2 clusters of 16 CTAs, each with 8 rows" in text
    assert "128 rows of W_hh: 128 KB in registers, 0 KB in shared memory" in text


def test_the_explanation_says_why_an_algorithm_is_out():
    text = str(plan("lstm", torch.bfloat16, 1024, 16, 1024, device=H100, backward=True))
    assert "lstm backward" in text
    assert "cluster   it does not fit: 1024 units are more than its warps take back" in text
    text = str(plan("lstm", torch.bfloat16, 1024, 16, 1024, device=H100))
    assert "cluster   it does not fit: 16 CTAs each hold 512 KB of W_hh" in text
    text = str(plan("lstm", torch.float64, 1024, 16, 1024, 256, device=H100))
    assert "H=1024 P=256" in text
    assert "nothing else can run this" in text
    assert "limit     3 kernels a step" in text


KERNELS = Path(__file__).parents[1] / "docs" / "kernels"
PAGES = sorted(KERNELS.glob("*_*.md"))


@pytest.mark.parametrize(
    ("page", "directions"), [*itertools.product(PAGES, (1, 2)), (KERNELS / "stepwise.md", 1)]
)
def test_the_kernels_pages_hold_what_the_plan_predicts(page, directions):
    """Rows of a table: | LSTM | 16 | 0.55 (e) | ..., two waves | does not fit |"""
    begin, end = ("## Predicted", "## Known") if directions == 1 else ("## Both", "## Predicted")
    table = page.read_text().rpartition(begin)[2].partition(end)[0]
    rows = re.findall(r"^\| (LSTM|GRU|RNN) \| (\d+) \| (.*) \|$", table, re.MULTILINE)
    assert len(rows) == (5 if directions == 1 else 2)
    for cell, N, columns in rows:
        for H, said in zip((256, 512, 768, 1024), columns.split(" | "), strict=True):
            problem = {"T": 1024, "N": int(N), "H": H, "device": H100}
            algorithm, _, way = page.stem.partition("_")
            problem["backward"] = way == "backward"
            name = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[cell]
            if said == "does not fit":
                refusals = plan(name, torch.bfloat16, **problem, directions=directions).refusals
                assert "does not fit" in refusals[algorithm]
                continue
            one, p = (
                plan(name, torch.bfloat16, **problem, algorithm=algorithm, directions=d)
                for d in (1, directions)
            )
            assert f"{p.us_per_step:.2f}" == said.split()[0], (cell, N, H)
            waves = {1: "", 2: ", two waves", 3: ", three waves", 4: ", four waves"}[p.waves]
            assert said.partition(")")[2] == waves, (cell, N, H)
            if directions == 2:
                ratio = total_us(p, 1024) / total_us(one, 1024)
                assert f"({ratio:.2f})" in said, (cell, N, H)


def test_the_second_direction_takes_the_time_of_the_first_where_there_is_room():
    """Two launches would take twice as long; with one for both, blocks that there are twice."""
    problem = {"T": 1024, "N": 16, "H": 512, "device": H100}
    one, two = (
        plan("lstm", torch.bfloat16, **problem, algorithm="cluster", directions=d) for d in (1, 2)
    )
    assert (two.directions, two.ctas, two.waves) == (2, 2 * one.ctas, 1)
    assert two.ctas <= H100.sms
    assert total_us(two) <= 1.2 * total_us(one)
    assert "both directions in one launch" in str(two)
    assert "both" not in str(one)


def test_stepwise_takes_twice_as_long_for_both_directions():
    problem = {"T": 1024, "N": 16, "H": 512, "device": H100, "algorithm": "stepwise"}
    one, two = (plan("lstm", torch.bfloat16, **problem, directions=d) for d in (1, 2))
    assert two.us_per_step == pytest.approx(2 * one.us_per_step)
    assert two.costs[0] == ("4 kernels a step", pytest.approx(2 * one.costs[0][1]))
