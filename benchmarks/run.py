"""``make bench``: is it right, how fast is it, does it learn the same.

1. every cell against torch.nn (``check.py``);
2. the workloads of ``workloads.toml`` against torch.nn: checked, timed in turn, memory beside it;
3. a character language model, once with each LSTM (``char_lm.py``).

Prints as it goes, keeps rows, loss curves and two pictures under ``results/<device>/``. The exit
status says whether all checks passed; rows slower than torch.nn are listed at the end.
"""

import argparse
import csv
import sys
import time
import warnings
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import char_lm
import check
import plot
import results
import timing
import torch
import workloads
from results import Row
from timing import Quantiles, Turn, torch_threads
from torch import nn
from workloads import Case, Workload

TORCH_NN = {"backend": "torch.nn", "algorithm": ""}
SLOW = 0.95
"""Below this ratio to torch.nn a row is listed as slow."""
FIRST_SHARE = 0.65
"""Share of the time for the rows on one thread, which count everywhere, where there are others."""


@dataclass
class Run:
    """What the parts of a run share."""

    fused_rnn: ModuleType
    backend: str
    writer: results.Writer
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def providers(self) -> dict[str, ModuleType]:
        return {"fused_rnn": self.fused_rnn, "torch": nn}

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        return {"fused_rnn": {"backend": self.backend}}

    def keep(self, *rows: Row) -> None:
        for row in rows:
            self.rows.append(row)
            self.writer.write(row)

    def chosen(self, module: nn.Module, input: Any, states: Any = None) -> dict[str, str]:
        """The backend that runs ``module`` on ``input``, and how, as columns of a row."""
        found = self.fused_rnn.explain(module, input, states)
        return {"backend": found.backend, "algorithm": found.algorithm}

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
    for cell, dtype, comparisons in check.check_all(run.providers, run.options):
        worst = max(comparisons, key=lambda comparison: comparison.share)
        say(
            f"   {cell:9} {dtype:9} {len(comparisons):4} tensors, "
            f"worst error {worst.share:4.0%} of the allowed"
        )
        for comparison in comparisons:
            if not comparison.ok:
                run.fail(str(comparison))


def timing_part(
    run: Run, chosen: list[Workload], threads: list[int], budget_s: float, least: int
) -> dict[str, str]:
    """Times all rows at the first thread count, then those at the others while there is time.
    Returns what was left out, with the reason."""
    say("\n2. Against torch.nn, in turn, milliseconds a call; ratio above 1 is faster")
    say(
        f"   {'workload':19} {'shape':32} {'pass':8} thr {'torch':>10} {'fused_rnn':>10} "
        f"{'ratio':>8} {'peak MiB':>15}  backend"
    )
    start = time.perf_counter()
    first_budget = budget_s * (FIRST_SHARE if threads[1:] else 1)
    unmeasured = sum(len(w.passes) for w in chosen)
    right: list[tuple[Workload, dict[str, Case]]] = []
    for w in chosen:
        cases = workloads.make_cases(w, run.providers, options=run.options)
        wrong = [c for c in check.compare_cases(w.name, cases, w.passes[-1]) if not c.ok]
        for comparison in wrong:
            run.fail(str(comparison))
        del cases["oracle"]
        if not wrong:
            right.append((w, cases))
        for kind in w.passes:
            left = start + first_budget - time.perf_counter()
            if not wrong:
                time_row(run, w, kind, cases, threads[0], left / unmeasured, least)
            unmeasured -= 1

    left_out = {}
    later = [(count, w, kind) for count in threads[1:] for w, _ in right for kind in w.passes]
    cases_of = {w.name: cases for w, cases in right}
    for i, (count, w, kind) in enumerate(later):
        left = start + budget_s - time.perf_counter()
        if left > 0:
            time_row(run, w, kind, cases_of[w.name], count, left / (len(later) - i), min(least, 3))
        else:
            left_out[f"{w.name} {kind}, {count} threads"] = "no time left, see --budget"
    return left_out


def time_row(
    run: Run,
    w: Workload,
    kind: str,
    cases: dict[str, Case],
    threads: int,
    budget: float,
    least: int,
) -> None:
    """Measures both providers, writes their rows, prints one line."""
    calls = {name: cases[name].call(kind) for name in run.providers}
    turns = {f"sgemm{count}": Turn(timing.calibration(), count) for count in {1, threads}}
    turns |= {name: Turn(call, threads) for name, call in calls.items()}
    samples = timing.interleave(turns, budget, min_repeats=least)
    with torch_threads(threads):
        repeats = 3 if threads == 1 else 1
        peaks = {name: timing.peak_memory(call, repeats) for name, call in calls.items()}

    case = cases["fused_rnn"]
    with torch.set_grad_enabled(kind == "train"):
        backends = {
            "torch": TORCH_NN,
            "fused_rnn": run.chosen(case.module, case.input, case.states),
        }
    single, these = samples["sgemm1"], samples[f"sgemm{threads}"]
    ours, theirs = (
        Row(
            workload=w.name,
            cell=w.cell,
            shape=w.shape,
            kind=kind,
            dtype="float32",
            threads=threads,
            provider=name,
            requested=run.backend if name == "fused_rnn" else "",
            **backends[name],
            **statistics_of(samples[name], samples["torch"]),
            peak_kib=None if peaks[name] is None else peaks[name] // 1024,
            calibration_gflops=timing.calibration_gflops(these),
            calibration_speedup=timing.median_ratio(single, these),
            counts=timing.counts(threads, single, these),
            note=w.note,
        )
        for name in ("fused_rnn", "torch")
    )
    run.keep(ours, theirs)
    ratio = f"{ours.ratio:.2f}×" if ours.counts else f"({ours.ratio:.2f}×)"
    memory = " → ".join(row.peak_mib for row in (theirs, ours))
    say(
        f"   {w.name:19} {w.shape:32} {kind:8} {threads:3} {theirs.p50_ms:10.4g} "
        f"{ours.p50_ms:10.4g} {ratio:>8} {memory:>15}  {ours.backend}"
    )


def statistics_of(seconds: list[float], torch_seconds: list[float]) -> dict[str, Any]:
    """The columns of a row that come from its samples."""
    q = Quantiles.of(seconds)
    return {
        "p20_ms": q.p20 * 1e3,
        "p50_ms": q.p50 * 1e3,
        "p80_ms": q.p80 * 1e3,
        "repeats": len(seconds),
        "ratio": timing.median_ratio(torch_seconds, seconds),
    }


def char_lm_part(run: Run, steps: int) -> None:
    say("\n3. A character model on Python's standard library: Embedding + LSTM + Linear")
    corpus = char_lm.load_corpus()
    say(
        f"   {corpus.files} files, {len(corpus.data):,} characters, {len(corpus.vocabulary)} "
        f"different, sha256 {corpus.sha256[:16]}; {steps} steps of {char_lm.SHAPE}, one thread"
    )

    def progress(step: int, learners: dict[str, char_lm.Learner]) -> None:
        if (step + 1) % max(1, steps // 6) == 0:
            losses = ", ".join(f"{name} {learners[name].losses[-1]:.7f}" for name in run.providers)
            say(f"   step {step + 1:4}: loss {losses}")

    with torch_threads(1):
        learners = char_lm.train(run.providers, run.options, corpus, steps, progress)
        sgemm = timing.interleave({"sgemm": Turn(timing.calibration())}, 0.1)["sgemm"]
    write_losses(results.losses_path(run.writer.path), learners)

    found = char_lm.agreement(learners)
    verdict = (
        f"largest relative distance of the curves {found.difference:.1e}, allowed "
        f"{found.allowed:.1e} (torch.nn in float32 to float64: {found.rounding:.1e})"
    )
    say(f"   {verdict}")
    if not found.ok:
        run.fail(f"character model: {verdict}")

    model = learners["fused_rnn"].model
    backends = {"torch": TORCH_NN, "fused_rnn": run.chosen(model.lstm, char_lm.lstm_input())}
    seconds = {name: learners[name].seconds[:steps] for name in run.providers}
    for name in run.providers:
        with torch_threads(1):  # further steps: the curves are already on file
            peak = timing.peak_memory(partial(learners[name].step, *corpus.batch(steps)))
        run.keep(
            Row(
                workload="char-lm",
                cell="lstm",
                shape=char_lm.SHAPE,
                kind="learn",
                dtype="float32",
                threads=1,
                provider=name,
                requested=run.backend if name == "fused_rnn" else "",
                **backends[name],
                **statistics_of(seconds[name], seconds["torch"]),
                peak_kib=None if peak is None else peak // 1024,
                calibration_gflops=timing.calibration_gflops(sgemm),
                calibration_speedup=1.0,
                counts=True,
                note=f"one optimizer step; {sum(seconds[name]):.2f} s for {steps}",
            )
        )
    ours, theirs = sum(seconds["fused_rnn"]), sum(seconds["torch"])
    say(f"   wall time torch {theirs:.2f} s, fused_rnn {ours:.2f} s: {theirs / ours:.2f}×")


def write_losses(path: Path, learners: dict[str, char_lm.Learner]) -> None:
    columns = {f"{name}_loss": learner.losses for name, learner in learners.items()}
    columns |= {f"{name}_seconds": learner.seconds for name, learner in learners.items()}
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(columns)
        lines.writerows(zip(*columns.values(), strict=True))


def summary(run: Run, left_out: dict[str, str]) -> None:
    if left_out:
        say("\nLeft out (`--all` or `--only NAME` runs the large ones):")
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
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--budget", type=float, default=100, help="seconds for part 2")
    parser.add_argument("--only", metavar="REGEX", help="workloads whose name matches")
    parser.add_argument("--all", action="store_true", help="the large workloads too")
    parser.add_argument("--backend", default="auto", help="of fused_rnn's modules")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="results folder")
    parser.add_argument("--steps", type=int, default=300, help="of the character model")
    parser.add_argument("--skip-check", action="store_true", help="without part 1")
    parser.add_argument("--skip-timing", action="store_true", help="without part 2")
    parser.add_argument("--skip-train", action="store_true", help="without part 3")
    parser.add_argument(
        "--quick", action="store_true", help="one thread, three repeats, 30 steps: does it run"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    import fused_rnn

    if arguments.quick:
        arguments.threads, arguments.budget, arguments.steps = [1], 0, 30
    threads = sorted({count for count in arguments.threads if count <= results.cores()})
    # torch.nn's word that its own projections are slow; the oracle hears it too.
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
    start = time.perf_counter()
    origin = results.provenance(fused_rnn)
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H%M%SZ")
    part = arguments.only or arguments.quick or arguments.skip_timing or arguments.skip_train
    path = arguments.out / origin.slug / f"{stamp}{'-part' if part else ''}.csv"
    say(f"{origin.device}; torch {origin.torch}, Python {origin.python}, commit {origin.commit}")
    say(f"fused_rnn {origin.fused_rnn}: {origin.build}")

    chosen, left_out = workloads.select(
        workloads.load(), only=arguments.only, everything=arguments.all
    )
    with results.Writer(path, origin) as writer:
        run = Run(fused_rnn, arguments.backend, writer)
        if not arguments.skip_check:
            check_part(run)
        if not arguments.skip_timing:
            least = 3 if arguments.quick else 5
            left_out |= timing_part(run, chosen, threads, arguments.budget, least)
        if not arguments.skip_train:
            char_lm_part(run, arguments.steps)
    summary(run, {} if arguments.only or arguments.skip_timing else left_out)
    pictures = plot.plot_run(path)
    files = [path, *pictures]
    say(f"\n{time.perf_counter() - start:.0f} s. Rows and pictures:")
    for file in files:
        say(f"   {file}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
