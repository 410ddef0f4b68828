"""Compiles the emulator and its drivers with $CXX into build/emulator, and runs cases.

What was compiled is kept with a hash of the command and of every file it read, so a second run of
the tests compiles nothing.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulator"
CXX = shlex.split(os.environ.get("CXX", "g++"))
# The emulator's folder first: its cuda/primitives.cuh stands in for csrc/cuda/primitives.cuh.
INCLUDES = [f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
# What stands in for CUDA's own header, which nvcc has.
HOST = f"-I{HERE / 'host'}"
FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-DFUSED_RNN_MOST_HELD=3"]
# Each seed reports its own races, also where an earlier one has reported the same place.
TSAN_OPTIONS = "exitcode=0 symbolize=0 suppress_equal_stacks=0 suppress_equal_addresses=0"


def compiler() -> str | None:
    return shutil.which(CXX[0])


def nvcc() -> str | None:
    """The CUDA compiler that setup.py would take."""
    return runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()


def _digest(command: list[str], files: Iterable[str]) -> str:
    state = hashlib.sha256(shlex.join(command).encode())
    for file in files:
        state.update(file.encode() + Path(file).read_bytes())
    return state.hexdigest()


def _is_current(stamp: Path, command: list[str]) -> bool:
    """The stamp holds the digest, then the files that it was taken of."""
    if not stamp.exists():
        return False
    digest, *files = stamp.read_text().splitlines()
    return all(map(os.path.exists, files)) and _digest(command, files) == digest


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """While one process makes a file, another that wants the same one waits for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")


def _compile(source: Path, flavour: str, flags: list[str]) -> Path:
    object_file = BUILD / flavour / source.parent.name / f"{source.stem}.o"
    stamp = object_file.with_suffix(".stamp")
    command = [*CXX, *FLAGS, *INCLUDES, HOST, *flags, "-c", str(source), "-o", str(object_file)]
    with _locked(object_file):
        if not _is_current(stamp, command):
            depends = object_file.with_suffix(".d")
            _run([*command, "-MMD", "-MF", str(depends)])
            files = shlex.split(depends.read_text().partition(":")[2].replace("\\\n", " "))
            stamp.write_text("\n".join([_digest(command, files), *files]))
    return object_file


def build(driver: Path, thread_sanitizer: bool = False, instead: Path | None = None) -> Path:
    """The program of a driver. Only the driver and the kernels in it are instrumented.

    ``instead`` is a folder whose files stand in for those of csrc; its name is one of their own.
    """
    flavour = "thread_sanitizer" if thread_sanitizer else "plain"
    define = ["-DEMULATOR_TSAN"] if thread_sanitizer else []
    sanitize = ["-fsanitize=thread"] if thread_sanitizer else []
    jobs = [(source, flavour, ["-O2", *define]) for source in sorted(HERE.glob("*.cpp"))]
    replaced = [] if instead is None else ["-iquote", str(instead)]
    own = flavour if instead is None else f"{flavour}-{instead.name}"
    jobs.append((driver, own, ["-O1", *define, *sanitize, *replaced]))
    return _link(_compile_all(jobs), BUILD / own / driver.stem, sanitize)


def _compile_all(jobs: list[tuple[Path, str, list[str]]]) -> list[Path]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: _compile(*job), jobs))


def _link(objects: list[Path], target: Path, flags: list[str]) -> Path:
    files = list(map(str, objects))
    command = [*CXX, *files, *flags, "-o", str(target)]
    stamp = target.with_suffix(".stamp-link")
    with _locked(target):
        if not target.exists() or not _is_current(stamp, command):
            _run(command)
            stamp.write_text("\n".join([_digest(command, files), *files]))
    return target


@functools.cache
def library() -> Path:
    """The CUDA ops over the emulator, as a library of torch ops."""
    flags = ["-O1", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    for folder in include_paths():
        flags += ["-isystem", folder]
    shared_sources = [ROOT / "csrc" / name for name in ("ops.cpp", "prepare.cpp", "plan.cpp")]
    sources = [*sorted(HERE.glob("*.cpp")), HERE / "ops" / "ops.cpp", *shared_sources]
    objects = _compile_all([(source, "library", flags) for source in sources])
    torch_folder = [f"-L{folder}" for folder in library_paths()]
    shared = ["-shared", *torch_folder, "-ltorch_cpu"]
    return _link(objects, BUILD / "library" / "libfused_rnn_emulated.so", shared)


def ops() -> Any:
    """``torch.ops.fused_rnn``'s twin, which runs the CUDA kernels' source on CPU tensors."""
    torch.ops.load_library(str(library()))
    return torch.ops.fused_rnn_emulated


def seed(value: int) -> None:
    """Choose the schedules of the ops' launches."""
    ctypes.CDLL(str(library())).fused_rnn_emulator_seed(ctypes.c_uint64(value))


def clusters(*active: int) -> None:
    """Say how many clusters of 1, 2, 4, 8 and 16 blocks fit the emulated GPU at a time."""
    given = (ctypes.c_int64 * 5)(*active)
    ctypes.CDLL(str(library())).fused_rnn_emulator_clusters(given)


def cluster_launches() -> int:
    """How many launches of clusters there were since the last call."""
    count = ctypes.CDLL(str(library())).fused_rnn_emulator_cluster_launches
    count.restype = ctypes.c_int64
    return int(count())


def overlaps() -> int:
    """How many chunks layers of stacks ended since the last call beside the layers before them."""
    count = ctypes.CDLL(str(library())).fused_rnn_emulator_overlaps
    count.restype = ctypes.c_int64
    return int(count())


def streams(*, captured: bool = False) -> int:
    """How many streams there are; from now on graphs are captured of all of them, or of none."""
    count = ctypes.CDLL(str(library())).fused_rnn_emulator_streams
    count.restype = ctypes.c_int64
    return int(count(ctypes.c_int(captured)))


def sms(count: int) -> None:
    """Say how many SMs the emulated GPU has."""
    ctypes.CDLL(str(library())).fused_rnn_emulator_sms(ctypes.c_int64(count))


def grid_launches() -> int:
    """How many launches there were since the last call whose blocks all run together."""
    count = ctypes.CDLL(str(library())).fused_rnn_emulator_grid_launches
    count.restype = ctypes.c_int64
    return int(count())


def run(program: Path, case: str, seeds: int, timeout: float = 120) -> dict[int, str]:
    """What the case says under each seed: "ok", or what was wrong."""
    command = [str(program), case, str(seeds)]
    if "thread_sanitizer" in program.parts:
        # ThreadSanitizer wants addresses where older kernels put them.
        command = ["setarch", "-R", *command]
    # The races are in the report. The sanitizer's own text goes to stderr, without names of
    # functions: looking them up takes a second a race.
    environment = {**os.environ, "TSAN_OPTIONS": TSAN_OPTIONS}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: exit {done.returncode}\n{done.stderr[-4000:]}")
    said: dict[int, str] = {}
    for line in done.stdout.splitlines():
        if line.startswith("seed "):
            head, _, text = line.partition(": ")
            seed = int(head.removeprefix("seed "))
            said[seed] = text
        else:
            said[seed] += "\n" + line
    if len(said) != seeds:  # exit code 0, as ThreadSanitizer was told, but not the end
        raise RuntimeError(f"{shlex.join(command)} stopped early\n{done.stderr[-4000:]}")
    return {seed: text.strip() for seed, text in said.items()}
