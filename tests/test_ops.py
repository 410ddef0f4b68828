"""The ops as torch sees them: schemas, fakes, memory, and what they refuse."""

import re
from types import SimpleNamespace

import pytest
import torch
from devices import DEVICES, device_of, there
from layers import make_problem
from numerics import DTYPES, cases, needs_native
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_rnn import autograd
from fused_rnn.cells import CELLS

pytestmark = [pytest.mark.op, needs_native]

ops = torch.ops.fused_rnn

ROWS = ("", "packed", "scattered")


def projects(cell, P, shape, **_):
    return not P or (cell == "lstm" and shape[2] > P)


# The last bit asks for dh_norm, which CUDA lacks.
EVERYTHING = {"cpu": 127, "cuda": 63}


def op_inputs_and_outputs(problem, device="cpu"):
    wanted = EVERYTHING[device]
    forward = there(problem.op_arguments(), device)
    h, c, h_n, _, saved = outputs = ops.layer(*forward)
    _, x, w_ih, _, w_hh, _, h0, c0, reverse, _, *options = forward
    grads = [there(problem.grads.get(name), device) for name in ("h", "c", "h_n", "c_n")]
    grads = [x if x is None or i < 2 else x.to(h_n.dtype) for i, x in enumerate(grads)]
    inputs = (x, w_ih, w_hh, h0, c0, reverse)
    backward = [problem.cell.id, wanted, *grads, h, c, saved, *inputs, *options]
    return (forward, outputs), (backward, ops.layer_backward(*backward))


@cases(
    projects,
    cell=CELLS,
    device=DEVICES,
    dtype=DTYPES,
    shape=((3, 2, 25), (1, 1, 8)),
    P=(0, 5),
    control=(False, True),
    product=(False, True),
    rows=ROWS,
    states=(False, True),
)
def test_ops_neither_change_nor_return_their_inputs(case):
    device, case = device_of(case)
    problem = make_problem(**case)
    for inputs, outputs in op_inputs_and_outputs(problem, device=device):
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
    device=DEVICES,
    dtype=DTYPES,
    shape=((3, 2, 25), (1, 1, 8), (2, 0, 8)),
    P=(0, 5),
    control=(False, True),
    product=(False, True),
    rows=("", "scattered"),
)
@pytest.mark.parametrize("save", [False, True])
def test_fakes_agree_with_the_ops(case, save):
    device, case = device_of(case)
    problem = make_problem(**case)
    cases = [(ops.layer, there(problem.op_arguments(save=save), device))]
    (_, _), (backward, _) = op_inputs_and_outputs(problem, device=device)
    cases.append((ops.layer_backward, backward))
    for op, inputs in cases:
        real = op(*inputs)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs))
        for place, (a, b) in enumerate(zip(real, fake, strict=True)):
            what = f"output {place} of {op} of {problem}"
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), what


def checked(op, inputs):
    return set(torch.library.opcheck(getattr(ops, op).default, tuple(inputs)).values())


@cases(
    projects,
    cell=CELLS,
    device=DEVICES,
    dtype=(torch.float32, torch.bfloat16),
    shape=((3, 2, 8),),
    P=(0, 5),
    control=(False, True),
    product=(False, True),
    rows=("", "scattered"),
)
@pytest.mark.parametrize("op", ["layer", "layer_backward"])
def test_opcheck(op, case):
    device, case = device_of(case)
    (forward, _), (backward, _) = op_inputs_and_outputs(make_problem(**case), device=device)
    assert checked(op, forward if op == "layer" else backward) == {"SUCCESS"}


@cases(
    projects,
    cell=CELLS,
    device=DEVICES,
    dtype=DTYPES,
    shape=((3, 2, 25), (2, 0, 8)),
    P=(0, 5),
    control=(False, True),
    product=(False, True),
    rows=ROWS,
)
def test_backward_gives_what_is_wanted_and_nothing_else(case):
    """Each gradient alone is the one that comes with all others; the rest is empty."""
    device, case = device_of(case)
    problem = make_problem(**case)
    _, (backward, everything) = op_inputs_and_outputs(problem, device=device)
    states = (5, 6)
    assert len(everything) == 9
    for bit, place in enumerate(p for p in range(9) if p not in states):
        if not EVERYTHING[device] & 1 << bit:
            continue
        backward[1] = 1 << bit
        alone = ops.layer_backward(*backward)
        for other, x in enumerate(alone):
            if other == place or other in states:
                assert torch.equal(x, everything[other]), f"output {other} of {problem}"
            else:
                assert x.shape == (0,), f"output {other} of {problem}"


def test_every_op_is_checked():
    """What the library registers is what the tests here, in test_bidirectional.py, test_norm.py,
    test_step.py and test_wavefront.py name."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if "fused_rnn::" in name}
    expected = {"layer", "layer_backward", "step", "step_backward"}
    expected |= {"bidirectional", "bidirectional_backward", "norm_layer", "norm_layer_backward"}
    expected |= {"stack", "stack_backward"}
    assert {name.split("::")[1] for name in names} == expected


# The ops' arguments, in the order of their schemas.
LAYER = "cell x w_ih b_ih w_hh b_hh h0 c0 reverse save control rows w_hr h_mask keep algorithm tf32"
LAYER_BACKWARD = (
    "cell wanted dh dc dh_n dc_n h c saved x w_ih w_hh h0 c0 reverse control rows w_hr h_mask keep "
    "algorithm tf32"
)
OPERANDS = ("w_ih", "b_ih", "w_hh", "b_hh", "h0", "c0", "control", "rows", "w_hr")

# Every operand with one too few and one too many at its end, and in its first dimension.
RESIZED = {
    "narrow": lambda x: x[..., :-1].contiguous(),
    "wide": lambda x: torch.cat([x, x[..., :1]], -1),
    "short": lambda x: x[1:].contiguous(),
    "long": lambda x: torch.cat([x, x[:1]]),
    "with one dimension more": lambda x: x.unsqueeze(0),
}


def refused(op, names, inputs, name, change):
    """The sentence in which the op refuses the inputs with one of them changed."""
    given = list(inputs)
    place = names.split().index(name)
    given[place] = change(given[place])
    with pytest.raises(RuntimeError, match="fused_rnn: ") as raised:
        op(*given)
    return str(raised.value)


@pytest.mark.parametrize("how", RESIZED)
@pytest.mark.parametrize("rows", ["", "scattered"])
@pytest.mark.parametrize("name", ["x", *OPERANDS])
@pytest.mark.parametrize("device", DEVICES)
def test_layer_refuses_wrong_sizes_in_a_sentence(name, rows, how, device):
    if name == "rows" and not rows:
        pytest.skip("there are no rows in this form")
    if device == "cuda" and rows and name == "x" and how in ("short", "long"):
        pytest.skip("on a GPU rows are not checked against x, which would have to be waited for")
    message = refused(ops.layer, LAYER, template(rows, device)[0], name, RESIZED[how])
    assert re.search(r"\[[\d, ]+\]|dimensions|projection|names", message), message


@pytest.mark.parametrize("name", ["x", *OPERANDS])
@pytest.mark.parametrize("device", DEVICES)
def test_layer_refuses_freed_memory(name, device):
    """As FSDP leaves parameters between calls; an address of nothing says "not given" inside."""

    def freed(x):
        x = x.clone()
        x.untyped_storage().resize_(0)
        return x

    message = refused(ops.layer, LAYER, template("scattered", device)[0], name, freed)
    assert f"{name} has no memory: its storage was freed" in message


@pytest.mark.parametrize("how", RESIZED)
@pytest.mark.parametrize("rows", ["", "scattered"])
@pytest.mark.parametrize("name", [*LAYER_BACKWARD.split()[2:14], "control", "rows", "w_hr"])
@pytest.mark.parametrize("device", DEVICES)
def test_layer_backward_refuses_wrong_sizes_in_a_sentence(name, rows, how, device):
    inputs = template(rows, device)[1]
    if inputs[LAYER_BACKWARD.split().index(name)] is None:
        pytest.skip(f"there are no {name} in this form")
    refused(ops.layer_backward, LAYER_BACKWARD, inputs, name, RESIZED[how])


def template(rows, device="cpu"):
    """An LSTM with every operand: arguments of layer and layer_backward."""
    problem = make_problem(
        "lstm", torch.float32, (3, 2, 8), P=5, control=True, rows=rows, product=True
    )
    (forward, _), (backward, _) = op_inputs_and_outputs(problem, device=device)
    return forward, backward


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("device", DEVICES)
def test_layer_refuses_other_dtypes_and_devices(name, device):
    forward = template("scattered", device)[0]
    for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
        message = refused(ops.layer, LAYER, forward, name, lambda x, dtype=dtype: x.to(dtype))
        assert "dtype" in message
    message = refused(ops.layer, LAYER, forward, name, lambda x: x.to("meta"))
    assert f"{name} is on another device" in message


@pytest.mark.parametrize("name", ["w_ih", "b_ih", "w_hh", "b_hh", "w_hr"])
def test_weights_must_have_the_dtype_of_x(name):
    """Only states may come in another, the carry dtype."""
    forward = template("")[0]
    for dtype in (torch.bfloat16, torch.float16):
        refused(ops.layer, LAYER, forward, name, lambda x, dtype=dtype: x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_layer_computes_in_four_dtypes(dtype):
    message = refused(ops.layer, LAYER, template("")[0], "x", lambda x: x.to(dtype))
    assert "float32, float64, bfloat16 or float16" in message


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru"])
def test_only_the_lstm_projects(cell):
    inputs = make_problem(cell, torch.float32, (3, 2, 8)).op_arguments()
    message = refused(ops.layer, LAYER, inputs, "w_hr", lambda _: torch.zeros(8, 8))
    assert "only LSTM has a projection" in message


@pytest.mark.parametrize("cell", [-1, 4, 99])
def test_a_cell_has_a_number(cell):
    message = refused(ops.layer, LAYER, template("")[0], "cell", lambda _: cell)
    assert f"no cell has number {cell}" in message


def test_the_cpu_has_no_algorithms_to_choose_among():
    message = refused(ops.layer, LAYER, template("")[0], "algorithm", lambda _: 1)
    assert "no algorithm 1" in message


@pytest.mark.parametrize("op", ["layer", "layer_backward"])
@pytest.mark.parametrize("wrong", ["twice", "beyond", "far beyond", "missing"])
def test_each_row_belongs_to_one_step(op, wrong):
    forward, backward = template("scattered")
    names, inputs = (LAYER, forward) if op == "layer" else (LAYER_BACKWARD, backward)

    def change(rows):
        rows, (first, second, *_) = rows.clone(), (rows >= 0).nonzero().tolist()
        value = {"twice": int(rows[tuple(second)]), "beyond": int(rows.max()) + 1}
        value |= {"far beyond": 2**31 - 1, "missing": -1}
        rows[tuple(first)] = value[wrong]
        return rows

    message = refused(getattr(ops, op), names, inputs, "rows", change)
    assert re.search(r"twice, or it is outside|names \d+ of the \d+ rows", message), message


def test_empty_weights_are_refused():
    """Their memory is nowhere, which elsewhere means that they are not given."""
    x = torch.randn(2, 3, 16)
    with pytest.raises(RuntimeError, match="must not be empty"):
        torch.ops.fused_rnn.layer(
            2, x, None, None, torch.randn(16, 0), None, None, None, False, True, None, None,
            torch.randn(0, 4), None, None, 0, False,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="must not be empty"):
        torch.ops.fused_rnn.layer(
            2, x[..., :0], torch.randn(16, 0), None, torch.randn(16, 4), None, None, None, False,
            True, None, None, None, None, None, 0, False,
        )  # fmt: skip


@pytest.mark.parametrize("state", [torch.bfloat16, torch.float64])
def test_a_state_of_a_third_dtype_is_refused(state):
    x, w_hh = torch.randn(2, 3, 16).half(), torch.randn(16, 4).half()
    with pytest.raises(RuntimeError, match="h0 has another dtype"):
        torch.ops.fused_rnn.layer(
            2, x, None, None, w_hh, None, torch.randn(3, 4, dtype=state), None, False, True, None,
            None, None, None, None, 0, False,
        )  # fmt: skip


def test_memory_that_is_not_there_is_said():
    """In words; the GPU's is torch's own exception."""
    x = torch.zeros(1, 1, 1).expand(2**24, 2**20, 32)  # more than a process can address
    with pytest.raises(RuntimeError, match="out of memory: there is no room for x"):
        ops.layer(
            2, x, None, None, torch.zeros(32, 8), None, None, None, False, True, None, None, None,
            None, None, 0, False,
        )  # fmt: skip


def test_the_gpus_memory_that_is_not_there_is_torchs_exception(monkeypatch):
    def fails(_):
        raise RuntimeError("fused_rnn: out of memory: there is no room for a tensor")

    with FakeTensorMode():
        on_gpu, on_cpu = torch.empty(3, device="cuda"), torch.empty(3)
    stream = SimpleNamespace(query=lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        autograd._call(fails, on_gpu)
    stream.query = lambda: 1 / 0  # what an earlier kernel did wrong
    with pytest.raises(ZeroDivisionError):
        autograd._call(fails, on_gpu)
    with pytest.raises(RuntimeError, match="no room") as raised:
        autograd._call(fails, on_cpu)
    assert not isinstance(raised.value, torch.OutOfMemoryError)
