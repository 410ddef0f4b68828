"""A process in which Triton interprets its kernels on the CPU.

Triton decides that when it is first imported, for good: in this process, other tests want the
compiler. So tests hand a function over, by name, and get what it returns or raises.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def _prepare(full: bool) -> None:
    import numerics
    import torch

    numerics.FULL = full
    torch.set_num_threads(1)
    # Memory is NaN until it is written, as for the tests of the native ops.
    torch.use_deterministic_algorithms(True)


def _seeded(seed: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch

    torch.manual_seed(seed)
    return function(*arguments)


class Interpreter:
    """One such process, until :meth:`close`."""

    def __init__(self, full: bool) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, spawn, initializer=_prepare, initargs=(full,))
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            self.pool.submit(os.getpid).result()  # starts it
        finally:
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            else:
                os.environ["TRITON_INTERPRET"] = before

    def run(self, seed: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)`` there; the function is one of a module's."""
        return self.pool.submit(_seeded, seed, function, arguments).result()

    def close(self) -> None:
        self.pool.shutdown()
