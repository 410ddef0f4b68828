"""The Triton backend: in Triton's interpreter, and where there is a GPU, on that."""

import importlib.util
from functools import partial

import numerics
import pytest
import torch
from interpreter import Interpreter
from layers import CLEAR, CUT, HOLD, check, make_problem, oracle_layer, run
from numerics import HALF, cases, grid

from fused_rnn import autograd, native, recompute
from fused_rnn.backends import reference, triton
from fused_rnn.backends.triton import ops, tuning
from fused_rnn.cells import CELLS

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    pytest.mark.xdist_group("triton"),  # one interpreter for all
]

DTYPES = (torch.float32, *HALF)
SHAPES = ((1, 1, 1), (4, 3, 25), (3, 2, 31), (2, 19, 17))
# Of tiles of 32 or 64 units: a part, one and a part, several.
TILED_SHAPES = ((3, 2, 31), (2, 3, 70), (2, 17, 33))
ROWS = ("", "packed", "scattered")
NUMBERS: dict[str, int] = {"auto": 0} | {name: n for n, name in enumerate(tuning.ALGORITHMS, 1)}


@pytest.fixture(scope="module")
def interpreter():
    there = Interpreter(numerics.FULL)
    yield there
    there.close()


@pytest.fixture(params=["interpreter", "gpu"])
def on(request):
    """Runs a test's body, a function of the device, where the kernels run."""
    if request.param == "gpu":
        if not torch.cuda.is_available() or triton.available():
            pytest.skip(triton.available() or "there is no GPU")
        return lambda body, *arguments: body("cuda", *arguments)
    there, seed = request.getfixturevalue("interpreter"), request.config.getoption("seed")
    return lambda body, *arguments: there.run(seed, body, "cpu", *arguments)


def layer_on(device, algorithm="auto"):
    """The layer on Triton's ops, for tensors of the CPU."""

    def there(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    def run_there(*operands, **options):
        options = {name: there(x) for name, x in options.items()}
        how = {"algorithm": NUMBERS[algorithm], "library": ops.library}
        outputs = autograd.layer(*map(there, operands), **options, **how)
        return tuple(x if x is None else x.cpu() for x in outputs)

    return run_there


def check_case(device, algorithm, case):
    check(layer_on(device, algorithm), make_problem(**case))


@cases(
    cell=CELLS,
    dtype=DTYPES,
    shape=SHAPES,
    reverse=(False, True),
    control=(False, True),
    rows=ROWS,
    states=(False, True),
    bias=(False, True),
    product=(False, True),
    h_mask=(False, True),
    keep=(False, True),
)
def test_outputs_and_gradients(case, on):
    on(check_case, "auto", case)


@cases(
    cell=CELLS,
    dtype=DTYPES,
    shape=TILED_SHAPES,
    reverse=(False, True),
    control=(False, True),
    rows=ROWS,
    states=(False, True),
    h_mask=(False, True),
    keep=(False, True),
)
def test_tiles_of_units(case, on):
    on(check_case, "tiled", case)


@cases(
    cell=("lstm", "gru"),
    dtype=DTYPES,
    shape=((4, 3, 25), (2, 2, 70)),
    bias=(False, True),
    product=(False, True),
    control=(False, True),
    rows=ROWS,
    h_mask=(False, True),
    keep=(False, True),
)
def test_gates_made_again(case, on):
    on(check_case, "recompute", case)


@cases(
    cell=CELLS,
    dtype=DTYPES,
    shape=((4, 3, 25), (2, 2, 70)),
    control=(False, True),
    algorithm=("auto", "tiled"),
)
def test_a_share_of_each_state_stays(case, on):
    case = dict(case)
    on(check_case, case.pop("algorithm"), case | {"share": True})


def check_few_states(device, case):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recompute, "ROWS", 1)
        layer = partial(layer_on(device), recompute=True, cells=True)
        check(layer, make_problem(shape=(6, 2, 9), product=True, **case))


@grid(cell=("lstm", "gru"), dtype=DTYPES, rows=ROWS)
def test_few_states_are_kept(cell, dtype, rows, on):
    on(check_few_states, {"cell": cell, "dtype": dtype, "rows": rows})


def check_bits(device, algorithm, cell, dtype):
    """Twice the same; and without save the same results, and nothing saved."""
    problem = make_problem(cell, dtype, (3, 3, 31), product=True, control=True, rows="scattered")
    layer = layer_on(device, algorithm)
    first, second = run(layer, problem), run(layer, problem)
    for name, x in first.items():
        assert torch.equal(x, second[name]), f"{name} of {problem}"
    arguments = [
        x.to(device) if isinstance(x, torch.Tensor) else x for x in problem.op_arguments(save=False)
    ]
    arguments[-2] = NUMBERS[algorithm]
    h, c, h_n, _, saved = ops.library.layer(*arguments)
    assert torch.equal(h.cpu(), first["h"])
    assert torch.equal(h_n.cpu(), first["h_n"])
    assert c.shape == saved.shape == (0,)
    arguments[9] = True  # save
    cell = CELLS[cell]
    saved = ops.library.layer(*arguments)[-1]
    gates = cell.saved * 31 * problem.operands["x"].size(0)
    assert saved.numel() == (2 * cell.gates * 31 if algorithm == "recompute" else gates)


@grid(cell=("rnn_tanh", "lstm", "gru"), dtype=(torch.float32, torch.bfloat16), algorithm=NUMBERS)
def test_bits_repeat_and_recompute_saves_no_gates(cell, dtype, algorithm, on):
    if (cell, algorithm) != ("rnn_tanh", "recompute"):  # has no gates to save
        on(check_bits, algorithm, cell, dtype)


def check_empty(device, cell, shape, rows):
    """Final states are the initial ones, gradients of weights are zero."""
    problem = make_problem(cell, torch.float32, shape, product=True, rows=rows, control=True)
    for name, x in run(layer_on(device), problem).items():
        if name in ("h_n", "c_n"):
            assert torch.equal(x, problem.operands[f"{name[0]}0"]), name
        elif name in ("dh0", "dc0"):
            assert torch.equal(x, problem.grads[f"{name[1]}_n"]), name
        else:
            assert not x.any(), name


@grid(cell=CELLS, shape=((0, 3, 5), (2, 0, 5)), rows=("", "packed"))
def test_no_steps_or_no_batch(cell, shape, rows, on):
    on(check_empty, cell, shape, rows)


def check_not_finite(device, algorithm, cell, dtype, bad):
    problem = make_problem(cell, dtype, (4, 3, 33))
    for gate in range(problem.cell.gates):
        problem.operands["x"][1, gate % 2, gate * 33 + 7] = bad
    ours, torchs = run(layer_on(device, algorithm), problem), run(oracle_layer, problem)
    for name, expected in torchs.items():
        for kind in ("isnan", "isposinf", "isneginf"):
            is_kind = getattr(torch, kind)
            assert torch.equal(is_kind(ours[name]), is_kind(expected)), f"{kind}: {name}, {bad}"
    assert ours["h"][:, 2].isfinite().all()


@grid(cell=CELLS, dtype=DTYPES, bad=(torch.nan, torch.inf, -torch.inf), algorithm=("auto", "tiled"))
def test_nan_and_infinity_pass_as_in_torch(cell, dtype, bad, algorithm, on):
    on(check_not_finite, algorithm, cell, dtype, bad)


def check_holding(device, algorithm, cell):
    """A row that holds keeps its state, whatever it is, and shows zeros; a clear forgets a NaN."""
    problem = make_problem(cell, torch.float32, (4, 3, 17))
    control = torch.zeros(4, 3, dtype=torch.uint8)
    control[:, 1] = HOLD | CLEAR | CUT
    control[0, 2] = CLEAR
    problem.options["control"] = control
    for name in ("h0", "c0"):
        if problem.operands[name] is not None:
            problem.operands[name][2] = torch.nan
    h, _, h_n, _ = layer_on(device, algorithm)(*problem.arguments(), **problem.keywords())
    assert torch.equal(h_n[1], problem.operands["h0"][1])
    assert not h[:, 1].any()
    assert h.isfinite().all()
    assert h_n.isfinite().all()


@grid(cell=CELLS, algorithm=("auto", "tiled"))
def test_holding_and_clearing(cell, algorithm, on):
    on(check_holding, algorithm, cell)


def extremes(dtype, *size):
    """Saturated, tiny and not finite values among ordinary ones."""
    info = torch.finfo(dtype)
    odd = [0.0, -0.0, info.tiny, -info.tiny / 4, 0.5999, 0.6, -0.6001]
    odd += [1e-4, -1e-3, 9.0, -9.0, 30.0, -30.0, 88.0, -88.0, 104.0, -104.0, 1e4, -1e4]
    odd += [torch.inf, -torch.inf, torch.nan]
    values = torch.randn(size)
    places = torch.randperm(values.numel())[: 6 * len(odd)]
    values.view(-1)[places] = torch.tensor(odd).repeat(6)
    return values.to(dtype)


def least(dtype):
    """The least number above 0."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def subnormals(dtype, *size):
    """Numbers below the normal range, and a few above."""
    count = int(4 / torch.finfo(dtype).eps)  # of the least to four times the least normal number
    steps = torch.randint(1, count, size) * (torch.randint(2, size) * 2 - 1)
    return (steps.double() * least(dtype)).to(dtype)


def ordinary(dtype, *size):
    return torch.randn(size).to(dtype)


def same(ours, theirs, what, dtype, absolute):
    """Equal where not finite; else within a few units of the last place."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    assert torch.equal(ours.isnan(), theirs.isnan()), what
    close = {"rtol": 16 * torch.finfo(dtype).eps, "atol": absolute, "equal_nan": True}
    torch.testing.assert_close(ours, theirs, **close, msg=lambda said: f"{what}: {said}")


def check_cells(device, name, dtype, draw_gates, draw_states, absolute):
    """One step through csrc/cells.h (the CPU's op), fused_rnn/cells.py and the Triton cells."""
    cell, N, H = CELLS[name], 7, 43
    gx, gh = (draw_gates(dtype, N, cell.gates * H) for _ in range(2))
    h, c, dh1, dc1 = (draw_states(dtype, N, H) for _ in range(4))
    pair = cell.states == 2
    forward = (cell.id, gx, gh, h, c if pair else None)
    found = []
    for library, place in ((torch.ops.fused_rnn, "cpu"), (ops.library, device)):
        here = [x.to(place) if isinstance(x, torch.Tensor) else x for x in forward]
        results = library.step(*here, True)
        grads = [x.to(place) for x in (dh1, dc1)]
        grads[1] = grads[1] if pair else None
        back = library.step_backward(cell.id, *grads, *results, *here[3:])
        found.append([x.cpu() for x in (*results, *back)])
    native, ours = found

    def compare(x, expected, what):
        same(x, expected, f"{what} of {name}, {dtype}", dtype, absolute)

    names = ("h1", "c1", "saved", "dgx", "dgh", "dh", "dc")
    for what, x, expected in zip(names, ours, native, strict=True):
        assert x.dtype == expected.dtype
        compare(x, expected, f"beside cells.h, {what}")
    leaves = [x.float().requires_grad_() for x in (gx, gh, h, c)[: 4 if pair else 3]]
    states = cell.step(leaves[0], leaves[1], tuple(leaves[2:]))
    for what, x, expected in zip(("h1", "c1"), ours, states, strict=False):
        compare(x, expected.detach(), f"beside cells.py, {what}")
    upstream = [x.float() for x in (dh1, dc1)[: cell.states]]
    dgx, dgh, *_ = torch.autograd.grad(states, leaves, upstream, allow_unused=True)
    compare(ours[3], dgx, "beside cells.py, dgx")
    compare(ours[4] if cell.splits_gates else ours[3], dgh, "beside cells.py, dgh")
    return ours


def check_cells_at_extremes(device, name, dtype):
    check_cells(device, name, dtype, extremes, ordinary, 16 * torch.finfo(dtype).eps)


def check_cells_below_the_normal_range(device, name, dtype):
    h1, *_ = check_cells(device, name, dtype, subnormals, subnormals, 2 * least(dtype))
    below = (h1 != 0) & (h1.abs() < torch.finfo(dtype).smallest_normal)
    assert below.sum() > 20


@numerics.needs_native
@grid(name=CELLS, dtype=DTYPES)
def test_the_cells_are_the_same_in_three_languages(name, dtype, on):
    on(check_cells_at_extremes, name, dtype)


@numerics.needs_native
@grid(name=CELLS, dtype=DTYPES)
def test_the_cells_are_the_same_below_the_normal_range(name, dtype, on, request):
    if dtype is torch.bfloat16 and request.node.callspec.params["on"] == "interpreter":
        pytest.skip("Triton's interpreter (3.6 to 3.9) makes other numbers of subnormal bfloat16")
    on(check_cells_below_the_normal_range, name, dtype)


def check_small_arguments(device):
    """Near 0, tanh x is x: no digit may be lost, down to the least normal number."""
    x = torch.logspace(-37, -0.1, 400).repeat(2)
    x[400:] *= -1
    zeros = torch.zeros_like(x)
    gx, gh, h = (t.view(1, -1).to(device) for t in (x, zeros, zeros))
    h1, *_ = ops.library.step(CELLS["rnn_tanh"].id, gx, gh, h, None, False)
    exact = x.double().tanh()
    assert ((h1.cpu().double()[0] - exact) / exact).abs().max() < 4 * torch.finfo(x.dtype).eps


def test_tanh_is_accurate_near_zero(on):
    on(check_small_arguments)


def check_modules(device, kind, dtype, bidirectional):
    """A stack, packed and not, and its second derivative; and a cell."""
    from twins import assert_twins, twins

    options = {"num_layers": 2, "bidirectional": bidirectional, "device": device, "dtype": dtype}
    theirs, ours = twins(kind, backend="triton", **options)
    for packed in (False, True):
        input = torch.randn(4, 3, 5, device=device, dtype=dtype)
        if packed:
            lengths = torch.tensor([1, 4, 2])
            input = torch.nn.utils.rnn.pack_padded_sequence(input, lengths, enforce_sorted=False)
        assert_twins(theirs, ours, input, what=f"{kind}, {dtype}, packed {packed}")
    theirs, ours = twins(kind, cell=True, backend="triton", device=device, dtype=dtype)
    input = torch.randn(3, 5, device=device, dtype=dtype)
    assert_twins(theirs, ours, input, what=f"{kind}Cell, {dtype}")
    with torch.no_grad():
        ours(input)


@grid(kind=("rnn_tanh", "lstm", "gru"), dtype=DTYPES, bidirectional=(False, True))
def test_modules(kind, dtype, bidirectional, on):
    on(check_modules, kind, dtype, bidirectional)


def check_second_derivative(device, kind):
    from twins import twins

    results = []
    _, ours = twins(kind, backend="triton", device=device)
    x = torch.randn(3, 2, 5, device=device)
    for name in ("triton", "reference"):
        ours.backend = name
        input = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(ours(input)[0].square().sum(), input, create_graph=True)
        ours.zero_grad()
        dx.square().sum().backward()
        results.append([input.grad, *(p.grad for p in ours.parameters())])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@grid(kind=("lstm", "gru"))
def test_second_derivatives(kind, on):
    on(check_second_derivative, kind)


def check_compiled(device, kind):
    from twins import step, twins

    _, ours = twins(kind, backend="triton", device=device)
    _, cell = twins(kind, cell=True, backend="triton", device=device)
    for module, shape in ((ours, (4, 3, 5)), (cell, (3, 5))):
        input = torch.randn(shape, device=device)
        traced = torch.compile(module, fullgraph=True, backend="aot_eager")
        for (name, mine), expected in zip(
            step(module, input, call=traced).items(), step(module, input).values(), strict=True
        ):
            torch.testing.assert_close(mine, expected, msg=name)


@grid(kind=("lstm", "gru"))
def test_compiles_as_one_graph(kind, on):
    on(check_compiled, kind)


def check_op(device, algorithm, cell):
    problem = make_problem(cell, torch.float32, (3, 2, 5), product=True, control=True)
    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in problem.op_arguments()]
    arguments[-2] = NUMBERS[algorithm]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.library.layer.default, tuple(arguments), test_utils=tests)
    h, c, _, _, saved = ops.library.layer(*arguments)
    _, x, w_ih, _, w_hh, _, h0, c0, reverse, _, *options = arguments
    dh = torch.randn_like(h)
    backward = (problem.cell.id, 31, dh, None, None, None, h, c, saved, x, w_ih, w_hh, h0, c0)
    torch.library.opcheck(
        ops.library.layer_backward.default, (*backward, reverse, *options), test_utils=tests
    )


@grid(cell=CELLS, algorithm=("auto", "recompute"))
def test_opcheck(cell, algorithm, on):
    on(check_op, algorithm, cell)


@numerics.needs_native
@pytest.mark.parametrize("name", native.SCHEMAS)
def test_schemas_are_the_native_ones(name):
    native, ours = (
        str(getattr(library, name).default._schema).partition("(")[2]
        for library in (torch.ops.fused_rnn, ops.library)
    )
    assert ours == native


def check_refusals(device):
    problem = make_problem(
        "lstm", torch.float32, (3, 2, 8), rows="packed", h_mask=True, keep=True, product=True
    )
    order = ["cell", "x", "w_ih", "b_ih", "w_hh", "b_hh", "h0", "c0", "reverse", "save"]
    order += ["control", "rows", "w_hr", "h_mask", "keep", "algorithm", "tf32"]
    good = dict(zip(order, problem.op_arguments(), strict=True))
    good = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in good.items()}
    ops.library.layer(*good.values())
    wrong = {
        name: [x[:-1], x.unsqueeze(0), x.to("meta"), x.to(torch.int64)]
        for name, x in good.items()
        if isinstance(x, torch.Tensor) and name != "rows"
    }
    wrong["x"].pop(2)  # on the meta device, nothing runs
    rows = good["rows"]
    wrong["rows"] = [rows[:-1], rows.float(), rows[0]]
    if device == "cpu":
        wrong["rows"] += [rows + 1, rows.clamp(max=0)]
    wrong |= {"cell": [-1, 4], "algorithm": [-1, 4], "w_hr": [good["w_hh"][:5]]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(RuntimeError, match="fused_rnn"):
                ops.library.layer(*(good | {name: value}).values())
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
        ops.library.layer(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x
                            for x in good.values()))  # fmt: skip


def test_bad_operands_are_refused(on):
    on(check_refusals)


def check_answers(device):
    import fused_rnn

    def refused(what, module, input, **how):
        with pytest.raises(RuntimeError, match=f"backend '{module.backend}' cannot run.*{what}"):
            fused_rnn.explain(module, input, **how)

    x = torch.randn(4, 3, 5, device=device)
    refused("not torch.float64", fused_rnn.GRU(5, 6, backend="triton").double(), x.double())
    refused("proj_size", fused_rnn.LSTM(5, 6, proj_size=2, backend="triton", device=device), x)
    big = fused_rnn.GRU(5, 300, backend="triton:resident", device=device)
    refused("300 units are more", big, x)
    cell = fused_rnn.GRUCell(5, 6, backend="triton:tiled", device=device)
    refused("single step", cell, x[0])
    other = "meta" if device == "cpu" else "cpu"
    refused(f"input is on {other}", fused_rnn.GRU(5, 6, backend="triton"), x.to(other))
    for name, words in (
        ("triton", "resident: W_hh stays on the chip"),
        ("triton:tiled", "tiled: each program reads W_hh from L2 in every step"),
        ("triton:recompute", "the forward saves states only"),
    ):
        told = fused_rnn.explain(fused_rnn.GRU(5, 6, backend=name, device=device), x)
        assert words in told.algorithm
        assert "one launch" in told.algorithm
    if device == "cpu":  # the interpreter is there to be asked, never to be chosen
        assert fused_rnn.explain(fused_rnn.GRU(5, 6), x).backend == "cpu"


def test_what_it_says_of_itself(on):
    on(check_answers)


def test_why_it_is_not_available(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETS", False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "has no CUDA" in triton._missing()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert triton._missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in triton._missing()


def test_an_old_gpu_is_refused(monkeypatch):
    from fused_rnn.backends import Problem

    problem = Problem(
        "gru", torch.float16, "cuda", 4, 3, 5, 6, 0, 1, 1, grad=True, packed=False, compiling=False
    )
    monkeypatch.setattr(triton, "INTERPRETS", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (((7, 5), "8.0 or newer, and this one has 7.5"), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, has=capability: has)
        told = triton.supports(problem)
        assert told is None if reason is None else reason in told


def test_auto_takes_it_where_nothing_faster_is_known_to_run(monkeypatch):
    """On a GPU without the CUDA library, while compiling: torch.nn's loop would be unrolled."""
    from fused_rnn import backends

    def problem(**more):
        sizes = {"T": 4, "N": 3, "I": 5, "H": 6, "P": 0, "layers": 1, "directions": 1}
        return backends.Problem(
            **{"cell": "gru", "dtype": torch.float32, "device": "cuda", "grad": True,
               "packed": False, "compiling": True} | sizes | more
        )  # fmt: skip

    monkeypatch.setattr(triton, "UNAVAILABLE", None)
    monkeypatch.setattr(triton, "INTERPRETS", False)
    monkeypatch.setattr(backends.cuda, "available", lambda: "there is no library")
    assert backends.choose(problem(), "auto")[0] is triton
    # What it lacks is torch.nn's.
    found, why = backends.choose(problem(compiling=False, dtype=torch.float64), "auto")
    assert found is backends.torch_nn
    assert "Triton" not in why
    assert backends.choose(problem(dtype=torch.float64), "auto")[0] is reference


def compare_with_reference(device):
    from fused_rnn.backends import Problem
    from fused_rnn.backends.trust import doubts

    for cell, dtype, packed in (("lstm", torch.float32, False), ("gru", torch.float16, True)):
        sizes = {"T": 9, "N": 3, "I": 5, "H": 33, "P": 0, "layers": 1, "directions": 2}
        flags = {"grad": True, "packed": packed, "compiling": False}
        asked = Problem(cell=cell, dtype=dtype, device=device, **sizes, **flags)
        assert doubts(triton, asked) is None


def test_the_kernels_agree_where_auto_compares_them(on):
    on(compare_with_reference)


def test_what_stays_on_the_chip():
    """Computed from a GPU's shared memory: an LSTM of 128 units in half types has 128 KiB."""
    lstm, gru = CELLS["lstm"], CELLS["gru"]
    assert tuning.choose(lstm, 128, "half", 0, tuning.A100_BYTES)[0] == "resident"
    assert tuning.choose(lstm, 128, "half", 0, 101_376)[0] == "tiled"  # of an RTX 4090
    assert tuning.choose(gru, 128, "half", 0, 101_376)[0] == "tiled"
    assert tuning.choose(gru, 64, "ieee", 0, 101_376)[0] == "resident"
    assert tuning.choose(lstm, 127, "half", 0, tuning.A100_BYTES)[0] == "tiled"
    assert tuning.choose(lstm, 64, "half", tuning.TILED, tuning.A100_BYTES)[0] == "tiled"
    with pytest.raises(RuntimeError, match="resident cannot run this: W_hh"):
        tuning.choose(lstm, 128, "half", tuning.RESIDENT, 101_376)
    for shapes in (*tuning.RESIDENT_SHAPES.values(), tuning.TILED_SHAPES.values()):
        assert all(shape.measured for shape in shapes)
