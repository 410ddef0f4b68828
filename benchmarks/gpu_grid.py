"""The grid against torch.nn on a GPU: ``make gpu-check PIECE=bench``.

Each row is one provider at one point of ``gpu_points.py``: checked against float64 where that is
affordable, then timed in turn with its rivals by CUDA events, inputs rotated, L2 overwritten before
each call. Rows are in ``<out>/grid.csv`` the moment they are measured. A run goes on where the last
one on the same device and code stopped, and stops by itself after ``--seconds``.

``--device cpu --tiny`` runs the same code on any machine.
"""

import argparse
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu_points
import gpu_rows
import results
import torch
from gpu_points import Point
from gpu_rows import TORCH, GpuRow
from torch import Tensor, nn

from fused_rnn.bench import check, timing, workloads
from fused_rnn.bench.arithmetic import tf32
from fused_rnn.bench.rows import Provenance, Writer, provenance
from fused_rnn.bench.timing import Turn, wall_clock
from fused_rnn.bench.workloads import Case, grad_mode

AFFORDABLE_GFLOP = 10_000.0
"""Largest point that is also computed in float64: a fraction of a second at some 50 TFLOPS."""
AFFORDABLE_ELEMENTS = 1 << 28
"""Largest T·N·H·layers·directions of such a point: float64 states and gates take 64 bytes each."""
ROW_S = 0.8
"""Seconds of timing a point, where its least repeats take less."""
LEAST, MOST = 5, 50
CALIBRATION = {"cuda": (4096, torch.float16), "cpu": (timing.CALIBRATION_SIZE, torch.float32)}
OUT_OF_MEMORY = "out of memory"
REFUSAL = re.compile(r"backend '.*?' cannot run this: ")
DEVICE_BROKEN = 3
"""Exit status where the device is in error and nothing more can be measured."""


class DeviceBrokenError(RuntimeError):
    """No further call to the device can succeed."""


@dataclass
class Verdict:
    """What is known of one provider at one point so far."""

    status: str = ""
    output: float | None = None
    gradient: float | None = None


@dataclass
class Bench:
    """What all points share. ``providers`` are torch.nn and its rivals: a namespace of modules and
    their options by name."""

    device: str
    providers: dict[str, tuple[ModuleType, dict[str, Any]]]
    fused_rnn: ModuleType
    row_s: float = ROW_S
    measure: Callable[[Callable[[], object]], float] = field(init=False)

    def __post_init__(self) -> None:
        self.measure = timing.CudaStopwatch() if self.device == "cuda" else wall_clock

    def rows(self, point: Point) -> list[GpuRow]:
        """Measures all providers at ``point``."""
        self.free()  # the last point's memory
        with tf32(point.arithmetic.tf32):
            verdicts = {name: Verdict() for name in self.providers}
            if affordable(point):
                self.check(point, verdicts)
                for verdict in verdicts.values():
                    if verdict.status == OUT_OF_MEMORY:  # without float64 beside it, it may fit
                        verdict.status = ""
            cases = {}
            for name in self.providers:
                if not verdicts[name].status:
                    with self.noting(verdicts[name]):
                        cases[name] = self.prepare(point, name)
            peaks, samples = self.time(point, cases, verdicts)
            answers = {name: self.answer(point, name, cases.get(name)) for name in self.providers}
        return [
            GpuRow(
                **gpu_rows.describe(point),
                provider=name,
                **answers[name],
                status=verdict.status or "ok",
                **gpu_rows.statistics_of(point, name, samples),
                peak_mib=peaks.get(name) if name in samples else None,
                error_output=verdict.output,
                error_gradient=verdict.gradient,
                calibration_tflops=self.calibrated(samples),
            )
            for name, verdict in verdicts.items()
        ]

    def make(self, point: Point, name: str, *, dropout: bool = True) -> Case:
        """A provider's case, or the ``"oracle"``'s; the same values for each."""
        w = point.workload if dropout else replace(point.workload, dropout=0.0)
        namespace, options = self.providers.get(name, (None, {}))
        given = {} if namespace is None else {name: namespace}
        case = workloads.make_cases(
            w,
            given,
            point.arithmetic.dtype,
            options={name: options},
            device=self.device,
            oracle=not given,
        )[name]
        # In training mode cuDNN keeps what a backward needs, without gradients too.
        case.module.train(point.kind == "train")
        return case

    def check(self, point: Point, verdicts: dict[str, Verdict]) -> None:
        """Fills in errors, and ``wrong`` where they break the rule of ``check.py``. Without
        dropout, whose random numbers are not the same on a GPU."""
        found: dict[str, dict[str, Tensor]] = {}
        for name in ("oracle", *self.providers):
            verdict = verdicts.get(name, Verdict())
            with self.noting(verdict):
                found[name] = self.results(point, name)
            if verdict.status:
                say(f"{point}: {name} {verdict.status}, while checking")
            self.free()
        if not {"oracle", TORCH} <= found.keys():
            return
        # A ReLU's gradient jumps where rounding flips a sign, of which so many steps have some in
        # any arithmetic (see check.py): it is told, and judged on integers by the tests.
        loose = point.workload.cell == "rnn_relu"
        theirs, oracle = found[TORCH], found["oracle"]
        for name in found.keys() & self.providers.keys():
            verdict, eps = verdicts[name], point.arithmetic.eps
            with self.noting(verdict):
                compared = check.compare_results(name, found[name], theirs, oracle, eps)
                gradients = [c for c in compared if c.where.startswith(f"{name}: d ")]
                outputs = [c for c in compared if c not in gradients]
                verdict.output = gpu_rows.worst(outputs)
                verdict.gradient = gpu_rows.worst(gradients)
                wrong = [c for c in (outputs if loose else compared) if not c.ok]
                if wrong and name != TORCH:
                    verdict.status = f"wrong: {wrong[0]}"

    def results(self, point: Point, name: str) -> dict[str, Tensor]:
        case = self.make(point, name, dropout=False)
        return {k: x.detach() for k, x in case.results(point.kind).items()}

    def prepare(self, point: Point, name: str) -> list[Case]:
        """Cases with different inputs, to take in turn, each called once."""
        case = self.make(point, name)
        cases = [case, case.another()]
        with grad_mode(point.kind):
            for each in cases:
                each.call(point.kind)()
        self.wait()
        return cases

    def time(
        self, point: Point, cases: dict[str, list[Case]], verdicts: dict[str, Verdict]
    ) -> tuple[dict[str, float | None], dict[str, list[float]]]:
        """Peak MiB and seconds a call of each; with them ``"calibration"``, a matrix product."""
        peaks: dict[str, float | None] = {}
        turns = {}
        for name in [*cases]:
            with self.noting(verdicts[name]), grad_mode(point.kind):
                peaks[name] = self.peak(cases[name][0].call(point.kind))
                inputs = cycle([case.call(point.kind) for case in cases[name]])
                turns[name] = Turn(lambda inputs=inputs: next(inputs)())  # type: ignore[misc]
        size, dtype = CALIBRATION[self.device]
        product = timing.calibration(size, dtype, self.device)
        product()
        turns["calibration"] = Turn(product)
        shared = Verdict()
        samples: dict[str, list[float]] = {}
        with self.noting(shared), grad_mode(point.kind):
            samples = timing.interleave(
                turns, self.row_s, min_repeats=LEAST, max_repeats=MOST, measure=self.measure
            )
        for name in turns.keys() & verdicts.keys():
            verdicts[name].status = shared.status
        return peaks, samples

    def answer(self, point: Point, name: str, cases: list[Case] | None) -> dict[str, str]:
        """Which algorithm ran: by torch's rule for cuDNN, or by what fused_rnn says of itself."""
        _, options = self.providers[name]
        requested = options.get("backend", "")
        if not cases:
            return {"requested": requested, "backend": "", "algorithm": ""}
        grad = point.kind == "train"
        if name == TORCH:
            algorithm = self.cudnn_algorithm(point) if self.device == "cuda" else ""
            return {"requested": "", "backend": TORCH, "algorithm": algorithm}
        with torch.set_grad_enabled(grad):
            found = self.fused_rnn.explain(cases[0].module, cases[0].input, cases[0].states)
        first = found.algorithm.splitlines()[0]
        return {"requested": requested, "backend": found.backend, "algorithm": first}

    def cudnn_algorithm(self, point: Point) -> str:
        """torch's rule, ``forward/backward`` in training; a cell's step never goes to cuDNN."""
        if point.kind == "step":
            return "cell kernels"
        from fused_rnn.backends import Problem, cudnn

        w, grad = point.workload, point.kind == "train"
        problem = Problem(
            cell=w.cell,
            dtype=point.arithmetic.dtype,
            device=self.device,
            T=w.T,
            N=w.N,
            I=w.I,
            H=w.H,
            P=w.P,
            layers=w.L,
            directions=w.D,
            grad=grad,
            packed=w.lengths is not None,
            compiling=False,
        )
        gpu = torch.cuda.get_device_properties()
        given = (problem, (gpu.major, gpu.minor), gpu.multi_processor_count)
        passes = (False, True) if grad else (False,)
        return "/".join(cudnn.algorithm(*given, backward=backward) for backward in passes)

    def peak(self, call: Callable[[], object]) -> float | None:
        cuda = self.device == "cuda"
        found = timing.peak_cuda_memory(call) if cuda else timing.peak_memory(call, 1)
        return None if found is None else found / 2**20

    def calibrated(self, samples: dict[str, list[float]]) -> float | None:
        if "calibration" not in samples:
            return None
        size, _ = CALIBRATION[self.device]
        return timing.calibration_gflops(samples["calibration"], size) / 1e3

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def noting(self, verdict: Verdict) -> Iterator[None]:
        """What fails inside becomes the verdict's status, and measuring goes on; unless the device
        is in error, which no later call would survive."""
        try:
            yield
            self.wait()
        except Exception as error:  # becomes a row, which fails the run
            sentence = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
                verdict.status = OUT_OF_MEMORY
            elif refusal := REFUSAL.match(sentence):
                verdict.status = f"refused: {sentence[refusal.end() :]}"
            else:
                verdict.status = f"failed: {sentence}"
        try:
            self.wait()
        except RuntimeError as error:
            raise DeviceBrokenError(f"{verdict.status or error}") from error
        if verdict.status:
            gc.collect()  # what failed may hang on the exception's frames
            self.free()


def affordable(point: Point) -> bool:
    w = point.workload
    elements = w.T * w.N * w.H * w.L * w.D
    return w.gflop(point.kind) <= AFFORDABLE_GFLOP and elements <= AFFORDABLE_ELEMENTS


def run(bench: Bench, points: list[Point], path: Path, origin: Provenance, end: float) -> int:
    """Measures what is missing until ``end``; the exit status: 0 if no row is wrong or failed."""
    rows = gpu_rows.read(path, origin)
    there: dict[str, set[str]] = {}
    for row in rows:
        there.setdefault(row.key, set()).add(row.provider)
    missing = [p for p in points if there.get(" ".join(p.key), set()) < bench.providers.keys()]
    measured = 0
    with Writer(path, origin, GpuRow, append=True) as writer:
        for point in missing:
            if time.monotonic() >= end:
                break
            try:
                new = bench.rows(point)
            except DeviceBrokenError as error:
                say(f"{point}: the device is in error, nothing more can be measured: {error}")
                status = f"device error: {error}"
                empty = {"requested": "", "backend": "", "algorithm": "", "status": status}
                for name in bench.providers:
                    writer.write(GpuRow(**gpu_rows.describe(point), provider=name, **empty))
                return DEVICE_BROKEN
            for row in new:
                writer.write(row)
            rows += new
            measured += 1
            say(gpu_rows.line(point, new))
    bad = [row for row in rows if row.status.startswith(("wrong", "failed", "device"))]
    say(
        f"{len(points) - len(missing) + measured} of {len(points)} points measured, "
        f"{measured} of them now; {len(bad)} rows wrong or failed"
    )
    for row in bad:
        say(f"   {row.key}, {row.provider}: {row.status}")
    return 1 if bad else 0


def say(text: str) -> None:
    print(text, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="results folder")
    parser.add_argument("--seconds", type=float, default=450, help="start no row after these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of fused_rnn's modules, such as cuda:stepwise or triton (default: the device's name)",
    )
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: does it run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    end = time.monotonic()
    arguments = parse(argv)
    end += arguments.seconds
    import fused_rnn

    if arguments.device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        say(f"torch {torch.__version__} sees no GPU; `--device cpu --tiny` runs the code without")
        return 2
    origin = provenance(fused_rnn, arguments.device)
    backends = arguments.backends or [arguments.device]
    for name in backends:
        if reason := fused_rnn.backends.BACKENDS[name.partition(":")[0]].available():
            say(f"backend {name!r} is not available: {reason}")
            return 2
    providers: dict[str, tuple[ModuleType, dict[str, Any]]] = {TORCH: (nn, {})}
    providers |= {name: (fused_rnn, {"backend": name}) for name in backends}
    bench = Bench(arguments.device, providers, fused_rnn, 0.0 if arguments.tiny else ROW_S)
    path = arguments.out / origin.slug / "grid.csv"
    say(f"{origin.device}; torch {origin.torch}, cuDNN {origin.cudnn}, commit {origin.commit}")
    return run(bench, gpu_points.points(tiny=arguments.tiny), path, origin, end)


if __name__ == "__main__":
    sys.exit(main())
