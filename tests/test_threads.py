"""Threads: the same bits on any number of them, and never a hang, whatever the thread settings.

Settings of the thread pool are read once a process, so each case is a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import make_problem, run
from numerics import DTYPES, cases, grid, needs_native

from fused_rnn.autograd import layer
from fused_rnn.cells import CELLS

pytestmark = needs_native

HERE = Path(__file__).resolve().parent
# How much slower than one thread a process may be whose threads have fewer cores than they think.
SLOWER = 5
# A hang is what lasts longer than this; the slowest case takes seconds on a busy machine.
TIMEOUT_S = 180


def bits(problem, threads: int) -> dict[str, torch.Tensor]:
    torch.set_num_threads(threads)
    try:
        return run(layer, problem)
    finally:
        torch.set_num_threads(1)


@cases(
    cell=CELLS,
    dtype=(torch.float32, torch.float64, torch.bfloat16),
    # Enough arithmetic for four threads; rows that they do not divide; fewer rows than threads.
    # The last two are so few rows, and so much work a step, that threads share out the units.
    shape=((100, 7, 96), (24, 33, 96), (16, 6, 256), (700, 1, 96), (20, 5, 300), (100, 1, 520)),
    control=(False, True),
    rows=("", "packed"),
    reverse=(False, True),
    product=(False, True),
    P=(0, 19),
    h_mask=(False, True),
    keep=(False, True),
)
def test_the_same_bits_on_any_number_of_threads(case):
    """Weights' gradients too, although chunks are cut otherwise for more threads."""
    if case["cell"] != "lstm":
        case["P"] = 0
    problem = make_problem(**case)
    one = bits(problem, 1)
    for threads in (2, 4, 4):
        several = bits(problem, threads)
        for name, value in one.items():
            assert torch.equal(value, several[name]), f"{name} of {problem} on {threads} threads"


@grid(cell=CELLS, dtype=DTYPES, N=(11, 14))
def test_the_same_bits_of_a_row_alone_and_of_a_row_in_a_pair(cell, dtype, N):
    """The compiler may contract the same sum in two ways in two functions."""
    problem = make_problem(cell, dtype, (40, N, 96))
    one, two = bits(problem, 1), bits(problem, 2)
    for name, value in one.items():
        assert torch.equal(value, two[name]), f"{name} of {problem}"


@cases(cell=CELLS, dtype=(torch.float32, torch.bfloat16), threads=(1, 2, 4))
def test_a_run_repeats_bit_for_bit(case):
    threads = case.pop("threads")
    problem = make_problem(shape=(100, 7, 96), **case)
    first, second = bits(problem, threads), bits(problem, threads)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} of {problem} on {threads} threads"


# Runs in a process of its own: what the settings do to time and results, against one thread.
PROGRAM = """
import ctypes, sys, threading, time
import torch
from layers import make_problem, run
from fused_rnn.autograd import layer

threads, callers, nested = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "nested"
torch.manual_seed(0)
# Some 50 ms on one thread: next to that, a time slice that a thread waits for counts little.
problems = [
    make_problem(cell, torch.float32, shape)
    for cell, shape in (("lstm", (200, 33, 96)), ("gru", (200, 33, 96)), ("lstm", (100, 3, 256)))
]

def once():
    return [run(layer, problem) for problem in problems]

def timed(call):
    # The best of some: how long it takes when nobody else has the machine.
    found = []
    for _ in range(5):
        start = time.perf_counter()
        result = call()
        found.append(time.perf_counter() - start)
    return min(found), result

torch.set_num_threads(1)
once()
alone, expected = timed(once)
torch.set_num_threads(threads)

def check(results):
    for ours, theirs in zip(results, expected, strict=True):
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name

def everyone():
    results = [None] * callers
    def call(place):
        results[place] = once()
    workers = [threading.Thread(target=call, args=(i,)) for i in range(callers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results

def inside():
    # An OpenMP region, entered as compiled code enters it.
    with open("/proc/self/maps") as maps:
        path = next(line.split()[-1] for line in maps if "libgomp" in line)
    results = []
    entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: results.append(once()))
    ctypes.CDLL(path).GOMP_parallel(entry, None, callers, 0)
    assert len(results) == callers, "OpenMP gave fewer threads"
    return results

call = inside if nested else everyone if callers > 1 else lambda: [once()]
call()
together, results = timed(call)
for result in results:
    check(result)
print(together / alone / callers)
"""


def in_a_process(
    threads: int, callers: int = 1, how: str = "flat", prefix: tuple[str, ...] = (), **settings: str
) -> float:
    """How many times as long as one thread takes; results are checked in the process."""
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    command = [*prefix, sys.executable, "-c", PROGRAM, str(threads), str(callers), how]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path} | settings,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def is_fast(*process: Any, **settings: Any) -> bool:
    """In one of three tries: threads that spin lose more than their share to another process."""
    return any(in_a_process(*process, **settings) < SLOWER for _ in range(3))


@pytest.mark.alone
def test_fewer_threads_may_come_than_were_asked_for():
    assert is_fast(4, OMP_NUM_THREADS="4", OMP_THREAD_LIMIT="2")


@pytest.mark.alone
def test_eight_threads_on_one_core():
    taskset = shutil.which("taskset")
    if taskset is None:
        pytest.skip("needs taskset")
    core = str(min(os.sched_getaffinity(0)))
    assert is_fast(8, prefix=(taskset, "-c", core), OMP_NUM_THREADS="8")


@pytest.mark.alone
def test_four_python_threads_at_once():
    assert is_fast(2, callers=4, OMP_NUM_THREADS="2")


@pytest.mark.alone
def test_inside_another_parallel_region():
    maps = Path("/proc/self/maps")
    if not maps.exists() or "libgomp" not in maps.read_text():
        pytest.skip("needs a torch whose threads are libgomp's")
    assert is_fast(2, callers=3, how="nested", OMP_NUM_THREADS="2")


@pytest.mark.alone
@pytest.mark.parametrize("settings", [{"OMP_DYNAMIC": "true"}, {"OMP_WAIT_POLICY": "active"}])
def test_other_settings_of_openmp(settings):
    assert is_fast(2, OMP_NUM_THREADS="2", **settings)
