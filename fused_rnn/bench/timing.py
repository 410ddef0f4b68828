"""How long and how much memory: interleaved timing of rival calls, and what it is worth.

Rivals take turns within each repeat, first one ahead, then the other, and a ratio is the median of
the repeats' own ratios: a neighbour on a shared machine slows both halves of a pair, or spoils one
pair among many. A calibration sgemm takes its turn in the same loop and says what the machine
could give at that moment. (:class:`torch.utils.benchmark.Timer` warms up inside every ``timeit``,
which triples the cost of a turn, so the clock is read here.)
"""

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

SAMPLE_S = 2e-3
"""A sample is as many calls as fill this time, so that the clock's own cost disappears."""
SPEEDUP_THAT_COUNTS = 1.3
"""Two threads are two cores only where the calibration sgemm gains at least this much."""
CALIBRATION_SIZE = 384
COPY_BYTES = (64 << 20, 512 << 20)
"""Least and most bytes of the copy that measures memory; between them twice the cache."""


@dataclass(frozen=True)
class Turn:
    """A call and the number of threads that torch may use for it."""

    call: Callable[[], object]
    threads: int = 1


@dataclass(frozen=True)
class Quantiles:
    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> "Quantiles":
        if len(values) == 1:
            return cls(*values * 3)
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(tenths[1], tenths[4], tenths[7])


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets torch's thread count for the block; one call of our pool or OpenMP's follows it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    turns: dict[str, Turn],
    budget_s: float,
    *,
    min_repeats: int = 5,
    max_repeats: int = 400,
    clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds a call of every turn, one value a repeat; value ``i`` of all turns is the same
    repeat. Repeats until ``budget_s`` is spent, between ``min_repeats`` and ``max_repeats``;
    the garbage collector waits outside. With ``measure``, such as :class:`CudaStopwatch`, a sample
    is one call that it times, and warming up is the caller's."""
    start = clock()
    calls = {} if measure else {name: _calls_per_sample(t, clock) for name, t in turns.items()}
    samples: dict[str, list[float]] = {name: [] for name in turns}
    order = list(turns)
    enabled = gc.isenabled()
    gc.disable()
    try:
        for repeat in range(max_repeats):
            if repeat >= min_repeats and clock() - start >= budget_s:
                break
            for name in order:
                turn = turns[name]
                seconds = measure(turn.call) if measure else _sample(turn, calls[name], clock)
                samples[name].append(seconds)
            order.reverse()
    finally:
        if enabled:
            gc.enable()
    return samples


def _calls_per_sample(turn: Turn, clock: Callable[[], float]) -> int:
    """Doubles the calls until they fill a sample; that is the warm-up too."""
    calls = 1
    while (seconds := _sample(turn, calls, clock) * calls) < SAMPLE_S:
        calls = max(2 * calls, min(int(calls * SAMPLE_S / max(seconds, 1e-9)), 16 * calls))
    return calls


def _sample(turn: Turn, calls: int, clock: Callable[[], float]) -> float:
    with torch_threads(turn.threads):
        start = clock()
        for _ in range(calls):
            turn.call()
        return (clock() - start) / calls


def wall_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the repeats of ``slow / fast``: above 1 where the second is the faster."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


class CudaStopwatch:
    """Seconds of one call on the current stream, by events around it; L2 is overwritten before.

    The host is ahead of the GPU by the time of that overwriting only, so a call whose launches take
    the host longer than the GPU shows it, as it does in use.
    """

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties().L2_cache_size
        self.flush = torch.empty(2 * l2, dtype=torch.int8, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, call: Callable[[], object]) -> float:
        start, end = self.events
        torch.cuda.synchronize()
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def calibration(
    size: int = CALIBRATION_SIZE, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Callable[[], object]:
    """A square product, by default far inside a CPU's caches: what the cores themselves can do."""
    a, b, out = (torch.rand(size, size, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def calibration_gflops(seconds: list[float], size: int = CALIBRATION_SIZE) -> float:
    return 2e-9 * size**3 / statistics.median(seconds)


def cache_bytes() -> int:
    """The largest cache of the CPU as the C library knows it, 32 MiB where it does not."""
    names = [f"SC_LEVEL{level}_CACHE_SIZE" for level in (2, 3)]
    sizes = [os.sysconf(name) for name in names if name in os.sysconf_names]
    return max([0, *sizes]) or 32 << 20


@dataclass(frozen=True)
class Rates:
    """What a machine gives beside products: 10⁹ bytes a second, read and written, of a copy that no
    cache holds; on a GPU also the µs from one kernel's launch to the next one's, and of a launch
    that is waited for."""

    copy_gb_s: float
    launch_us: float | None = None
    sync_us: float | None = None

    @classmethod
    def of(cls, device: str, repeats: int = 5) -> "Rates":
        """Measures them, on as many threads as torch may use."""
        size = min(max(COPY_BYTES[0], 2 * cache_bytes()), COPY_BYTES[1])
        source, target = (torch.ones(size // 4, device=device) for _ in range(2))
        measure = CudaStopwatch() if device == "cuda" else wall_clock
        seconds = [measure(lambda: target.copy_(source)) for _ in range(repeats + 1)][1:]
        copied = 2e-9 * size / statistics.median(seconds)
        if device != "cuda":
            return cls(copied)
        one = torch.zeros(1, device=device)

        def launch(times: int) -> None:
            for _ in range(times):
                one.add_(1)

        def wait() -> None:
            launch(1)
            torch.cuda.synchronize()

        launches = [measure(lambda: launch(1000)) / 1000 for _ in range(repeats)]
        waits = [wall_clock(wait) for _ in range(100)]
        return cls(copied, *(1e6 * statistics.median(values) for values in (launches, waits)))


def counts(threads: int, single: list[float], these: list[float]) -> bool:
    """Whether a row at ``threads`` threads is a result. One thread always is; more are where the
    calibration ``these`` ran at least 1.3 times as fast as that on a ``single`` thread."""
    return threads == 1 or median_ratio(single, these) >= SPEEDUP_THAT_COUNTS


def peak_memory(call: Callable[[], object], repeats: int = 3) -> int | None:
    """Bytes by which the process grew at the peak of one call: the median of ``repeats``.

    Linux only, else ``None``. Freed memory is first returned to the system, so that all the call
    touches is counted: tensors, and the scratch that oneDNN or a kernel allocates past torch's
    allocator, which a profiler of tensors does not see. Resolution is a page and a few.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return None
    growth = []
    for _ in range(repeats):
        gc.collect()
        libc.malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        except OSError:  # some containers forbid it
            return None
        before = _status("VmRSS")
        call()
        growth.append(_status("VmHWM") - before)
    return max(0, int(statistics.median(growth)))


def peak_cuda_memory(call: Callable[[], object]) -> int:
    """Bytes of torch's allocator above what was allocated before, at the peak of one call. Memory
    that a library takes past torch is not in it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
