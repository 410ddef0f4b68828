"""What people read, made of files of rows and of nothing else.

``python benchmarks/report.py`` prints the table of the newest run; ``--update`` puts it between the
markers of README.md and writes docs/benchmarks.md, the newest run of each device; ``--html`` writes
that as one page with the pictures inside.
"""

import argparse
import html
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import aims
import results

from fused_rnn.bench import rows
from fused_rnn.bench.rows import Provenance, Row
from fused_rnn.bench.today import TASKS

HOUSE = results.ROOT.parent
README, PAGE = HOUSE / "README.md", HOUSE / "docs" / "benchmarks.md"
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
HEAD = (
    *("workload", "cell, shape", "pass", "backend", "torch.nn ms", "fused_rnn ms", "ratio"),
    *("2 threads", "peak MiB, torch.nn → fused_rnn"),
)
COUNTS = (
    "A ratio in parentheses does not count: beside it, two threads gave a plain matrix product "
    "less than 1.3× of one thread, so the second core was not free."
)
TODAY_HEAD = (
    *("workload", "cell, shape", "pass", "with torch.nn", "ours in its way", "torch.nn ms"),
    *("ours in its way ms", "fused_rnn ms", "ratio", "ours / ours in its way"),
)
TODAY_WORDS = (
    "What people write with torch.nn today, against our one call for it, and that against our own "
    "modules used as torch.nn's; all three in turn, on one thread."
)
AIMS_WORDS = (
    'What the CPU\'s loops are to reach: ratios are those of `backend="cpu"` to torch.nn, on one '
    "thread; [docs/cpu-performance.md](cpu-performance.md) has the reasons where an aim was not "
    "reached."
)
PICTURES = ("ratios", "heat", "scaling", "roofline", "memory")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px }
td, th { border-bottom: 1px solid #ddd; padding: 3px 8px; text-align: left }
img, svg { max-width: 100%; height: auto }
"""


def measured_on(run: Provenance) -> str:
    return (
        f"Measured on {run.device}, {run.date[:10]}, commit {run.commit}; torch {run.torch}, "
        f"Python {run.python}, {run.build}; float32, milliseconds a call (medians), "
        "ratio = torch.nn's time over fused_rnn's, peak = what the process grew by in one call."
    )


def source(run: Provenance, path: Path) -> str:
    return f"Command: `{run.command}`; rows: `{relative(path)}`."


def lines(found: list[Row]) -> Iterator[tuple[str, ...]]:
    """The cells of the table's lines, as ``HEAD`` names them."""
    by_key = {(r.workload, r.kind, r.threads, r.provider): r for r in found}
    for row in found:
        if row.provider != "fused_rnn" or row.threads != 1 or row.ratio is None or row.task:
            continue
        theirs = by_key[row.workload, row.kind, 1, "torch"]
        two = by_key.get((row.workload, row.kind, 2, "fused_rnn"))
        yield (
            row.workload,
            f"{row.cell} {row.shape}",
            row.kind,
            row.backend,
            milliseconds(theirs.p50_ms),
            milliseconds(row.p50_ms),
            f"**{row.ratio:.2f}×**",
            two_threads(two),
            f"{theirs.peak_mib} → {row.peak_mib}",
        )


class Today(NamedTuple):
    """The cells of a line, as ``TODAY_HEAD`` names them."""

    workload: str
    shape: str
    kind: str
    torch: str
    plain: str
    torch_ms: str
    plain_ms: str
    ms: str
    ratio: str
    share: str


def today(found: list[Row]) -> Iterator[Today]:
    """The tasks that all three providers did."""
    by_key = {(r.workload, r.kind, r.provider): r for r in found if r.task and r.p50_ms}
    for (workload, kind, provider), row in by_key.items():
        theirs, plain = (by_key.get((workload, kind, name)) for name in ("torch", "plain"))
        if provider == "fused_rnn" and theirs and plain:
            words = TASKS[row.task]
            yield Today(
                workload,
                f"{row.cell} {row.shape}",
                kind,
                words.torch,
                words.plain,
                milliseconds(theirs.p50_ms),
                milliseconds(plain.p50_ms),
                milliseconds(row.p50_ms),
                f"**{row.ratio:.2f}×**",
                f"{row.p50_ms / plain.p50_ms:.2f}",
            )


def markdown(head: Iterable[str], numbers: int, found: Iterable[Iterable[str]]) -> list[str]:
    """A table whose last so many columns are numbers."""
    head = [*head]
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"] + [
        f"| {' | '.join(cells)} |" for cells in found
    ]


def table(path: Path) -> str:
    """The rows of a file in Markdown, with where and how they were measured."""
    found, run = rows.read(path)
    written = [measured_on(run), "", *markdown(HEAD, 5, lines(found)), "", COUNTS, ""]
    tasks = [*today(found)]
    if tasks:
        written += [TODAY_WORDS, "", *markdown(TODAY_HEAD, 5, tasks), ""]
    return "\n".join([*written, source(run, path)])


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def two_threads(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return ""
    return f"{row.ratio:.2f}×" if row.counts else f"({row.ratio:.2f}×)"


def relative(path: Path) -> Path:
    return path.resolve().relative_to(HOUSE) if path.resolve().is_relative_to(HOUSE) else path


def devices(folder: Path = results.RESULTS) -> list[Path]:
    """The newest complete run of each device."""
    found = []
    for device in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            found.append(results.newest(device))
        except FileNotFoundError:  # what there is comes from `make gpu-check`
            continue
    return found


def aims_of(path: Path) -> list[aims.Aim]:
    """What the run of a file of rows said of the CPU's aims; older ones have none."""
    beside = results.of_run(path, "aims")
    return [aims.Aim.parse(line) for line in rows.lines(beside)] if beside.exists() else []


def pictures(path: Path, suffix: str) -> list[Path]:
    """Those that were drawn of a file of rows."""
    named = (path.with_name(f"{path.stem}-{name}.{suffix}") for name in PICTURES)
    return [picture for picture in named if picture.exists()]


def page(folder: Path = results.RESULTS) -> str:
    """docs/benchmarks.md."""
    parts = [
        "# Benchmarks",
        "Made by `python benchmarks/report.py --update` from the newest rows of each device; "
        "[benchmarks/README.md](../benchmarks/README.md) says what each number means.",
    ]
    for path in devices(folder):
        _, run = rows.read(path)
        parts += [f"## {run.device}", table(path)]
        if found := aims_of(path):
            parts += [AIMS_WORDS, "\n".join(markdown(aims.HEAD, 0, (aim.cells for aim in found)))]
        for picture in pictures(path, "png"):
            parts.append(f"![{picture.stem}](../{relative(picture).as_posix()})")
    checked = sorted(folder.glob("*/summary.md"))
    parts.append("## GPUs")
    parts += [f"[{path.parent.name}](../{relative(path).as_posix()})" for path in checked]
    if not checked:
        parts.append("Not yet measured. `make gpu-check` on a machine with one writes them here.")
    return "\n\n".join(parts) + "\n"


def html_page(folder: Path = results.RESULTS) -> str:
    """The same as one page that needs no other file."""
    parts = []
    for path in devices(folder):
        found, run = rows.read(path)
        parts += [f"<h2>{html.escape(run.device)}</h2><p>{html.escape(measured_on(run))}</p>"]
        parts += [*html_table(HEAD, lines(found)), f"<p>{html.escape(COUNTS)}</p>"]
        if tasks := [*today(found)]:
            parts += [f"<p>{html.escape(TODAY_WORDS)}</p>", *html_table(TODAY_HEAD, tasks)]
        if reached := aims_of(path):
            parts.append(f"<p>{html.escape(AIMS_WORDS)}</p>")
            parts += html_table(aims.HEAD, (aim.cells for aim in reached))
        parts.append(f"<p>{html.escape(source(run, path))}</p>")
        for picture in pictures(path, "svg"):
            drawn = picture.read_text()
            parts.append(f"<figure>{drawn[drawn.index('<svg') :]}</figure>")
    title = "fused_rnn: benchmarks"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang='en'>{head}<h1>{title}</h1>" + "\n".join(parts) + "</html>\n"


def html_table(head: Iterable[str], found: Iterable[Iterable[str]]) -> list[str]:
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = (
        "".join(f"<td>{html.escape(cell.replace('*', ''))}</td>" for cell in cells)
        for cells in found
    )
    return [f"<table><tr>{titles}</tr>", *(f"<tr>{row}</tr>" for row in body), "</table>"]


def update(readme: Path, text: str) -> None:
    """Replaces what stands between the markers of ``readme``."""
    content = readme.read_text()
    if content.count(START) != 1 or content.count(END) != 1:
        raise ValueError(f"{readme} needs one line {START} and one line {END}")
    head, rest = content.split(START)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{START}\n{text}\n{END}{tail}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, nargs="?", help="rows file (default: the newest)")
    parser.add_argument("--update", action="store_true", help="README.md and docs/benchmarks.md")
    parser.add_argument("--html", type=Path, help="write one page for a browser")
    arguments = parser.parse_args(argv)
    if arguments.html:
        arguments.html.write_text(html_page())
    if arguments.update:
        update(README, table(arguments.rows or results.newest()))
        PAGE.write_text(page())
    elif not arguments.html:
        print(table(arguments.rows or results.newest()))


if __name__ == "__main__":
    main()
