"""The grid of `make gpu-check`, its rows and its summary, on a machine without a GPU."""

import csv
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_grid
import gpu_points
import gpu_rows
import gpu_summary
import results
from gpu_grid import TORCH, Bench, GpuRow

from fused_rnn.bench import workloads
from fused_rnn.bench.rows import Provenance, Writer, git_commit, source_hash

ORIGIN = Provenance(
    date="2026-01-02T03:04:05+00:00",
    commit="0123456789ab",
    device="Some GPU",
    python="3.12.0",
    torch="2.11.0",
    fused_rnn="0.1.0",
    build="g++ 12, AVX2",
    command="python benchmarks/gpu_grid.py",
    cudnn="91900",
    driver="580.1",
    sources="0a1b2c3d4e5f",
)
POINTS = gpu_points.points()
TINY = gpu_points.points(tiny=True)
OURS = SimpleNamespace(
    explain=lambda *_: SimpleNamespace(backend="ours", algorithm="by hand\nmore of it")
)


def first(**wanted):
    """The first tiny point whose dtype, kind, cell are these."""
    return next(
        p
        for p in TINY
        if all(getattr(p, k, getattr(p.workload, k, None)) == v for k, v in wanted.items())
    )


LSTM = first(cell="lstm", dtype="fp32", kind="train")


def bench(namespace=nn):
    return Bench("cpu", {TORCH: (nn, {}), "ours": (namespace, {})}, OURS, 0.0)


def run(folder, points, *, namespace=nn, origin=ORIGIN, seconds=1e9):
    path = folder / "grid.csv"
    status = gpu_grid.run(bench(namespace), points, path, origin, time.monotonic() + seconds)
    return status, gpu_rows.read(path, origin)


def test_the_published_point_comes_first_in_every_dtype():
    first_eight = [(p.dtype, p.kind) for p in POINTS[:8]]
    assert {p.workload.name for p in POINTS[:8]} == {gpu_points.ANCHOR}
    assert first_eight[:4] == [
        *(("fp16", kind) for kind in ("forward", "train")),
        *(("bf16", kind) for kind in ("forward", "train")),
    ]
    w = POINTS[0].workload
    assert (w.cell, w.H, w.I, w.N, w.T) == ("lstm", 768, 768, 16, 1024)


def test_groups_go_from_the_telling_to_the_complete():
    order = list(dict.fromkeys(p.group for p in POINTS))
    assert order == ["anchor", "core", "workload", "form", "grid"]
    core = [p for p in POINTS if p.group == "core" and p.dtype == "bf16"]
    wanted = {
        (cell, H, N) for cell in ("lstm", "gru") for H in (256, 512, 1024) for N in (1, 16, 64, 256)
    }
    assert {(p.workload.cell, p.workload.H, p.workload.N) for p in core} == wanted


def test_every_wanted_point_is_there_once():
    keys = [p.key for p in POINTS]
    assert len(keys) == len(set(keys))
    for w in workloads.load():
        for dtype in gpu_points.ARITHMETICS:
            for kind in w.passes:
                assert replace(POINTS[0], workload=w, dtype=dtype, kind=kind).key in keys, w.name
    found = {
        (w.cell, w.H, w.N, w.T, p.dtype, p.kind)
        for p in POINTS
        for w in [p.workload]
        if w.I == w.H and (w.L, w.D, w.P, w.lengths) == (1, 1, 0, None)
    }
    for cell in workloads.GATES:
        for H in (64, 128, 256, 512, 768, 1024, 1150, 2048):
            for N in (1, 8, 16, 64, 128, 256):
                for T in (64, 1024):
                    for dtype in ("fp16", "bf16", "fp32", "tf32"):
                        for kind in ("forward", "train"):
                            assert (cell, H, N, T, dtype, kind) in found


def test_forms_are_packed_bidirectional_and_of_three_layers():
    forms = {
        (w.cell, w.L, w.D, w.lengths) for p in POINTS if p.group == "form" for w in [p.workload]
    }
    for cell in ("lstm", "gru"):
        for form in ((1, 1, "uniform"), (1, 2, None), (3, 1, None), (3, 2, "uniform")):
            assert (cell, *form) in forms


def test_rows_hold_times_errors_and_algorithms(tmp_path):
    packed = first(lengths="uniform", dtype="bf16", kind="train")
    status, rows = run(tmp_path, [LSTM, packed])
    assert status == 0
    assert [(r.provider, r.lengths) for r in rows] == [
        *((name, "") for name in (TORCH, "ours")),
        *((name, "uniform") for name in (TORCH, "ours")),
    ]
    for row in rows:
        assert row.status == "ok"
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.us_per_step == pytest.approx(1e3 * row.p50_ms / row.T, rel=1e-3)
        assert 0 < row.error_output < 0.02
        assert 0 < row.error_gradient < 0.1
        assert row.calibration_tflops > 0
    assert rows[1].algorithm == "by hand"
    # Both are torch.nn here, so their errors are the same, and smaller in float32.
    assert rows[0].error_output == rows[1].error_output < rows[2].error_output


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, capsys):
    points = [LSTM, first(cell="gru", dtype="fp32", kind="forward")]
    run(tmp_path, points[:1])
    before = (tmp_path / "grid.csv").read_text()
    _, rows = run(tmp_path, points)
    assert "2 of 2 points measured, 1 of them now" in capsys.readouterr().out
    assert (tmp_path / "grid.csv").read_text().startswith(before)
    assert len(rows) == 4
    run(tmp_path, points)
    assert "2 of 2 points measured, 0 of them now" in capsys.readouterr().out
    # Results were committed: the same code.
    run(tmp_path, points, origin=replace(ORIGIN, commit="other"))
    assert "2 of 2 points measured, 0 of them now" in capsys.readouterr().out
    for change in ({"sources": "other"}, {"device": "other"}):
        run(tmp_path, points[:1], origin=replace(ORIGIN, **change))
        assert "1 of 1 points measured, 1 of them now" in capsys.readouterr().out


def test_a_line_that_was_cut_is_measured_again(tmp_path):
    run(tmp_path, [LSTM])
    path = tmp_path / "grid.csv"
    complete = path.read_text()
    path.write_text(complete[:-40])
    _, rows = run(tmp_path, [LSTM])
    assert [row.provider for row in rows] == [TORCH, TORCH, "ours"]
    with path.open(newline="") as file:
        assert all(len(line) == len(rows[0].__dict__) + 12 for line in csv.reader(file))


def test_a_file_with_other_columns_is_not_appended_to(tmp_path):
    (tmp_path / "grid.csv").write_text("cell,ms\nlstm,1\n")
    with (
        pytest.raises(ValueError, match="other columns"),
        Writer(tmp_path / "grid.csv", ORIGIN, GpuRow, append=True),
    ):
        pass
    assert (tmp_path / "grid.csv").read_text() == "cell,ms\nlstm,1\n"
    assert "Times: not yet measured." in gpu_summary.summary(tmp_path)


def test_no_row_is_begun_after_the_time_is_over(tmp_path, capsys):
    assert run(tmp_path, [LSTM], seconds=-1) == (0, [])
    assert "0 of 1 points measured" in capsys.readouterr().out


class Full(nn.LSTM):
    def forward(self, input, hx=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")


class Wrong(nn.LSTM):
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return output + 1e-3 * output.detach() ** 2, states


class Nan(nn.LSTM):
    def forward(self, input, hx=None):
        output, states = super().forward(input, hx)
        return output * torch.nan, states


class Broken(nn.LSTM):
    def forward(self, input, hx=None):
        raise RuntimeError("there is no kernel for this\nsecond line")


def test_out_of_memory_is_a_row_and_no_failure(tmp_path):
    status, rows = run(
        tmp_path, [LSTM, first(cell="gru")], namespace=SimpleNamespace(LSTM=Full, GRU=nn.GRU)
    )
    assert status == 0
    assert [row.status for row in rows] == ["ok", "out of memory", "ok", "ok"]
    assert rows[0].p50_ms
    assert rows[0].error_output is not None
    assert (rows[1].p50_ms, rows[1].ratio, rows[1].error_output) == (None, None, None)


def test_what_does_not_fit_while_checking_is_timed_all_the_same(tmp_path):
    calls = []

    class FullAtFirst(nn.LSTM):
        def forward(self, input, hx=None):
            calls.append(input)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(input, hx)

    status, (_, ours) = run(tmp_path, [LSTM], namespace=SimpleNamespace(LSTM=FullAtFirst))
    assert (status, ours.status, ours.error_output) == (0, "ok", None)
    assert ours.p50_ms > 0


@pytest.mark.parametrize("module", [Wrong, Nan])
def test_a_wrong_provider_is_not_timed_and_fails_the_run(module, tmp_path, capsys):
    status, (theirs, ours) = run(tmp_path, [LSTM], namespace=SimpleNamespace(LSTM=module))
    assert status == 1
    assert theirs.status == "ok"
    assert theirs.p50_ms > 0
    assert ours.status.startswith("wrong: ours: output: error")
    assert not ours.error_output <= 10 * theirs.error_output
    assert ours.error_gradient == theirs.error_gradient or module is Nan
    assert ours.p50_ms is None
    assert "1 rows wrong or failed" in capsys.readouterr().out
    # What an earlier run found wrong still fails the one that has nothing left to measure.
    assert run(tmp_path, [LSTM])[0] == 1


def test_a_failure_is_a_row_and_fails_the_run(tmp_path):
    status, rows = run(
        tmp_path, [LSTM, first(cell="gru")], namespace=SimpleNamespace(LSTM=Broken, GRU=nn.GRU)
    )
    assert status == 1
    assert rows[1].status == "failed: there is no kernel for this"
    assert [row.status for row in rows[2:]] == ["ok", "ok"]


def test_results_of_another_shape_or_dtype_are_a_failure(tmp_path):
    class Wide(nn.LSTM):
        def forward(self, input, hx=None):
            output, states = super().forward(input, hx)
            return output.double(), states

    status, (theirs, ours) = run(tmp_path, [LSTM], namespace=SimpleNamespace(LSTM=Wide))
    assert (status, theirs.status) == (1, "ok")
    assert ours.status.startswith("failed: ours: output: torch.float64")
    assert ours.p50_ms is None


def test_a_device_in_error_stops_the_run_and_says_where(tmp_path, monkeypatch):
    def wait(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Bench, "wait", wait)
    status, rows = run(tmp_path, [LSTM, first(cell="gru")])
    assert status == gpu_grid.DEVICE_BROKEN
    assert {row.cell for row in rows} == {"lstm"}
    assert all("illegal memory access" in row.status for row in rows)


@pytest.mark.parametrize(("cell", "expected"), [("rnn_tanh", "wrong"), ("rnn_relu", "ok")])
def test_a_wrong_gradient_fails_but_a_relus_which_is_only_told(cell, expected, tmp_path):
    class Flipped(nn.RNN):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output.detach() + 3 * (output - output.detach()), h_n

    point = first(cell=cell, dtype="fp32", kind="train")
    _, rows = run(tmp_path, [point], namespace=SimpleNamespace(RNN=Flipped))
    assert rows[1].status.split(":")[0] == expected
    assert rows[1].error_gradient > 0.5 > 1e-5 > rows[1].error_output


@pytest.mark.parametrize(("dtype", "expected"), [("tf32", True), ("fp32", False)])
def test_tf32_sets_both_of_torchs_flags_and_puts_them_back(dtype, expected, tmp_path):
    seen = []

    class Asking(nn.LSTM):
        def forward(self, input, hx=None):
            flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
            seen.append([flag.allow_tf32 for flag in flags])
            return super().forward(input, hx)

    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    point = first(cell="lstm", dtype=dtype, kind="forward")
    assert run(tmp_path, [point], namespace=SimpleNamespace(LSTM=Asking))[0] == 0
    assert seen
    assert all(flags == [expected, expected] for flags in seen)
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)


def test_inputs_take_turns_and_inference_is_not_training(tmp_path):
    seen = []

    class Watched(nn.LSTM):
        def forward(self, input, hx=None):
            seen.append((input.data_ptr(), self.training))
            return super().forward(input, hx)

    point = first(cell="lstm", dtype="fp32", kind="forward")
    assert run(tmp_path, [point], namespace=SimpleNamespace(LSTM=Watched))[0] == 0
    places = [place for place, _ in seen[-gpu_grid.LEAST :]]
    assert len(set(places)) == 2
    assert all(a != b for a, b in itertools.pairwise(places))
    assert not any(training for _, training in seen)


@pytest.mark.parametrize(
    ("changed", "kind", "expected"),
    [
        ({}, "forward", "PERSIST_STATIC"),
        ({}, "train", "PERSIST_STATIC/PERSIST_STATIC"),
        ({"H": 192}, "train", "PERSIST_STATIC_SMALL_H/STANDARD"),
        ({"lengths": "zipf"}, "train", "STANDARD/STANDARD"),
    ],
)
def test_torchs_rows_name_cudnns_algorithm(changed, kind, expected, monkeypatch):
    gpu = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    w = replace(POINTS[0].workload, **changed)
    assert bench().cudnn_algorithm(replace(POINTS[0], workload=w, kind=kind)) == expected


def test_large_points_have_no_float64_errors():
    large = [p for p in POINTS if not gpu_grid.affordable(p)]
    assert large
    assert min(p.workload.gflop(p.kind) for p in large) > 1000
    assert all(gpu_grid.affordable(p) for p in POINTS[:8])


def test_the_command_runs_without_a_gpu_on_tiny_sizes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_points, "points", lambda tiny: TINY[:1] if tiny else POINTS)
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert gpu_grid.main([*arguments, "--backends", "reference"]) == 0
    assert "1 of 1 points measured" in capsys.readouterr().out
    (path,) = tmp_path.rglob("grid.csv")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["provider"], line["requested"]) for line in lines] == [
        (TORCH, ""),
        ("reference", "reference"),
    ]
    assert lines[1]["backend"] == "reference"
    assert lines[1]["algorithm"]
    assert lines[0]["commit"] == git_commit()
    assert lines[0]["sources"] == source_hash()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_tritons_algorithms_are_measured_and_what_one_refuses_is_no_failure(tmp_path):
    """In Triton's interpreter: a single step has no loop that could be tiled."""
    code = """
import sys, gpu_grid, gpu_points
tiny = gpu_points.points(tiny=True)
points = [next(p for p in tiny if p.kind == kind) for kind in ("train", "step")]
gpu_points.points = lambda tiny: points
gpu_grid.LEAST = gpu_grid.MOST = 1
sys.exit(gpu_grid.main(sys.argv[1:]))
"""
    names = ["triton", "triton:tiled"]
    options = ["--device", "cpu", "--tiny", "--out", tmp_path, "--backends", *names]
    ended = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=results.ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 of 2 points measured, 2 of them now; 0 rows wrong or failed" in ended.stdout
    (path,) = tmp_path.rglob("grid.csv")
    train, step = [
        [*rows] for _, rows in itertools.groupby(gpu_rows.lines(path), lambda r: r["kind"])
    ]
    assert [row["requested"] for row in train] == ["", *names]
    assert [row["algorithm"].partition(":")[0] for row in train[1:]] == ["resident", "tiled"]
    assert all(row["status"] == "ok" and row["error_gradient"] for row in train)
    assert [row["status"].partition(":")[0] for row in step] == ["ok", "ok", "refused"]
    assert step[2]["status"].endswith("a single step has no time loop for 'tiled' to run")


def test_a_backend_that_is_not_there_is_said(monkeypatch, capsys):
    from fused_rnn.backends import triton

    monkeypatch.setattr(triton, "UNAVAILABLE", "no moon")
    assert gpu_grid.main(["--device", "cpu", "--tiny", "--backends", "triton:tiled"]) == 2
    assert capsys.readouterr().out == "backend 'triton:tiled' is not available: no moon\n"


def test_without_a_gpu_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_grid.main([]) == 2
    assert "sees no GPU" in capsys.readouterr().out


def row(provider, ratio=None, *, p50=1.0, point=LSTM, **more):
    made = {"requested": "", "backend": "", "algorithm": "STANDARD", "status": "ok"} | more
    described = gpu_rows.describe(point)
    return GpuRow(**described, provider=provider, p50_ms=p50, ratio=ratio, **made)


def test_an_empty_folder_has_a_summary_that_claims_nothing(tmp_path):
    text = gpu_summary.summary(tmp_path)
    for piece in gpu_summary.PIECES:
        assert f"| {piece} | not yet measured |" in text
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"| {tool} | not yet measured |" in text
    assert "Times: not yet measured." in text
    assert "Synchronisation and launches: not yet measured." in text


def test_the_summary_tells_means_losses_and_anchors(tmp_path):
    anchor = POINTS[0]
    other = first(cell="lstm", dtype="fp32", kind="train", N=1)
    rows = [
        row(TORCH, 1.0, p50=2.2, point=anchor, algorithm="PERSIST_STATIC"),
        row("cuda", 0.5, p50=4.4, point=anchor, algorithm="stepwise"),
        row("triton", 0.25, p50=8.8, point=anchor, algorithm="tiled"),
        *(row(TORCH, 1.0, p50=8.0), row("cuda", 4.0, p50=2.0)),
        *(row(TORCH, 1.0, p50=3.0, point=other), row("cuda", 0.25, p50=12.0, point=other)),
        row("cuda", p50=None, status="out of memory", point=POINTS[1]),
    ]
    old = replace(ORIGIN, sources="old")
    with Writer(tmp_path / "grid.csv", old, GpuRow) as writer:
        writer.write(row("cuda", 99.0))
    with Writer(tmp_path / "grid.csv", ORIGIN, GpuRow, append=True) as writer:
        for each in rows:
            writer.write(each)
    text = gpu_summary.summary(tmp_path)
    assert "| cuda | lstm | fp32 | train | 1.00× | 0.25× | 4.00× | 1 of 2 |" in text
    assert "| triton | lstm | fp16 | forward | 0.25× | 0.25× | 0.25× | 0 of 1 |" in text
    assert "| torch.nn here | cuda here | triton here |" in text
    assert "| forward | 2.01 | 2.2 (PERSIST_STATIC) | 4.4 (stepwise) | 8.8 (tiled) |" in text
    assert "| train | 5.19 | not yet measured | out of memory | not yet measured |" in text
    losses, wins = text.split("Where we lose most:")[1].split("Where we win most:")
    assert losses.index("0.25×") < losses.index("0.50×")
    assert "4.00×" in wins
    assert "0.50×" not in wins
    assert "Without a time: 1 of 8 rows:" in text
    assert "99.00×" not in text


def test_the_summary_tells_what_the_pieces_found(tmp_path):
    head = "test,ctas,cluster,threads,payload_bytes,ns_per_step,cycles_per_step,note"
    head += ",device,date,commit"
    origin = "Some GPU,2026-01-02,0123456789ab"
    lines = [
        f"grid_sync,2,0,256,0,700.0,1200.0,,{origin}",
        f"grid_sync,132,0,256,0,1070.0,1900.0,,{origin}",
        f"st_async,16,16,256,128,40.0,70.0,,{origin}",
        f"max_active_clusters,16,16,256,0,,,7 clusters,{origin}",
        f"kernel_after_kernel_in_graph,1,0,32,0,1300.0,,,{origin}",
    ]
    (tmp_path / "sync-latency.csv").write_text("\n".join([head, *lines]) + "\n")
    state = {
        "build": {"status": "passed", "found": {"cpu_built": "none was given", "info": "torch 2"}},
        "test": {
            "found": {"files": {"test_a.py": {"status": "failed", "tests": 5, "failures": 2}}}
        },
        "sanitize": {"found": {"tools": {"memcheck": {"status": "passed", "said": "0 errors"}}}},
    }
    (tmp_path / "gpu-check.json").write_text(json.dumps(state))
    text = gpu_summary.summary(tmp_path)
    assert "| grid_sync | 132 | 0 | 0 | 1070.0 | 1900.0 |  |" in text
    assert "| grid_sync | 2 |" not in text
    assert "| kernel_after_kernel_in_graph | 1 |" in text
    assert "7 clusters" in text
    assert "1 of 1 steps by st.async are under 100 ns or over 2 µs" in text
    assert "Library built beside a torch without CUDA: none was given." in text
    assert "5 tests, 2 failures, 0 errors, 0 skipped; 1 files." in text
    assert "| memcheck | passed | 0 errors |" in text
    assert "| racecheck | not yet measured |" in text
