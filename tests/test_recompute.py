"""``recompute=True``: the CPU's bits of the default, at less memory."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from devices import DEVICES, layer_on
from layers import check, make_problem, projects, run
from numerics import DTYPES, cases, grid, needs_native
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from twins import H, I, P, name_of, step, tensors

import fused_rnn
from fused_rnn import autograd, recompute
from fused_rnn.cells import CELLS

SAVING = tuple(name for name, cell in CELLS.items() if cell.saved)
T, N = 20, 3
# Sums over the rows: made chunk by chunk they come in another order.
WEIGHTS = ("dw_ih", "db_ih", "dw_hh", "db_hh", "dw_hr")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(recompute, "ROWS", 1)


@needs_native
@cases(
    projects, cell=SAVING, dtype=DTYPES, P=(0, 5), reverse=(False, True), control=(False, True),
    rows=("", "packed", "scattered"), states=(True, False), product=(False, True),
    regularised=(False, True), shape=((19, 3, 9), (40, 2, 33), (1, 4, 6)), device=DEVICES,
)  # fmt: skip
def test_the_layer_keeps_the_rule_and_all_bits_but_of_sums(case):
    regularised, device = case.pop("regularised"), case.pop("device")
    problem = make_problem(**case, h_mask=regularised, keep=regularised)
    layer = layer_on(device)
    check(partial(layer, recompute=True, cells=True), problem)
    if device != "cpu":
        return  # whose products may round otherwise for fewer rows
    expected, found = run(layer, problem), run(partial(layer, recompute=True, cells=True), problem)
    for name in expected.keys() - set(WEIGHTS):
        assert torch.equal(found[name], expected[name]), f"{name} of {problem}"


FORMS = {
    "plain": ({}, {}),
    "two directions": ({"bidirectional": True, "num_layers": 2, "dropout": 0.5}, {}),
    "batch first": ({"batch_first": True, "direction": "reverse"}, {"tbptt": 7}),
    "masked": ({"recurrent_dropout": 0.3, "weight_dropout": 0.2}, {}),
    "ragged": ({"bidirectional": True}, {"lengths": [0, 20, 11]}),
    "episodes": ({"bidirectional": True}, {"reset": torch.arange(T * N).view(T, N) % 7 == 0}),
    "learned": ({"learn_initial_state": True}, {"reset": torch.arange(T * N).view(T, N) % 7 == 0}),
    "last step": ({}, {"last_step_only": True, "lengths": [20, 1, 3]}),
    "cell states": ({"num_layers": 2}, {"return_cell_states": True}),
    "projected": ({"proj_size": P, "bidirectional": True}, {}),
}


def pair(kind, **options):
    """The default and ``recompute``, equal weights."""
    name, extra = name_of(kind)
    plain = getattr(fused_rnn, name)(I, H, **extra, **options)
    ours = getattr(fused_rnn, name)(I, H, recompute=True, **extra, **options)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@grid(
    lambda kind, form, **_: kind == "lstm" or form not in ("projected", "cell states"),
    kind=SAVING, form=FORMS, backend=("auto", "reference"),
)  # fmt: skip
def test_modules_compose(kind, form, backend):
    options, call = FORMS[form]
    plain, ours = pair(kind, dtype=torch.float64, **options)
    input = torch.randn((N, T, I) if ours.batch_first else (T, N, I), dtype=torch.float64)
    with fused_rnn.use_backend(backend):
        expected, found = (
            step(module, input, seed=3, call=partial(module, **call)) for module in (plain, ours)
        )
    assert_close(found, expected)
    for name in (name for name in found if name.startswith("output")):
        assert torch.equal(found[name], expected[name])


@grid(kind=SAVING, form=("packed", "jagged"))
def test_compact_input(kind, form):
    plain, ours = pair(kind, bidirectional=True, num_layers=2)
    sequences = [torch.randn(length, I) for length in (20, 13, 13, 1)]
    if form == "packed":
        input, results = nn.utils.rnn.pack_sequence(sequences), []
        for module in (plain, ours):
            results.append(step(module, input))
        assert_close(results[1], results[0])
        return
    values = torch.cat(sequences).requires_grad_()
    offsets = torch.tensor([0, 20, 33, 46, 47])
    for module in (plain, ours):
        y, _ = module(torch.nested.nested_tensor_from_jagged(values, offsets))
        y.values().square().sum().backward()
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("kind", SAVING)
def test_second_derivatives_and_transforms(kind):
    plain, ours = pair(kind, dtype=torch.float64)
    input = torch.randn(4, 2, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], input, fast_mode=True)
    loss = {module: (lambda x, m=module: m(x)[0].square().sum()) for module in (plain, ours)}
    for how in (torch.func.grad, torch.func.hessian):
        for backend in ("auto", "reference"):
            with fused_rnn.use_backend(backend if how is torch.func.grad else "auto"):
                found = how(loss[ours])(input.detach())
            assert_close(found, how(loss[plain])(input.detach()))


@grid(kind=SAVING, device=DEVICES, half=(torch.bfloat16, torch.float16))
def test_autocast(kind, device, half):
    plain, ours = pair(kind, device=device)

    def call(input, hx, module):
        with torch.autocast(device, half):
            return module(input, hx)

    input = torch.randn(T, N, I, device=device)
    expected, found = (step(m, input, call=partial(call, module=m)) for m in (plain, ours))
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert_close(found, expected, rtol=0.02, atol=0.02)


@grid(kind=SAVING, device=DEVICES, grad=(True, False))
def test_it_compiles_as_one_graph_for_all_sizes(kind, device, grad):
    _, ours = pair(kind, dtype=torch.float64, device=device, bidirectional=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(ours, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(grad):
        for sizes in ((20, 3), (50, 2), (7, 5)):
            input = torch.randn(*sizes, I, dtype=torch.float64, device=device)
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(input, dim)
            outputs = [list(tensors(run(input))) for run in (call, ours)]
            assert_close(*outputs)
            if grad:
                losses = [sum(y.square().sum() for y in each) for each in outputs]
                gradients = [torch.autograd.grad(loss, [*ours.parameters()]) for loss in losses]
                assert_close(*gradients)
    assert counter.frame_count == 1


@needs_native
@grid(cell=SAVING, rows=("", "packed"))
def test_opcheck(cell, rows):
    problem = make_problem(cell, torch.float64, (19, 3, 4), rows=rows, product=True)
    library = torch.ops.fused_rnn_recompute
    arguments = problem.op_arguments()
    torch.library.opcheck(library.layer.default, arguments)
    cell_id, x, w_ih, b_ih, w_hh, b_hh, h0, c0, reverse, _, *options = arguments
    saved = library.layer(*arguments)[4]
    grads = [problem.grads.get(name) for name in ("h", "c", "h_n", "c_n")]
    inputs = (x, w_ih, w_hh, h0, c0, reverse, *options)
    arguments = (cell_id, 63, *grads, b_ih, b_hh, saved, *inputs)
    torch.library.opcheck(library.layer_backward.default, arguments)


@grid(kind=SAVING, device=DEVICES)
def test_what_a_forward_keeps(kind, device, monkeypatch):
    """Of 64 steps and more: the input and states at 15 of them."""
    kept = []
    for module in pair(kind, device=device):
        held = {}
        input = torch.randn(200, N, I, device=device)

        def count(x, held=held):
            held[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            module(input)
        weights = {p.data_ptr() for p in (*module.parameters(), input)}
        kept.append(sum(size for at, size in held.items() if at not in weights))
    states = CELLS[kind].states
    assert kept[1] == 15 * N * H * states
    assert kept[0] == 200 * N * H * (states + CELLS[kind].saved)


PEAK = """
import sys, torch, fused_rnn
from fused_rnn.bench.timing import peak_memory
torch.set_num_threads(1)
module, x = fused_rnn.LSTM(64, 64, recompute=sys.argv[1] == "True"), torch.randn(1000, 32, 64)
dy = torch.randn(1000, 32, 64)
call = lambda: torch.autograd.grad(module(x)[0], [*module.parameters()], dy)
call()
print(peak_memory(call))
"""


def test_an_lstm_trains_in_half_the_memory():
    peaks = []
    for recomputes in ("False", "True"):
        ran = subprocess.run(
            [sys.executable, "-c", PEAK, recomputes], check=True, capture_output=True, text=True
        )
        peaks.append(ran.stdout.strip())
    if "None" in peaks:
        pytest.skip("this system does not tell a process's peak memory")
    assert int(peaks[1]) <= 0.5 * int(peaks[0])


def test_what_it_says_of_itself():
    lstm, input = fused_rnn.LSTM(I, H, recompute=True), torch.randn(T, N, I)
    assert "recompute=True" in repr(lstm)
    assert fused_rnn.explain(lstm, input).problem.options == ("recompute",)
    with (
        fused_rnn.use_backend("torch"),
        pytest.raises(RuntimeError, match=r"torch\.nn has no recompute"),
    ):
        lstm(input)
    with fused_rnn.use_backend("torch"), torch.no_grad():
        lstm(input)  # there is nothing to keep
    with pytest.raises(ValueError, match="cannot revert 0: its recompute=True"):
        fused_rnn.revert(nn.Sequential(lstm))
    # An RNN saves nothing but its states anyway.
    assert fused_rnn.explain(fused_rnn.RNN(I, H, recompute=True), input).problem.options == ()


def test_no_layer_of_no_rows_fails():
    """No batch, no steps that are there: what the default says of them."""
    for shape, rows in (((5, 0, 4), ""), ((0, 3, 4), "")):
        problem = make_problem("lstm", torch.float32, shape, rows=rows)
        expected = run(autograd.layer, problem)
        assert_close(run(partial(autograd.layer, recompute=True, cells=True), problem), expected)
