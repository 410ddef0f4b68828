"""Sequences of lengths, with resets and windows, that nobody listed."""

import by_hand
import pytest
import torch
from test_sequences import LOOPS, MODULES, exists, learnt, module_of
from torch.testing import assert_close
from twins import I, step

from fused_rnn.cells import CELLS

pytest.importorskip("hypothesis", reason="sequences are drawn by hypothesis")
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def problems(draw):
    steps, batch = draw(st.integers(1, 6)), draw(st.integers(0, 5))
    lengths = draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    bits = draw(st.lists(st.booleans(), min_size=steps * batch, max_size=steps * batch))
    reset = torch.tensor(bits, dtype=torch.bool).view(steps, batch)
    return lengths, reset, draw(st.none() | st.integers(1, 7)), draw(st.sampled_from(list(MODULES)))


@given(problem=problems(), kind=st.sampled_from(list(CELLS)), backend=st.sampled_from(LOOPS))
def test_any_lengths_resets_and_windows(problem, kind, backend):
    lengths, reset, tbptt, form = problem
    if not exists(kind, form=form) or backend == "cuda":
        return
    made = learnt(module_of(kind, dtype=torch.float64, backend=backend, **MODULES[form]))
    reset = reset.t() if made.batch_first else reset
    input = torch.randn(*reset.shape, I, dtype=torch.float64)
    before = reset.clone()
    options = {"lengths": lengths, "reset": reset, "tbptt": tbptt}
    got = step(made, input, call=lambda x, hx: made(x, hx, **options))
    assert torch.equal(reset, before), "the caller's tensor was changed"
    if not lengths:
        assert got["output 0"].numel() == 0
        return

    def call(x, hx):
        return by_hand.forward(made, x, hx, **options)[:2]

    expected = step(made, input, call=call) if any(lengths) else {}
    for name, value in expected.items():
        assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")
