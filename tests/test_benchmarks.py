"""The benchmarks' own arithmetic: shapes, statistics, rules, tables. Nothing is timed here."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import char_lm
import report
import results

from fused_rnn.bench import check, timing, workloads
from fused_rnn.bench.rows import Provenance, Row, Writer, read
from fused_rnn.bench.timing import Turn

LOADED = workloads.load()
TODAY = workloads.load(workloads.TODAY)
ORIGIN = Provenance(
    date="2026-01-02T03:04:05+00:00",
    commit="0123456789ab",
    device="Some Processor @ 2.50GHz, 2 cores",
    python="3.11.0",
    torch="2.13.0",
    fused_rnn="0.1.0",
    build="g++ 12, AVX2",
    command="python benchmarks/run.py",
)
ROW = Row(
    workload="lstm-128-16-64",
    cell="lstm",
    shape="T128 N16 I64 H64 L1 D1",
    kind="train",
    dtype="float32",
    threads=1,
    provider="fused_rnn",
    requested="auto",
    backend="cpu",
    algorithm="batch split",
    p20_ms=1.5,
    p50_ms=2.0,
    p80_ms=2.5,
    repeats=9,
    ratio=2.25,
    peak_kib=2048,
    calibration_gflops=100.0,
    calibration_speedup=1.0,
    counts=True,
)


class FakeClock:
    """Time that passes only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: float, log: list[float] | None = None):
        def run() -> None:
            self.now += seconds
            if log is not None:
                log.append(seconds)

        return run


def write(path: Path, *rows: Row) -> Path:
    with Writer(path, ORIGIN) as writer:
        for row in rows:
            writer.write(row)
    return path


def test_every_task_is_a_small_workload():
    assert {w.task for w in TODAY} == set(workloads.TASKS)
    assert workloads.select(TODAY) == (TODAY, {})
    by_task = {w.task: w for w in TODAY}
    assert by_task["ensemble"].models == 16
    assert (by_task["stream"].N, by_task["stream"].H) == (1, 128)
    for w in TODAY:
        if w.task == "episodes":
            assert w.reset == 0.01
            assert int(w.resets().sum()) == round(0.01 * w.T * w.N) > 0


def test_a_task_counts_all_of_its_models_and_plain_all_steps():
    w = replace(check.PLAIN, task="ensemble", models=3)
    for input_gradient in (False, True):
        options = {"input_gradient": input_gradient}
        one = replace(w, task=None, models=1).gflop("train", **options)
        assert w.gflop("train", **options) == pytest.approx(3 * one)
    ragged = replace(w, task="ragged", models=1, lengths="uniform")
    dense = replace(ragged, task=None, lengths=None)
    assert replace(ragged, plain=True).gflop("train") == dense.gflop("train")
    assert ragged.gflop("train") < dense.gflop("train")


@pytest.mark.parametrize("w", LOADED, ids=lambda w: w.name)
def test_workload_file_gives_modules_of_its_shapes(w):
    module = workloads.make_module(nn, replace(w, I=3, H=4))
    assert sum(p.numel() for p in module.parameters()) == w.D * sum(
        workloads.GATES[w.cell] * 4 * ((3 if layer == 0 else 4 * w.D) + 4 + 2)
        for layer in range(w.L)
    )


def test_goal_shapes_are_small_workloads():
    chosen, left_out = workloads.select(LOADED)
    shapes = {(w.cell, w.T, w.N, w.I, w.H, w.mode) for w in chosen}
    for cell in ("rnn_tanh", "lstm", "gru"):
        for T, N, H in ((128, 1, 64), (128, 16, 64), (128, 16, 256)):
            assert (cell, T, N, H, H, "train") in shapes
        assert (cell, 1, 1, 128, 128, "step") in shapes
    assert any(w.lengths == "uniform" and (w.T, w.N, w.H) == (100, 32, 128) for w in chosen)
    assert all("small is" in reason for reason in left_out.values())
    assert len(chosen) + len(left_out) == len(LOADED)


def test_select_by_name_ignores_size_and_all_takes_everything():
    chosen, left_out = workloads.select(LOADED, only=["awd-*", "gru-step"])
    assert [w.name for w in chosen] == ["awd-lstm", "gru-step"]
    assert left_out == {}
    assert workloads.select(LOADED, everything=True) == (LOADED, {})
    with pytest.raises(ValueError, match=r"no workload 'nosuch'.*awd-lstm"):
        workloads.select(LOADED, only=["nosuch"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "elman"}, "unknown cell 'elman'"),
        ({"mode": "fit"}, "unknown mode 'fit'"),
        ({"lengths": "short"}, "unknown lengths 'short'"),
        ({"mode": "step", "T": 2}, "a step is one layer"),
        ({"task": "translate"}, "unknown task 'translate', expected one of .*'ensemble'"),
        ({"task": "stream", "cell": "gru"}, "written for an LSTM"),
    ],
)
def test_wrong_workloads_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(check.PLAIN, **change)


def test_gflop_counts_live_rows_only():
    dense = workloads.Workload("w", "gru", I=10, H=20, T=30, N=4, mode="train")
    assert dense.gflop("forward") == pytest.approx(2e-9 * 30 * 4 * 3 * 20 * (10 + 20))
    input_gradient = 2e-9 * 30 * 4 * 3 * 20 * 10
    assert dense.gflop("train") == pytest.approx(3 * dense.gflop("forward") - input_gradient)
    ragged = replace(dense, lengths="zipf")
    lengths = ragged.sequence_lengths()
    assert lengths.max() == 30
    assert lengths.min() >= 1
    assert ragged.gflop("train") / dense.gflop("train") == pytest.approx(lengths.sum() / 120)


def test_quantiles_of_known_values():
    found = timing.Quantiles.of([float(i) for i in range(10, -1, -1)])
    assert (found.p20, found.p50, found.p80) == (2.0, 5.0, 8.0)
    assert timing.Quantiles.of([3.0]) == timing.Quantiles(3.0, 3.0, 3.0)


def test_ratio_is_the_median_of_pairs():
    # Medians alone would say 3 / 2; a slow minute that hits both of a pair says nothing.
    assert timing.median_ratio([2.0, 30.0, 3.0], [1.0, 15.0, 2.0]) == 2.0


def test_interleave_takes_turns_and_keeps_to_its_budget():
    clock, log = FakeClock(), []
    turns = {"slow": Turn(clock.call(0.2, log)), "fast": Turn(clock.call(0.1, log))}
    samples = timing.interleave(turns, 2.9, clock=clock)
    assert samples["slow"] == pytest.approx([0.2] * 9)
    assert samples["fast"] == pytest.approx([0.1] * 9)
    warm_up, timed = log[:2], log[2:]
    assert warm_up == [0.2, 0.1]
    assert timed == list(itertools.islice(itertools.cycle([0.2, 0.1, 0.1, 0.2]), 18))


def test_interleave_repeats_at_least_and_at_most():
    clock = FakeClock()
    turns = {"call": Turn(clock.call(1.0))}
    assert len(timing.interleave(turns, 0.0, min_repeats=3, clock=clock)["call"]) == 3
    assert len(timing.interleave(turns, 1e9, max_repeats=7, clock=clock)["call"]) == 7


def test_a_stopwatch_times_single_calls_in_turn():
    clock, log = FakeClock(), []
    turns = {"slow": Turn(clock.call(0.2, log)), "fast": Turn(clock.call(0.1, log))}

    def measure(call):
        start = clock()
        call()
        return 10 * (clock() - start)

    samples = timing.interleave(turns, 0.0, min_repeats=3, clock=clock, measure=measure)
    assert samples == {"slow": pytest.approx([2.0] * 3), "fast": pytest.approx([1.0] * 3)}
    assert log == [0.2, 0.1, 0.1, 0.2, 0.2, 0.1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to time")
def test_cuda_stopwatch_and_peak_see_what_a_call_does():
    stopwatch = timing.CudaStopwatch()
    short, long = (
        stopwatch(lambda cycles=cycles: torch.cuda._sleep(cycles)) for cycles in (10**7, 10**8)
    )
    assert 1e-3 < short < long
    assert long == pytest.approx(10 * short, rel=0.3)
    peak = timing.peak_cuda_memory(lambda: torch.ones(16 << 20, dtype=torch.uint8, device="cuda"))
    assert peak == 16 << 20


def test_short_calls_share_a_sample():
    clock, log = FakeClock(), []
    turns = {"call": Turn(clock.call(1e-5, log))}
    samples = timing.interleave(turns, 0.0, min_repeats=2, clock=clock)
    assert samples["call"] == pytest.approx([1e-5] * 2)
    assert len(log) >= 3 * timing.SAMPLE_S / 1e-5


def test_turns_run_on_their_threads_and_put_them_back():
    before, seen = torch.get_num_threads(), []

    def call() -> None:
        seen.append(torch.get_num_threads())
        clock.now += 1.0

    clock = FakeClock()
    turns = {"one": Turn(call, 1), "two": Turn(call, 2)}
    timing.interleave(turns, 0.0, min_repeats=1, clock=clock)
    assert seen == [1, 2, 1, 2]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("threads", "single", "these", "expected"),
    [
        (1, [2.0, 2.0], [2.0, 2.0], True),
        (2, [2.0, 2.0, 2.0], [1.0, 1.5, 9.0], True),
        (2, [2.0, 2.0, 2.0], [1.6, 1.6, 1.0], False),
    ],
)
def test_two_threads_count_only_where_the_calibration_gains(threads, single, these, expected):
    assert timing.counts(threads, single, these) is expected


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only")
def test_peak_memory_sees_what_a_call_frees_again():
    found = timing.peak_memory(lambda: torch.ones(16 << 20, dtype=torch.uint8))
    if found is None:
        pytest.skip("this system does not let a process reset its peak")
    assert found == pytest.approx(16 << 20, rel=0.1)


def test_rule_allows_twice_torchs_error_and_some_ulp():
    oracle = torch.ones(4, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    theirs = torch.full((4,), 1 + 100 * eps)
    assert check.compare("w", torch.full((4,), 1 + 207 * eps), theirs, oracle).ok
    assert not check.compare("w", torch.full((4,), 1 + 210 * eps), theirs, oracle).ok
    assert not check.compare("w", torch.full((4,), torch.nan), theirs, oracle).ok
    with pytest.raises(AssertionError, match=r"torch\.nn gives"):
        check.compare("w", torch.ones(3), theirs, oracle)


@pytest.mark.parametrize("kind", ["forward", "train"])
def test_a_wrong_gradient_or_output_is_found(kind):
    class Wrong(nn.GRU):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output + 1e-4 * output.detach() ** 2, h_n

    w = replace(check.PLAIN, cell="gru")
    cases = workloads.make_cases(w, {"fused_rnn": nn, "torch": nn})
    assert all(c.ok for c in check.compare_cases("same", cases, kind))
    cases["fused_rnn"].module.__class__ = Wrong
    wrong = [c.where for c in check.compare_cases("wrong", cases, kind) if not c.ok]
    assert wrong == ["wrong: output"]


def test_relu_on_integers_is_exact_in_the_half_types():
    for form, dtype in itertools.product(check.FORMS, check.HALF):
        w = replace(form, cell="rnn_relu", P=0)
        cases = workloads.make_cases(w, {"torch": nn}, dtype, with_states=True, integers=True)
        output, oracle = (cases[name].results("forward") for name in ("torch", "oracle"))
        for name, value in output.items():
            assert torch.equal(value.double(), oracle[name]), (w.name, dtype, name)
            assert value.any()


def test_all_forms_of_the_check_compare_every_gradient():
    for form in check.FORMS:
        cases = workloads.make_cases(form, {"fused_rnn": nn, "torch": nn}, with_states=True)
        names = {c.where for c in check.compare_cases("", cases, "train")}
        parameters = {name for name, _ in cases["torch"].module.named_parameters()}
        assert {f": d {name}" for name in parameters | {"input", "h0", "c0"}} <= names


def test_rows_survive_the_file(tmp_path):
    rows = [ROW, replace(ROW, threads=2, counts=False, peak_kib=None)]
    assert read(write(tmp_path / "rows.csv", *rows)) == (rows, ORIGIN)


def test_rows_are_in_the_file_before_it_is_closed(tmp_path):
    with Writer(tmp_path / "rows.csv", ORIGIN) as writer:
        writer.write(ROW)
        assert read(tmp_path / "rows.csv")[0] == [ROW]


def test_a_writer_that_appends_goes_on_behind_whole_lines(tmp_path):
    path = write(tmp_path / "rows.csv", ROW)
    path.write_text(path.read_text() + "lstm-128-16-64,lstm,T1")
    with Writer(path, ORIGIN, append=True) as writer:
        writer.write(replace(ROW, threads=2))
    assert read(path)[0] == [ROW, replace(ROW, threads=2)]
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="other columns"):
        Writer(path, ORIGIN, append=True)


def test_newest_is_the_last_complete_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="make bench"):
        results.newest(tmp_path)
    others = ("2026-01-03-part", "2026-01-02-losses", "2026-01-04-few-rows", "grid")
    names = ("2026-01-01", "2026-01-02", *others)
    for name in names:
        write(tmp_path / "device" / f"{name}.csv", ROW)
    assert results.newest(tmp_path).name == "2026-01-02.csv"
    assert ORIGIN.slug == "some-processor-2-50ghz-2-cores"


def test_report_replaces_only_what_stands_between_its_markers(tmp_path):
    theirs = replace(ROW, provider="torch", backend="torch.nn", p50_ms=4.5, peak_kib=1024)
    two = replace(ROW, threads=2, ratio=1.75, counts=False)
    path = write(tmp_path / "rows.csv", ROW, theirs, two)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    report.update(readme, report.table(path))
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith(f"before\n{report.START}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert (
        "| lstm-128-16-64 | lstm T128 N16 I64 H64 L1 D1 | train | cpu | 4.5 | 2 | **2.25×** "
        "| (1.75×) | 1.0 → 2.0 |"
    ) in text
    report.update(readme, report.table(path))
    assert readme.read_text() == text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="needs one line"):
        report.update(readme, "table")


def test_report_has_a_table_of_tasks_where_there_are_any(tmp_path):
    ours = replace(ROW, workload="ensemble-64", task="ensemble")
    theirs = replace(ours, provider="torch", p50_ms=4.5)
    plain = replace(ours, provider="plain", p50_ms=2.5)
    text = report.table(write(tmp_path / "rows.csv", ours, theirs, plain))
    assert (
        "| ensemble-64 | lstm T128 N16 I64 H64 L1 D1 | train | loop over the models "
        "| loop over ours | 4.5 | 2.5 | 2 | **2.25×** | 0.80 |"
    ) in text
    assert text.count("ensemble-64") == 1
    for some in ([ours, theirs], [ours, plain], [replace(ours, p50_ms=None), theirs, plain]):
        assert report.TODAY_WORDS not in report.table(write(tmp_path / "rows.csv", *some))


def test_character_model_learns_the_same_from_the_same():
    corpus = char_lm.load_corpus()
    assert set(corpus.vocabulary) >= set("def self:\n")
    inputs, targets = corpus.batch(3)
    assert torch.equal(inputs[1:], targets[:-1])
    learners = char_lm.train({"fused_rnn": nn, "torch": nn}, {}, corpus, 3)
    found = char_lm.agreement(learners)
    assert learners["torch"].losses[-1] < learners["torch"].losses[0]
    assert found.difference == 0
    assert found.ok
    learners["fused_rnn"].losses[1] *= 1 + 2 * found.allowed
    assert not char_lm.agreement(learners).ok
