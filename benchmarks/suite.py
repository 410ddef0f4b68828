"""``make bench``: is it right, how fast is it, does it learn the same.

1. every cell against torch.nn (``fused_rnn/bench/check.py``);
2. the small workloads against torch.nn: checked, timed in turn, memory beside it
   (``fused_rnn/bench/measure.py``);
3. what people write with torch.nn where ours has one call (``fused_rnn/bench/today.py``), likewise;
4. what the CPU's loops are to reach (``aims.py``);
5. a character language model, once with each LSTM (``char_lm.py``).

Prints as it goes, keeps rows, loss curves and pictures under ``results/<device>/``. The exit
status says whether all checks passed; rows slower than torch.nn are listed at the end.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import aims
import char_lm
import plot
import report
import results
from torch import nn
from tqdm import tqdm

import fused_rnn
from fused_rnn.bench import check, measure, rows, timing, workloads
from fused_rnn.bench.__main__ import progress, silence
from fused_rnn.bench.measure import Bench, Point
from fused_rnn.bench.providers import find
from fused_rnn.bench.rows import Provenance, Row, Writer
from fused_rnn.bench.timing import Rates, Turn, torch_threads

PROVIDERS = {"fused_rnn": fused_rnn, "torch": nn}
TODAY = ("fused_rnn", "plain", "torch")
SLOW = 0.95
"""Below this ratio to torch.nn a row is listed as slow."""


@dataclass
class Run:
    """What the parts of a run share."""

    writer: Writer
    origin: Provenance
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rates: dict[int, Rates] = field(default_factory=dict)

    def fail(self, sentence: str) -> None:
        self.failures.append(sentence)
        say(f"  FAILED {sentence}")


def say(text: str = "") -> None:
    print(text, flush=True)


def check_part(run: Run) -> None:
    say("\n1. Every cell against torch.nn: outputs, final states, all gradients")
    say(
        f"   allowed: {check.FACTOR} × torch.nn's own error against float64 + {check.ULPS} ulp, "
        f"float64 {check.FLOAT64_ULPS} ulp"
    )
    for cell, dtype, comparisons in check.check_all(PROVIDERS, {}):
        worst = max(comparisons, key=lambda comparison: comparison.share)
        say(
            f"   {cell:9} {dtype:9} {len(comparisons):4} tensors, "
            f"worst error {worst.share:4.0%} of the allowed"
        )
        for comparison in comparisons:
            if not comparison.ok:
                run.fail(str(comparison))


def timing_part(run: Run, threads: list[int], budget: float, least: int) -> dict[str, str]:
    """Times all rows at the first thread count, then those at the others while there is time.
    Returns what was left out, with the reason."""
    say("\n2. Against torch.nn, in turn; ratio above 1 is faster than torch.nn")
    chosen, left_out = workloads.select(workloads.load())
    points = measure.points(chosen, threads=threads)
    return left_out | measured(run, PROVIDERS, points, budget, least)


def today_part(run: Run, budget: float, least: int) -> dict[str, str]:
    """The tasks of ``today.py`` on one thread. Returns what was left out, with the reason."""
    say("\n3. Against what people write with torch.nn; `plain` is ours in torch.nn's way")
    points = measure.points(workloads.load(workloads.TODAY))
    left_out = measured(run, TODAY, points, budget, least)
    for line in report.today(run.rows):
        ratio = line.ratio.replace("*", "")
        say(f"   {line.workload} {line.kind}: {ratio} a {line.torch}, {line.share} of {line.plain}")
    return left_out


def measured(
    run: Run,
    providers: Iterable[str],
    points: list[Point],
    budget: float,
    least: int,
    memory: bool = True,
) -> dict[str, str]:
    say(measure.HEAD)
    bench = Bench([find(name) for name in providers], memory=memory, rates=run.rates)
    found, late = measure.run(
        bench, points, run.writer, budget=budget, least=least, progress=progress, say=tqdm.write
    )
    run.rows += found
    for row in found:
        if row.is_bad:
            run.fail(f"{row.workload} {row.kind}, {row.provider}: {row.status}")
    return late


def aims_part(run: Run, seconds: float) -> dict[str, str]:
    """Measures what part 2 has no row of, and prints the table. Returns what was left out, with the
    reason."""
    say(f"\n4. What the CPU's loops are to reach: {aims.OURS} on one thread")
    points = aims.missing(aims.ratio_points(), run.rows)
    path = results.of_run(run.writer.path, "cpu")
    with Writer(path, run.origin) as writer:
        apart = replace(run, writer=writer, rows=[])
        left_out = measured(apart, (aims.OURS, "torch"), points, seconds, aims.LEAST, memory=False)
    folder = run.writer.path.parent
    found = [
        *aims.ratio_aims(run.rows + apart.rows),
        *aims.workload_aims(*aims.kept(folder, run.origin)),
    ]
    found += aims.own_aims()
    with Writer(results.of_run(run.writer.path, "aims"), run.origin, aims.Aim) as writer:
        for aim in found:
            writer.write(aim)
    for line in aims.text(found):
        say(f"   {line}")
    return left_out


def char_lm_part(run: Run, steps: int) -> None:
    say("\n5. A character model on Python's standard library: Embedding + LSTM + Linear")
    corpus = char_lm.load_corpus()
    say(
        f"   {corpus.files} files, {len(corpus.data):,} characters, {len(corpus.vocabulary)} "
        f"different, sha256 {corpus.sha256[:16]}; {steps} steps of {char_lm.SHAPE}, one thread"
    )

    def progress(step: int, learners: dict[str, char_lm.Learner]) -> None:
        if (step + 1) % max(1, steps // 6) == 0:
            losses = ", ".join(f"{name} {learners[name].losses[-1]:.7f}" for name in PROVIDERS)
            say(f"   step {step + 1:4}: loss {losses}")

    with torch_threads(1):
        learners = char_lm.train(PROVIDERS, {}, corpus, steps, progress)
        sgemm = timing.interleave({"sgemm": Turn(timing.calibration())}, 0.1)["sgemm"]
    write_losses(results.of_run(run.writer.path, "losses"), learners)

    found = char_lm.agreement(learners)
    verdict = (
        f"largest relative distance of the curves {found.difference:.1e}, allowed "
        f"{found.allowed:.1e} (torch.nn in float32 to float64: {found.rounding:.1e})"
    )
    say(f"   {verdict}")
    if not found.ok:
        run.fail(f"character model: {verdict}")

    ours = fused_rnn.explain(learners["fused_rnn"].model.lstm, char_lm.lstm_input())
    ran = {"fused_rnn": ("auto", ours.backend, ours.algorithm), "torch": ("", "torch.nn", "")}
    seconds = {name: learners[name].seconds[:steps] for name in PROVIDERS}
    for name, (requested, backend, algorithm) in ran.items():
        with torch_threads(1):  # further steps: the curves are already on file
            peak = timing.peak_memory(partial(learners[name].step, *corpus.batch(steps)))
        row = Row(
            workload="char-lm",
            cell="lstm",
            shape=char_lm.SHAPE,
            kind="learn",
            dtype="float32",
            threads=1,
            provider=name,
            requested=requested,
            backend=backend,
            algorithm=algorithm,
            **measure.statistics_of(seconds[name], seconds["torch"]),
            peak_kib=None if peak is None else peak // 1024,
            calibration_gflops=timing.calibration_gflops(sgemm),
            calibration_speedup=1.0,
            counts=True,
            note=f"one optimizer step; {sum(seconds[name]):.2f} s for {steps}",
        )
        run.rows.append(row)
        run.writer.write(row)
    mine, theirs = sum(seconds["fused_rnn"]), sum(seconds["torch"])
    say(f"   wall time torch {theirs:.2f} s, fused_rnn {mine:.2f} s: {theirs / mine:.2f}×")


def write_losses(path: Path, learners: dict[str, char_lm.Learner]) -> None:
    columns = {f"{name}_loss": learner.losses for name, learner in learners.items()}
    columns |= {f"{name}_seconds": learner.seconds for name, learner in learners.items()}
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(columns)
        lines.writerows(zip(*columns.values(), strict=True))


def summary(run: Run, left_out: dict[str, str]) -> None:
    say("\nLeft out (`python benchmarks/run.py --workload NAME` runs the large ones):")
    for name, reason in left_out.items():
        say(f"   {name}: {reason}")
    if any(not row.counts for row in run.rows):
        say(
            "\nA ratio in parentheses does not count: beside it more threads gave the calibration "
            f"sgemm less than {timing.SPEEDUP_THAT_COUNTS}× of one thread."
        )
    ours = [row for row in run.rows if row.provider == "fused_rnn" and row.counts]
    slow = [row for row in ours if row.ratio < SLOW]
    say(
        f"\n{len(run.failures)} failed checks; {len(slow)} of {len(ours)} rows under {SLOW}× "
        f"torch.nn{':' if slow else '.'}"
    )
    for row in slow:
        say(f"   {row.workload} {row.kind}, {row.threads} threads: {row.ratio:.2f}×")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=90, help="seconds for part 2")
    parser.add_argument("--today", type=float, default=18, help="seconds for part 3")
    parser.add_argument("--aims", type=float, default=30, help="seconds for part 4, at least")
    parser.add_argument("--steps", type=int, default=300, help="of the character model")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="results folder")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one thread, few repeats, no part 4, 30 steps: does it run",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    threads, least = [count for count in (1, 2) if count <= rows.cores()], 5
    if arguments.quick:
        arguments.budget, arguments.today, arguments.steps, threads, least = 0, 0, 30, [1], 3
    silence()
    start = time.perf_counter()
    origin = rows.provenance(fused_rnn)
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H%M%SZ")
    path = arguments.out / origin.slug / f"{stamp}{'-part' if arguments.quick else ''}.csv"
    say(f"{origin.device}; torch {origin.torch}, Python {origin.python}, commit {origin.commit}")
    say(f"fused_rnn {origin.fused_rnn}: {origin.build}")

    with Writer(path, origin) as writer:
        run = Run(writer, origin)
        check_part(run)
        left_out = timing_part(run, threads, arguments.budget, least)
        left_out |= today_part(run, arguments.today, least)
        if not arguments.quick:
            left_out |= aims_part(run, arguments.aims)
        char_lm_part(run, arguments.steps)
    summary(run, left_out)
    say(f"\n{time.perf_counter() - start:.0f} s. Rows and pictures:")
    for file in (path, *plot.plot_run(path)):
        say(f"   {file}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
