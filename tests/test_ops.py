"""The ops as torch sees them: schemas, fakes, memory, and what they refuse."""

import pytest
import torch
from layers import make_problem
from numerics import DTYPES, cases, needs_native
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_rnn.cells import CELLS

pytestmark = [pytest.mark.op, needs_native]

ops = torch.ops.fused_rnn

ROWS = ("", "packed", "scattered")


def projects(cell, P, shape, **_):
    return not P or (cell == "lstm" and shape[2] > P)


def op_inputs_and_outputs(problem):
    forward = problem.op_arguments()
    h, c, h_n, c_n, saved = outputs = ops.layer(*forward)
    _, _, w_hh, _, h0, c0, reverse, _, *options = forward
    grads = [problem.grads.get(name) for name in ("h", "c", "h_n", "c_n")]
    grads = [x if x is None or i < 2 else x.to(h_n.dtype) for i, x in enumerate(grads)]
    backward = [problem.cell.id, *grads, h, c, saved, w_hh, h0, c0, reverse, *options]
    return (forward, outputs), (backward, ops.layer_backward(*backward))


@cases(
    projects,
    cell=CELLS,
    dtype=DTYPES,
    shape=((3, 2, 25), (1, 1, 8)),
    P=(0, 5),
    control=(False, True),
    rows=ROWS,
    states=(False, True),
)
def test_ops_neither_change_nor_return_their_inputs(case):
    problem = make_problem(**case)
    for inputs, outputs in op_inputs_and_outputs(problem):
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in tensors]
        outputs = ops.layer(*inputs) if len(outputs) == 5 else ops.layer_backward(*inputs)
        for x, copy in zip(tensors, before, strict=True):
            assert torch.equal(x, copy), str(problem)
        filled = [x for x in (*tensors, *outputs) if x.numel()]
        places = [x.untyped_storage().data_ptr() for x in filled]
        own = places[len(filled) - sum(x.numel() > 0 for x in outputs) :]
        assert len(set(own)) == len(own), f"two outputs share memory: {problem}"
        assert not set(own) & set(places[: -len(own)]), f"an output is an input: {problem}"


@cases(
    projects,
    cell=CELLS,
    dtype=DTYPES,
    shape=((3, 2, 25), (1, 1, 8), (2, 0, 8)),
    P=(0, 5),
    control=(False, True),
    rows=("", "scattered"),
)
@pytest.mark.parametrize("save", [False, True])
def test_fakes_agree_with_the_ops(case, save):
    problem = make_problem(**case)
    cases = [(ops.layer, problem.op_arguments(save=save))]
    (_, _), (backward, _) = op_inputs_and_outputs(problem)
    cases.append((ops.layer_backward, backward))
    for op, inputs in cases:
        real = op(*inputs)
        with FakeTensorMode() as mode:
            fake = op(
                *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs)
            )
        for place, (a, b) in enumerate(zip(real, fake, strict=True)):
            what = f"output {place} of {op} of {problem}"
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), what


@pytest.mark.parametrize("op", ["layer", "layer_backward"])
@cases(
    projects,
    cell=CELLS,
    dtype=(torch.float32, torch.bfloat16),
    shape=((3, 2, 8),),
    P=(0, 5),
    control=(False, True),
    rows=("", "scattered"),
)
def test_opcheck(op, case):
    problem = make_problem(**case)
    (forward, _), (backward, _) = op_inputs_and_outputs(problem)
    # Rows that hold are not written in `saved`, so two runs differ there unless both fill it.
    inputs = forward if op == "layer" else backward
    checked = torch.library.opcheck(getattr(ops, op).default, tuple(inputs))
    assert set(checked.values()) == {"SUCCESS"}


def test_every_op_is_checked():
    """What the library registers is what the tests above and in test_step.py name."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "fused_rnn::" in name}
    assert names == {"layer", "layer_backward", "step", "step_backward"}
