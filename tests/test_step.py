"""One step of a cell: the pointwise op, and the small step that is called by address."""

import datetime
import os
import resource
from pathlib import Path

import pytest
import torch
from devices import DEVICES, device_of, there
from layers import torch_cell
from numerics import (
    DTYPES,
    HALF,
    assert_as_good_as,
    cases,
    grid,
    integers,
    needs_native,
    signed_permutation,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_rnn
from fused_rnn import autograd, native, steps
from fused_rnn.backends import cpu
from fused_rnn.cells import CELLS, Cell

pytestmark = [pytest.mark.op, needs_native]

ops = torch.ops.fused_rnn

NAMES = ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")
# N, I, H: ones, sizes that no vector divides, up to and beyond the 4 rows that share weights in L1.
SHAPES = ((1, 1, 1), (1, 7, 25), (2, 31, 33), (4, 60, 60), (1, 130, 130), (3, 16, 31), (9, 5, 25))


def make_operands(
    cell: str, dtype: torch.dtype, shape: tuple[int, int, int], *, bias: bool = True
) -> dict[str, Tensor | None]:
    N, I, H = shape  # noqa: E741
    spec = CELLS[cell]
    exact = cell == "rnn_relu" and dtype in HALF

    def draw(*size: int) -> Tensor:
        return integers(*size, limit=1) if exact else torch.randn(size)

    def weight(out: int, into: int) -> Tensor:
        return signed_permutation(out, into) if exact else torch.randn(out, into) / into**0.5

    operands = dict.fromkeys(NAMES) | {
        "x": draw(N, I),
        "h": draw(N, H),
        "w_ih": weight(spec.gates * H, I),
        "w_hh": weight(spec.gates * H, H),
    }
    if spec.states == 2:
        operands["c"] = draw(N, H)
    if bias:
        operands |= {name: draw(spec.gates * H) for name in ("b_ih", "b_hh")}
    return {name: x if x is None else x.to(dtype) for name, x in operands.items()}


def oracle_step(cell: Cell, x, h, c, w_ih, w_hh, b_ih, b_hh):
    linear = torch.nn.functional.linear
    return cell.step(linear(x, w_ih, b_ih), linear(h, w_hh, b_hh), (h, c)[: cell.states])


def small_step(cell: Cell, operands: dict[str, Tensor | None]):
    x, h, c, *weights = operands.values()
    return cpu.small_step(cell.id, x, (h,) if c is None else (h, c), tuple(weights))


def run(step, cell: str, operands, grads) -> dict[str, Tensor]:
    """The new states and all gradients, by name."""
    dtype = operands["x"].dtype
    leaves = {name: x if x is None else x.detach().requires_grad_() for name, x in operands.items()}
    states = step(CELLS[cell], *leaves.values())[: CELLS[cell].states]
    torch.autograd.backward(states, [dy.to(dtype) for dy in grads[: len(states)]])
    found = {f"d{name}": x.grad for name, x in leaves.items() if x is not None}
    return dict(zip(("h1", "c1"), (s.detach() for s in states), strict=False)) | found


def to_double(operands):
    return {name: x if x is None else x.double() for name, x in operands.items()}


@cases(cell=CELLS, device=DEVICES, dtype=DTYPES, shape=SHAPES, bias=(False, True))
def test_a_step_is_as_good_as_torchs(case):
    device, case = device_of(case)
    cell, (N, I, H) = case["cell"], case["shape"]  # noqa: E741
    operands = there(make_operands(**case), device)
    grads = there([integers(N, H, limit=1), integers(N, H, limit=1)], device)
    ours, torchs = (run(step, cell, operands, grads) for step in (cpu.cell_step, torch_cell))
    oracle = run(oracle_step, cell, to_double(operands), grads)
    assert ours.keys() == oracle.keys()
    length = max(N, I, CELLS[cell].gates * H)
    for name, expected in oracle.items():
        what = f"{name} of a step {case} on {device}"
        assert_as_good_as(ours[name], torchs[name], expected, what, length=length, scale=1.0)


@cases(cell=CELLS, dtype=DTYPES, shape=SHAPES, bias=(False, True))
def test_a_small_step_is_as_good_as_torchs(case):
    cell, shape = CELLS[case["cell"]], case["shape"]
    operands = make_operands(**case)
    ours = small_step(cell, operands)
    assert ours is not None
    assert len(ours) == cell.states
    torchs = torch_cell(cell, *operands.values())
    oracle = oracle_step(cell, *to_double(operands).values())
    for place in range(cell.states):
        values = (ours[place], torchs[place], oracle[place])
        assert values[0].dtype == case["dtype"]
        what = f"state {place} of a small step {case}"
        assert_as_good_as(*values, what, length=sum(shape[1:]), scale=1.0)


@grid(cell=CELLS, dtype=DTYPES)
def test_a_step_changes_nothing_and_returns_new_memory(cell, dtype):
    operands = make_operands(cell, dtype, (2, 5, 25))
    before = {name: x.clone() for name, x in operands.items() if x is not None}
    small, other = small_step(CELLS[cell], operands), cpu.cell_step(CELLS[cell], *operands.values())
    for states in (small, other):
        results = [x for x in states if x is not None]
        places = [x.untyped_storage().data_ptr() for x in results]
        assert len(set(places)) == len(places)
        for name, copy in before.items():
            assert torch.equal(operands[name], copy), name
            assert operands[name].untyped_storage().data_ptr() not in places


def unfit(operands: dict[str, Tensor | None], name: str, how: str) -> dict[str, Tensor | None]:
    """The operands with one that the kernel, which reads plain memory, must not see."""
    x = operands[name]
    changed = {
        "shorter": lambda: x[..., :-1].contiguous(),
        "longer": lambda: torch.cat([x, x[..., :1]], -1),
        "strided": lambda: torch.stack([x, x], -1)[..., 0],
        "another dtype": lambda: x.to(torch.float64 if x.dtype != torch.float64 else torch.half),
        "integers": lambda: x.to(torch.int64),
        "meta": lambda: x.to("meta"),
        "a subclass": lambda: x.as_subclass(Subclass),
        "sparse": lambda: x.to_sparse(),
        "empty": lambda: x[..., :0],
        "negated": lambda: torch._neg_view(x),
        "one dimension more": lambda: x.unsqueeze(0),
        "freed": lambda: freed(x.clone()),
    }[how]()
    return operands | {name: changed}


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


class Subclass(torch.Tensor):
    """A tensor whose functions somebody may have overridden."""


UNFIT = (
    "shorter",
    "longer",
    "strided",
    "another dtype",
    "integers",
    "meta",
    "a subclass",
    "sparse",
    "empty",
    "negated",
    "one dimension more",
    "freed",
)


@grid(lambda cell, name, **_: name != "c" or cell == "lstm", cell=CELLS, name=NAMES, how=UNFIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_step_leaves_what_is_not_plain_memory_to_others(cell, name, how, dtype):
    operands = unfit(make_operands(cell, dtype, (2, 5, 25)), name, how)
    assert small_step(CELLS[cell], operands) is None


@grid(cell=CELLS, name=("b_ih", "b_hh"), how=UNFIT)
def test_a_small_step_looks_at_a_bias_that_is_alone(cell, name, how):
    operands = make_operands(cell, torch.float32, (2, 5, 25))
    other = {"b_ih": "b_hh", "b_hh": "b_ih"}[name]
    given = unfit(operands | {other: None}, name, how)
    assert small_step(CELLS[cell], given) is None


@pytest.mark.parametrize(
    ("N", "I", "H", "small"),
    [(1, 2000, 2000, True), (4, 2000, 2000, True), (5, 2000, 2000, False), (16, 32, 32, True),
     (1000, 32, 32, False)],
)  # fmt: skip
def test_a_small_step_is_for_a_few_rows_or_little_work(N, I, H, small, monkeypatch):  # noqa: E741
    calls, real = [], cpu.small_step

    def watched(*operands):
        calls.append(real(*operands))
        return calls[-1]

    monkeypatch.setitem(steps.SMALL_STEPS, "cpu", watched)
    cell = fused_rnn.LSTMCell(I, H, backend="cpu")
    input, states = torch.zeros(N, I), (torch.zeros(N, H), torch.zeros(N, H))
    with torch.no_grad():
        cell(input, states)
    assert any(calls) == small
    how = fused_rnn.explain(cell, input, states).algorithm
    assert how.startswith("torch's two GEMMs")  # explained with gradients
    with torch.no_grad():
        how = fused_rnn.explain(cell, input, states).algorithm
    assert how.startswith("one pass") == small
    calls.clear()
    cell(input, states)
    assert not calls, "a step with gradients goes another way"


@pytest.mark.parametrize("cell", CELLS)
def test_a_small_step_without_its_own_states_is_left_to_others(cell):
    """The address of nothing must not reach the kernel."""
    x, h, _, *weights = make_operands(cell, torch.float32, (1, 5, 8)).values()
    count = CELLS[cell].states
    for states in ((), (h,) * (3 - count), (h,) * 3, [h] * count, (None,) * count, (1.0,) * count):
        assert cpu.small_step(CELLS[cell].id, x, states, tuple(weights)) is None
    assert cpu.small_step(CELLS[cell].id, x, (h,) * count, tuple(weights[:3])) is None
    assert len(cpu.small_step(CELLS[cell].id, x, (h,) * count, tuple(weights))) == count


@pytest.mark.parametrize("other", ["no method", "another way to call it", "none", "no table"])
def test_a_torch_of_other_tensors_has_no_small_steps(other, monkeypatch):
    class Other:
        __dlpack_c_exchange_api__ = Tensor.__dlpack_c_exchange_api__

    if other == "no table":
        Other.__dlpack_c_exchange_api__ = datetime.datetime_CAPI
    elif other != "none":
        Other.is_neg = Tensor.sum if other == "another way to call it" else Tensor.__len__
    monkeypatch.setattr(native, "Tensor", Other)
    other = native._connect()
    assert other is not native.small_step
    assert other(CELLS["gru"].id, torch.zeros(1, 2), torch.zeros(1, 3), {}, ()) is None
    monkeypatch.setattr(native, "Tensor", Tensor)
    assert native._connect() is native.small_step


@grid(cell=CELLS, bias=(True, False))
def test_a_small_step_finds_weights_by_their_names(cell, bias):
    x, h, c, *weights = make_operands(cell, torch.float32, (2, 5, 25), bias=bias).values()
    spec, state = CELLS[cell], h if c is None else (h, c)
    expected = cpu.small_step(spec.id, x, (h, c)[: spec.states], tuple(weights))
    held = dict(zip(NAMES[3:], weights, strict=True))

    def by_name(weights, names):
        return cpu.small_step(spec.id, x, state, weights, names)

    few = {name: held[name] for name in NAMES[3:5]}
    for found in (by_name(held, NAMES[3:]), *([] if bias else [by_name(few, NAMES[3:5])])):
        assert all(map(torch.equal, (found,) if c is None else found, expected))
    # Nothing that is not there reaches the kernel.
    for missing in NAMES[3:]:
        assert by_name({name: w for name, w in held.items() if name != missing}, NAMES[3:]) is None
    for required in NAMES[3:5]:
        assert by_name(held | {required: None}, NAMES[3:]) is None
        assert by_name(held | {required: h}, NAMES[3:]) is None
    for names in ((), NAMES[3:4], NAMES[3:6], NAMES[2:], [], "w_ih", 4, (1, 2, 3, 4), ([], {})):
        assert by_name(held, names) is None
    for names in ([NAMES[3:]], [NAMES[3:]] * 17, [None], [4]):  # of layers, whose states are 3D
        assert by_name(held, names) is None
    if spec.states == 1:  # modules refuse a tuple
        assert cpu.small_step(spec.id, x, (h,), held, NAMES[3:]) is None
    for weights in (None, [*held.values()], NAMES, held.items()):
        assert by_name(weights, NAMES[3:]) is None


@grid(cell=CELLS, dtype=DTYPES)
def test_a_small_step_of_layers_returns_y_in_memory_of_its_own(cell, dtype):
    x, h, c, *weights = make_operands(cell, dtype, (2, 25, 25)).values()
    spec, held = CELLS[cell], dict(zip(NAMES[3:], weights, strict=True))
    states = tuple(torch.stack([s, s.flip(0)]) for s in (h, c)[: spec.states])
    state = states if spec.states == 2 else states[0]
    y, after = cpu.small_step(spec.id, x, state, held, [NAMES[3:]] * 2)
    after = after if spec.states == 2 else (after,)
    lower = cpu.small_step(spec.id, x, tuple(s[0] for s in states), tuple(weights))
    upper = cpu.small_step(spec.id, lower[0], tuple(s[1] for s in states), tuple(weights))
    for value, *parts in zip(after, lower, upper, strict=True):
        assert torch.equal(value, torch.stack(parts))
    assert torch.equal(y, upper[0])
    assert y.shape == (2, 25)
    results = (y, *after)
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)
    for t in results:
        assert t.dtype == dtype
        assert t.is_contiguous()
        assert t.data_ptr() % 64 == 0
        t.zero_()
    assert torch.equal(
        upper[0], cpu.small_step(spec.id, lower[0], tuple(s[1] for s in states), tuple(weights))[0]
    )


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in use is not told here")
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizer keeps freed memory")
def test_the_results_of_small_steps_are_freed(cell):
    x, h, c, *weights = make_operands(cell, torch.float32, (4, 1, 256)).values()

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    spec, held = CELLS[cell], dict(zip(NAMES[3:], weights, strict=True))
    states = tuple(s.unsqueeze(0) for s in (h, c)[: spec.states])
    state, names = (states if c is not None else states[0]), [NAMES[3:]]
    cpu.small_step(spec.id, x, state, held, names)
    before, calls = resident(), 5_000
    for _ in range(calls):
        cpu.small_step(spec.id, x, state, held, names)
    assert resident() - before < calls * h.numel() * 4 / 4  # a quarter of y


def pointwise(cell: str, dtype: torch.dtype, shape: tuple[int, int], device: str = "cpu"):
    """Arguments of the ops step and step_backward."""
    (N, H), spec = shape, CELLS[cell]
    gx, gh = torch.randn(2, N, spec.gates * H).to(device, dtype)
    h, c, dh1, dc1 = torch.randn(4, N, H).to(device, dtype)
    if spec.states == 1:
        c = dc1 = None
    forward = (spec.id, gx, gh, h, c, True)
    h1, c1, saved = ops.step(*forward)
    return forward, (spec.id, dh1, dc1, h1, c1, saved, h, c)


@cases(cell=CELLS, device=DEVICES, dtype=DTYPES, shape=((1, 1), (3, 25), (2, 64), (0, 8)))
def test_fakes_agree_with_the_ops(case):
    forward, backward = pointwise(**case)
    for op, inputs in ((ops.step, forward), (ops.step_backward, backward)):
        for last in (True, False) if op is ops.step else (inputs[-1],):
            given = (*inputs[:-1], last)
            real = op(*given)
            with FakeTensorMode() as mode:
                fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given))
            for place, (a, b) in enumerate(zip(real, fake, strict=True)):
                what = f"output {place} of {op}: {case}"
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), what


@grid(cell=CELLS, device=DEVICES, dtype=(torch.float32, torch.bfloat16))
def test_opcheck(cell, device, dtype):
    forward, backward = pointwise(cell, dtype, (3, 8), device)
    for op, inputs in ((ops.step, forward), (ops.step_backward, backward)):
        checked = torch.library.opcheck(op.default, inputs)
        assert set(checked.values()) == {"SUCCESS"}, op


@grid(cell=CELLS, device=DEVICES, dtype=DTYPES)
def test_without_save_nothing_is_saved_and_results_are_the_same(cell, device, dtype):
    forward, _ = pointwise(cell, dtype, (3, 25), device)
    h1, c1, _ = ops.step(*forward)
    other_h1, other_c1, saved = ops.step(*forward[:-1], False)
    assert torch.equal(h1, other_h1)
    assert torch.equal(c1, other_c1)
    assert saved.shape == (0,)


@grid(cell=CELLS, device=DEVICES, dtype=DTYPES, bad=(torch.nan, torch.inf, -torch.inf))
def test_nan_and_infinity_pass_as_in_torch(cell, device, dtype, bad):
    spec, (N, H) = CELLS[cell], (2, 25)
    gx = torch.randn(N, spec.gates, H).to(dtype)
    for gate in range(spec.gates):
        gx[0, gate, 3 * gate] = bad
    gx, gh = gx.flatten(1), torch.randn(N, spec.gates * H).to(dtype)
    states = torch.randn(2, N, H).to(dtype).unbind()
    found = []
    for step in (autograd.step, lambda cell, *a: cell.step(*a[:2], a[2:][: cell.states])):
        given = (gx, gh, *states[: spec.states])
        leaves = [x.clone().to(device).requires_grad_() for x in given]
        arguments = leaves if spec.states == 2 else [*leaves, None]
        results = step(spec, *arguments)[: spec.states]
        grads = torch.autograd.grad(
            results, leaves, [torch.ones_like(y) for y in results], allow_unused=True
        )
        grads = [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        ]
        found.append([*results, *grads])
    for place, (value, expected) in enumerate(zip(*found, strict=True)):
        what = f"result {place} of {cell} with {bad} in gx: {dtype}"
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(value), kind(expected)), what


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("place", [1, 2, 3, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_refuses_wrong_sizes_in_a_sentence(cell, place, device):
    forward, _ = pointwise(cell, torch.float32, (3, 8), device)
    if forward[place] is None:
        pytest.skip("this cell has no such operand")
    for wrong in (forward[place][:, 1:], forward[place][1:], forward[place].unsqueeze(0)):
        with pytest.raises(RuntimeError, match=r"fused_rnn: \w+ (has size .* expected|is missing)"):
            ops.step(*forward[:place], wrong, *forward[place + 1 :])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("place", range(1, 8))
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_backward_refuses_wrong_sizes_in_a_sentence(cell, place, device):
    """What is kept too: its kernel reads as much as h1 says there is."""
    _, backward = pointwise(cell, torch.float32, (3, 8), device)
    if backward[place] is None or not backward[place].numel():
        pytest.skip("this cell has no such operand")
    wrong = backward[place][:, 1:].contiguous()
    with pytest.raises(RuntimeError, match=r"fused_rnn: \w+ (has size .* expected|is missing)"):
        ops.step_backward(*backward[:place], wrong, *backward[place + 1 :])
