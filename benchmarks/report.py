"""README's table, made of a rows file and of nothing else.

``python benchmarks/report.py`` prints the table of the newest run;
``--update README.md`` puts it between the markers there.
"""

import argparse
from pathlib import Path

import results

from fused_rnn.bench import rows
from fused_rnn.bench.rows import Row

START, END = "<!-- bench:start -->", "<!-- bench:end -->"


def table(path: Path) -> str:
    found, run = rows.read(path)
    by_key = {(r.workload, r.kind, r.threads, r.provider): r for r in found}
    ours = [r for r in found if r.provider == "fused_rnn" and r.threads == 1]
    lines = [
        f"Measured on {run.device}, {run.date[:10]}, commit {run.commit}; torch {run.torch}, "
        f"Python {run.python}, {run.build}; float32, milliseconds a call (medians), "
        "ratio = torch.nn's time over fused_rnn's, peak = what the process grew by in one call.",
        "",
        "| workload | cell, shape | pass | backend | torch.nn ms | fused_rnn ms | ratio "
        "| 2 threads | peak MiB, torch.nn → fused_rnn |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in ours:
        theirs = by_key[row.workload, row.kind, 1, "torch"]
        two = by_key.get((row.workload, row.kind, 2, "fused_rnn"))
        lines.append(
            f"| {row.workload} | {row.cell} {row.shape} | {row.kind} | {row.backend} "
            f"| {milliseconds(theirs.p50_ms)} | {milliseconds(row.p50_ms)} | **{row.ratio:.2f}×** "
            f"| {two_threads(two)} | {theirs.peak_mib} → {row.peak_mib} |"
        )
    lines += [
        "",
        "A ratio in parentheses does not count: beside it, two threads gave a plain matrix product "
        "less than 1.3× of one thread, so the second core was not free.",
        "",
        f"Command: `{run.command}`; rows: `{relative(path)}`.",
    ]
    return "\n".join(lines)


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def two_threads(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row.ratio:.2f}×" if row.counts else f"({row.ratio:.2f}×)"


def relative(path: Path) -> Path:
    house = results.ROOT.parent
    return path.resolve().relative_to(house) if path.resolve().is_relative_to(house) else path


def update(readme: Path, text: str) -> None:
    """Replaces what stands between the markers of ``readme``."""
    content = readme.read_text()
    if content.count(START) != 1 or content.count(END) != 1:
        raise ValueError(f"{readme} needs one line {START} and one line {END}")
    head, rest = content.split(START)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{START}\n{text}\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="?", help="rows file (default: the newest)")
    parser.add_argument("--update", type=Path, metavar="README", help="file with the markers")
    arguments = parser.parse_args()
    text = table(arguments.rows or results.newest())
    if arguments.update:
        update(arguments.update, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
