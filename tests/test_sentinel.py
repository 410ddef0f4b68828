"""`make sentinel`: what counts as lost speed, and against which rows."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import sentinel
from test_benchmarks import ORIGIN, ROW

from fused_rnn.bench import workloads
from fused_rnn.bench.rows import Writer

HOUSE = Path(__file__).resolve().parents[1]
SHAPES = {w.name: w for w in workloads.load()}


def row_of(name, kind, **more):
    w = SHAPES[name]
    what = {"workload": name, "cell": w.cell, "shape": w.shape, "kind": kind, "dtype": "float32"}
    return replace(ROW, **what, threads=1, provider="fused_rnn", **more)


def write(folder, name, origin=ORIGIN, ratio=2.0):
    path = folder / name
    with Writer(path, origin) as writer:
        for shape, kind in sentinel.SENTINELS:
            row = row_of(shape, kind, ratio=ratio)
            writer.write(row)
            writer.write(replace(row, provider="torch", ratio=1.0))
    return path


def test_the_latest_rows_of_this_processor_build_and_torch_count(tmp_path):
    write(tmp_path, "2026-01-02T000000Z.csv", ratio=3.0)
    latest = write(tmp_path, "2026-01-03T000000Z.csv")
    write(tmp_path, "2026-01-04T000000Z.csv", replace(ORIGIN, cpu="another"))
    write(tmp_path, "2026-01-05T000000Z.csv", replace(ORIGIN, build="another"))
    write(tmp_path, "2026-01-06T000000Z.csv", replace(ORIGIN, torch="another"))
    path, kept = sentinel.before(ORIGIN, tmp_path)
    assert path == latest
    assert {row.ratio for row in kept.values()} == {2.0}
    assert len(kept) == len(sentinel.SENTINELS)
    with pytest.raises(LookupError, match="no rows are kept of a third"):
        sentinel.before(replace(ORIGIN, cpu="a third"), tmp_path)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs it where the shapes have these ratios, one list for each shape by turns."""
    write(tmp_path, "2026-01-03T000000Z.csv")
    monkeypatch.setattr(sentinel.results, "ROOT", tmp_path)
    monkeypatch.setattr(sentinel.rows, "provenance", lambda _: ORIGIN)
    monkeypatch.setattr(sentinel.before, "__defaults__", (tmp_path,))

    def run(first, **more):
        asked = []

        def measured(bench, point):
            asked.append(point.workload.name)
            is_first = point.workload.name == sentinel.SENTINELS[0][0]
            ratio = first[asked.count(asked[-1]) - 1] if is_first else 1.5
            row = row_of(point.workload.name, point.kind, ratio=ratio)
            return [replace(row, provider="torch"), replace(row, **more) if is_first else row]

        monkeypatch.setattr(sentinel.Bench, "rows", measured)
        return sentinel.main([]), asked.count(sentinel.SENTINELS[0][0]), capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("ratios", "status", "tries"),
    [((1.5,), 0, 1), ((1.3, 1.5), 0, 2), ((1.3, 1.3, 1.41), 0, 3), ((1.3, 1.3, 1.39), 1, 3)],
)
def test_what_stays_thirty_percent_below_is_lost(ratios, status, tries, run):
    found, asked, told = run(ratios)
    assert (found, asked) == (status, tries)
    assert f"{status} of {len(sentinel.SENTINELS)} lost" in told
    assert ", ".join(f"{ratio:.2f}×" for ratio in ratios) in told


def test_a_wrong_result_fails(run):
    found, _, told = run((1.5,), status="wrong: output")
    assert found == 1
    assert "wrong: output" in told


def test_without_rows_nothing_is_compared(run, monkeypatch):
    monkeypatch.setattr(sentinel.rows, "provenance", lambda _: replace(ORIGIN, cpu="another"))
    found, asked, told = run(())
    assert (found, asked) == (0, 0)
    assert "no rows are kept of another" in told


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(sentinel, "COUNTED", (("lstm", 4, 2, 8, "forward"),))
    monkeypatch.setattr(sentinel, "COUNTS", tmp_path / "instructions.csv")


@pytest.mark.skipif(
    not (shutil.which("valgrind") and shutil.which("g++")), reason="needs valgrind and g++"
)
@pytest.mark.usefixtures("tiny")
def test_instructions_are_the_same_each_time(tmp_path, monkeypatch, capsys):
    if not [*HOUSE.glob("build/release-*/kernels.avx2.float.o")]:
        pytest.skip("needs the AVX2 build of the loops in build/")
    assert sentinel.main(["--count", "--keep"]) == 0
    assert "lstm 4:2:8 forward" in (told := capsys.readouterr().out)
    assert "none kept" in told
    assert sentinel.main(["--count"]) == 0
    assert "+0.0%" in capsys.readouterr().out
    first = sentinel.rows.lines(sentinel.COUNTS)[0]
    assert first["commit"]
    # Only the loops count: twice the steps are nearly twice the instructions.
    monkeypatch.setattr(
        sentinel, "COUNTED", (("lstm", 64, 2, 8, "train"), ("lstm", 128, 2, 8, "train"))
    )
    short, long = sentinel.counts(tmp_path / "count")
    assert 1.8 < long.instructions / short.instructions < 2


@pytest.mark.usefixtures("tiny")
def test_what_cannot_be_counted_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sentinel.results, "ROOT", tmp_path / "benchmarks")
    assert sentinel.main(["--count"]) == 0
    assert "no kernels.avx2.float.o" in capsys.readouterr().out
    built = tmp_path / "build" / "release-x" / "kernels.avx2.float.o"
    built.parent.mkdir(parents=True)
    built.touch()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert sentinel.main(["--count", "--keep"]) == 0
    assert "there is no no-such-compiler" in capsys.readouterr().out
    monkeypatch.setenv("CXX", "false")
    assert sentinel.main(["--count", "--keep"]) == 0
    assert "nothing is counted: Command" in capsys.readouterr().out
    assert not sentinel.COUNTS.exists()
