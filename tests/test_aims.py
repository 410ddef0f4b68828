"""The table of what the CPU's loops are to reach: what is measured, and what it says."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_rnn.bench import rows, timing
from fused_rnn.bench.measure import Bench
from fused_rnn.bench.providers import find
from fused_rnn.bench.rows import Writer
from fused_rnn.bench.workloads import square

HOUSE = Path(__file__).resolve().parents[1]
sys.path.append(str(HOUSE / "benchmarks"))

import aims  # noqa: E402
from test_benchmarks import ORIGIN, ROW  # noqa: E402


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_S", 0.0)
    monkeypatch.setattr(timing, "peak_memory", lambda call, repeats=3: (call(), 3 << 20)[1])
    monkeypatch.setattr(timing, "COPY_BYTES", (1 << 16, 1 << 16))
    monkeypatch.setattr(aims, "SMALL", [(4, 2, 3), (4, 3, 3)])
    monkeypatch.setattr(aims, "LARGE", [(3, 16, 256)])
    short = lambda cell, H, N, T: square(cell, min(H, 8), min(N, 3), min(T, 6))  # noqa: E731
    monkeypatch.setattr(aims, "square", short)


def row(cell, kind, shape, ratio, **more):
    T, N, H = shape
    values = {"cell": cell, "kind": kind, "shape": f"T{T} N{N} I{H} H{H} L1 D1", "ratio": ratio}
    return replace(ROW, **values, provider=aims.OURS, threads=1, task="", **more)


def by_name(found):
    return {aim.name: aim for aim in found}


def test_an_aim_is_met_at_its_bound():
    least, most = aims.Aim("a", 2.0, False, 2.0), aims.Aim("b", 2.0, True, 2.0)
    assert least.met
    assert most.met
    assert not replace(least, reached=1.99).met
    assert not replace(most, reached=2.01).met
    assert replace(least, reached=None).met is None
    assert least.cells == ("a", "≥ 2", "2.00", "yes", "")
    assert replace(most, reached=2.01, of="x", note="y").cells[1:] == ("≤ 2", "2.01", "no", "x; y")
    assert replace(least, reached=None).cells[2:4] == ("", "not judged")


@pytest.fixture
def _as_they_are(monkeypatch):
    monkeypatch.setattr(aims, "square", square)


@pytest.mark.usefixtures("_as_they_are")
def test_ratios_are_a_mean_of_all_small_shapes_and_each_large_one():
    found = [row("gru", "train", shape, 2.0 * 4**k) for k, shape in enumerate(aims.SMALL)]
    found += [row("gru", "train", shape, 1.3) for shape in aims.LARGE]
    told = by_name(aims.ratio_aims(found))
    assert told["gru train, T128, mean"].reached == pytest.approx(4.0)
    assert told["gru train, T128, mean"].met is False
    assert told["gru train, 3:16:256"].reached == 1.3
    assert told["gru train, 3:16:256"].met is False
    assert told["lstm train, T128, mean"].reached is None  # no row of it
    assert told["lstm forward, 3:16:256"].reached is None
    assert told["lstm forward, 3:16:256"].note == "not measured"
    assert len(told) == len(aims.RATIOS) * (1 + len(aims.LARGE)) + 2
    alone = by_name(aims.ratio_aims(found[1:]))
    assert alone["gru train, T128, mean"].reached is None  # a mean of some would be another mean
    other = replace(found[-1], shape=found[-1].shape.replace("L1", "L3"))
    assert by_name(aims.ratio_aims([other]))["gru train, 3:16:256"].reached is None


@pytest.mark.usefixtures("_as_they_are")
def test_the_share_of_the_product_is_the_lowest_of_all_that_are_large_enough():
    shares = {"gru": 0.5, "rnn_tanh": 0.9, "lstm": 0.7}
    found = [
        row(cell, "train", aims.LARGE[0], 1.0, gflops=100 * share, calibration_gflops=100.0)
        for cell, share in shares.items()
    ]
    told = by_name(aims.ratio_aims(found))
    assert told["training, large: share of sgemm"].reached == pytest.approx(0.5)
    assert "lstm 16×256 0.70" in told["training, large: share of sgemm"].of
    some = by_name(aims.ratio_aims(found[:2]))
    assert some["training, large: share of sgemm"].reached is None  # the worst may be the third


def test_what_auto_ran_on_our_loops_is_not_measured_again():
    points = aims.ratio_points()
    assert len(points) == 2 * 3 * len(aims.SMALL + aims.LARGE)
    found = [row("gru", "train", aims.SMALL[0], 2.0)]
    assert len(aims.missing(points, found)) == len(points) - 1
    auto = replace(found[0], provider="fused_rnn", backend="cpu")
    assert len(aims.missing(points, [auto])) == len(points) - 1
    for other in (
        replace(auto, backend="torch.nn"),
        replace(auto, threads=2),
        replace(auto, dtype="bfloat16"),
        replace(auto, task="ragged"),
        replace(auto, ratio=None),
        replace(auto, kind="forward", shape="T4 N2 I3 H4 L1 D1"),
    ):
        assert aims.missing(points, [other]) == points


@pytest.mark.usefixtures("_as_they_are")
def test_points_become_rows_become_aims():
    bench = Bench([find(aims.OURS), find("torch")])
    found = [r for point in aims.ratio_points() for r in bench.rows(point, 0.0, 1)]
    assert {r.status for r in found} == {"ok"}
    told = [*aims.ratio_aims(found)]
    assert len(told) == len(aims.RATIOS) * (1 + len(aims.LARGE)) + 2
    assert all(aim.reached for aim in told if "T128, mean" in aim.name or "large" in aim.name)


def test_our_own_calls_are_compared(monkeypatch):
    monkeypatch.setattr(timing, "calibration", lambda: lambda: None)
    found = [*aims.own_aims(0.0)]
    assert len(found) == 8
    judged = [aim for aim in found if "threads" not in aim.name]
    assert all(aim.reached is not None for aim in judged)
    # At these sizes the slope is one of noise about 0: its sum is tested below.
    assert all(aim.reached > 0 for aim in judged if "slope" not in aim.name)
    told = by_name(found)
    assert told["training in half types, 512:16:256: memory over float32's"].reached == 1.0
    half = told["training in half types, 128:16:256: time over float32's"]
    assert half.of.count(",") + 1 == 2 * len(aims.CELL_NAMES)
    assert "a step takes gru" in told["training 16:64, slope of time from T 128 to 4096"].note


@pytest.mark.parametrize(("cost", "slope"), [(1.0, 1.0), (2.0, 1.2), (0.5, 0.8), (1 / 32, 0.0)])
def test_the_slope_is_that_of_one_long_call_beside_many_short_ones(monkeypatch, cost, slope):
    """``cost`` is the long call's time over that of as many steps in short ones."""
    steps = []

    def steps_of(turn):
        steps.clear()
        turn.call()
        return [*steps]

    def quotient(over, under, seconds):
        (long,), short = steps_of(over), steps_of(under)
        assert len(short) > 1
        assert sum(short) == long == 4096
        return cost

    def case(w):
        return SimpleNamespace(train=lambda: steps.append(w.T))

    monkeypatch.setattr(aims, "case", case)
    monkeypatch.setattr(aims, "square", square)
    monkeypatch.setattr(aims, "quotient", quotient)
    (aim,) = aims.slope_aims(0.0)
    assert aim.reached == pytest.approx(slope)
    assert aim.met == (slope <= 1.05)


def test_threads_are_judged_beside_a_product_that_gains(monkeypatch):
    """With no gain of the product there is nothing to say of the calls."""
    times = {"call 1": [2.0], "call 2": [1.0], "sgemm 1": [1.0], "sgemm 2": [1.0]}
    monkeypatch.setattr(timing, "interleave", lambda turns, seconds: {k: times[k] for k in turns})
    unjudged = [*aims.thread_aims(0.0)]
    assert [aim.reached for aim in unjudged] == [None, None]
    assert "not judged: gru 16×256, gru 64×256" in unjudged[0].note
    times["sgemm 2"] = [1 / aims.SPEEDUP]
    assert [aim.reached for aim in aims.thread_aims(0.0)] == [2.0, 2.0]


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_bytes_on_paper_hold_what_the_op_keeps(cell):
    """What autograd holds of a call so long that this is nearly all, and the output."""
    w = square(cell, 16, 32, 4096)
    case = aims.case(w)
    held = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: held.setdefault(x.data_ptr(), x), lambda x: x
    ):
        case.module(case.data)
    for parameter in case.leaves.values():
        held.pop(parameter.data_ptr(), None)
    found = sum(x.numel() * x.element_size() for x in held.values())
    assert found < aims.bytes_on_paper(w) < 1.02 * found


def test_rows_of_all_workloads_are_read_from_the_device_s_folder(tmp_path):
    assert aims.kept(tmp_path, ORIGIN)[0] == []
    assert [aim.met for aim in aims.workload_aims(*aims.kept(tmp_path, ORIGIN))] == [None, None]
    ours = [row("gru", "train", (4, 2, 3), ratio) for ratio in (2.0, 8.0)]
    ours += [row("gru", "forward", (4, 2, 3), 0.9)]
    with Writer(tmp_path / "workloads-cpu.csv", ORIGIN) as writer:
        for k, r in enumerate(ours):
            writer.write(replace(r, workload=f"w{k}"))
            writer.write(replace(r, workload=f"w{k}", provider="torch", ratio=1.0))
    nothing, why = aims.kept(tmp_path, replace(ORIGIN, cpu="another"))
    assert nothing == []
    assert "of another cpu" in why
    lowest, mean = aims.workload_aims(*aims.kept(tmp_path, ORIGIN))
    assert lowest.reached == 0.9
    assert not lowest.met
    assert ORIGIN.commit in lowest.note
    assert mean.reached == pytest.approx(4.0)
    assert mean.met


def test_a_table_comes_back_from_its_file(tmp_path):
    found = [aims.Aim("a", 2.0, False, None, "of", "note"), aims.Aim("b", 1.5, True, 1.25)]
    with Writer(tmp_path / "x.csv", ORIGIN, aims.Aim) as writer:
        for aim in found:
            writer.write(aim)
    assert [aims.Aim.parse(line) for line in rows.lines(tmp_path / "x.csv")] == found
