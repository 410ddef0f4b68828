"""Lengths, resets, cuts, cell states over time: against loops that know nothing of our op."""

import copy

import by_hand
import numerics
import pytest
import torch
from devices import DEVICES, there
from numerics import DTYPES, HALF, cases, grid
from torch import nn
from torch.testing import assert_close
from twins import (
    BACKEND_NAMES,
    MODULE_KINDS,
    H,
    I,
    P,
    mapped,
    name_of,
    states,
    step,
    tensors,
    twins,
)

import fused_rnn
from fused_rnn.cells import CELLS

# torch.nn's kernels have none of this.
LOOPS = tuple(name for name in BACKEND_NAMES if name != "torch")
T, N = 7, 4
LENGTHS = (4, 0, 7, 1)
FORMS = {"list": list, "int32": lambda n: torch.tensor(n, dtype=torch.int32)}


def module_of(kind, *args, **options):
    name, extra = name_of(kind)
    return getattr(fused_rnn, name)(*(args or (I, H)), **extra, **options)


def resets(device="cpu"):
    """Episodes of 1 step and of many; at step 0, twice in a row, at a sequence's last step."""
    reset = torch.zeros(T, N, dtype=torch.bool, device=device)
    for t, n in ((0, 0), (3, 0), (4, 0), (5, 2), (6, 2), (2, 2), (0, 3), (1, 3), (3, 1)):
        reset[t, n] = True
    return reset


def learnt(module):
    """The module, a learned initial state of which is not zero."""
    for name, parameter in module.named_parameters():
        if name in ("h_0", "c_0"):
            nn.init.uniform_(parameter, -1, 1)
    return module


# What the module is, beside its kind.
MODULES = {
    "plain": {},
    "two layers": {"num_layers": 2, "bias": False},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "reverse": {"num_layers": 2, "direction": "reverse"},
    "batch first": {"batch_first": True, "bidirectional": True},
    "projected": {"proj_size": P, "num_layers": 2, "bidirectional": True},
    "learned": {"learn_initial_state": True, "num_layers": 2, "bidirectional": True},
    "projected, learned": {"learn_initial_state": True, "proj_size": P, "batch_first": True},
    "reverse, learned": {"learn_initial_state": True, "direction": "reverse"},
}


def exists(kind, dtype=None, form="plain", **_):
    """Only LSTMs project; numerics.py says why no ReLU in the half types."""
    return ("projected" not in form or kind == "lstm") and (kind != "rnn_relu" or dtype not in HALF)


@cases(
    exists,
    kind=CELLS,
    backend=LOOPS,
    device=DEVICES,
    dtype=DTYPES,
    form=MODULES,
    given=(True, False),
    lengths=("", *FORMS),
    reset=(False, True),
    tbptt=(None, 1, 3),
)
def test_results_and_all_gradients(case):
    """Of any mixture of options, by the rule: against the loop by hand, one sequence at a time."""
    kind, device, dtype = case["kind"], case["device"], case["dtype"]
    made = {"device": device, "dtype": dtype, "backend": case["backend"]} | MODULES[case["form"]]
    ours = learnt(module_of(kind, **made))
    batch_first = ours.batch_first
    options = {"tbptt": case["tbptt"], "padding_value": -2.0 * case["reset"]}
    if case["reset"]:
        options["reset"] = resets(device).t() if batch_first else resets(device)
    if case["lengths"]:
        options["lengths"] = FORMS[case["lengths"]](LENGTHS)
    input = torch.randn(*((N, T) if batch_first else (T, N)), I, dtype=dtype, device=device)
    hx = states(kind, ours, N, dtype=dtype) if case["given"] else None
    cells = CELLS[kind].states == 2

    def call(input, hx):
        return ours(input, hx, return_cell_states=cells, **options)

    def expected(module):
        def forward(input, hx):
            result = by_hand.forward(module, input, hx, **options)
            return result if cells else result[:2]

        return forward

    got = step(ours, input, hx, call=call)
    torchs = step(ours, input, hx, call=expected(ours))
    exact = copy.deepcopy(ours).double()
    oracle = step(
        exact, mapped(input, torch.Tensor.double), mapped(hx, torch.Tensor.double),
        call=expected(exact),
    )  # fmt: skip
    assert got.keys() | oracle.keys() == got.keys()
    for name, value in got.items():
        if name not in oracle:
            assert not value.any(), f"{name}: the loop by hand did not use it"
            continue
        numerics.assert_as_good_as(
            value, torchs[name], oracle[name], f"{name} of {case}",
            length=T * N * 4 * H, scale=1.0,
        )  # fmt: skip


def episodes(lengths, reset):
    """``(sequence, first, end)`` of each episode."""
    for n, length in enumerate(lengths):
        starts = [t for t in range(length) if t == 0 or reset[t, n]]
        yield from ((n, a, b) for a, b in zip(starts, [*starts, length][1:], strict=True))


@grid(
    exists, kind=CELLS, backend=LOOPS, device=DEVICES,
    form=("plain", "two layers", "bidirectional", "projected"),
)  # fmt: skip
def test_each_episode_is_torchs_module_alone(kind, backend, device, form):
    """What torch.nn makes of it, called with nothing but the episode's steps."""
    theirs, ours = twins(
        kind, I, H, backend=backend, device=device, dtype=torch.float64, **MODULES[form]
    )
    x, reset = torch.randn(T, N, I, dtype=torch.float64, device=device), resets(device)
    output, _ = ours(x, lengths=LENGTHS, reset=reset)
    found = list(episodes(LENGTHS, reset))
    assert len(found) == 7
    for n, first, end in found:
        alone, _ = theirs(x[first:end, n : n + 1])
        assert_close(output[first:end, n : n + 1], alone)
    for n, length in enumerate(LENGTHS):
        assert not output[length:, n].any()


@grid(kind=MODULE_KINDS, backend=LOOPS, device=DEVICES, bidirectional=(False, True))
def test_padding_may_hold_anything(kind, backend, device, bidirectional):
    """NaN there reaches no result and no gradient, and gets none itself."""
    options = {"dtype": torch.float64, "device": device, "backend": backend}
    ours = module_of(kind, I, H, 2, bidirectional=bidirectional, **options)
    clean = torch.randn(T, N, I, dtype=torch.float64, device=device)
    dirty = clean.clone()
    for n, length in enumerate(LENGTHS):
        dirty[length:, n] = torch.nan
    results = [
        step(ours, input, call=lambda x, hx: ours(x, hx, lengths=LENGTHS))
        for input in (clean, dirty)
    ]
    assert_close(results[1], results[0], rtol=0, atol=0)
    for n, length in enumerate(LENGTHS):
        assert not results[1]["d input 0"][length:, n].any()


@grid(
    exists, kind=CELLS, backend=LOOPS, device=DEVICES, form=MODULES,
    lengths=(False, True), grad=(False, True),
)  # fmt: skip
def test_last_step_only_is_the_last_of_the_output(kind, backend, device, form, lengths, grad):
    """With its gradients; in the backward direction too it is the step that stands last."""
    options = {"device": device, "dtype": torch.float64, "backend": backend} | MODULES[form]
    ours = learnt(module_of(kind, **options))
    shape = (N, T, I) if ours.batch_first else (T, N, I)
    input = torch.randn(shape, dtype=torch.float64, device=device)
    asked = {"lengths": LENGTHS, "padding_value": 3.0} if lengths else {}

    def picked(x, hx):
        output, state = ours(x, hx, **asked)
        output = output.transpose(0, 1) if ours.batch_first else output
        ends = LENGTHS if lengths else [T] * N
        return torch.stack([output[end - 1, n] for n, end in enumerate(ends)]), state

    def asked_for(x, hx):
        return ours(x, hx, last_step_only=True, **asked)

    with torch.set_grad_enabled(grad):
        if grad:
            assert_close(step(ours, input, call=asked_for), step(ours, input, call=picked))
        got, expected = asked_for(input, None), picked(input, None)
    assert_close(got, expected)
    storage = got[0].untyped_storage()
    assert storage.nbytes() < ours(input)[0].untyped_storage().nbytes(), "the rest is kept"


@grid(backend=LOOPS, device=DEVICES, grad=(False, True), proj_size=(0, P), dtype=DTYPES)
def test_cell_states_are_the_same_with_and_without_gradients(
    backend, device, grad, proj_size, dtype
):
    options = {"dtype": dtype, "device": device, "backend": backend, "proj_size": proj_size}
    ours = fused_rnn.LSTM(I, H, 2, bidirectional=True, **options)
    input = torch.randn(T, N, I, dtype=dtype, device=device)
    with torch.set_grad_enabled(grad):
        output, (_, c_n), c = ours(input, return_cell_states=True)
        plain, _ = ours(input)
    assert c.shape == (T, N, 2 * H)
    assert c.dtype == dtype
    assert torch.equal(output, plain)
    assert_close(c[-1, :, :H], c_n[2])
    assert_close(c[0, :, H:], c_n[3])
    assert ours(input[:, 0], return_cell_states=True)[2].shape == (T, 2 * H)


@grid(kind=MODULE_KINDS, backend=LOOPS, device=DEVICES, batch_first=(False, True))
def test_a_single_sequence_without_batch(kind, backend, device, batch_first):
    options = {"dtype": torch.float64, "device": device, "backend": backend}
    ours = module_of(kind, batch_first=batch_first, bidirectional=True, **options)
    x, reset = torch.randn(T, I, dtype=torch.float64, device=device), resets(device)[:, 2]
    dim = 0 if batch_first else 1
    call = {"tbptt": 2}
    expected = ours(x.unsqueeze(dim), reset=reset.unsqueeze(dim), **call)
    got = ours(x, reset=reset, **call)
    assert_close(got[0], expected[0].squeeze(dim))
    for a, b in zip(tensors(got[1]), tensors(expected[1]), strict=True):
        assert_close(a, b.squeeze(1))
    last, _ = ours(x, reset=reset, last_step_only=True)
    assert_close(last, got[0][-1])


@grid(
    kind=MODULE_KINDS, backend=LOOPS, device=DEVICES, form=("bidirectional", "reverse", "learned")
)
def test_packed_input_takes_what_needs_no_lengths(kind, backend, device, form):
    """Truncation, cell states and the last step, in the caller's order of sequences."""
    options = {"dtype": torch.float64, "device": device, "backend": backend} | MODULES[form]
    ours = learnt(module_of(kind, **options))
    lengths, cells = (4, 2, 7, 1), CELLS[kind].states == 2
    input = torch.randn(T, N, I, dtype=torch.float64, device=device)
    asked = {"tbptt": 2, "return_cell_states": cells}

    def padded(x, hx):
        return ours(x, hx, lengths=lengths, **asked)

    def packed(x, hx):
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, state, *c = ours(x, hx, **asked)
        unpack = nn.utils.rnn.pad_packed_sequence
        return unpack(output)[0], state, *(unpack(y)[0] for y in c)

    assert_close(step(ours, input, call=packed), step(ours, input, call=padded))
    sequence = nn.utils.rnn.pack_padded_sequence(input, lengths, enforce_sorted=False)
    got, _ = ours(sequence, last_step_only=True)
    assert_close(got, ours(input, lengths=lengths, last_step_only=True)[0])


@grid(backend=LOOPS, device=DEVICES, kind=MODULE_KINDS)
def test_dropout_between_layers_is_drawn_as_ever(backend, device, kind):
    """A reset and ends that change nothing leave the results what they were."""
    options = {"dtype": torch.float64, "device": device, "backend": backend}
    ours = module_of(kind, I, H, 3, dropout=0.4, bidirectional=True, **options)
    input = torch.randn(T, N, I, dtype=torch.float64, device=device)
    none = torch.zeros(T, N, dtype=torch.bool, device=device)
    results = [
        step(ours, input, seed=3, call=lambda x, hx, asked=asked: ours(x, hx, **asked))
        for asked in ({}, {"lengths": [T] * N, "reset": none, "tbptt": T})
    ]
    assert_close(results[1], results[0])


@grid(kind=MODULE_KINDS, backend=LOOPS, device=DEVICES, half=("bfloat16", "float16"))
def test_autocast(kind, backend, device, half):
    ours = module_of(kind, I, H, 2, backend=backend, device=device, learn_initial_state=True)
    input = torch.randn(T, N, I, device=device)
    asked = {"lengths": LENGTHS, "reset": resets(device), "return_cell_states": kind == "lstm"}
    with torch.autocast(device, getattr(torch, half)):
        plain, got = ours(input), ours(input, **asked)
    exact = by_hand.forward(
        copy.deepcopy(ours).double(), input.double(), lengths=LENGTHS, reset=resets(device)
    )
    assert [t.dtype for t in tensors(got[:2])] == [t.dtype for t in tensors(plain)]
    for value, expected in zip(tensors(got), tensors(exact), strict=False):
        assert_close(value.double(), expected, rtol=0, atol=0.05)


REFUSED = {
    "below 0": ({"lengths": (1, -1, 2, 3)}, ValueError, "from 0 to 7.*got -1"),
    "past T": ({"lengths": torch.tensor([1, 8, 2, 3])}, ValueError, "from 0 to 7.*got 8"),
    "too few": ({"lengths": (1, 2, 3)}, ValueError, r"expected shape \(4,\), got \(3,\)"),
    "of two dimensions": ({"lengths": torch.ones(4, 1).int()}, ValueError, "expected shape"),
    "not whole": ({"lengths": (1, 2.5, 2, 3)}, TypeError, "must be integers"),
    "of floats": ({"lengths": torch.ones(4)}, TypeError, "must be integers, got torch.float32"),
    "of bools": ({"lengths": torch.ones(4).bool()}, TypeError, "must be integers"),
    "a number": ({"lengths": 3}, TypeError, "must be integers, got 3"),
    "far past T": ({"lengths": (1, 10**30, 2, 3)}, ValueError, "from 0 to 7"),
    "words": ({"lengths": ("a", "b", "c", "d")}, TypeError, "must be integers"),
    "nested": ({"lengths": [[1], [2], [3], [4]]}, TypeError, "must be integers"),
    "not a number": ({"lengths": (1, float("nan"), 2, 3)}, TypeError, "must be integers"),
    "padding with words": (
        {"lengths": (1, 2, 3, 4), "padding_value": "0"}, TypeError, "a number, got str",
    ),
    "elsewhere": ({"lengths": torch.ones(4, device="meta").int()}, ValueError, "on meta"),
    "reset of bytes": ({"reset": torch.zeros(7, 4).byte()}, TypeError, "bool, got torch.uint8"),
    "reset no tensor": ({"reset": [[True]]}, TypeError, "bool, got list"),
    "reset transposed": (
        {"reset": torch.zeros(4, 7).bool()}, ValueError, r"expected shape \(7, 4\), got \(4, 7\)",
    ),
    "reset elsewhere": (
        {"reset": torch.zeros(7, 4, device="meta").bool()}, ValueError, "reset is on meta",
    ),
    "no window": ({"tbptt": 0}, ValueError, "from 1 on, got 0"),
    "half a window": ({"tbptt": 2.0}, ValueError, "from 1 on, got 2.0"),
    "true window": ({"tbptt": True}, ValueError, "from 1 on, got True"),
    "unknown": ({"length": (1, 2, 3, 4)}, TypeError, "unexpected keyword"),
}  # fmt: skip


@grid(kind=MODULE_KINDS, backend=LOOPS, device=DEVICES)
def test_what_makes_no_sense_is_refused(kind, backend, device):
    ours = module_of(kind, backend=backend, device=device)
    input = torch.randn(T, N, I, device=device)
    for what, (options, error, sentence) in REFUSED.items():
        with pytest.raises(error, match=sentence):
            ours(input, **there(options, device) if what != "past T" else options)
    with pytest.raises(ValueError, match=r"expected shape \(4, 7\), got \(7, 4\)"):
        module_of(kind, batch_first=True, device=device)(
            input.transpose(0, 1), reset=resets(device)
        )
    with pytest.raises(ValueError, match="of a single sequence pass the steps that count"):
        ours(input[:, 0], lengths=[3])
    if kind != "lstm":
        with pytest.raises(ValueError, match="return_cell_states is for an LSTM"):
            ours(input, return_cell_states=True)
    packed = nn.utils.rnn.pack_sequence([input[:, 0]])
    for asked in ({"lengths": [T]}, {"reset": resets(device)[:, :1]}):
        with pytest.raises(
            ValueError, match=r"cannot be had with a PackedSequence.*pass the padded"
        ):
            ours(packed, **asked)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        ours(input[:0], lengths=[0] * N)
    assert ours(input, lengths=LENGTHS)[0].shape == (T, N, H)
    assert_close(ours(input, tbptt=10**30)[0], ours(input)[0])


@grid(kind=MODULE_KINDS)
def test_torchs_kernels_refuse_by_name_and_auto_takes_ours(kind):
    ours = module_of(kind, backend="torch")
    input = torch.randn(T, N, I)
    asked = {
        "lengths": (LENGTHS, "lengths, reset or tbptt"),
        "reset": (resets(), "lengths, reset or tbptt"),
        "tbptt": (2, "lengths, reset or tbptt"),
        "return_cell_states": (True, "return_cell_states"),
        "last_step_only": (True, "last_step_only"),
    }
    for name, (value, words) in asked.items():
        if name == "return_cell_states" and kind != "lstm":
            continue
        with pytest.raises(RuntimeError, match=f"backend 'torch' cannot run this.*no {words}"):
            ours(input, **{name: value})
        ours.backend = "auto"
        explained = fused_rnn.explain(ours, input, **{name: value})
        assert explained.backend != "torch"
        assert words in str(explained)
        ours.backend = "torch"
    reverse = module_of(kind, backend="torch", direction="reverse")
    with pytest.raises(RuntimeError, match=r'torch\.nn has no direction="reverse"'):
        reverse(input)


@pytest.mark.parametrize("what", ["lengths", "reset"])
def test_long_sequences_that_hold_or_reset_often(what):
    """More steps than a chunk of the loop has, and more rows than a tile."""
    ours = fused_rnn.GRU(3, 17, bidirectional=True, dtype=torch.float64)
    input = torch.randn(300, 21, 3, dtype=torch.float64)
    asked = {"lengths": torch.randint(301, (21,)), "reset": torch.rand(300, 21) < 0.01}
    asked = {what: asked[what]}
    got = step(ours, input, call=lambda x, hx: ours(x, hx, **asked))
    ours.backend = "reference"
    expected = step(ours, input, call=lambda x, hx: ours(x, hx, **asked))
    assert_close(got, expected)


def test_small_integers_hold_lengths_of_long_input():
    input = torch.randn(300, 2, I)
    gru, lengths = fused_rnn.GRU(I, H, bidirectional=True), torch.tensor([100, 7])
    for dtype in (torch.int8, torch.uint8, torch.int16):
        got = gru(input, lengths=lengths.to(dtype), last_step_only=True)
        assert_close(got, gru(input, lengths=[100, 7], last_step_only=True))


def test_fx_keeps_the_keywords():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fused_rnn.GRU(I, H)

        def forward(self, x, reset):
            return self.rnn(x, reset=reset, tbptt=2)[0]

    model, x = Model(), torch.randn(T, N, I)
    graph = torch.fx.symbolic_trace(model)
    assert_close(graph(x, resets()), model(x, resets()))
    assert not torch.equal(graph(x, resets()), model.rnn(x)[0])
