"""`python -m fused_rnn.bench`: what is asked for is what is checked, timed and kept."""

import csv
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("tqdm", reason="fused_rnn.bench needs tqdm")

from fused_rnn.bench import __main__ as command
from fused_rnn.bench import measure, providers, rows, timing, workloads
from fused_rnn.bench.arithmetic import DTYPES
from fused_rnn.bench.measure import Bench, Point
from fused_rnn.bench.providers import Provider, find

TINY = workloads.Workload("tiny", "gru", I=3, H=5, T=4, N=2, mode="train")
TASKS = [
    replace(TINY, name=name, cell="lstm", task=name, **more)
    for name, more in {
        "episodes": {"reset": 0.3},
        "ragged": {"lengths": "uniform"},
        "ensemble": {"models": 3},
        "stream": {"mode": "infer"},
    }.items()
]
TINY_GRID = ["--grid", "T=3", "N=2", "H=4", "--least", "1", "--budget", "0"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nothing here is about the machine's rates, and collecting garbage takes long in a test."""
    monkeypatch.setattr(timing, "peak_memory", lambda call, repeats: (call(), 3 << 20)[1])
    monkeypatch.setattr(timing, "COPY_BYTES", (1 << 16, 1 << 16))
    monkeypatch.setattr(timing, "SAMPLE_S", 0.0)


def bench(*names, **more):
    return Bench([find(name) for name in names], **more)


def measured(path):
    return rows.read(path)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "w",
    [
        TINY,
        replace(TINY, name="ragged", cell="lstm", lengths="uniform", D=2),
        replace(TINY, name="step", T=1, mode="step"),
        replace(TINY, name="relu", cell="rnn_relu", L=2, dropout=0.5),
    ],
    ids=lambda w: w.name,
)
def test_every_provider_gives_rows_of_its_results(w, dtype):
    names = ["fused_rnn", "recompute", "fused_rnn:reference", "torch", "torch:packed", "loop"]
    harness = bench(*names)
    for kind in w.passes:
        found = {row.provider: row for row in harness.rows(Point(w, dtype, kind), 0.0, 1)}
        assert [*found] == names
        if w.mode == "step":
            assert "nothing to pack" in found.pop("torch:packed").status
            assert "nothing to compute again" in found.pop("recompute").status
        assert {row.status for row in found.values()} == {"ok"}, found
        for name, row in found.items():
            assert row.p20_ms <= row.p50_ms <= row.p80_ms
            assert row.us_per_step == pytest.approx(1e3 * row.p50_ms / w.T)
            assert row.gflop == w.gflop(kind)
            assert row.gflops == pytest.approx(1e3 * row.gflop / row.p50_ms)
            assert row.roofline > 0
            assert row.peak_kib == 3 << 10
            assert (row.error is None) == name.startswith("torch")
            assert row.ratio is not None
        assert found["torch"].ratio == 1
        assert found["loop"].backend == "reference"


@pytest.mark.parametrize("w", TASKS, ids=lambda w: w.name)
def test_a_task_is_the_same_for_all_and_done_in_three_ways(w):
    """What is timed is right, in each way; and each way is what its name says."""
    names = ["fused_rnn", "plain", "torch", "loop"]
    harness, calls = bench(*names, input_gradient=True), {}

    def counted(module, *_):
        calls[type(module).__module__, type(module).__name__] = (
            calls.get((type(module).__module__, type(module).__name__), 0) + 1
        )

    for kind in w.passes:
        found = harness.rows(Point(w, "float32", kind), 0.0, 1)
        assert [(row.provider, row.status, row.task) for row in found] == [
            (name, "ok", w.name) for name in names
        ]
        backends = {row.provider: row.backend for row in found}
        assert backends["torch"] == "torch.nn"
        assert backends["loop"] == "reference" or w.name == "stream"
        assert all(row.error is not None for row in found if row.provider != "torch")
    for entry in harness.entries[w, "float32"]:
        calls.clear()
        with nn.modules.module.register_module_forward_hook(counted):
            case = entry.provider.case(w, torch.float32, "cpu")
            with workloads.grad_mode("forward"):
                case.forward()
        inner = {kind: count for kind, count in calls.items() if "bench" not in kind[0]}
        assert inner == CALLED[w.name, entry.name]


OURS, CELL, THEIRS = (
    ("fused_rnn.modules", "LSTM"),
    ("fused_rnn.cell_modules", "LSTMCell"),
    "torch.nn.modules.rnn",
)
CALLED = {
    ("episodes", "torch"): {(THEIRS, "LSTM"): TINY.T},
    ("ragged", "torch"): {(THEIRS, "LSTM"): 1},
    ("ensemble", "torch"): {(THEIRS, "LSTM"): 3},
    ("stream", "torch"): {(THEIRS, "LSTMCell"): TINY.T},
    ("ensemble", "plain"): {OURS: 3},
    ("stream", "plain"): {CELL: TINY.T},
    ("stream", "fused_rnn"): {},  # step is no forward
    ("stream", "loop"): {},
}
CALLED |= {
    (w.name, name): {OURS: 1}
    for w in TASKS
    for name in ("fused_rnn", "plain", "loop")
    if (w.name, name) not in CALLED
}


def test_a_wrong_task_is_found(monkeypatch):
    class Wrong(workloads.Episodes):
        def forward(self, input, hx=None):
            return self.rnn(input, hx)

    monkeypatch.setattr(workloads, "Episodes", Wrong)
    harness = bench("fused_rnn", "torch")
    entry = measure.Entry(harness.providers[0])
    w = replace(TASKS[0])
    entry.case = entry.provider.case(w, torch.float32, "cpu")
    monkeypatch.undo()
    harness.check(w, "float32", [entry])
    assert entry.status.startswith("wrong: fused_rnn: output")


def test_providers_say_what_tasks_they_do_not_do():
    assert "no task" in find("plain").refusal(TINY)
    for w in TASKS:
        assert find("plain").refusal(w) is None
        for name in ("torch:packed", "torch.compile"):
            assert find(name).refusal(w)


def test_a_wrong_provider_is_not_timed_and_the_others_are():
    class Wrong(nn.GRU):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output + 1e-4, h_n

    class Broken(nn.GRU):
        def forward(self, input, hx=None):
            raise RuntimeError("no such kernel\nmore")

    harness = Bench(
        [
            Provider("wrong", SimpleNamespace(GRU=Wrong)),
            Provider("broken", SimpleNamespace(GRU=Broken)),
            find("fused_rnn"),
        ]
    )
    for _ in range(2):  # the second time it is remembered
        wrong, broken, ours = harness.rows(Point(TINY, "float32", "train"), 0.0, 1)
        assert re.match(r"wrong: wrong: output: error 1\.0\de-04 ABOVE", wrong.status)
        assert broken.status == "failed: no such kernel"
        assert wrong.is_bad
        assert broken.is_bad
        assert wrong.p50_ms is None
        assert wrong.error > 1
        assert ours.status == "ok"
        assert ours.ratio is None  # torch.nn was not timed


def test_memory_that_is_not_there_is_no_fault():
    class Large(nn.GRU):
        def forward(self, input, hx=None):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    harness = Bench([Provider("large", SimpleNamespace(GRU=Large))])
    (row,) = harness.rows(Point(TINY, "float32", "forward"), 0.0, 1)
    assert (row.status, row.is_bad, row.p50_ms) == ("out of memory", False, None)


def test_what_fails_once_it_is_measured_spoils_no_other(monkeypatch):
    class Breaks(nn.GRU):
        room = True

        def forward(self, input, hx=None):
            if not Breaks.room:
                raise RuntimeError("no room")
            return super().forward(input, hx)

    def peak(call, repeats):
        Breaks.room = False
        call()
        return 1 << 10

    monkeypatch.setattr(timing, "peak_memory", peak)
    harness = Bench([Provider("breaks", SimpleNamespace(GRU=Breaks)), find("torch")])
    first, second = harness.rows(Point(TINY, "float32", "forward"), 0.0, 1)
    assert (first.status, first.p50_ms, first.peak_kib) == ("failed: no room", None, None)
    assert (second.status, second.peak_kib) == ("ok", 1)
    assert second.p50_ms > 0


def test_compiled_loop_is_refused_where_it_would_not_end():
    compiled = find("torch.compile")
    assert compiled.compiles
    assert compiled.refusal(replace(TINY, T=providers.MOST_COMPILED_STEPS)) is None
    assert "takes too long" in compiled.refusal(replace(TINY, T=providers.MOST_COMPILED_STEPS + 1))


def test_a_compiled_module_is_what_is_called(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    case = find("torch.compile").case(TINY, torch.float32, "cpu")
    assert compiled == [case.module]
    assert case.module.backend == "reference"


@pytest.mark.parametrize("name", ["cudnn", "fused_rnn:nosuch", "torch:loop"])
def test_unknown_providers_are_refused(name):
    with pytest.raises(ValueError, match=r"unknown (provider|backend) .*expected one of"):
        find(name)


def test_peers_are_found_by_import(monkeypatch):
    module = SimpleNamespace(GRU=nn.GRU)
    path = "torchrl.modules.tensordict_module.rnn"
    monkeypatch.setitem(sys.modules, path, module)
    assert find("torchrl").namespace is module
    for name, missing in {
        "torchrl": path,
        "haste": "haste_pytorch",
        "flashrnn": "flashrnn",
    }.items():
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ValueError, match=f"'{name}' cannot be imported"):
            find(name)


@pytest.mark.parametrize("asked", [False, True])
def test_inputs_rotate_and_have_a_gradient_only_where_asked(asked, monkeypatch):
    harness = bench("torch", input_gradient=asked)
    case = harness.checked(TINY, "float32")[0].case
    seen, wanted, grad = set(), set(), torch.autograd.grad

    def counting(outputs, leaves, cotangents):
        wanted.add(len(leaves))
        return grad(outputs, leaves, cotangents)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    case.module.register_forward_pre_hook(lambda _, args: seen.add(args[0].data_ptr()))
    call = harness.rotating(case, "train")
    for _ in range(measure.MOST_INPUTS):
        call()
    assert len(seen) == measure.MOST_INPUTS
    assert wanted == {4 + asked}


def test_least_traffic_and_products_of_a_call():
    x, y, weights = 4 * 2 * 3, 4 * 2 * 5, 3 * 5 * (3 + 5)
    assert TINY.mbyte("forward", 2) == pytest.approx(2e-6 * (x + y + weights))
    assert TINY.mbyte("train", 4) == pytest.approx(4e-6 * (2 * x + 3 * y + 3 * weights))
    more = TINY.mbyte("train", 4, input_gradient=True) - TINY.mbyte("train", 4)
    assert more == pytest.approx(4e-6 * x)
    whole = TINY.gflop("train", input_gradient=True)
    assert whole == pytest.approx(3 * TINY.gflop("forward"))


def test_roofline_is_the_larger_of_products_and_traffic():
    harness = bench("torch")
    point = Point(TINY, "float32", "forward")
    seconds = {"torch": [2.0], "sgemm on 1": [1.0]}
    entry = measure.Entry(find("torch"))
    for rate, bound in ((1e-9, "mbyte"), (1e9, "gflop")):
        harness.rates[1] = timing.Rates(rate)
        row = harness.statistics(point, seconds, entry)
        product = 2e-9 * timing.CALIBRATION_SIZE**3
        least = row["gflop"] / product if bound == "gflop" else 1e-3 * row["mbyte"] / rate
        assert row["roofline"] == pytest.approx(least / 2.0)


def test_rates_are_of_this_machine():
    found = timing.Rates.of("cpu", 1)
    assert 0.001 < found.copy_gb_s < 10_000
    assert found.launch_us is None
    assert timing.cache_bytes() >= 1 << 18


def test_grid_is_every_combination():
    found = workloads.grid(["lstm", "gru"], ["H=8,16", "N=1,2", "L=2"], ())
    assert {(w.cell, w.H, w.I, w.N, w.T, w.L, w.mode) for w in found} == {
        (cell, H, H, N, 128, 2, "train")
        for cell in ("lstm", "gru")
        for H in (8, 16)
        for N in (1, 2)
    }
    assert len({w.name for w in found}) == len(found)
    steps = workloads.grid(["gru"], ["H=8", "T=16,32"], ["step"])
    assert [(w.mode, w.T, w.name) for w in steps] == [("step", 1, "gru-step-16-8")]
    assert workloads.grid(["gru"], ["I=3", "H=8"], ())[0].I == 3
    for wrong in ("H", "H=", "H=a", "X=1", "H=1;2"):
        with pytest.raises(ValueError, match="is no axis"):
            workloads.grid(["gru"], [wrong], ())


def test_the_command_writes_rows_and_goes_on_behind_them(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.csv"
    options = [*TINY_GRID, "--cell", "gru", "--providers", "fused_rnn:reference,torch"]
    assert command.main([*options, "--out", str(path), "--pass", "forward"]) == 0
    first = measured(path)
    assert [(r.provider, r.kind, r.requested) for r in first] == [
        ("fused_rnn:reference", "forward", "reference"),
        ("torch", "forward", ""),
    ]
    text = path.read_text()
    assert command.main([*options, "--out", str(path), "--pass", "forward"]) == 0
    assert path.read_text() == text
    assert "0 of 1 points to measure" in capsys.readouterr().out
    assert command.main([*options, "--out", str(path)]) == 0
    assert path.read_text().startswith(text)
    assert [r.kind for r in measured(path)] == ["forward"] * 2 + ["train"] * 2
    # Other code or another instruction set, and all is measured again.
    for function, column in (("source_hash", "sources"), ("build_info", "build")):
        monkeypatch.setattr(rows, function, lambda *_: "other")
        assert command.main([*options, "--out", str(path), "--pass", "forward"]) == 0
        with path.open(newline="") as file:
            last = [line[column] for line in csv.DictReader(file)]
        assert last[-2:] == ["other"] * 2
        assert "other" not in last[:-2]


def test_an_interrupted_run_keeps_its_rows(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.csv"
    whole = Bench.rows
    points = []

    def cut(self, point, *more):
        points.append(point)
        if len(points) == 2:
            raise KeyboardInterrupt
        return whole(self, point, *more)

    monkeypatch.setattr(Bench, "rows", cut)
    options = [*TINY_GRID, "--cell", "gru", "--out", str(path)]
    assert command.main(options) == 130
    assert [r.kind for r in measured(path)] == ["forward"] * 2
    assert "the same command goes on" in capsys.readouterr().out
    assert command.main(options) == 0
    assert [r.kind for r in measured(path)] == ["forward"] * 2 + ["train"] * 2


def test_the_command_fails_where_a_row_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure.check, "ULPS", -1e9)
    options = [*TINY_GRID, "--cell", "gru", "--pass", "forward"]
    assert command.main([*options, "--out", str(tmp_path / "rows.csv")]) == 1
    assert "1 wrong or failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cell", "elman"], "unknown 'elman': expected one of rnn_tanh"),
        (["--dtype", "int8"], "unknown 'int8'"),
        (["--device", "cpu", "--dtype", "tf32"], "tf32 is a GPU's"),
        (["--pass", "backward"], "unknown 'backward': expected one of forward, train, step"),
        (["--providers", "magic"], "unknown provider 'magic'"),
        (["--workload", "nosuch"], "there is no workload 'nosuch'"),
        (["--today", "--workload", "gru-step"], "there is no workload 'gru-step'"),
        (["--grid", "Q=1"], "'Q=1' is no axis"),
        (["--threads", "4096"], "this process may use"),
        (["--workload", "silero-vad", "--pass", "train"], "nothing is left to measure"),
    ],
)
def test_the_command_refuses_what_there_is_not(options, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        command.main([*options, "--out", str(tmp_path / "rows.csv")])
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_a_file_of_other_columns_is_left_alone(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(SystemExit):
        command.main([*TINY_GRID, "--out", str(path)])
    assert "move it away" in capsys.readouterr().err
    assert path.read_text() == "other,columns\n1,2\n"


@pytest.mark.parametrize(
    ("budget", "given", "late"),
    [
        (None, [(1, 1.0), (1, 1.0), (2, 1.0), (2, 1.0)], []),
        (10.0, [(1, 3.25), (1, 2.25), (2, 1.25), (2, 0.25)], []),
        (4.0, [(1, 1.3), (1, 0.3), (2, 0.2)], ["tiny train, 2 threads"]),
    ],
)
def test_a_budget_is_spent_on_the_first_thread_count_first(
    budget, given, late, tmp_path, monkeypatch
):
    clock, seen = SimpleNamespace(now=0.0), []

    class Slow(Bench):
        def rows(self, point, seconds, least):
            seen.append((point.threads, round(seconds, 3)))
            clock.now += seconds + 1
            return []

    wanted = measure.points([TINY], threads=[1, 2])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    with rows.Writer(tmp_path / "rows.csv", rows.provenance(command.fused_rnn)) as writer:
        found, left_out = measure.run(Slow([]), wanted, writer, budget=budget)
    assert seen == given
    assert found == []
    assert [*left_out] == late


def test_an_installation_has_every_file_that_it_needs():
    tomllib = pytest.importorskip("tomllib")
    house = rows.PACKAGE.parent
    # Its subject is the list of files in pyproject.toml, which no installation carries.
    if not (house / "pyproject.toml").exists():
        pytest.skip("this is an installation itself")
    with (house / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    folders = {path.parent for path in rows.PACKAGE.rglob("*.py")}
    found = {".".join(folder.relative_to(house).parts) for folder in folders}
    assert set(setuptools["packages"]) == found
    data = {
        p for pattern in setuptools["package-data"]["fused_rnn"] for p in rows.PACKAGE.glob(pattern)
    }
    others = {*rows.PACKAGE.rglob("*.toml"), *rows.PACKAGE.rglob("*.csv")}
    assert others <= data
