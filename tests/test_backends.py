"""Which backend runs, who may choose, and what is said about it."""

import sys
import threading

import pytest
import torch
from numerics import DTYPES, grid, needs_native
from torch.testing import assert_close
from twins import MODULE_KINDS, RUN_HERE, H, I, P, states, tensors, twins

import fused_rnn
from fused_rnn import backends
from fused_rnn.backends import BACKENDS, SMALL_STEPS
from fused_rnn.cells import CELLS
from fused_rnn.plan import KNOWN_DEVICES

ASKED_HERE = (*RUN_HERE, "auto")


def chosen(module, input=None, hx=None):
    input = torch.randn(4, 3, I) if input is None else input
    return fused_rnn.explain(module, input, hx).backend


ENTRIES = ("layer", "plain_layer", "stack", "cell_step")


@pytest.fixture
def ran(monkeypatch):
    """Set of the backends whose functions are called, however the caller got hold of them."""
    owners = {
        function.__code__: name
        for name in RUN_HERE
        for entry in ENTRIES
        if (function := getattr(BACKENDS[name], entry, None)) is not None
    }
    names = set()

    def watch(frame, event, result):
        if event == "return" and result is not None and frame.f_code in owners:
            names.add(owners[frame.f_code])

    def small_step(*operands):
        result = BACKENDS["cpu"].small_step(*operands)
        if result is not None:  # "not this one"
            names.add("cpu")
        return result

    for request in SMALL_STEPS:  # not Python's, and so not seen by a profile
        monkeypatch.setitem(SMALL_STEPS, request, small_step)
    sys.setprofile(watch)
    yield names
    sys.setprofile(None)


@grid(name=BACKENDS)
def test_a_backend_answers_what_the_registry_asks(name):
    backend = BACKENDS[name]
    assert name == backend.NAME
    reason = backend.available()
    assert reason is None or isinstance(reason, str)
    problem = backends.Problem(
        cell="lstm", dtype=torch.float32, device="cpu", T=3, N=2, I=I, H=H, P=0, layers=1,
        directions=1, grad=True, packed=False, compiling=False,
    )  # fmt: skip
    assert backend.supports(problem) is None or isinstance(backend.supports(problem), str)


@grid(
    lambda kind, proj_size, cell, **_: not proj_size or (kind == "lstm" and not cell),
    kind=CELLS, name=("cpu", "reference"), dtype=DTYPES, cell=(False, True), proj_size=(0, P),
    packed=(False, True), grad=(False, True),
)  # fmt: skip
def test_cpu_and_reference_run_all_that_torch_offers(
    kind, name, dtype, cell, proj_size, packed, grad, ran
):
    options = {"proj_size": proj_size} if proj_size else {}
    _, ours = twins(kind, cell=cell, backend=name, dtype=dtype, **options)
    input = torch.randn(*((3,) if cell else (4, 3)), I, dtype=dtype)
    if packed and not cell:
        input = torch.nn.utils.rnn.pack_padded_sequence(
            input, torch.tensor([1, 4, 2]), enforce_sorted=False
        )
    with torch.set_grad_enabled(grad):
        assert fused_rnn.explain(ours, input).backend == name
        ours(input)
    assert ran == {name}


@grid(kind=MODULE_KINDS, cell=(False, True), name=RUN_HERE, grad=(False, True))
def test_an_explicit_choice_is_what_runs(kind, cell, name, grad, ran):
    """By keyword and by context; the keyword wins over the context."""
    input = torch.randn(*((3,) if cell else (4, 3)), I)
    _, auto = twins(kind, cell=cell)
    _, explicit = twins(kind, cell=cell, backend=name)
    with torch.set_grad_enabled(grad):
        with fused_rnn.use_backend(name):
            auto(input)
            assert chosen(auto, input) == name
        explicit(input)
        for other in RUN_HERE:
            with fused_rnn.use_backend(other):
                explicit(input)
                assert chosen(explicit, input) == name
    assert ran == {name}


@grid(kind=MODULE_KINDS, cell=(False, True))
def test_auto_runs_what_explain_says(kind, cell, ran):
    _, ours = twins(kind, cell=cell)
    for size in (1, 3, 40):
        for grad in (False, True):
            input = torch.randn(*((size,) if cell else (8, size)), I)
            ran.clear()
            with torch.set_grad_enabled(grad):
                expected = fused_rnn.explain(ours, input).backend
                assert not ran, "explain computes"
                ours(input)
            assert ran == {expected}


@needs_native
@pytest.mark.parametrize("N", [1, 32, 256])
@pytest.mark.parametrize("grad", [False, True])
def test_auto_runs_our_loops_on_sequences_of_any_size(N, grad, ran):
    lstm = fused_rnn.LSTM(16, 16)
    with torch.set_grad_enabled(grad):
        lstm(torch.randn(3, N, 16))
    assert ran == {"cpu"}


def test_choices_nest_and_end():
    _, ours = twins("gru")
    before = chosen(ours)
    with fused_rnn.use_backend("reference"):
        with fused_rnn.use_backend("torch"):
            assert chosen(ours) == "torch"
            with fused_rnn.use_backend("auto"):
                assert chosen(ours) == before
            assert chosen(ours) == "torch"
        assert chosen(ours) == "reference"
    assert chosen(ours) == before


def test_a_choice_ends_when_an_exception_leaves_it():
    _, ours = twins("gru")
    before = chosen(ours)

    def fail():
        with fused_rnn.use_backend("reference"), fused_rnn.use_backend("torch"):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert chosen(ours) == before
    with pytest.raises(ValueError, match="fortran"):
        fused_rnn.use_backend("fortran").__enter__()
    assert chosen(ours) == before


def test_a_context_can_be_entered_again():
    _, ours = twins("gru")
    before, context = chosen(ours), fused_rnn.use_backend("reference")
    with context:
        with context:
            assert chosen(ours) == "reference"
        assert chosen(ours) == "reference"
    assert chosen(ours) == before
    with context:
        assert chosen(ours) == "reference"
    assert chosen(ours) == before


def test_a_choice_holds_in_its_thread_alone():
    _, ours = twins("gru")
    before, elsewhere = chosen(ours), {}
    entered, looked = threading.Event(), threading.Event()

    def other_thread():
        entered.wait(10)
        elsewhere["outside"] = chosen(ours)
        with fused_rnn.use_backend("torch"):
            elsewhere["inside"] = chosen(ours)
            looked.set()
            left.wait(10)
            elsewhere["still inside"] = chosen(ours)

    left = threading.Event()
    thread = threading.Thread(target=other_thread)
    thread.start()
    with fused_rnn.use_backend("reference"):
        entered.set()
        assert looked.wait(10)
        assert chosen(ours) == "reference"
    left.set()
    thread.join(10)
    assert elsewhere == {"outside": before, "inside": "torch", "still inside": "torch"}


@grid(kind=MODULE_KINDS, cell=(False, True), forward=RUN_HERE, backward=RUN_HERE)
def test_a_backward_runs_on_the_backend_of_its_forward(kind, cell, forward, backward):
    """The nodes of the graph are the forward's; what stands around the backward adds nothing."""
    _, ours = twins(kind, cell=cell, dtype=torch.float64)
    input = torch.randn(*((3,) if cell else (4, 3)), I, dtype=torch.float64)

    def gradients(around_backward):
        with fused_rnn.use_backend(forward):
            loss = sum(t.square().sum() for t in tensors(ours(input)))
        with fused_rnn.use_backend(around_backward):
            return torch.autograd.grad(loss, list(ours.parameters()))

    assert_close(gradients(backward), gradients(forward), rtol=0, atol=0)


def test_backends_give_one_result(ran):
    for kind in CELLS:
        _, ours = twins(kind, I, H, 2, bidirectional=True, dtype=torch.float64)
        input = torch.randn(6, 3, I, dtype=torch.float64)
        hx = states(kind, ours, 3, dtype=torch.float64)
        results = []
        for name in ASKED_HERE:
            with fused_rnn.use_backend(name):
                results.append(list(tensors(ours(input, hx))))
        for name, result in zip(ASKED_HERE, results, strict=True):
            assert_close(result, results[0], msg=lambda m, at=(kind, name): f"{at}: {m}")
    assert ran == set(RUN_HERE)


@grid(kind=MODULE_KINDS, how=("keyword", "context"), why=("unavailable", "unsupported"))
def test_an_explicit_choice_that_cannot_be_met_raises_and_says_why(kind, how, why, monkeypatch):
    reason = "there is no moon tonight"
    answer = {"unavailable": "available", "unsupported": "supports"}[why]
    monkeypatch.setattr(BACKENDS["cpu"], answer, lambda *_: reason)
    _, ours = twins(kind, backend="cpu" if how == "keyword" else "auto")
    input = torch.randn(4, 3, I)
    with fused_rnn.use_backend("cpu" if how == "context" else "auto"):
        for call in (lambda: ours(input), lambda: fused_rnn.explain(ours, input)):
            with pytest.raises(RuntimeError) as refusal:
                call()
            assert reason in str(refusal.value)
            assert "cpu" in str(refusal.value)


@grid(kind=MODULE_KINDS, why=("available", "supports"))
def test_auto_goes_round_what_cannot_run_and_explain_says_so(kind, why, monkeypatch, ran):
    reason = "there is no moon tonight"
    monkeypatch.setattr(BACKENDS["cpu"], why, lambda *_: reason)
    theirs, ours = twins(kind)
    input = torch.randn(4, 3, I)
    explanation = fused_rnn.explain(ours, input)
    assert explanation.backend != "cpu"
    assert reason in str(explanation)
    assert_close(ours(input), theirs(input))
    assert ran == {explanation.backend}


@grid(kind=MODULE_KINDS, cell=(False, True))
def test_another_device_than_the_cpu_is_refused_by_cpu_and_run_by_auto(kind, cell, ran):
    """The meta device stands for every device that has no kernels of ours."""
    input = torch.randn(*((3,) if cell else (4, 3)), I, device="meta")
    _, ours = twins(kind, cell=cell, device="meta")
    explanation = fused_rnn.explain(ours, input)
    assert explanation.backend != "cpu"
    assert "meta" in str(explanation)
    assert all(t.is_meta for t in tensors(ours(input)))
    assert ran == {explanation.backend}
    with fused_rnn.use_backend("cpu"), pytest.raises(RuntimeError, match="meta"):
        ours(input)


@grid(kind=MODULE_KINDS, cell=(False, True), backend=ASKED_HERE)
def test_explain_prints_the_backend_the_request_and_every_answer(kind, cell, backend):
    _, ours = twins(kind, cell=cell, backend=backend)
    input = torch.randn(*((3,) if cell else (4, 3)), I)
    explanation = fused_rnn.explain(ours, input, states(kind, ours, 3))
    text = str(explanation)
    assert explanation.requested == backend
    assert explanation.backend in BACKENDS
    assert explanation.why
    assert explanation.why in text
    assert repr(explanation.backend) in text.splitlines()[0]
    for name in BACKENDS:
        assert name in text


def test_explain_refuses_what_the_module_would_and_other_modules():
    with pytest.raises(TypeError, match="Linear"):
        fused_rnn.explain(torch.nn.Linear(2, 3), torch.randn(3, 2))
    with pytest.raises(TypeError, match="LSTM"):
        fused_rnn.explain(torch.nn.LSTM(2, 3), torch.randn(4, 3, 2))
    with pytest.raises(RuntimeError, match="input_size"):
        fused_rnn.explain(fused_rnn.LSTM(2, 3), torch.randn(4, 3, 5))


def test_explain_knows_packed_input_dtype_and_autocast():
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, I), torch.randn(1, I)])
    lstm = fused_rnn.LSTM(I, H)
    assert "packed=True" in str(fused_rnn.explain(lstm, packed))
    with torch.autocast("cpu", torch.bfloat16):
        assert "torch.bfloat16" in str(fused_rnn.explain(lstm, torch.randn(3, 2, I)))
    with torch.no_grad():
        assert "grad=False" in str(fused_rnn.explain(lstm, packed))


def test_four_threads_train_at_once_each_on_its_own_backend():
    """Right results, and nobody hears of another's choice."""
    _, ours = twins("lstm", dtype=torch.float64)
    input = torch.randn(20, 3, I, dtype=torch.float64)
    parameters = list(ours.parameters())
    expected = torch.autograd.grad(ours(input)[0].square().sum(), parameters)
    failures = []

    def train(name):
        with fused_rnn.use_backend(name):
            for _ in range(5):
                got = torch.autograd.grad(ours(input)[0].square().sum(), parameters)
                try:
                    assert_close(got, expected)
                    assert chosen(ours, input) == fused_rnn.explain(ours, input).backend
                except AssertionError as failure:
                    failures.append((name, failure))

    threads = [threading.Thread(target=train, args=(name,)) for name in ASKED_HERE]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "hung"
    assert not failures


def test_an_algorithm_is_asked_for_after_a_colon(monkeypatch):
    asked = backends.Problem(
        cell="lstm", dtype=torch.bfloat16, device="cuda", T=64, N=16, I=512, H=512, P=0, layers=1,
        directions=1, grad=False, packed=False, compiling=False,
    )  # fmt: skip
    monkeypatch.setattr(backends.cuda, "available", lambda: None)
    monkeypatch.setattr(backends.cuda, "describe", lambda _: KNOWN_DEVICES["H200"])
    chosen, why = backends.choose(asked, "cuda:stepwise")
    assert (chosen.NAME, why) == ("cuda", "asked for")
    for name in ("cuda:cluster", "cuda:grid"):
        assert backends.choose(asked, name)[0].NAME == "cuda"
    with pytest.raises(RuntimeError, match=r"'cuda:cluster' .* no projection"):
        backends.choose(asked._replace(P=64), "cuda:cluster")
    with pytest.raises(RuntimeError, match="a single step has no time loop"):
        backends.choose(asked._replace(T=0), "cuda:grid")
    assert backends.choose(asked._replace(T=0), "cuda:stepwise")[0].NAME == "cuda"


@pytest.mark.parametrize("name", ["cuda:", "cuda:fast", "cpu:stepwise", "auto:stepwise", ":grid"])
def test_an_unknown_algorithm_is_refused_with_the_names_there_are(name):
    with pytest.raises(ValueError, match=r"expected one of 'auto', .*'cuda:stepwise'"):
        fused_rnn.LSTM(3, 4, backend=name)
    with pytest.raises(ValueError, match=r"unknown backend"):
        fused_rnn.use_backend(name)


def test_the_algorithm_asked_for_reaches_the_layer(monkeypatch):
    """On a GPU that is played by the CPU's kernels, which have no algorithm of that number."""
    monkeypatch.setattr(backends.cuda, "available", lambda: None)
    monkeypatch.setattr(backends.cuda, "supports", lambda _: None)
    x, ours = torch.randn(3, 2, 5), fused_rnn.GRU(5, 4, backend="cuda:stepwise")
    with pytest.raises(RuntimeError, match="this device has no algorithm 1"):
        ours(x)
    with pytest.raises(RuntimeError, match="this device has no algorithm 1"), torch.no_grad():
        ours(x)
    assert fused_rnn.GRU(5, 4, backend="cuda")(x)[0].shape == (3, 2, 4)
