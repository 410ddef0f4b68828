"""From the rows of a GPU's grid to the table by which "auto" chooses there."""

import csv
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_gpu_grid import ORIGIN

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_points
import gpu_rows
import tune

from fused_rnn import backends
from fused_rnn.backends import tuning

POINTS = {p.dtype: p for p in gpu_points.points() if p.kind == "train" and p.group == "anchor"}


def measured(point, provider="cuda", **changed):
    options = {"requested": provider, "backend": provider, "algorithm": "stepwise: a product"}
    options |= {"status": "ok", "ratio": 1.25, "p50_ms": 3.0}
    options |= gpu_rows.describe(point) | {"provider": provider} | changed
    return gpu_rows.GpuRow(**options)


def file_of(folder, *rows, origin=ORIGIN):
    path = folder / "grid.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        lines = [asdict(row) | asdict(origin) for row in rows]
        writer = csv.DictWriter(file, list(lines[0]))
        if new:
            writer.writeheader()
        writer.writerows(lines)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "tuning.csv"
    path.write_text(tuning.TABLE.read_text().splitlines()[0] + "\n")
    return path


def read(path):
    with path.open(newline="") as file:
        return list(tuning.read(csv.DictReader(file)))


def test_what_was_measured_is_what_auto_finds(tmp_path, table, monkeypatch):
    for dtype, ratio in (("fp16", 0.5), ("bf16", 2.0), ("tf32", 1.5), ("fp32", 0.75)):
        file_of(tmp_path, measured(POINTS[dtype], ratio=ratio))
    assert tune.main([str(tmp_path), "--table", str(table)]) == 0
    rows = tuning.by_key(read(table))
    monkeypatch.setattr(tuning, "table", lambda: rows)
    w = POINTS["fp16"].workload
    problem = backends.Problem(
        cell=w.cell, dtype=torch.float16, device="cuda", T=w.T, N=w.N, I=w.I, H=w.H, P=0,
        layers=1, directions=1, grad=True, packed=False, compiling=False,
    )  # fmt: skip
    expected = {(torch.float16, False): 0.5, (torch.bfloat16, True): 2.0}
    expected |= {(torch.float32, True): 1.5, (torch.float32, False): 0.75}
    for (dtype, tf32), speedup in expected.items():
        row = tuning.measured(problem._replace(dtype=dtype), ORIGIN.device, tf32)
        assert (row.speedup, row.algorithm) == (speedup, "stepwise")
        assert row.source == f"benchmarks/results/{tmp_path.name}/grid.csv"
    assert tuning.measured(problem._replace(grad=False), ORIGIN.device, False) is None
    assert tuning.measured(problem, "another GPU", False) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"provider": "torch.nn"},
        {"provider": "cuda:stepwise"},
        {"status": "wrong: h is off"},
        {"status": "out of memory", "ratio": None},
        {"kind": "step"},
        {"projection": 64},
    ],
    ids=str,
)
def test_what_says_nothing_of_ours_leaves_no_row(changed, tmp_path, table, capsys):
    file_of(tmp_path, measured(POINTS["bf16"], **changed))
    assert tune.main([str(tmp_path), "--table", str(table)]) == 1
    assert "no measurement of ours" in capsys.readouterr().err
    assert read(table) == []


def test_a_gpus_rows_replace_its_older_ones_and_no_others(tmp_path, table):
    older = replace(ORIGIN, sources="older", date="2025-01-02T03:04:05+00:00")
    file_of(tmp_path, measured(POINTS["fp16"], ratio=9.0), origin=older)
    file_of(tmp_path, measured(POINTS["bf16"]), origin=replace(ORIGIN, commit="earlier"))
    file_of(tmp_path, measured(POINTS["tf32"]))
    for _ in range(2):
        assert tune.main([str(tmp_path), "--table", str(table)]) == 0
        assert [row.key.dtype for row in read(table)] == ["bfloat16", "float32"]
    other = tmp_path / "other"
    other.mkdir()
    file_of(other, measured(POINTS["fp32"]), origin=replace(ORIGIN, device="Other GPU"))
    assert tune.main([str(other), "--table", str(table)]) == 0
    assert sorted(row.key.device for row in read(table)) == ["Other GPU", "Some GPU", "Some GPU"]
