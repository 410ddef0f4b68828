"""Two pictures of a run: the ratios, and the loss curves of the character model.

``python benchmarks/plot.py [rows.csv]`` draws them again, beside the file they come from.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import results
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from fused_rnn.bench.rows import read

OURS, THEIRS, LINE = "#2a6f97", "#c1666b", "#444444"


def plot_ratios(path: Path) -> Path:
    """One bar for each workload and pass on one thread: torch.nn's time over ours."""
    rows, provenance = read(path)
    rows = [r for r in rows if r.provider == "fused_rnn" and r.threads == 1][::-1]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.24 * len(rows)), layout="constrained")
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
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.axvline(1, color=LINE, linewidth=1)
    axes.margins(x=0.12, y=0.01)
    axes.set_title(
        f"fused_rnn against torch.nn {provenance.torch}, one thread (longer is faster)\n"
        f"{provenance.device}, {provenance.date[:10]}, commit {provenance.commit}",
        fontsize=9,
    )
    return _save(figure, path, "ratios")


def plot_losses(path: Path) -> Path:
    """The loss curves over each other, and below how far apart they are."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    column = {name: [float(line[name]) for line in lines] for name in lines[0]}
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, layout="constrained", height_ratios=(2, 1)
    )
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
    return _save(figure, path, "")


def plot_run(path: Path) -> list[Path]:
    """The pictures of what the run that wrote ``path`` has: its rows, its losses."""
    losses = results.losses_path(path)
    rows = path.read_text().count("\n") > 1
    return ([plot_ratios(path)] if rows else []) + (
        [plot_losses(losses)] if losses.exists() else []
    )


def _save(figure: plt.Figure, path: Path, suffix: str) -> Path:
    target = path.with_name("-".join(filter(None, (path.stem, suffix))) + ".png")
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="?", help="rows file (default: the newest)")
    for picture in plot_run(parser.parse_args().rows or results.newest()):
        print(picture)


if __name__ == "__main__":
    main()
