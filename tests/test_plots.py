"""Pictures and pages made of rows: what is in them, and that those in the repository are fresh."""

import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("tqdm", reason="fused_rnn.bench needs tqdm")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import charts
import errors
import plot
import report
from test_benchmarks import ORIGIN, ROW

from fused_rnn.bench.check import Comparison
from fused_rnn.bench.rows import Writer

TIMED = replace(ROW, gflop=1.0, mbyte=10.0, gflops=500.0, roofline=0.5, copy_gb_s=10.0)


def rows():
    """A grid where ours takes time in proportion to T, N and H², torch.nn twice that at H = 64."""
    found = []
    for T, N, H, threads in product((16, 32, 64), (1, 4, 16), (32, 64), (1, 2)):
        ours = 1e-4 * T * N * H**2 / threads
        for name, factor in (("fused_rnn", 1.0), ("torch", 2.0 if H == 64 else 0.5)):
            times = {
                q: f * factor * ours for q, f in (("p20_ms", 0.9), ("p50_ms", 1), ("p80_ms", 1.1))
            }
            shape = f"T{T} N{N} I{H} H{H} L1 D1"
            what = {"workload": f"lstm-{T}-{N}-{H}", "shape": shape, "threads": threads}
            ratio = 1.0 if name == "torch" else 2.0 if H == 64 else 0.5
            found.append(replace(TIMED, **what, provider=name, **times, ratio=ratio))
    return found


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_visible()]


def legends(figure):
    drawn = [axes.get_legend() for axes in figure.axes]
    return [text.get_text() for legend in drawn if legend for text in legend.get_texts()]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_heat_map_has_a_map_for_each_length_and_the_ratios():
    figure = charts.heat(rows(), ORIGIN)
    assert titles(figure) == [f"lstm train float32, T={T}" for T in (16, 32, 64)]
    assert sorted(texts(figure)) == 9 * ["0.5×"] + 9 * ["2×"]
    assert charts.heat([ROW], ORIGIN) is None


def test_scaling_tells_the_slope_over_each_letter():
    figure = charts.scaling(rows(), ORIGIN)
    assert titles(figure) == [
        "lstm train float32, N16 I=H H64",
        "lstm train float32, T64 I=H H64",
        "lstm train float32, T64 N16 I=H H64",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["T", "N", "threads"]
    slopes = 2 * ["1.00"] + ["-1.00"]
    told = [f"{name}, slope {slope}" for slope in slopes for name in ("fused_rnn", "torch")]
    assert legends(figure) == told
    assert charts.scaling([ROW], ORIGIN) is None


def test_roofline_is_drawn_at_the_measured_rates():
    figure = charts.roofline(rows(), ORIGIN)
    (line,) = figure.axes[0].lines
    x, y = line.get_data()
    assert max(y) == ROW.calibration_gflops
    assert y[0] == pytest.approx(TIMED.copy_gb_s * x[0])
    assert "copy 10 GB/s, product 100 GFLOP/s" in legends(figure)
    assert charts.roofline([ROW], ORIGIN) is None  # of a version that did not measure copies


def test_memory_has_a_bar_for_each_provider():
    figure = charts.memory([ROW, replace(ROW, provider="torch", peak_kib=4096)], ORIGIN)
    assert sorted(bar.get_width() for bar in figure.axes[0].patches) == [2.0, 4.0]
    assert legends(figure) == ["fused_rnn", "torch"]
    assert charts.memory([replace(ROW, peak_kib=None)], ORIGIN) is None


def test_changes_are_grey_where_the_quantiles_meet():
    def faster(factor):
        return replace(ROW, p20_ms=1.5 / factor, p50_ms=2.0 / factor, p80_ms=2.5 / factor)

    for factor, color in ((4.0, charts.OURS), (1.1, charts.INK), (0.25, charts.THEIRS)):
        figure = charts.changes([ROW], [faster(factor)], ORIGIN)
        span, middle, *_ = figure.axes[0].lines
        assert {span.get_color(), middle.get_color()} == {color}
        assert middle.get_xdata() == pytest.approx([factor])
    assert charts.changes([ROW], [replace(ROW, workload="other")], ORIGIN) is None


def test_every_picture_is_a_png_and_an_svg_beside_its_rows(tmp_path):
    bad = replace(ROW, workload="bad", status="out of memory", p50_ms=None, ratio=None)
    for name in ("new", "old"):
        with Writer(tmp_path / f"{name}.csv", ORIGIN) as writer:
            for row in (*rows(), bad):
                writer.write(row)
    files = plot.plot_run(tmp_path / "new.csv", tmp_path / "old.csv")
    drawn = ("ratios", *charts.CHARTS, "changes")
    assert [f.name for f in files] == [f"new-{n}.{s}" for n in drawn for s in ("png", "svg")]
    for file in files:
        start = file.read_bytes()[:400]
        assert start.startswith(b"\x89PNG") if file.suffix == ".png" else b"<svg" in start


def test_pages_hold_the_newest_run_of_each_device(tmp_path):
    for device, name in (("a", "2026-01-01"), ("a", "2026-01-02"), ("b", "2026-01-01")):
        theirs = replace(ROW, provider="torch", p50_ms=4.5)
        with Writer(tmp_path / device / f"{name}.csv", replace(ORIGIN, device=device)) as writer:
            for row in (replace(ROW, workload=f"{device}-{name}"), theirs):
                writer.write(replace(row, workload=f"{device}-{name}"))
    (tmp_path / "gpu").mkdir()
    plot.plot_run(tmp_path / "b" / "2026-01-01.csv")
    text = report.page(tmp_path)
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["a", "b", "GPUs"]
    assert "| a-2026-01-02 |" in text
    assert "a-2026-01-01" not in text
    assert "2026-01-01-ratios.png)" in text
    assert "Not yet measured." in text
    (tmp_path / "gpu" / "summary.md").write_text("")
    assert "gpu/summary.md)" in report.page(tmp_path)
    page = report.html_page(tmp_path)
    assert page.count("<h2>") == 2
    assert "<td>2.25×</td>" in page
    assert page.count("<svg") == 2  # ratios and memory
    assert not re.search(r"(src|href)=.http", page)


def test_readme_and_the_page_of_benchmarks_are_fresh(monkeypatch):
    """Of the results that are committed: running `make bench` makes nothing stale."""
    listed = subprocess.run(
        ["git", "ls-files", "benchmarks/results"], cwd=report.HOUSE, capture_output=True, text=True
    )
    dated = re.findall(r"^(.*/\d{4}-\d\d-\d\dT\d+Z\.csv)$", listed.stdout, re.MULTILINE)
    if not dated:
        pytest.skip("this is no checkout of git")
    newest = {Path(name).parent: report.HOUSE / name for name in sorted(dated)}
    latest = max(newest.values(), key=lambda path: path.name)
    cure = "run `python benchmarks/report.py --update`"
    shown = report.README.read_text().split(report.START)[1].split(report.END)[0].strip()
    assert shown == report.table(latest), cure
    monkeypatch.setattr(report, "devices", lambda folder: sorted(newest.values()))
    assert report.PAGE.read_text() == report.page(), cure


def test_errors_are_told_in_epsilons_of_the_largest_value(tmp_path):
    eps = 2.0**-23
    compared = [
        Comparison("lstm: output", 3 * eps, 16 * eps, 4 * eps, scale=1.0),
        Comparison("lstm: h_n", 8 * eps, 10 * eps, 1 * eps, scale=4.0),
    ]
    where = {"backend": "cpu", "cell": "lstm", "dtype": "float32"}
    found = errors.Errors.of("outputs", compared, **where)
    assert (found.tensors, found.ours, found.torch_nn, found.share) == (2, 3.0, 4.0, 0.8)
    with Writer(tmp_path / "errors.csv", ORIGIN, errors.Errors) as writer:
        writer.write(found)
    (line,) = errors.rows.lines(tmp_path / "errors.csv")
    assert errors.Errors.parse(line) == found


def test_the_page_of_errors_is_fresh():
    written = [errors.page(path) for path in errors.results.RESULTS.glob("*/errors.csv")]
    assert errors.PAGE.read_text() in written, "run `python benchmarks/errors.py`"
