"""Charts of rows: each function takes rows that have times and returns a figure, or ``None`` where
they hold too little for one. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import results  # noqa: F401, where the package is
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from fused_rnn.bench.rows import Provenance, Row

OURS, THEIRS, INK = "#0072b2", "#d55e00", "#444444"
COLORS = (OURS, THEIRS, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vP*"
LETTERS = ("T", "N", "H")
LEAST_POINTS = 3
"""Fewer make no curve."""

plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "fused_rnn",
}


def titled(what: str, run: Provenance) -> str:
    return f"{what}\n{run.device}, {run.date[:10]}, commit {run.commit}, torch {run.torch}"


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each name, the same in all pictures for ours and torch.nn's."""
    order = sorted(set(names), key=lambda name: (name != "fused_rnn", name != "torch", name))
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(order)
    }


def panels(count: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    columns = min(count, 3)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(size[0] * columns, size[1] * lines), squeeze=False
    )
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, [*axes.flat[:count]]


def plain_ticks(axis: Any, values: Iterable[float] = (), unit: str = "") -> None:
    """Numbers that people read on a logarithmic axis, at ``values`` or at 1, 2, 5, 10, ..."""
    axis.set_major_locator(FixedLocator([*values]) if values else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}" + unit)
    axis.set_minor_locator(NullLocator())


def heat(rows: list[Row], run: Provenance) -> Figure | None:
    """The ratio to torch.nn over H and N, a map for each cell, pass, dtype and T."""
    ours = [r for r in rows if r.provider == "fused_rnn" and r.threads == 1 and r.ratio]
    ours = [r for r in ours if r.shape.endswith("L1 D1") and r.sizes["I"] == r.sizes["H"]]
    maps = grouped(ours, lambda r: (r.cell, r.kind, r.dtype, r.sizes["T"]))
    found = {}
    for key, members in maps.items():
        cells = {(r.sizes["H"], r.sizes["N"]): r.ratio for r in members}
        axes = [sorted(set(values)) for values in zip(*cells, strict=True)]
        if min(map(len, axes)) > 1:
            found[key] = (cells, *axes)
    if not found:
        return None
    figure, places = panels(len(found), (3.6, 3.0))
    most = max(abs(np.log2(ratio)) for cells, *_ in found.values() for ratio in cells.values())
    norm = TwoSlopeNorm(0, -max(most, 1), max(most, 1))
    for axes, ((cell, kind, dtype, T), (cells, heights, widths)) in zip(
        places, found.items(), strict=True
    ):
        shown = [[np.log2(cells.get((H, N), np.nan)) for N in widths] for H in heights]
        axes.imshow(shown, cmap="PuOr", norm=norm, origin="lower", aspect="auto")
        for (H, N), ratio in cells.items():
            at, strong = (widths.index(N), heights.index(H)), abs(np.log2(ratio)) > 0.6 * most
            axes.annotate(
                f"{ratio:.2g}×", at, ha="center", va="center", color="w" if strong else "k"
            )
        axes.set_xticks(range(len(widths)), widths)
        axes.set_yticks(range(len(heights)), heights)
        axes.set(xlabel="N, batch", ylabel="H = I, units", title=f"{cell} {kind} {dtype}, T={T}")
        axes.grid(False)
    figure.suptitle(
        titled("torch.nn's time over fused_rnn's, one thread; purple: fused_rnn is faster", run),
        fontsize=10,
    )
    return figure


def scaling(rows: list[Row], run: Provenance) -> Figure | None:
    """Time over T, N, H or threads, all else equal, with the slope in double logarithms: 1 is
    proportional. Of each pass, cell and letter the last series with the most points."""
    best: dict[tuple[str, ...], dict[str, list[tuple[int, Row]]]] = {}
    for letter in (*LETTERS, "threads"):

        def value(row: Row, letter: str = letter) -> int:
            return row.threads if letter == "threads" else row.sizes[letter]

        def others(row: Row, letter: str = letter) -> Hashable:
            sizes = dict(row.sizes, threads=row.threads)
            if sizes["I"] == sizes["H"]:
                del sizes["I"]
            sizes.pop(letter)
            return row.cell, row.kind, row.dtype, tuple(sizes.items())

        for (cell, kind, dtype, _), members in grouped(rows, others).items():
            series = {
                name: sorted(((value(r), r) for r in of), key=lambda pair: pair[0])
                for name, of in grouped(members, lambda r: r.provider).items()
            }
            points = max(len({x for x, _ in pairs}) for pairs in series.values())
            key = (letter, cell, kind, dtype)
            before = max((len(pairs) for pairs in best.get(key, {}).values()), default=0)
            if points >= (2 if letter == "threads" else LEAST_POINTS) and points >= before:
                best[key] = series
    if not best:
        return None
    figure, places = panels(len(best), (4.2, 3.4))
    style = styles(name for series in best.values() for name in series)
    for axes, ((letter, cell, kind, dtype), series) in zip(places, best.items(), strict=True):
        for name, pairs in series.items():
            x, y = [x for x, _ in pairs], [row.p50_ms for _, row in pairs]
            slope = np.polyfit(np.log(x), np.log(y), 1)[0] if len(set(x)) > 1 else 0.0
            spread = [
                [r.p50_ms - r.p20_ms for _, r in pairs],
                [r.p80_ms - r.p50_ms for _, r in pairs],
            ]
            axes.errorbar(x, y, spread, label=f"{name}, slope {slope:.2f}", **style[name])
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_ticks(axes.xaxis, {x for pairs in series.values() for x, _ in pairs})
        plain_ticks(axes.yaxis)
        sample = next(iter(series.values()))[0][1]
        sizes = (
            sample.sizes | {"I": "=H"} if sample.sizes["I"] == sample.sizes["H"] else sample.sizes
        )
        fixed = " ".join(f"{k}{v}" for k, v in sizes.items() if k not in (letter, "L", "D"))
        axes.set(xlabel=letter, ylabel="ms a call", title=f"{cell} {kind} {dtype}, {fixed}")
        axes.legend(fontsize=7)
    figure.suptitle(titled("time a call: median, p20 to p80", run), fontsize=10)
    return figure


def roofline(rows: list[Row], run: Provenance) -> Figure | None:
    """Products a second over products for each byte that must move, under what the machine gave in
    the same run."""
    rows = [r for r in rows if r.gflops and r.copy_gb_s and r.threads == 1]
    if not rows:
        return None
    peak = statistics.median(r.calibration_gflops for r in rows)
    copy = statistics.median(r.copy_gb_s for r in rows)
    figure, axes = plt.subplots(figsize=(8, 5))
    style = styles(r.provider for r in rows)
    for name, members in grouped(rows, lambda r: r.provider).items():
        x = [1e3 * r.gflop / r.mbyte for r in members]
        y = [r.gflops for r in members]
        axes.scatter(x, y, s=22, alpha=0.8, label=name, **style[name])
    xs = [1e3 * r.gflop / r.mbyte for r in rows]
    x = np.geomspace(min(*xs, peak / copy) / 2, max(*xs, peak / copy) * 2, 100)
    roof = np.minimum(peak, copy * x)
    axes.plot(x, roof, color=INK, label=f"copy {copy:.3g} GB/s, product {peak:.3g} GFLOP/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.set(xlabel="FLOP for each byte that must move", ylabel="GFLOP/s")
    axes.legend()
    figure.suptitle(titled("roofline, one thread; weights may stay in a cache", run), fontsize=10)
    return figure


def memory(rows: list[Row], run: Provenance) -> Figure | None:
    """Peak memory of a call, a bar for each provider."""
    rows = [r for r in rows if r.peak_kib and r.threads == 1]
    calls = grouped(rows, lambda r: f"{r.workload} · {r.kind}")
    if not calls:
        return None
    names = [*styles(r.provider for r in rows).items()]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.16 * (len(names) + 1) * len(calls)))
    height = 0.8 / len(names)
    for i, (name, style) in enumerate(names):
        at = [(k, r) for k, of in enumerate(calls.values()) for r in of if r.provider == name]
        axes.barh(
            [-k - (i - (len(names) - 1) / 2) * height for k, _ in at],
            [r.peak_kib / 1024 for _, r in at],
            height,
            color=style["color"],
            label=name,
        )
    axes.set_yticks([-k for k in range(len(calls))], [*calls], fontsize=8)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.margins(y=0.01)
    axes.set_xlabel("MiB at the peak of a call, beyond what was there")
    axes.legend()
    figure.suptitle(titled("peak memory, one thread (shorter is better)", run), fontsize=9)
    return figure


def changes(old: list[Row], new: list[Row], run: Provenance) -> Figure | None:
    """What both runs have of ours: the old time over the new, with what p20 and p80 leave open."""
    before = {row.key: row for row in old}
    both = [(before[r.key], r) for r in new if r.provider != "torch" and r.key in before][::-1]
    if not both:
        return None
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.24 * len(both)))
    for y, (a, b) in enumerate(both):
        middle = a.p50_ms / b.p50_ms
        low, high = a.p20_ms / b.p80_ms, a.p80_ms / b.p20_ms
        color = INK if low < 1 < high else OURS if middle > 1 else THEIRS
        axes.plot([low, high], [y, y], color=color, linewidth=2)
        axes.plot(middle, y, "o", color=color)
    labels = [f"{b.workload} · {b.kind} · {b.threads}" for _, b in both]
    axes.set_yticks(range(len(both)), labels, fontsize=8)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, unit="×")
    axes.margins(y=0.01)
    axes.set_xlabel("old time over new: right is faster, grey is noise")
    figure.suptitle(titled("before and after (workload · pass · threads)", run), fontsize=9)
    return figure


CHARTS: dict[str, Callable[[list[Row], Provenance], Figure | None]] = {
    "heat": heat,
    "scaling": scaling,
    "roofline": roofline,
    "memory": memory,
}
