"""The pictures of a file of rows, each as PNG and SVG beside it.

``python benchmarks/plot.py [rows.csv]`` draws all for which the file has rows: ratios to torch.nn,
heat maps over H and N, times over T, N, H and threads with the fitted slope, the roofline, memory,
and the loss curves of the character model. ``--before old.csv`` adds what changed since that file.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import charts
import results
from charts import INK, OURS, THEIRS, plt
from matplotlib.figure import Figure

from fused_rnn.bench.rows import Provenance, Row, read


def ratios(rows: list[Row], run: Provenance) -> Figure | None:
    """One bar for each workload and pass on one thread: torch.nn's time over ours."""
    rows = [r for r in rows if r.provider == "fused_rnn" and r.threads == 1 and r.ratio][::-1]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.24 * len(rows)))
    axes.barh(
        [f"{r.workload} · {r.kind}" for r in rows],
        [r.ratio - 1 for r in rows],
        left=1,
        color=[OURS if r.ratio >= 1 else THEIRS for r in rows],
    )
    for y, row in enumerate(rows):
        axes.annotate(
            f"{row.ratio:.2f}×",
            (max(row.ratio, 1), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_xscale("log")
    charts.plain_ticks(axes.xaxis, unit="×")
    axes.tick_params(labelsize=8)
    axes.axvline(1, color=INK, linewidth=1)
    axes.margins(x=0.12, y=0.01)
    what = f"fused_rnn against torch.nn {run.torch}, one thread (longer is faster)"
    figure.suptitle(charts.titled(what, run), fontsize=9)
    return figure


def losses(path: Path) -> Figure:
    """The loss curves over each other, and below how far apart they are."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    column = {name: [float(line[name]) for line in lines] for name in lines[0]}
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1))
    for name, color, width in (("torch", THEIRS, 4.0), ("fused_rnn", OURS, 1.2)):
        seconds = sum(column[f"{name}_seconds"])
        above.plot(column[f"{name}_loss"], color=color, lw=width, label=f"{name}, {seconds:.1f} s")
    above.set_ylabel("loss, nats a character")
    above.set_title("character model on Python's standard library, same weights and batches")
    above.legend()
    for name, other, color in (("fused_rnn", "torch", OURS), ("torch", "oracle", THEIRS)):
        pairs = zip(column[f"{name}_loss"], column[f"{other}_loss"], strict=True)
        label = f"{name} to {'torch.nn in float64' if other == 'oracle' else other}"
        below.plot([abs(a - b) / b for a, b in pairs], ".", color=color, ms=3, label=label)
    below.set_yscale("log")
    below.set_ylabel("relative distance")
    below.set_xlabel("step")
    below.legend()
    return figure


def figures(path: Path, before: Path | None = None) -> Iterator[tuple[str, Figure]]:
    """The pictures for which there are rows, by name."""
    if path.read_text().count("\n") > 1:
        rows, run = read(path)
        timed = [row for row in rows if row.status == "ok" and not row.task]
        drawn = {"ratios": ratios(timed, run)}
        drawn |= {name: draw(timed, run) for name, draw in charts.CHARTS.items()}
        if before:
            drawn["changes"] = charts.changes([r for r in read(before)[0] if r.p50_ms], timed, run)
        yield from ((name, figure) for name, figure in drawn.items() if figure)
    curves = results.of_run(path, "losses")
    if curves.exists():
        yield "losses", losses(curves)


def plot_run(path: Path, before: Path | None = None) -> list[Path]:
    """Draws the pictures of the run that wrote ``path``; their files."""
    files = []
    for name, figure in figures(path, before):
        for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
            files.append(path.with_name(f"{path.stem}-{name}.{suffix}"))
            figure.savefig(files[-1], dpi=120, metadata=metadata)
        plt.close(figure)
    return files


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, nargs="?", help="rows file (default: the newest)")
    parser.add_argument("--before", type=Path, help="earlier rows to compare with")
    arguments = parser.parse_args(argv)
    for picture in plot_run(arguments.rows or results.newest(), arguments.before):
        print(picture)


if __name__ == "__main__":
    main()
