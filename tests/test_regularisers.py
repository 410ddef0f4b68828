"""Recurrent dropout and weight dropout: torch.nn's modules with weights that were masked by hand.
Zoneout: the plainest loop.

A mask on a sequence's h, on its way into the recurrent product, is one on the columns of the
recurrent weight, for that sequence.
"""

import by_hand
import pytest
import torch
from devices import DEVICES, native
from numerics import HALF, grid
from test_options import module_of
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close
from twins import BACKEND_NAMES, MODULE_KINDS, H, I, P, mapped, states, step, tensors, twins

import fused_rnn

T, N, RATE = 6, 4, 0.4
REGULARISERS = ("recurrent_dropout", "weight_dropout")


def masked(theirs, masks, n):
    """The parameters with masked recurrent weights; of ``masks`` each is for a layer and
    direction, ``[N,R]`` (the n-th row) or of the weight's own shape."""
    parameters = dict(theirs.named_parameters())
    names = [name for name in parameters if name.startswith("weight_hh")]
    for name, mask in zip(names, masks, strict=True):
        by = mask if mask.shape == parameters[name].shape else mask[n]
        parameters[name] = parameters[name] * by
    return parameters


def expected(theirs, input, hx, masks):
    """What :func:`twins.step` says of ``theirs``, each sequence run alone with its own masks."""

    def call(input, hx):
        alone = []
        for n in range(input.size(1)):
            state = mapped(hx, lambda s, n=n: s[:, n : n + 1])
            parameters = masked(theirs, masks, n)
            alone.append(
                tuple(tensors(functional_call(theirs, parameters, (input[:, n : n + 1], state))))
            )
        output, *state = (torch.cat(parts, 1) for parts in zip(*alone, strict=True))
        return output, tuple(state)

    return step(theirs, input, hx, call=call)


@grid(
    lambda kind, proj_size, backend, regulariser, **_: (
        (not proj_size or kind == "lstm")
        and (backend != "torch" or regulariser == "weight_dropout")
    ),
    kind=MODULE_KINDS, regulariser=REGULARISERS, backend=BACKEND_NAMES, device=DEVICES,
    bidirectional=(False, True), given=(False, True), proj_size=(0, P),
)  # fmt: skip
def test_it_is_torchs_module_with_masked_weights(
    kind, regulariser, backend, device, bidirectional, given, proj_size
):
    options = {"num_layers": 2, "bidirectional": bidirectional, "dtype": torch.float64}
    options |= {"device": device} | ({"proj_size": proj_size} if proj_size else {})
    theirs, plain = twins(kind, **options)
    ours = module_of(kind, backend=backend, **{regulariser: RATE}, **options)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(T, N, I, dtype=torch.float64, device=device)
    hx = ours(input)[1] if given else None  # any state of the right form
    shapes = [p.shape for name, p in theirs.named_parameters() if name.startswith("weight_hh")]
    torch.manual_seed(7)
    widths = [(N, s[1]) if regulariser == "recurrent_dropout" else s for s in shapes]
    masks = [torch.dropout(torch.ones(s).to(input), RATE, True) for s in widths]
    assert_close(step(ours, input, hx, seed=7), expected(theirs, input, hx, masks))
    # And nothing at all in evaluation.
    ours.eval()
    assert_close(step(ours, input, hx), step(plain, input, hx))


def zoneout_by_hand(module, p, training, draws):
    """``zoned`` of :func:`by_hand.forward`: where ``draws`` ``[T,N,*]`` for a layer and direction
    say so, or by shares."""

    def zoned(k, t, n, before, after):
        if training:
            stays = draws[k][t, n].bool().split([s.numel() for s in after])
            return list(map(torch.where, stays, before, after))
        return [q * old + (1 - q) * new for q, old, new in zip(p, before, after, strict=False)]

    return zoned


@grid(
    lambda kind, proj_size, **_: not proj_size or kind == "lstm",
    kind=MODULE_KINDS, backend=("cpu", "reference", "auto"), device=DEVICES,
    bidirectional=(False, True), given=(False, True), proj_size=(0, P), training=(True, False),
    ragged=(False, True), reset=(False, True), pair=(False, True), learned=(False, True),
)  # fmt: skip
def test_zoneout_is_the_plainest_loops(
    kind, backend, device, bidirectional, given, proj_size, training, ragged, reset, pair, learned
):
    p = (0.3, 0.6) if pair and kind == "lstm" else (RATE, RATE)
    options = {"num_layers": 2, "bidirectional": bidirectional, "dtype": torch.float64}
    options |= {"device": device} | ({"proj_size": proj_size} if proj_size else {})
    options |= {"learn_initial_state": learned, "zoneout": p if pair and kind == "lstm" else RATE}
    ours = module_of(kind, backend="auto", **options).train(training)
    exact = {"dtype": torch.float64, "device": device}
    hx = states(kind, ours, N, **exact) if given else None
    input = torch.randn(T, N, I, **exact)
    asked = {"lengths": [6, 2, 0, 5]} if ragged else {}
    asked |= {"reset": torch.rand(T, N, device=device) < 0.3} if reset else {}

    widths = sum((proj_size or H, H)[: len(list(tensors(ours(input)[1])))])
    shares = torch.cat([torch.full((n,), q) for q, n in zip(p, (proj_size or H, H), strict=True)])
    torch.manual_seed(7)
    draws = [
        torch.empty(T, N, widths, dtype=torch.uint8, device=device).bernoulli_(
            shares[:widths].to(device)
        )
        for _ in range(4 if bidirectional else 2)
    ]
    zoned = zoneout_by_hand(ours, p, training, draws)

    def theirs(input, hx):
        output, state, _ = by_hand.forward(ours, input, hx, zoned=zoned, **asked)
        return output, state

    expected = step(ours, input, hx, call=theirs)
    # The native loops have no backward in evaluation.
    forward_only = not training and backend == "cpu"
    with fused_rnn.use_backend(native(device) if backend == "cpu" else backend):
        if forward_only:
            with torch.no_grad():
                found = {
                    f"output {at}": x for at, x in enumerate(tensors(ours(input, hx, **asked)))
                }
            expected = {name: x for name, x in expected.items() if name in found}
        else:
            found = step(ours, input, hx, seed=7, call=lambda x, hx: ours(x, hx, **asked))
    assert_close(found, expected)


@pytest.mark.parametrize("kind", MODULE_KINDS)
@pytest.mark.parametrize("proj_size", [0, P])
def test_steps_with_zoneout_are_the_sequence(kind, proj_size):
    options = {"proj_size": proj_size} if proj_size and kind == "lstm" else {}
    gru = module_of(kind, num_layers=2, zoneout=RATE, dtype=torch.float64, **options).eval()
    x, state, shown = torch.randn(T, N, I, dtype=torch.float64), None, []
    with torch.no_grad():
        for x_t in x:
            y, state = gru.step(x_t, state)
            shown.append(y)
        output, final = gru(x)
    assert_close(torch.stack(shown), output)
    assert_close(list(tensors(state)), list(tensors(final)))


def test_zoneout_says_where_it_runs():
    lstm, x = fused_rnn.LSTM(I, H, zoneout=(0.1, 0.5)), torch.randn(T, N, I)
    assert repr(lstm) == f"LSTM({I}, {H}, zoneout=(0.1, 0.5))"
    assert str(fused_rnn.explain(lstm, x)).startswith("lstm on 'cpu'")
    lstm.eval()
    explained = str(fused_rnn.explain(lstm, x))
    assert explained.startswith("lstm on 'reference'")
    assert "backward in training only" in explained
    with torch.no_grad():
        assert str(fused_rnn.explain(lstm, x)).startswith("lstm on 'cpu'")
    for name, reason in (("cpu", "backward in training only"), ("torch", "has no zoneout")):
        with fused_rnn.use_backend(name), pytest.raises(RuntimeError, match=reason):
            lstm(x)
    lstm(x)[0].sum().backward()  # by the reference
    with pytest.raises(ValueError, match="zoneout should be a number in range"):
        fused_rnn.GRU(I, H, zoneout=(0.1, 0.5))
    with pytest.raises(ValueError, match="cannot revert 0: its zoneout="):
        fused_rnn.revert(nn.Sequential(lstm))


@grid(kind=MODULE_KINDS, regulariser=(*REGULARISERS, "zoneout"), device=DEVICES, dtype=HALF)
def test_seeds_decide(kind, regulariser, device, dtype):
    ours = module_of(kind, I, H, 2, device=device, dtype=dtype, **{regulariser: RATE})
    input = torch.randn(T, N, I, dtype=dtype, device=device)
    first, again, other = (step(ours, input, seed=seed) for seed in (1, 1, 2))
    assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(other["output 0"], first["output 0"])


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_all_is_zeroed_at_one(regulariser):
    """Without h in the product each step stands alone."""
    ours = fused_rnn.RNN(I, H, **{regulariser: 1.0})
    input = torch.randn(T, N, I)
    steps = torch.stack([ours(x.unsqueeze(0))[0][0] for x in input])
    assert_close(ours(input)[0], steps)


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_episodes_of_a_sequence_share_its_mask(kind):
    """With a learned state, which makes them rows of their own, and without."""
    reset = torch.rand(T, N) < 0.4
    input = torch.randn(T, N, I)
    plain = module_of(kind, recurrent_dropout=RATE)
    learned = module_of(kind, recurrent_dropout=RATE, learn_initial_state=True)
    learned.load_state_dict(plain.state_dict(), strict=False)
    results = []
    for module in (plain, learned):
        torch.manual_seed(3)
        results.append(list(tensors(module(input, reset=reset))))
    assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", MODULE_KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_ragged_sequences_are_those_of_the_same_masks_alone(kind, packed):
    ours = module_of(kind, recurrent_dropout=RATE, bidirectional=True, dtype=torch.float64)
    theirs, _ = twins(kind, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    input, lengths = torch.randn(T, N, I, dtype=torch.float64), (6, 4, 4, 1)
    torch.manual_seed(5)
    masks = [torch.dropout(torch.ones(N, H, dtype=torch.float64), RATE, True) for _ in range(2)]
    torch.manual_seed(5)
    if packed:
        output, _ = ours(nn.utils.rnn.pack_padded_sequence(input, lengths))
        output, _ = nn.utils.rnn.pad_packed_sequence(output)
    else:
        output, _ = ours(input, lengths=lengths)
    for n, length in enumerate(lengths):
        alone = functional_call(theirs, masked(theirs, masks, n), (input[:length, n : n + 1],))
        assert_close(output[:length, n : n + 1], alone[0])


@pytest.mark.parametrize("regulariser", [*REGULARISERS, "zoneout"])
def test_compiled_training(regulariser):
    ours = fused_rnn.LSTM(I, H, **{regulariser: RATE})
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    input = torch.randn(T, N, I)
    assert_close(step(ours, input, seed=4, call=compiled), step(ours, input, seed=4))


def test_what_it_cannot_do_is_refused():
    gru, x = fused_rnn.GRU(I, H, recurrent_dropout=RATE), torch.randn(N, I)
    with pytest.raises(ValueError, match="one for a whole sequence; call eval"):
        gru.step(x)
    gru.eval()
    assert gru.step(x)[0].shape == (N, H)
    gru.train()
    with (
        fused_rnn.use_backend("torch"),
        pytest.raises(RuntimeError, match=r"torch\.nn has no recurrent_dropout"),
    ):
        gru(x.unsqueeze(0))
    for name in (*REGULARISERS, "zoneout"):
        for value in (-0.1, 1.5, "0.5", True):
            with pytest.raises(ValueError, match=f"{name} should be a number in range"):
                fused_rnn.LSTM(I, H, **{name: value})
        with pytest.raises(ValueError, match=f"cannot revert 0: its {name}=0.4"):
            fused_rnn.revert(nn.Sequential(fused_rnn.LSTM(I, H, **{name: RATE})))
        assert f"{name}=0.4" in repr(fused_rnn.LSTM(I, H, **{name: RATE}))
