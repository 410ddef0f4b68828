"""The ops at sizes and in layouts that nobody listed."""

from dataclasses import replace

import pytest
import torch
from layers import check, make_problem, oracle_layer, run
from numerics import DTYPES, assert_as_good_as, needs_native
from test_step import make_operands, oracle_step, small_step, to_double

from fused_rnn.autograd import layer
from fused_rnn.backends import cpu
from fused_rnn.cells import CELLS

pytest.importorskip("hypothesis", reason="sizes are drawn by hypothesis")
from hypothesis import given
from hypothesis import strategies as st

pytestmark = [pytest.mark.op, needs_native]


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in memory of another layout."""
    if how == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "every other":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if how == "offset":
        return torch.cat([torch.full_like(x[:1], torch.nan), x])[1:]
    if how == "expanded":
        return x[:1].expand_as(x)
    return x


LAYOUTS = ("plain", "transposed", "every other", "offset", "expanded")


@given(
    cell=st.sampled_from(sorted(CELLS)),
    dtype=st.sampled_from(DTYPES),
    T=st.integers(1, 5),
    N=st.integers(0, 6),
    H=st.integers(1, 70),
    P=st.integers(0, 40),
    options=st.fixed_dictionaries(
        {name: st.booleans() for name in ("states", "bias", "reverse", "control", "product")}
    ),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=6, max_size=6),
)
def test_any_shape_and_layout(cell, dtype, T, N, H, P, options, layouts):
    P = P if cell == "lstm" and P < H else 0
    problem = make_problem(cell, dtype, (T, N, H), P=P, **options)
    layout = dict(zip(("x", "w_hh", "b_hh", "h0", "c0", "grads"), layouts, strict=True))
    for name, how in layout.items():
        x = problem.operands.get(name)
        if x is not None and how == "expanded" and x.numel():
            problem.operands[name] = strided(x, how).clone()
    other = replace(
        problem,
        operands=problem.operands
        | {
            name: strided(x, layout[name]) if x.numel() else x
            for name, x in problem.operands.items()
            if name in layout and x is not None
        },
        grads={
            name: strided(x, layout["grads"]) if layout["grads"] != "expanded" else x
            for name, x in problem.grads.items()
        },
    )
    ours, same = run(layer, problem), run(layer, other)
    for name, value in ours.items():
        assert torch.equal(value, same[name]), f"{name} of {problem} in layout {layout}"
    if N:
        check(layer, problem)
    else:
        reference = run(oracle_layer, problem)
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in reference.items()}
        assert not any(v.any() for k, v in ours.items() if k.startswith("dw"))


@given(
    cell=st.sampled_from(sorted(CELLS)),
    dtype=st.sampled_from(DTYPES),
    N=st.integers(1, 9),
    I=st.integers(1, 70),
    H=st.integers(1, 70),
    bias=st.booleans(),
)
def test_both_steps_agree_at_any_size(cell, dtype, N, I, H, bias):  # noqa: E741
    operands = make_operands(cell, dtype, (N, I, H), bias=bias)
    small = small_step(CELLS[cell], operands)
    step = cpu.cell_step(CELLS[cell], *operands.values())
    oracle = oracle_step(CELLS[cell], *to_double(operands).values())
    for place in range(CELLS[cell].states):
        values = (small[place], step[place], oracle[place])
        assert_as_good_as(*values, f"state {place}, small step {cell} N{N} I{I} H{H}", scale=1.0)
