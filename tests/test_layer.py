"""One layer in one direction on the native kernels, against torch's cells and the reference."""

from dataclasses import replace

import pytest
import torch
from devices import DEVICES, layer_on, there
from layers import CLEAR, HOLD, check, make_problem, oracle_layer, projects, run, torch_layer
from numerics import DTYPES, HALF, assert_as_good_as, cases, grid, needs_native

from fused_rnn.autograd import layer
from fused_rnn.cells import CELLS, carry_dtype

pytestmark = [pytest.mark.op, needs_native]

ops = torch.ops.fused_rnn

# T, N, H: ones, sizes that no vector divides, more rows than are multiplied at a time, more rows
# than a chunk has (256): of many sequences, of one.
SHAPES = ((1, 1, 1), (1, 3, 25), (7, 1, 31), (5, 4, 33), (3, 2, 60), (4, 9, 130), (33, 26, 8))
SHAPES += ((520, 1, 17), (3, 300, 5))
ROWS = ("", "packed", "scattered")


def op_on(device, arguments):
    """Results of the op on the device, on the CPU."""
    return there(tuple(ops.layer(*there(arguments, device))), "cpu")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(256, 64, 12), (4, 3000, 5)], ids=str)
def test_sums_over_many_rows(cell, shape, rows):
    """A weight's gradient sums over all rows: added one by one they would lose digits."""
    case = {"cell": cell, "shape": shape, "rows": rows, "dtype": torch.float32}
    check(layer, make_problem(**case))


def test_sums_over_many_inputs_and_units():
    """Products of 2,048 positive terms: added one by one they lose 4 to 6 ulp."""
    T, N, H = 2, 8, 2048
    x, w_ih, w_hh, h0 = (1 + torch.rand(s) for s in ((T, N, H), (H, H), (H, H), (N, H)))
    w_hh *= 2.0**-11  # states stay in range
    w_ih *= 2.0**-11
    operands = [t.requires_grad_() for t in (x, w_ih, w_hh, h0)]
    x, w_ih, w_hh, h0 = operands
    h, _, h_n, _ = layer(CELLS["rnn_relu"], x, w_hh, None, h0, None, w_ih=w_ih)
    found = [h, h_n, *torch.autograd.grad(h.sum() + h_n.sum(), (x, h0))]
    x, w_ih, w_hh, h0 = (t.detach().double().requires_grad_() for t in operands)
    first = x[0] @ w_ih.t() + h0 @ w_hh.t()
    second = x[1] @ w_ih.t() + first @ w_hh.t()
    loss = first.sum() + 2 * second.sum()
    expected = [torch.stack((first, second)), second, *torch.autograd.grad(loss, (x, h0))]
    for value, exact in zip(found, expected, strict=True):
        error = ((value.detach().double() - exact) / exact).square().mean().sqrt()
        assert error < 3 * torch.finfo(torch.float32).eps, error


def fits(cell, dtype, shape, **case):
    """A ReLU's states are not bounded: sums over 520 of them leave float16."""
    bounded = cell != "rnn_relu" or dtype is not torch.float16 or shape[0] < 520
    return bounded and projects(cell=cell, shape=shape, **case)


@cases(
    fits,
    cell=CELLS,
    dtype=DTYPES,
    shape=SHAPES,
    P=(0, 1, 19),
    reverse=(False, True),
    control=(False, True),
    rows=ROWS,
    states=(False, True),
    bias=(False, True),
    product=(False, True),
    h_mask=(False, True),
    keep=(False, True),
)
def test_outputs_and_gradients(case):
    check(layer, make_problem(**case))


@cases(
    fits,
    cell=CELLS,
    dtype=DTYPES,
    shape=SHAPES,
    P=(0, 1, 19),
    reverse=(False, True),
    control=(False, True),
    rows=ROWS,
    states=(False, True),
)
def test_a_share_of_each_state_stays(case):
    check(layer, make_problem(share=True, **case))


@cases(
    projects,
    cell=CELLS,
    shape=SHAPES[:4],
    P=(0, 1, 19),
    reverse=(False, True),
    control=(False, True),
    rows=ROWS,
    states=(False, True),
    h_mask=(False, True),
    keep=(False, True),
    share=(False, True),
)
def test_the_oracle_does_what_torchs_cells_do(case):
    problem = make_problem(dtype=torch.float64, **case)
    torchs, oracle = run(torch_layer, problem), run(oracle_layer, problem)
    for name, expected in oracle.items():
        what = f"{name} of {problem}, torch's cells and the reference"
        # The oracle against itself: what torch does must be within rounding.
        assert_as_good_as(torchs[name], expected, expected, what, length=problem.length, scale=1.0)


@pytest.mark.parametrize("dtype", HALF)
@grid(projects, cell=CELLS, shape=((9, 3, 33), (4, 2, 130)), P=(0, 19), control=(False, True))
def test_half_types_are_rounded_once(cell, dtype, shape, P, control):
    """Products, gates and carried states are float32: only what is stored is rounded.

    On the CPU. A GPU's tensor cores multiply half types: h is rounded on its way into the product.
    """
    problem = make_problem(cell, dtype, shape, P=P, control=control)
    ours = run(layer, problem)
    oracle = run(oracle_layer, problem.to(torch.float64))
    half_ulp = torch.finfo(dtype).eps / 2
    for name in problem.grads:
        assert ours[name].dtype == (carry_dtype(dtype) if name.endswith("_n") else dtype)
        relative = 0.0 if name.endswith("_n") else half_ulp
        # float32's own error at these sizes, far below a unit of the half types.
        allowed = relative * oracle[name].abs() + 1e-5 * oracle[name].abs().max().clamp(min=1)
        # Below the smallest normal number a unit stops shrinking.
        allowed += relative * torch.finfo(dtype).smallest_normal
        excess = ((ours[name].double() - oracle[name]).abs() - allowed).max().item()
        assert excess <= 0, f"{name} of {problem}: {dtype}, {excess} above one rounding"


@grid(
    projects,
    cell=CELLS,
    dtype=DTYPES,
    P=(0, 19),
    reverse=(False, True),
    control=(False, True),
    shape=((9, 3, 33), (8, 1, 60)),
)
def test_a_run_cut_into_chunks_equals_the_whole_bit_for_bit(
    cell, dtype, shape, P, reverse, control
):
    whole = make_problem(cell, dtype, shape, P=P, reverse=reverse, control=control)
    cut = 4
    pieces = [slice(0, cut), slice(cut, None)]
    first, last = reversed(pieces) if reverse else pieces

    def part(piece, h0, c0):
        options = whole.options | ({"control": whole.options["control"][piece]} if control else {})
        x = whole.operands["x"][piece].detach().requires_grad_()
        keywords = {"w_hr": whole.operands["w_hr"]} | options
        weights = (whole.operands["w_hh"], whole.operands["b_hh"])
        return x, layer(whole.cell, x, *weights, h0, c0, **keywords)

    xs, results = {}, {}
    h0, c0 = whole.operands["h0"], whole.operands["c0"]
    for piece in (first, last):
        xs[piece.start], results[piece.start] = part(piece, h0, c0)
        h0, c0 = results[piece.start][2:]
    expected = run(layer, whole)
    joined = {
        "h": torch.cat([results[0][0], results[cut][0]]),
        "h_n": results[last.start][2],
    }
    if whole.cell.states == 2:
        joined |= {
            "c": torch.cat([results[0][1], results[cut][1]]),
            "c_n": results[last.start][3],
        }
    grads = [whole.grads[name].to(x.dtype) for name, x in joined.items()]
    torch.autograd.backward(list(joined.values()), grads)
    for name, value in joined.items():
        assert torch.equal(value, expected[name]), f"{name} of {whole}: {dtype}"
    dx = torch.cat([xs[0].grad, xs[cut].grad])
    assert torch.equal(dx, expected["dx"]), f"dx of {whole}: {dtype}"


@grid(cell=CELLS, dtype=DTYPES, device=DEVICES, save=(False, True))
def test_holding_carries_the_state_and_shows_zeros(cell, dtype, device, save):
    problem = make_problem(cell, dtype, (5, 4, 25))
    control = torch.zeros(5, 4, dtype=torch.uint8)
    control[:, 1] = HOLD | CLEAR
    problem.options["control"] = control
    h, c, h_n, c_n, _ = op_on(device, problem.op_arguments(save=save))
    assert not h[:, 1].any()
    assert torch.equal(h_n[1], problem.operands["h0"][1].to(h_n.dtype))
    assert h[:, 0].all() or cell == "rnn_relu"
    if c.numel():
        assert not c[:, 1].any()
    if c_n.numel():
        assert torch.equal(c_n[1], problem.operands["c0"][1].to(c_n.dtype))


@grid(projects, cell=CELLS, dtype=DTYPES, P=(0, 19))
def test_rows_are_control_in_another_order(cell, dtype, P):
    """Compact rows and padding that holds are the same run."""
    compact = make_problem(cell, dtype, (6, 5, 33), P=P, rows="scattered")
    rows = compact.options["rows"]
    live, at = rows >= 0, rows.clamp(min=0).long()
    padded = replace(
        compact,
        operands=compact.operands | {"x": compact.operands["x"][at]},
        grads=compact.grads | {k: compact.grads[k][at] for k in compact.grads.keys() & {"h", "c"}},
        options={"reverse": False, "control": HOLD * (~live).byte()},
    )
    ours, other = run(layer, compact), run(layer, padded)
    for name in ("h", "dx", *(("c",) if compact.cell.states == 2 else ())):
        assert torch.equal(ours[name][at[live]], other[name][live]), f"{name} of {compact}"
        assert not other[name][~live].any()
    for name in ("h_n", "dh0"):
        assert torch.equal(ours[name], other[name]), f"{name} of {compact}"


@grid(cell=CELLS, dtype=DTYPES, device=DEVICES, reverse=(False, True))
def test_all_steps_may_hold(cell, dtype, device, reverse):
    problem = make_problem(cell, dtype, (3, 2, 25), reverse=reverse)
    problem.operands["x"] = problem.operands["x"][0, :0]
    problem.options["rows"] = torch.full((3, 2), -1, dtype=torch.int32)
    for name in ("h", "c"):
        if name in problem.grads:
            problem.grads[name] = problem.grads[name][0, :0]
    ours = run(layer_on(device), problem)
    assert ours["h"].shape == (0, 25)
    assert torch.equal(ours["h_n"], problem.operands["h0"].to(ours["h_n"].dtype))
    assert torch.equal(ours["dh0"], problem.grads["h_n"])
    assert not ours["dw_hh"].any()


@grid(cell=CELLS, dtype=DTYPES, device=DEVICES)
def test_no_steps_leave_the_state_as_it_was(cell, dtype, device):
    problem = make_problem(cell, dtype, (1, 3, 25))
    problem.operands["x"] = problem.operands["x"][:0]
    h, _, h_n, c_n, _ = op_on(device, problem.op_arguments())
    assert h.shape == (0, 3, 25)
    assert torch.equal(h_n, problem.operands["h0"].to(h_n.dtype))
    if c_n.numel():
        assert torch.equal(c_n, problem.operands["c0"].to(c_n.dtype))


@grid(cell=CELLS, dtype=DTYPES, device=DEVICES, control=(False, True))
def test_without_save_nothing_is_saved_and_results_are_the_same(cell, dtype, device, control):
    problem = make_problem(cell, dtype, (5, 3, 33), control=control)
    h, c, h_n, c_n, saved = op_on(device, problem.op_arguments(save=True))
    results = op_on(device, problem.op_arguments(save=False))
    for ours, expected in zip(results[::2][:2] + results[3:4], (h, h_n, c_n), strict=True):
        assert torch.equal(ours, expected)
    assert results[1].shape == results[4].shape == (0,)
    assert c.shape == ((5, 3, 33) if problem.cell.states == 2 else (0,))
    saved_width = problem.cell.saved * 33
    assert saved.shape == ((5, 3, saved_width) if saved_width else (0,))


@pytest.mark.parametrize("sign", [-1, 1])
@grid(cell=CELLS, dtype=DTYPES, device=DEVICES)
def test_gates_saturate_without_overflow(cell, dtype, device, sign):
    problem = make_problem(cell, dtype, (4, 3, 33))
    largest = torch.finfo(dtype).max / (1 if dtype in HALF else 1e6)
    for name in ("x", "w_hh"):
        problem.operands[name] = torch.full_like(problem.operands[name], sign * largest)
        problem.operands["w_hh"] = problem.operands["w_hh"].clamp(-1, 1)
    if cell == "rnn_relu":
        problem.operands["x"].clamp_(max=16.0)
        problem.operands["w_hh"] /= 33
    ours = run(layer_on(device), problem)
    oracle = run(oracle_layer, problem.to(torch.float64))
    for name, value in ours.items():
        assert value.isfinite().all(), f"{name} of {problem}: {dtype}"
    for name in ("h", "h_n"):
        tolerance = 16 * torch.finfo(dtype).eps * max(1.0, oracle[name].abs().max().item())
        torch.testing.assert_close(ours[name].double(), oracle[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@grid(projects, cell=CELLS, dtype=DTYPES, device=DEVICES, P=(0, 19))
def test_nan_and_infinity_pass_as_in_torch(cell, dtype, device, P, bad):
    """The reference computes with torch's own functions, whatever the dtype."""
    problem = make_problem(cell, dtype, (4, 3, 33), P=P)
    for gate in range(problem.cell.gates):
        # One gate a sequence; other sequences stay clean.
        problem.operands["x"][1, gate % 2, gate * 33 + 7] = bad
    ours, torchs = run(layer_on(device), problem), run(oracle_layer, problem)
    for name, expected in torchs.items():
        what = f"{name} of {problem} with {bad} in x: {dtype} on {device}"
        value = ours[name]
        assert torch.equal(value.isnan(), expected.isnan()), what
        assert torch.equal(value.isposinf(), expected.isposinf()), what
        assert torch.equal(value.isneginf(), expected.isneginf()), what
    assert ours["h"][:, 2].isfinite().all()


@grid(dtype=DTYPES, device=DEVICES)
def test_relu_passes_nan_value_and_gradient(dtype, device):
    x = torch.tensor([torch.nan, -1.0, 0.0, 2.0], dtype=dtype).view(1, 1, 4).requires_grad_()
    w_hh = torch.zeros(4, 4, dtype=dtype)
    h, *_ = layer_on(device)(CELLS["rnn_relu"], x, w_hh, None, None, None)
    h.backward(torch.full_like(h, 3.0))
    (expected,) = torch.autograd.grad(torch.relu(x), x, torch.full_like(h, 3.0))
    torch.testing.assert_close(h.detach(), torch.relu(x).detach(), equal_nan=True)
    torch.testing.assert_close(x.grad, expected)
    assert x.grad.flatten().tolist() == [3.0, 0.0, 0.0, 3.0]
