"""The pieces of ``make gpu-check``. Each runs commands by way of :class:`gpu_run.Check`, keeps in
``check.found`` what the summary tells and what need not be done again, and says how it ended.

============  ===========================================================================
build         the library with this Python's torch; also loads one that was built without CUDA
test          the tests, what only a GPU shows first, a file at a time
sanitize      compute-sanitizer's tools on a planted error, which each must find, and on every op
micro         what synchronisation and launches cost here, the plan's constants
stacks        layers side by side against one after the other
bench         the grid: the CUDA kernels against torch.nn
bench_triton  the grid: Triton's kernels against torch.nn
============  ===========================================================================
"""

import csv
import os
import re
import runpy
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import results
from gpu_run import ROOT, Check, Outcome, now

PYTHON = sys.executable
MICRO = results.ROOT / "micro"
BUILT = ROOT / "build" / "micro"
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND_ERRORS = 9
"""Exit status that compute-sanitizer is told to give where it finds an error."""
KERNELS = "kns=fused_rnn"
"""Only kernels with this in their mangled name: cuBLAS' are not ours to check."""
TESTS = {
    # What only a GPU has.
    "test_gpu.py": "",
    "test_gpu_memory.py": "",
    # CUDA's kernels; their other half, on the emulator, is the CPU's work.
    "test_cuda_stepwise.py": "-k gpu",
    "test_cuda_cluster.py": "-k gpu",
    "test_cuda_grid.py": "-k gpu",
    # Triton's kernels; its interpreter and its compiler alone are the CPU's work.
    "test_triton.py": "-k gpu",
    "test_describe.py": "",
    "test_cuda.py": "",
    # The grids with the device as an axis.
    "test_modules.py": "",
    "test_cells.py": "",
    "test_layer.py": "",
    "test_ops.py": "",
    "test_bidirectional.py": "",
    "test_wavefront.py": "-k gpu",
    "test_gradients.py": "",
    "test_recompute.py": "",
    "test_vmap.py": "",
    "test_packed.py": "",
    "test_autocast.py": "",
    "test_compile.py": "",
    "test_convert.py": "",
    "test_wrapped.py": "",
    "test_step.py": "",
    "test_errors.py": "",
    "test_any_size.py": "",
    "test_sequences.py": "",
    "test_sequences_transforms.py": "",
    "test_streaming.py": "",
    "test_options.py": "",
    "test_regularisers.py": "",
    "test_jagged.py": "",
    "test_any_sequence.py": "",
    "test_differs.py": "",
}
"""Files in the order in which they run, and options of pytest for each; files that are in neither
table run last."""
LEFT_TO_CI = {
    f"test_{name}.py"
    for name in (
        *("aims", "backends", "bench", "benchmarks", "build", "char_lm", "compare"),
        *("cuda_build", "docs"),
        *("emulator", "examples", "export_trace", "gpu_check", "gpu_grid", "gradient_flow"),
        *("isa", "norm", "norm_modules", "peers", "plain", "plan"),
        *("plots", "profile", "real_models", "self_test", "sentinel", "streaming_sharded", "team"),
        *("threads", "triton_compile", "trust", "tune"),
    )
}
"""Files about the CPU or the tooling alone."""
BENCH_S = 450.0
LEAST_S = 20.0
"""With less time left nothing is begun."""


def build(check: Check) -> Outcome:
    compiled = check.command(PYTHON, "setup.py", "-q", "build_ext", "--inplace")
    if not compiled.ok:
        status = "cut" if compiled.status is None else "failed"  # ninja goes on where it stopped
        return Outcome(status, f"setup.py build_ext: {compiled.how}")
    told = check.command(PYTHON, "-m", "fused_rnn")
    check.found["info"] = told.output
    if not told.ok:
        return Outcome("failed", f"`python -m fused_rnn`, which tests itself: {told.how}")
    if not re.search(r"^backend cuda\s+available$", told.output, re.MULTILINE):
        return Outcome("failed", "`python -m fused_rnn` does not call the cuda backend available")
    library = cpu_built(check)
    if library is None:
        check.found["cpu_built"] = "none was given (CPU_BUILT=) and build/cuda holds none"
        return Outcome("passed", "the cuda backend is available; no CPU-built library was given")
    loaded = check.command(PYTHON, results.ROOT / "gpu_load.py", library, limit=120)
    last = (loaded.output.strip().splitlines() or [loaded.how])[-1]
    check.found["cpu_built"] = f"{library.name}: {last}"
    if not loaded.ok:
        return Outcome("failed", f"the library built beside a torch without CUDA: {last}")
    return Outcome("passed", "the cuda backend is available; the CPU-built library loads")


def cpu_built(check: Check) -> Path | None:
    """The library named by CPU_BUILT, or what ``make cuda`` left."""
    if check.options.cpu_built:
        return Path(check.options.cpu_built).resolve()
    return next(iter(sorted((ROOT / "build" / "cuda").rglob("libfused_rnn_cuda.so"))), None)


def test(check: Check) -> Outcome:
    """A file at a time, so that a crash or the deadline costs no other file's result."""
    files = check.found.setdefault("files", {})
    if check.found.setdefault("pytest", check.options.pytest) != check.options.pytest:
        files.clear()
        check.found["pytest"] = check.options.pytest
    ranks = {None: 0, "cut": 1, "failed": 2}  # what was never run before what is run again

    def order(path: Path) -> tuple[int, int, str]:
        place = places.index(path.name) if path.name in TESTS else len(places)
        return ranks[files.get(path.name, {}).get("status")], place, path.name

    places, found = [*TESTS], {*(ROOT / "tests").glob("test_*.py")}
    every = {path for path in found if path.name not in LEFT_TO_CI}
    check.found["left_to_ci"] = sorted(path.name for path in found - every)
    left = [path for path in every if files.get(path.name, {}).get("status") != "passed"]
    for path in sorted(left, key=order):
        if check.left < LEAST_S:
            break
        files[path.name] = run_file(check, path)
        check.save()
    return verdict(files, len(every), len(found - every))


def run_file(check: Check, path: Path) -> dict[str, str | int | float]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-rs", f"--junit-xml={report}", *shlex.split(TESTS.get(path.name, ""))]
        options += shlex.split(check.options.pytest)
        ended = check.command(PYTHON, "-m", "pytest", *options, path.relative_to(ROOT))
        counts = read_counts(report)
    if ended.status == 5:  # pytest collected nothing
        status = "passed" if not counts.get("errors") else "failed"
    elif ended.status is None:
        status = "cut"
    else:
        status = "passed" if ended.ok and counts else "failed"
    return {"status": status, "how": ended.how, **counts}


def read_counts(report: Path) -> dict[str, int]:
    """Counts of pytest's XML report; empty where it wrote none."""
    if not report.exists():
        return {}
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    names = ("tests", "failures", "errors", "skipped")
    totals = dict.fromkeys(names, 0)
    for suite in suites:
        for name in names:
            totals[name] += int(suite.get(name, 0))
    return totals


def verdict(
    files: dict[str, dict[str, str | int | float]], expected: int, left_to_ci: int
) -> Outcome:
    total = {
        name: sum(int(f.get(name, 0)) for f in files.values()) for name in ("tests", "skipped")
    }
    sentence = f"{total['tests']} tests in {len(files)} of {expected} files"
    sentence += f", {total['skipped']} skipped"
    if left_to_ci:
        sentence += f"; {left_to_ci} files about the CPU or the tooling alone are left to CI"
    wrong = [name for name, f in files.items() if f["status"] == "failed"]
    if wrong:
        return Outcome("failed", f"{sentence}; failed: {', '.join(wrong)}")
    if len(files) < expected or any(f["status"] == "cut" for f in files.values()):
        return Outcome("cut", f"{sentence}; run it again to go on")
    return Outcome("passed", sentence)


def sanitize(check: Check) -> Outcome:
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        return Outcome(
            "failed", "compute-sanitizer was not found on PATH, in CUDA_HOME/bin or beside nvcc"
        )
    planted = compile_micro(check, "planted_errors")
    if isinstance(planted, Outcome):
        return planted
    tools = check.found.setdefault("tools", {})
    for tool in TOOLS:
        if tools.get(tool, {}).get("status") == "passed":
            continue
        if check.left < LEAST_S:
            return Outcome("cut", f"{len(tools)} of {len(TOOLS)} tools; run it again to go on")
        tools[tool] = watch(check, sanitizer, tool, planted)
        check.save()
    unseen = {tool for tool, found in tools.items() if found["planted"] != "found"}
    told = ", ".join(
        f"{tool} {found['status']}" + " (did not find the planted error)" * (tool in unseen)
        for tool, found in tools.items()
    )
    states = {found["status"] for found in tools.values()}
    return Outcome(next((s for s in ("failed", "cut") if s in states), "passed"), told)


def watch(check: Check, sanitizer: str, tool: str, planted: Path) -> dict[str, str]:
    """One tool: on the planted error, which it must find, and on every op, where it must find none.
    The ops also run where the planted error was not found: what is found there is an error."""
    watched = [sanitizer, "--tool", tool, "--kernel-name", KERNELS]
    watched += ["--error-exitcode", str(FOUND_ERRORS)]
    if tool == "memcheck":  # what torch asks the driver for and does not get is no error of ours
        watched += ["--report-api-errors", "no"]
    control = check.command(*watched, planted, tool, limit=60)
    seen = control.status == FOUND_ERRORS
    # With torch's own pool, memory beyond a tensor's end would belong to some other tensor.
    whole = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ended = check.command(*watched, PYTHON, results.ROOT / "gpu_sanitize.py", env=whole)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", ended.output)
    said = [*re.findall(r"^\d+ calls made.*", ended.output, re.MULTILINE), *summaries]
    clean = ended.ok and len(said) > len(summaries)
    cut = ended.status is None
    return {
        "status": "passed" if seen and clean else "cut" if seen and cut else "failed",
        "planted": "found" if seen else f"not found ({control.how})",
        "said": ended.how if cut else "; ".join(said) or ended.how,
    }


def micro(check: Check) -> Outcome:
    program = compile_micro(check, "sync_latency")
    if isinstance(program, Outcome):
        return program
    ended = check.command(program, limit=240)
    lines = [line for line in ended.output.splitlines() if line.count(",") == 7]
    if len(lines) > 1:
        origin = {"device": check.device["device"], "date": now(), "commit": check.commit}
        with (check.folder / "sync-latency.csv").open("w", newline="") as file:
            rows = [row | origin for row in csv.DictReader(lines)]
            writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if not ended.ok:
        return Outcome("failed", f"{max(0, len(lines) - 1)} rows, then {ended.how}")
    return Outcome("passed", f"{len(lines) - 1} rows")


def stacks(check: Check) -> Outcome:
    ended = check.command(
        PYTHON, results.ROOT / "gpu_stacks.py", "--out", check.folder.parent, limit=240
    )
    counted = re.findall(r"^\d+ rows, \d+ wrong$", ended.output, re.MULTILINE)
    said = f"{counted[-1] if counted else 'it counted no rows'} ({ended.how})"
    return Outcome("passed" if ended.ok else "failed", said)


def bench(check: Check, backend: str = "cuda") -> Outcome:
    seconds = min(BENCH_S, check.left - LEAST_S)
    options = ("--backends", backend, "--out", check.folder.parent, "--seconds", f"{seconds:.0f}")
    ended = check.command(PYTHON, results.ROOT / "gpu_grid.py", *options)
    counted = re.findall(r"^\d+ of \d+ points measured.*", ended.output, re.MULTILINE)
    said = counted[-1] if counted else "it was ended before it counted its rows"
    if ended.status is None:
        return Outcome("cut", f"{said}; run it again to go on")
    return Outcome("passed" if ended.ok else "failed", f"{said} ({ended.how})")


def bench_triton(check: Check) -> Outcome:
    """A piece of its own: Triton's kernels take seconds to compile at each new H, and the CUDA
    kernels' rows do not wait for them."""
    return bench(check, "triton")


def compile_micro(check: Check, name: str) -> Path | Outcome:
    """The program, compiled for this GPU; or why there is none."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        return Outcome("failed", "nvcc was not found: see what setup.py says of NVCC")
    BUILT.mkdir(parents=True, exist_ok=True)
    target = BUILT / name
    arch = "".join(map(str, check.device["capability"]))
    compiled = check.command(*compile_command(nvcc, name, arch, target), limit=180)
    return target if compiled.ok else Outcome("failed", f"nvcc {name}.cu: {compiled.how}")


def compile_command(nvcc: str, name: str, arch: str, target: Path) -> tuple[str | Path, ...]:
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    runtime = f"-L{Path(nvcc).parent.parent / 'lib'}"  # of pip's nvcc: see setup.py
    options = ("-O3", "-std=c++17", "-lineinfo", "-I", ROOT / "csrc", code, runtime)
    return (nvcc, *options, MICRO / f"{name}.cu", "-o", target)


def find_tool(name: str) -> str | None:
    """nvcc as setup.py finds it. Other tools of CUDA: in CUDA_HOME, on PATH, beside that nvcc, and
    where CUDA is by default."""
    nvcc: str | None = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()
    if name == "nvcc":
        return nvcc
    home = os.environ.get("CUDA_HOME")
    places = [
        str(Path(home, "bin")) if home else "",
        os.environ.get("PATH", os.defpath),
        str(Path(nvcc).resolve().parent) if nvcc else "",
        "/usr/local/cuda/bin",
    ]
    return shutil.which(name, path=os.pathsep.join(filter(None, places)))


PIECES: dict[str, Callable[[Check], Outcome]] = {
    piece.__name__: piece for piece in (build, test, sanitize, micro, stacks, bench, bench_triton)
}
