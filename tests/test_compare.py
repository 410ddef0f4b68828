"""`benchmarks/compare.py`: what counts as slower."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compare
from test_benchmarks import ORIGIN, ROW

from fused_rnn.bench.rows import Writer

WRONG = replace(ROW, status="wrong: output", p20_ms=None, p50_ms=None, p80_ms=None, counts=False)


def times(factor, *, rate=100.0):
    scaled = {name: factor * getattr(ROW, name) for name in ("p20_ms", "p50_ms", "p80_ms")}
    return replace(ROW, **scaled, calibration_gflops=rate)


def run(folder, old, new, *options, device=ORIGIN.device):
    paths = []
    for name, row, origin in (("old", old, ORIGIN), ("new", new, replace(ORIGIN, device=device))):
        paths.append(str(folder / f"{name}.csv"))
        with Writer(folder / f"{name}.csv", origin) as writer:
            writer.write(row)
    return compare.main([*paths, *options])


@pytest.mark.parametrize(
    ("new", "options", "status"),
    [
        (ROW, [], 0),
        (times(2.0), [], 1),
        (times(0.5), [], 0),
        # The quantiles still overlap: p20 of the new is 1.5 * 1.6, p80 of the old 2.5.
        (times(1.6), [], 0),
        (times(2.0), ["--noise", "1.5"], 0),
        # The whole machine was half as fast.
        (times(2.0, rate=50.0), [], 0),
        # The product was slow beside the old row only.
        (times(1.0, rate=200.0), [], 0),
        (WRONG, [], 1),
        (replace(ROW, workload="other"), [], 2),
        (replace(ROW, provider="torch"), [], 2),
    ],
)
def test_only_what_is_slower_beyond_the_noise_fails(new, options, status, tmp_path, capsys):
    assert run(tmp_path, ROW, new, *options) == status
    told = capsys.readouterr().out
    assert ("1 slower" in told) == (status == 1 and new is not WRONG)
    assert ("no longer right" in told) == (new is WRONG)


def test_what_got_faster_is_told(tmp_path, capsys):
    assert run(tmp_path, ROW, times(0.5)) == 0
    assert "1 faster" in capsys.readouterr().out


def test_rows_of_another_device_say_nothing(tmp_path, capsys):
    assert run(tmp_path, ROW, times(9.0), device="Another Processor") == 2
    assert "nothing to compare" in capsys.readouterr().out
