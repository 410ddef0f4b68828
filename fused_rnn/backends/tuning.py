"""Where ours was measured faster than torch.nn on a GPU, and where slower: ``tuning.csv``.

``benchmarks/tune.py`` writes the table from result files; nothing in it is guessed.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from . import Problem

TABLE = Path(__file__).with_name("tuning.csv")
NEAR = 1.0
"""A row speaks for a problem whose T, N and H are each within so many doublings of its own."""


class Key(NamedTuple):
    """What has to be equal for a row to say anything of a problem. The input's width is not in it:
    its product is one matrix product for ours and for torch.nn."""

    device: str
    cell: str
    dtype: str
    tf32: bool
    grad: bool
    layers: int
    directions: int
    packed: bool


class Row(NamedTuple):
    """One measurement: torch.nn's time over ours, ``algorithm`` being the one of ours that ran."""

    key: Key
    T: int
    N: int
    H: int
    speedup: float
    algorithm: str
    source: str


def key(problem: Problem, device: str, tf32: bool) -> Key:
    """The rows that may speak for ``problem`` on the GPU called ``device``."""
    dtype = str(problem.dtype).removeprefix("torch.")
    shape = (problem.layers, problem.directions, problem.packed)
    return Key(device, problem.cell, dtype, tf32 and dtype == "float32", problem.grad, *shape)


@lru_cache(maxsize=1)
def table() -> dict[Key, list[Row]]:
    """All rows, by key."""
    with TABLE.open(newline="") as file:
        return by_key(read(csv.DictReader(file)))


def flag(text: str) -> bool:
    """``"1"`` or ``"0"``."""
    return bool(int(text))


def read(lines: Iterable[dict[str, str]]) -> Iterable[Row]:
    """Rows from the columns of a file, which are the fields of :class:`Key` and :class:`Row`."""
    types: dict[str, Any] = {"tf32": flag, "grad": flag, "packed": flag, "speedup": float}
    types |= dict.fromkeys(("layers", "directions", "T", "N", "H"), int)
    for line in lines:
        typed = {name: types.get(name, str)(text) for name, text in line.items()}
        same = Key(**{name: typed.pop(name) for name in Key._fields})
        yield Row(same, **typed)


def by_key(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows that may speak for the same problems together."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row)
    return found


def nearest(problem: Problem, rows: Iterable[Row]) -> Row | None:
    """The row nearest in T, N and H on a scale of doublings, if one is near enough."""

    def doublings(row: Row) -> list[float]:
        pairs = (row.T, problem.T), (row.N, problem.N), (row.H, problem.H)
        return [abs(math.log2(measured / asked)) for measured, asked in pairs]

    if not min(problem.T, problem.N, problem.H):
        return None
    near = [row for row in rows if max(doublings(row)) <= NEAR]
    return min(near, key=lambda row: sum(doublings(row)), default=None)


def measured(problem: Problem, device: str, tf32: bool) -> Row | None:
    """The measurement that speaks for ``problem``, or None: a projection was never measured."""
    if problem.P or problem.options:
        return None
    return nearest(problem, table().get(key(problem, device, tf32), ()))
