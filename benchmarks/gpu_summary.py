"""``summary.md`` of a device's folder, made of the files that are there: what ``make gpu-check``
found, and what is not yet measured.

``python benchmarks/gpu_summary.py benchmarks/results/<device>`` prints it.
"""

import argparse
import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_rows
from gpu_rows import SAME, TORCH, GpuRow

PIECES = ("build", "test", "sanitize", "micro", "stacks", "bench", "bench_triton")
MISSING = "not yet measured"
PUBLISHED_AT = {"cell": "lstm", "dtype": "fp16", "H": 768, "I": 768, "N": 16, "T": 1024}
PUBLISHED = {"forward": 2.01, "train": 5.19}
"""torch.nn.LSTM there on an H100 SXM, milliseconds: the bar labels of head_dim--lstm.svg in
github.com/NX-AI/flashrnn."""
SENSIBLE_NS = (100.0, 2000.0)
"""Outside of this an exchange by st.async wants a look before it is used."""
SHOWN = 10


def summary(folder: Path) -> str:
    path = folder / "gpu-check.json"
    state = json.loads(path.read_text()) if path.exists() else {}
    rows, origin = read_grid(folder / "grid.csv")
    device = next((s["device"]["device"] for s in state.values() if "device" in s), folder.name)
    parts = [
        f"# GPU check: {device}",
        "Made by `make gpu-check` from the files beside it. What no file holds is "
        f"{MISSING}; rows of other sources than the newest are left out.",
        *pieces(state),
        *build(state),
        *tests(state),
        *sanitizer(state),
        *synchronisation(folder / "sync-latency.csv"),
        *against_torch(rows, origin),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: str, lines: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *lines])


def pieces(state: dict[str, Any]) -> Iterator[str]:
    lines = []
    for name in PIECES:
        s = state.get(name, {})
        seconds = f"{s['seconds']:.0f}" if "seconds" in s else ""
        told = [s.get("status", MISSING), *(s.get(k, "") for k in ("sentence", "date", "commit"))]
        lines.append(f"| {name} | {' | '.join(told)} | {seconds} |")
    yield table("| piece | | | date | commit | seconds |", lines)


def build(state: dict[str, Any]) -> Iterator[str]:
    found = state.get("build", {}).get("found", {})
    yield "## Build"
    yield f"Library built beside a torch without CUDA: {found.get('cpu_built', MISSING)}."
    if "info" in found:
        yield f"```\n{found['info'].strip()}\n```"


def tests(state: dict[str, Any]) -> Iterator[str]:
    found = state.get("test", {}).get("found", {})
    files = found.get("files", {})
    yield "## Tests"
    if found.get("left_to_ci"):
        yield (
            "Left out here, being about the CPU or the tooling alone: CI runs "
            f"{', '.join(found['left_to_ci'])}."
        )
    if not files:
        yield f"Results on this device: {MISSING}."
        return
    names = ("tests", "failures", "errors", "skipped")
    totals = {name: sum(f.get(name, 0) for f in files.values()) for name in names}
    yield ", ".join(f"{count} {name}" for name, count in totals.items()) + f"; {len(files)} files."
    yield table(
        "| file | | tests | failures | errors | skipped |",
        [
            f"| {name} | {f['status']} | {' | '.join(str(f.get(k, '')) for k in names)} |"
            for name, f in files.items()
        ],
    )


def sanitizer(state: dict[str, Any]) -> Iterator[str]:
    tools = state.get("sanitize", {}).get("found", {}).get("tools", {})
    yield "## compute-sanitizer"
    yield "Each tool must find an error that was planted for it, and none in the ops."
    yield table(
        "| tool | | every op | planted error |",
        [
            f"| {tool} | {found.get('status', MISSING)} | {found.get('said', '')} "
            f"| {found.get('planted', '')} |"
            for tool in ("memcheck", "racecheck", "synccheck")
            for found in [tools.get(tool, {})]
        ],
    )


def synchronisation(path: Path) -> Iterator[str]:
    yield "## What waiting costs"
    if not path.exists():
        yield f"Synchronisation and launches: {MISSING}."
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    most: dict[tuple[str, ...], int] = defaultdict(int)
    for row in rows:
        most[place(row)] = max(most[place(row)], int(row["ctas"]))
    yield (
        f"{rows[0]['date'][:10]}, commit {rows[0]['commit']}; medians of 7 launches. Of each "
        f"exchange the row with the most blocks; `{path.name}` has the others."
    )
    yield table(
        "| test | blocks | of a cluster | bytes | ns a step | cycles a step | |",
        [
            "| {test} | {ctas} | {cluster} | {payload_bytes} | {ns_per_step} | {cycles_per_step} "
            "| {note} |".format(**row)
            for row in rows
            if int(row["ctas"]) == most[place(row)] or row["test"].startswith(("kernel", "host"))
        ],
    )
    timed = [row for row in rows if row["test"] == "st_async" and row["ns_per_step"]]
    odd = [r for r in timed if not SENSIBLE_NS[0] <= float(r["ns_per_step"]) <= SENSIBLE_NS[1]]
    if odd:
        yield (
            f"{len(odd)} of {len(timed)} steps by st.async are under {SENSIBLE_NS[0]:.0f} ns or "
            f"over {SENSIBLE_NS[1] / 1e3:.0f} µs: look at the microbenchmark before using them."
        )


def place(row: dict[str, str]) -> tuple[str, ...]:
    return row["test"], row["cluster"], row["payload_bytes"]


def read_grid(path: Path) -> tuple[list[GpuRow], dict[str, str]]:
    """The rows of the newest sources, and the last line's provenance."""
    lines = gpu_rows.lines(path)
    if not lines:
        return [], {}
    last = lines[-1]
    lines = [line for line in lines if all(line[k] == last[k] for k in SAME)]
    return [GpuRow.parse(line) for line in lines], last


def against_torch(rows: list[GpuRow], origin: dict[str, str]) -> Iterator[str]:
    yield "## Against torch.nn"
    if not rows:
        yield f"Times: {MISSING}."
        return
    yield (
        f"torch {origin['torch']}, cuDNN {origin['cudnn']}, driver {origin['driver']}, commit "
        f"{origin['commit']}. Ratio: torch.nn's time over ours, above 1 is faster; medians of "
        "interleaved calls by CUDA events, L2 overwritten before each."
    )
    yield from anchors(rows)
    ours = [row for row in rows if row.provider != TORCH]
    timed = [row for row in ours if row.ratio is not None]
    if not timed:
        yield f"Ratios: {MISSING}."
    else:
        yield "Geometric mean of the ratios, and how many of the rows are faster:"
        yield means(timed)
        ordered = sorted(timed, key=lambda row: row.ratio or 0)
        yield "Where we lose most:"
        yield ratios(rows, [row for row in ordered if (row.ratio or 0) < 1][:SHOWN])
        yield "Where we win most:"
        yield ratios(rows, [row for row in reversed(ordered) if (row.ratio or 0) >= 1][:SHOWN])
    bad = [row for row in rows if row.status != "ok"]
    yield f"Without a time: {len(bad)} of {len(rows)} rows{':' if bad else '.'}"
    if bad:
        yield table(
            "| point | provider | |",
            [f"| {row.key} | {row.provider} | {row.status} |" for row in bad[: 3 * SHOWN]],
        )


def anchors(rows: list[GpuRow]) -> Iterator[str]:
    """The published point, and what it is here."""
    published = PUBLISHED_AT.items()
    there = [row for row in rows if all(getattr(row, k) == v for k, v in published)]

    def told(kind: str, provider: str) -> str:
        found = next((row for row in there if (row.kind, row.provider) == (kind, provider)), None)
        if found is None or found.p50_ms is None:
            return MISSING if found is None else found.status
        return f"{found.p50_ms:.3g} ({found.algorithm})"

    yield f"The published point, {' '.join(f'{k}={v}' for k, v in published)}, in milliseconds:"
    ours = sorted({row.provider for row in rows} - {TORCH})
    heads = [f"{provider} here" for provider in (TORCH, *ours)]
    yield table(
        f"| pass | torch.nn, published (H100 SXM) | {' | '.join(heads)} |",
        [
            f"| {kind} | {ms} | {' | '.join(told(kind, provider) for provider in (TORCH, *ours))} |"
            for kind, ms in PUBLISHED.items()
        ],
    )


def means(timed: list[GpuRow]) -> str:
    groups: dict[tuple[str, ...], list[GpuRow]] = defaultdict(list)
    for row in timed:
        groups[row.provider, row.cell, row.dtype, row.kind].append(row)
    lines = []
    for group, members in sorted(groups.items()):
        found = [row.ratio or 0.0 for row in members]
        worst, best = min(found), max(found)
        faster = sum(ratio > 1 for ratio in found)
        lines.append(
            f"| {' | '.join(group)} | {statistics.geometric_mean(found):.2f}× | {worst:.2f}× "
            f"| {best:.2f}× | {faster} of {len(found)} |"
        )
    return table("| provider | cell | dtype | pass | mean | worst | best | faster |", lines)


def ratios(rows: list[GpuRow], chosen: list[GpuRow]) -> str:
    theirs = {row.key: row for row in rows if row.provider == TORCH}
    lines = [
        f"| {row.key.split(' dropout')[0]} | {row.provider} | {row.ratio:.2f}× "
        f"| {theirs[row.key].p50_ms:.4g} | {row.p50_ms:.4g} "
        f"| {theirs[row.key].algorithm} | {row.algorithm} |"
        for row in chosen
    ]
    head = "| point | provider | ratio | torch.nn ms | ours ms | torch.nn's | ours |"
    return table(head, lines or ["| none | | | | | | |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of one device")
    print(summary(parser.parse_args().folder), end="")


if __name__ == "__main__":
    main()
