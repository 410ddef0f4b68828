"""The rule that results are held to, and the grids of cases.

The rule: the oracle is the same computation in float64. A result passes if its largest error is at
most twice torch's own at the same dtype and shape, plus a few units in the last place of the
oracle's largest value.

A ReLU's gradient jumps where rounding flips the sign of its argument, and the half types flip some
in any random problem, ours and torch's others: there comparing derivatives says nothing. Such
tests draw integers and use :func:`signed_permutation` as weights. Then every state is a small
integer, which all dtypes hold exactly, and the kink is met only at 0 itself.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from devices import meet
from torch import Tensor

from fused_rnn import native

# Whether the grids are complete, the most combinations of one (0: all) and the seed of the sample
# that is taken of others; conftest.py sets them from the options of these names.
FULL, MOST, SEED = False, 0, 0

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)

FACTOR = 2
# Where torch happens to be exact, twice its error is nothing. What remains is the rounding of the
# result and of the operands of a gate's last formula (i, g, 1 - i, dc, ...), 1/2 each, and the
# random walk of a weight's gradient, whose chains have up to 256 products here and N in torch's
# cells: sqrt(256) / 4, which is 4.
ULPS = 8

needs_native = pytest.mark.skipif(
    native.UNAVAILABLE is not None, reason=f"needs the native library: {native.UNAVAILABLE}"
)


def assert_as_good_as(
    ours: Tensor,
    torchs: Tensor,
    oracle: Tensor,
    what: object,
    *,
    length: int = 1,
    scale: float = 0.0,
) -> None:
    """Hold ``ours`` to the rule.

    Args:
        ours: the result. Its dtype may be wider than torch's: a state in the carry dtype.
        torchs: what torch computes from the same values in the dtype under test.
        oracle: what is right, in float64.
        what: names the case in the message: cell, tensor, backend, options.
        length: number of terms of the longest sum behind a value, over all steps. In float64 torch
            is no coarser than the oracle and has no error of its own to be measured against, while
            two orders of summation differ by a random walk: ULPS become ``ULPS * sqrt(length)``.
        scale: magnitude of the operands where the value is a difference that may be smaller; an
            ulp is one of the larger of it and the oracle's largest value.
    """
    seed = torch.initial_seed()
    case = f"{what}: {torchs.dtype} {tuple(torchs.shape)}, seed {seed}"
    assert ours.shape == oracle.shape == torchs.shape, f"{case}: ours has {tuple(ours.shape)}"
    assert oracle.dtype == torch.float64, f"{case}: the oracle is {oracle.dtype}"
    if not oracle.numel():
        return
    assert oracle.isfinite().all(), f"{case}: the oracle is not finite, the rule says nothing"
    errors = (ours.double() - oracle).abs()
    torch_error = (torchs.double() - oracle).abs().max().item()
    assert math.isfinite(torch_error), f"{case}: torch overflows, the rule says nothing"
    ulp = torch.finfo(torchs.dtype).eps * max(oracle.abs().max().item(), scale)
    ulps = ULPS * math.sqrt(length) if torchs.dtype == torch.float64 else ULPS
    allowed = FACTOR * torch_error + ulps * ulp
    # A NaN is the worst of all, and compares as not within.
    worst = int(errors.nan_to_num(math.inf).argmax())
    error = errors.flatten()[worst].item()
    assert error <= allowed, (
        f"{case}: error {error:.3e}, allowed {allowed:.3e} (torch's own {torch_error:.3e}, "
        f"{error / ulp if ulp else math.inf:.1f} ulp); worst at "
        f"{tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), oracle.shape))}: "
        f"{ours.flatten()[worst].item()!r} instead of {oracle.flatten()[worst].item()!r}"
    )


def signed_permutation(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix of zeros and one ±1 in each row, spread evenly over the columns."""
    column = torch.cat([torch.randperm(columns) for _ in range(-(-rows // columns))])[:rows]
    sign = torch.randint(2, (rows, 1), dtype=dtype) * 2 - 1
    return torch.zeros(rows, columns, dtype=dtype).scatter_(1, column.unsqueeze(1), sign)


def integers(*shape: int, dtype: torch.dtype = torch.float32, limit: int = 2) -> Tensor:
    """Integers from ``-limit`` to ``limit``."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


def grid(
    where: Callable[..., bool] | None = None, /, **axes: Iterable[Any]
) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize`` over the axes: all combinations under ``--full``, else few.

    The few hold every pair of values of any two axes. They are the same in every run.

    Args:
        where: takes the axes by keyword; combinations for which it is false are left out.
        axes: names and values. A dict, such as a registry, stands for its keys. Where one is
            ``backend``, combinations with a ``device`` (without that axis: the CPU) that it cannot
            be asked for are left out.

    Example::

        @grid(lambda cell, P: not P or cell == "lstm", cell=CELLS, dtype=DTYPES, P=(0, 3))
        def test_something(cell, dtype, P): ...
    """
    names = list(axes)
    chosen = combinations(where, **axes)
    if len(names) == 1:
        return pytest.mark.parametrize(names[0], [only for (only,) in chosen], ids=_id)
    return pytest.mark.parametrize(names, chosen, ids=_id)


def cases(
    where: Callable[..., bool] | None = None, /, **axes: Iterable[Any]
) -> pytest.MarkDecorator:
    """As :func:`grid`, for a test that takes all axes as one dict, ``case``."""
    chosen = combinations(where, **axes)
    return pytest.mark.parametrize(
        "case",
        [dict(zip(axes, values, strict=True)) for values in chosen],
        ids=["-".join(_id(value) for value in values) for values in chosen],
    )


def combinations(
    where: Callable[..., bool] | None = None, /, **axes: Iterable[Any]
) -> list[tuple[Any, ...]]:
    """The tuples of :func:`grid`."""
    every = []
    for values in itertools.product(*axes.values()):
        case = dict(zip(axes, values, strict=True))
        if meet(**case) and (where is None or where(**case)):
            every.append(values)
    if not FULL:
        return pairwise(every) if every and len(axes) > 2 else every
    if not MOST or len(every) <= MOST:
        return every
    # In the order of the grid, as pytest is to show them.
    return [every[i] for i in sorted(random.Random(SEED).sample(range(len(every)), MOST))]


def pairwise(every: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """A subset of the tuples with every pair of values of two places that ``every`` has.

    Greedy: of the tuples that have the first pair still missing, always the first of those that
    bring the most missing pairs.
    """
    columns = []
    for values in zip(*every, strict=True):
        numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
        columns.append(torch.tensor([numbers[value] for value in values]))
    pairs, count = [], 0  # of each two places, the number of every tuple's pair
    for one, other in itertools.combinations(columns, 2):
        most = int(other.max()) + 1
        pairs.append(count + one * most + other)
        count += (int(one.max()) + 1) * most
    of_tuples = torch.stack(pairs, dim=1)
    missing = torch.zeros(count, dtype=torch.bool)
    missing[of_tuples] = True
    first_pairs = torch.stack([numbers.min() for numbers in pairs])
    chosen = []
    while missing.any():
        wanted = missing.nonzero()[0]
        places = int(torch.searchsorted(first_pairs, wanted, right=True)) - 1
        having = (pairs[places] == wanted).nonzero().squeeze(1)
        best = int(having[missing[of_tuples[having]].sum(dim=1).argmax()])
        missing[of_tuples[best]] = False
        chosen.append(best)
    return [every[at] for at in sorted(chosen)]


def _id(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(_id(part) for part in value)
    return str(value).removeprefix("torch.")
