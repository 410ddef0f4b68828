"""torch.func: vmap over inputs and over models, per-sample gradients, jvp, vjp, hessians.

Each is compared with a loop, or with the same on torch.nn, in float64: rounding apart.
"""

from functools import partial

import pytest
import torch
from devices import DEVICES, device_of, layer_on, native, there
from layers import OPERANDS, make_problem, projects
from numerics import DTYPES, cases, grid, needs_native
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import functional_call, stack_module_state
from torch.testing import assert_close
from twins import MODULE_KINDS, H, I, name_of, tensors, twins

import fused_rnn
from fused_rnn import autograd
from fused_rnn.autograd import layer
from fused_rnn.cells import CELLS

ops = torch.ops.fused_rnn
MEMBERS, T, N = 3, 4, 2


def stack(columns):
    """The operands of each model as those of the op: what is one object is expanded."""
    first = columns[0]
    if not isinstance(first, torch.Tensor):
        return first
    if all(x is first for x in columns):
        return first.expand(len(columns), *first.shape)
    return torch.stack(columns)


@needs_native
@pytest.mark.op
@cases(
    projects,
    cell=CELLS,
    device=DEVICES,
    dtype=DTYPES,
    shape=((5, 3, 33), (3, 0, 8), (60, 5, 96)),  # the last is work for four threads
    P=(0, 3),
    control=(False, True),
    rows=("", "scattered"),
    states=(False, True),
    product=(False, True),
    shared=(False, True),
)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_models_in_one_call_are_the_models_one_by_one(case, threads):
    """Bit for bit, forward and backward, on more and on fewer threads than models."""
    device, case = device_of(case)
    shared, case = case["shared"], {k: v for k, v in case.items() if k != "shared"}
    problem = make_problem(**case)
    each = [there(problem.op_arguments(), device)]

    def own(place, x):  # masks are shared: they decide how many rows there are
        return isinstance(x, torch.Tensor) and x.is_floating_point() and not (shared and place == 1)

    for k in range(1, MEMBERS):
        each.append([x.roll(k, -1) if own(at, x) else x for at, x in enumerate(each[0])])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = [ops.layer(*arguments) for arguments in each]
        found = ops.layer(*map(stack, zip(*each, strict=True)))
        compare(found, expected, problem)
        backward = []
        for (_, x, w_ih, _, w_hh, _, h0, c0, reverse, _, *options), kept in zip(
            each, expected, strict=True
        ):
            dh, dc, dh_n, dc_n = (
                there(problem.grads.get(name), device) for name in ("h", "c", "h_n", "c_n")
            )
            dh_n, dc_n = (None if d is None else d.to(kept[2].dtype) for d in (dh_n, dc_n))
            grads, states = (dh, dc, dh_n, dc_n), (kept[0], kept[1], kept[4])
            inputs = (x, w_ih, w_hh, h0, c0, reverse)
            wanted = 127 if device == "cpu" else 63  # with dh_norm, which CUDA lacks
            backward.append([problem.cell.id, wanted, *grads, *states, *inputs, *options])
        expected = [ops.layer_backward(*arguments) for arguments in backward]
        stacked = [
            x[0] if isinstance(x[0], torch.Tensor) and x[0].shape == (0,) else stack(x)
            for x in zip(*backward, strict=True)
        ]
        compare(ops.layer_backward(*stacked), expected, problem)
    finally:
        torch.set_num_threads(before)


def compare(found, expected, problem):
    for place, one_by_one in enumerate(zip(*expected, strict=True)):
        whole = found[place]
        for at, x in enumerate(one_by_one):
            y = whole if whole.shape == (0,) else whole[at]
            assert torch.equal(x, y), f"output {place} of model {at} of {problem}"


def as_function(problem, names, run=layer):
    every = problem.operands | problem.options

    def function(*given):
        named = every | dict(zip(names, given, strict=True))
        positional = [named.pop(name) for name in OPERANDS]
        return tuple(y for y in run(problem.cell, *positional, **named) if y is not None)

    return function


BATCHED = {
    "inputs": ("x", "h0"),
    "models": ("w_ih", "w_hh", "b_ih", "b_hh"),
    "both": ("x", "w_ih", "w_hh", "c0"),
    "masks": ("control", "h_mask"),
    "rows": ("x", "rows"),
}


@needs_native
@pytest.mark.op
@cases(
    projects,
    cell=CELLS,
    device=DEVICES,
    P=(0, 3),
    batched=BATCHED,
    rows=("", "packed"),
    reverse=(False, True),
)
def test_vmap_is_a_loop(case):
    """Results, first and second derivatives, down to what is shared and what is not."""
    device, case = device_of(case)
    names = BATCHED[case.pop("batched")]
    problem = make_problem(
        shape=(T, N, H), dtype=torch.float64, control=True, h_mask=True, product=True, **case
    )
    every = problem.operands | problem.options
    names = [name for name in names if every.get(name) is not None]
    if not names:
        pytest.skip("the case has no such operand")
    at = [k % 2 for k in range(len(names))]  # the dimension of vmap is the first, or the second
    many = []
    for name, dim in zip(names, at, strict=True):
        x = every[name]
        shift = 0 if name in ("control", "rows") else 1
        copies = [x.roll(k, -1 if shift else 1) for k in range(MEMBERS)]
        many.append(torch.stack(copies, dim))
    shared = [x for x in problem.operands.values() if x is not None]
    leaves = [x.requires_grad_() for x in (*many, *shared) if x.is_floating_point()]
    function = as_function(problem, names, layer_on(device))

    def loop(*many):
        members = (x.unbind(dim) for x, dim in zip(many, at, strict=True))
        return [torch.stack(y) for y in zip(*map(function, *members), strict=True)]

    results = []
    for run in (torch.func.vmap(function, tuple(at)), loop):
        outputs = run(*many)
        loss = sum(y.sin().sum() for y in outputs)
        first = grad(loss, leaves, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        second = grad(penalty, leaves, allow_unused=True)
        results.append([*outputs, *first, *second])
    for ours, expected in zip(*results, strict=True):
        if expected is not None or ours is not None:
            assert_close(ours, expected)


def module_of(kind, device="cpu", **options):
    name, extra = name_of(kind)
    backend = native(device)
    options = extra | options | {"device": device, "dtype": torch.float64, "backend": backend}
    return getattr(fused_rnn, name)(I, H, **options)


def ensemble(kind, device, **options):
    models = [module_of(kind, device, **options) for _ in range(MEMBERS)]
    weights, _ = stack_module_state(models)

    def call(weights, *arguments, **asked):
        return functional_call(models[0], weights, arguments, asked)

    return models, weights, call


FORMS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "learned": {"learn_initial_state": True},
    "recompute": {"recompute": True},
}


@grid(kind=MODULE_KINDS, device=DEVICES, form=FORMS, lengths=(False, True), own=(False, True))
def test_an_ensemble_trains_as_its_models(kind, device, form, lengths, own):
    """On one input, or each on its own."""
    models, weights, call = ensemble(kind, device, **FORMS[form])
    shape = (N, T, I) if FORMS[form].get("batch_first") else (T, N, I)
    x = torch.randn(*(MEMBERS,) * own, *shape, dtype=torch.float64, device=device)
    asked = {"lengths": torch.tensor([1, T], device=device)} if lengths else {}
    run = torch.func.vmap(partial(call, **asked), (0, 0 if own else None))
    outputs = list(tensors(run(weights, x)))
    inputs = x if own else [x] * MEMBERS
    apart = [list(tensors(m(x, **asked))) for m, x in zip(models, inputs, strict=True)]
    expected = [torch.stack(y) for y in zip(*apart, strict=True)]
    assert_close(outputs, expected)
    got = grad(sum(y.sin().sum() for y in outputs), list(weights.values()))
    loss = sum(y.sin().sum() for y in expected)
    for name, dw in zip(weights, got, strict=True):
        each = grad(loss, [dict(m.named_parameters())[name] for m in models], retain_graph=True)
        assert_close(dw, torch.stack(each))


@needs_native
@pytest.mark.parametrize("device", DEVICES)
def test_what_vmap_stacks_is_one_call(device, monkeypatch):
    called, call = [], autograd._call
    monkeypatch.setattr(autograd, "_call", lambda op, *x: (called.append(op), call(op, *x))[1])
    models, weights, run = ensemble("lstm", device)
    x = torch.randn(T, N, I, dtype=torch.float64, device=device)
    y, _ = torch.func.vmap(run, (0, None))(weights, x)
    y.sum().backward()
    samples = x.transpose(0, 1).unsqueeze(2)
    with torch.no_grad():
        torch.func.vmap(lambda x: models[0](x)[0])(samples)
    names = [str(op).rpartition(".")[2] for op in called]
    assert names == ["layer", "layer_backward", "layer"]


@grid(kind=MODULE_KINDS, device=DEVICES, form=FORMS)
def test_gradients_of_each_sample(kind, device, form):
    module = module_of(kind, device, **FORMS[form])
    weights = dict(module.named_parameters())
    samples = torch.randn(MEMBERS, T, I, dtype=torch.float64, device=device)

    def loss(weights, x):
        return functional_call(module, weights, (x,))[0].square().mean()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, samples)
    for at, x in enumerate(samples):
        expected = grad(loss(weights, x), list(weights.values()), allow_unused=True)
        for (name, dw), right in zip(weights.items(), expected, strict=True):
            right = torch.zeros_like(dw) if right is None else right
            assert_close(found[name][at], right)


@grid(kind=MODULE_KINDS, device=DEVICES)
def test_a_penalty_on_each_samples_gradient_trains(kind, device):
    """Derivatives of what vmap and grad gave, by an ordinary backward."""
    module = module_of(kind, device)
    samples = torch.randn(MEMBERS, T, I, dtype=torch.float64, device=device)
    slope = torch.func.grad(lambda x: module(x)[0].square().sum())
    parameters, results = list(module.parameters()), []
    for slopes in (torch.func.vmap(slope)(samples), torch.stack([slope(x) for x in samples])):
        results.append(grad((slopes.norm(dim=(1, 2)) - 1).square().sum(), parameters))
    leaf = samples.clone().requires_grad_()
    total = sum(module(x)[0].square().sum() for x in leaf)
    (slopes,) = grad(total, leaf, create_graph=True)
    results.append(grad((slopes.norm(dim=(1, 2)) - 1).square().sum(), parameters))
    assert_close(results[0], results[2])
    assert_close(results[1], results[2])


@grid(kind=MODULE_KINDS, device=DEVICES)
def test_derivatives_by_torch_func_are_torchs(kind, device):
    """jvp, vjp, both Jacobians and the Hessian, at the input and at a weight."""
    theirs, ours = twins(kind, device=device, dtype=torch.float64)
    x, direction = torch.randn(2, 3, 1, I, dtype=torch.float64, device=device)
    w = ours.weight_hh_l0.detach()

    def function(module):
        def of(x, w):
            return functional_call(module, {"weight_hh_l0": w}, (x,))[0]

        return of

    with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
        outer = torch.randn(3, 1, H, dtype=torch.float64, device=device)
        expected, their_vjp = torch.func.vjp(function(theirs), x, w)
        their_gradients = their_vjp(outer)
        jacobian = torch.autograd.functional.jacobian(function(theirs), (x, w))
        hessian = torch.autograd.functional.hessian(lambda x: function(theirs)(x, w).sin().sum(), x)
        of_weight = torch.autograd.functional.hessian(
            lambda w: function(theirs)(x, w).sin().sum(), w
        )
    f = function(ours)
    output, vjp = torch.func.vjp(f, x, w)
    assert_close(output, expected)
    assert_close(vjp(outer), their_gradients)
    along = torch.func.jvp(partial(f, w=w), (x,), (direction,))[1]
    assert_close(along, torch.tensordot(jacobian[0], direction, 3))
    assert_close(torch.func.jacrev(f, (0, 1))(x, w), jacobian)
    assert_close(torch.func.jacfwd(f, (0, 1))(x, w), jacobian)
    assert_close(torch.func.hessian(lambda x: f(x, w).sin().sum())(x), hessian)
    assert_close(torch.func.hessian(lambda w: f(x, w).sin().sum())(w), of_weight)


WITHOUT_MASKS = {
    "zoneout": partial(fused_rnn.LSTM, zoneout=(0.2, 0.5)),
    "layer norm": fused_rnn.LayerNormLSTM,
    "joint norm": partial(fused_rnn.LayerNormGRU, norm="joint"),
}


@grid(kind=WITHOUT_MASKS, grad_enabled=(False, True))
def test_vmap_of_what_is_the_same_in_each_row(kind, grad_enabled):
    """Shares of states and layer norms: over models, and over inputs."""
    models = [WITHOUT_MASKS[kind](I, H, dtype=torch.float64).eval() for _ in range(MEMBERS)]
    weights, _ = stack_module_state(models)
    xs = torch.randn(MEMBERS, T, N, I, dtype=torch.float64)
    with torch.set_grad_enabled(grad_enabled):
        found = torch.func.vmap(lambda w, x: functional_call(models[0], w, (x,))[0])(weights, xs)
        assert_close(found, torch.stack([m(x)[0] for m, x in zip(models, xs, strict=True)]))
        found = torch.func.vmap(lambda x: models[0](x)[0])(xs)
        assert_close(found, torch.stack([models[0](x)[0] for x in xs]))


def test_many_gradients_at_once_where_steps_are_computed_again():
    module = fused_rnn.LSTM(I, H, recompute=True, dtype=torch.float64)
    y = module(torch.randn(T, N, I, dtype=torch.float64))[0].sum((0, 1))
    leaves, rows = list(module.parameters()), torch.eye(H, dtype=torch.float64)
    found = grad(y, leaves, rows, is_grads_batched=True, retain_graph=True)
    each = [grad(y, leaves, row, retain_graph=True) for row in rows]
    assert_close(found, tuple(torch.stack(g) for g in zip(*each, strict=True)))


@grid(kind=MODULE_KINDS, cell=(False, True), device=DEVICES)
def test_a_jacobian_by_many_gradients_at_once(kind, cell, device):
    """What ``is_grads_batched`` asks: a backward under vmap of an ordinary forward."""
    theirs, ours = twins(kind, cell=cell, device=device, dtype=torch.float64)
    x = torch.randn(*(N, I) if cell else (T, N, I), dtype=torch.float64, device=device)

    def first(module):
        return lambda x: next(tensors(module(x)))

    jacobian = torch.autograd.functional.jacobian
    assert_close(jacobian(first(ours), x, vectorize=True), jacobian(first(theirs), x))


@needs_native
@grid(kind=MODULE_KINDS, device=DEVICES)
def test_second_derivatives_through_vmap(kind, device):
    _, weights, call = ensemble(kind, device)
    x = torch.randn(2, 1, I, dtype=torch.float64, device=device, requires_grad=True)
    run = torch.func.vmap(lambda w, x: call(w, x)[0], (0, None))

    def function(x, *values):
        return run(dict(zip(weights, values, strict=True)), x)

    inputs = (x, *weights.values())
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
def test_vmap_of_vmap_is_two_loops(device):
    """Models over inputs, and inputs over models."""
    models, weights, call = ensemble("gru", device)
    xs = torch.randn(2, T, N, I, dtype=torch.float64, device=device)
    vmap = torch.func.vmap
    expected = torch.stack([torch.stack([m(x)[0] for m in models]) for x in xs])

    def run(w, x):
        return call(w, x)[0]

    over_inputs = vmap(lambda x: vmap(lambda w: run(w, x))(weights))(xs)
    over_models = vmap(lambda w: vmap(lambda x: run(w, x))(xs), out_dims=1)(weights)
    assert_close(over_inputs, expected)
    assert_close(over_models, expected)
    got = grad(over_models.sin().sum(), list(weights.values()))
    other = grad(over_inputs.sin().sum(), list(weights.values()))
    assert_close(got, other)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
def test_explain_says_what_runs_under_a_transform(device):
    module, found = module_of("gru", device), {}
    x = torch.randn(2, T, N, I, dtype=torch.float64, device=device)
    asked = {
        "vmap": lambda ask: torch.func.vmap(ask)(x),
        "grad": lambda ask: torch.func.grad(lambda x: ask(x).sum())(x[0]),
        "vmap of grad": lambda ask: torch.func.vmap(torch.func.grad(lambda x: ask(x).sum()))(x),
        "jvp": lambda ask: torch.func.jvp(ask, (x[0],), (x[1],)),
        "grad of grad": lambda ask: torch.func.grad(
            lambda y: torch.func.grad(lambda x: ask(x).square().sum())(y).sum()
        )(x[0]),
    }
    for name, transform in asked.items():

        def ask(x, name=name):
            found[name] = fused_rnn.explain(module, x).backend
            return x

        transform(ask)
    ours = dict.fromkeys(("vmap", "grad", "vmap of grad"), "cpu" if device == "cpu" else "cuda")
    assert found == ours | dict.fromkeys(("jvp", "grad of grad"), "reference")


def test_each_member_may_draw_a_mask_of_its_own():
    _, weights, call = ensemble("lstm", "cpu", recurrent_dropout=0.5)
    x = torch.randn(T, N, I, dtype=torch.float64)
    same = {name: w[:1].expand_as(w) for name, w in weights.items()}
    for randomness, equal in (("same", True), ("different", False)):
        y, _ = torch.func.vmap(call, (0, None), randomness=randomness)(same, x)
        assert torch.equal(y[0], y[1]) is equal
