"""Constructor keywords beyond torch.nn's: reverse, a learned initial state, a forget bias."""

import copy
import io
import pickle

import pytest
import torch
from devices import DEVICES
from numerics import grid
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

T, N = 6, 3
OPTIONS = {"direction": "reverse", "learn_initial_state": True, "forget_bias": 1.5}
LOOPS = tuple(name for name in BACKEND_NAMES if name != "torch")


def module_of(kind, *args, **options):
    name, extra = name_of(kind)
    return getattr(fused_rnn, name)(*(args or (I, H)), **extra, **options)


def of(kind):
    return {k: v for k, v in OPTIONS.items() if kind == "lstm" or k != "forget_bias"}


@grid(
    lambda kind, packed, proj_size, **_: not proj_size or kind == "lstm",
    kind=CELLS, backend=LOOPS, device=DEVICES, num_layers=(1, 2), packed=(False, True),
    given=(True, False), proj_size=(0, P),
)  # fmt: skip
def test_reverse_is_torchs_module_on_the_input_turned_round(
    kind, backend, device, num_layers, packed, given, proj_size
):
    options = {"device": device, "dtype": torch.float64}
    options |= {"proj_size": proj_size} if proj_size else {}
    theirs, _ = twins(kind, I, H, num_layers, **options)
    ours = module_of(kind, I, H, num_layers, direction="reverse", backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())
    lengths = (6, 2, 4) if packed else (T,) * N
    input = torch.randn(T, N, I, dtype=torch.float64, device=device)
    hx = states(kind, ours, N, dtype=torch.float64) if given else None

    def turned(x):
        columns = [torch.cat([x[:end, n].flip(0), x[end:, n]]) for n, end in enumerate(lengths)]
        return torch.stack(columns, 1)

    def pad(module, around):
        def call(x, hx):
            x = around(x)
            if packed:
                x = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            output, state = module(x, hx)
            if packed:
                output, _ = nn.utils.rnn.pad_packed_sequence(output)
            return around(output), state

        return call

    got = step(ours, input, hx, call=pad(ours, lambda x: x))
    expected = step(theirs, input, hx, call=pad(theirs, turned))
    assert_close(got, expected)


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES, packed=(False, True),
      batched=(True, False), bidirectional=(False, True))  # fmt: skip
def test_a_learned_state_is_hx_where_none_is_given(
    kind, backend, device, packed, batched, bidirectional
):
    options = {"device": device, "dtype": torch.float64, "bidirectional": bidirectional}
    theirs, _ = twins(kind, I, H, 2, **options)
    ours = module_of(kind, I, H, 2, learn_initial_state=True, backend=backend, **options)
    incompatible = ours.load_state_dict(theirs.state_dict(), strict=False)
    own = ["h_0", "c_0"][: CELLS[kind].states]
    assert (incompatible.missing_keys, incompatible.unexpected_keys) == (own, [])
    assert not any(ours.get_parameter(name).any() for name in own)
    learned = [ours.get_parameter(name) for name in own]
    for parameter in learned:
        nn.init.uniform_(parameter, -1, 1)
    input = torch.randn(T, N, I, dtype=torch.float64, device=device)
    if not batched:
        input = input[:, 0]
    elif packed:
        input = nn.utils.rnn.pack_padded_sequence(input, (2, 6, 3), enforce_sorted=False)
    given = [p.detach().clone().requires_grad_() for p in learned]
    wide = [p.unsqueeze(1).expand(-1, N, -1) if batched else p for p in given]
    hx = tuple(wide) if len(wide) == 2 else wide[0]
    expected, got = list(tensors(theirs(input, hx))), list(tensors(ours(input)))
    assert_close(got, expected)
    weight = [torch.randn_like(t) for t in got]
    ours_d = torch.autograd.grad(got, learned, weight)
    assert_close(ours_d, torch.autograd.grad(expected, given, weight))
    # A state that is given counts, and the learned one gets no gradient.
    ours.zero_grad()
    other = mapped(hx, lambda s: s.detach() + 1)
    sum(t.sum() for t in tensors(ours(input, other))).backward()
    assert all(p.grad is None for p in learned)


def test_the_forget_gates_bias_is_what_was_asked_for():
    torch.manual_seed(1)
    plain = fused_rnn.LSTM(I, H, 2, bidirectional=True)
    torch.manual_seed(1)
    lstm = fused_rnn.LSTM(I, H, 2, bidirectional=True, forget_bias=1.5)
    assert list(lstm.state_dict()) == list(plain.state_dict())
    for again in range(2):
        for name, value in lstm.state_dict().items():
            if "bias" in name:
                expected = 1.5 if "bias_ih" in name else 0.0
                assert (value[H : 2 * H] == expected).all(), (again, name)
                value = torch.cat([value[:H], value[2 * H :]])
                other = plain.state_dict()[name]
                other = torch.cat([other[:H], other[2 * H :]])
            else:
                other = plain.state_dict()[name]
            assert torch.equal(value, other), name
        torch.manual_seed(1)
        lstm.reset_parameters()


@grid(kind=MODULE_KINDS)
def test_nothing_changes_where_they_are_not_used(kind):
    name, extra = name_of(kind)
    theirs, ours = getattr(nn, name)(I, H, 2, **extra), module_of(kind, I, H, 2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)


COPIES = {
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy": copy.deepcopy,
    "state_dict": lambda module: loaded(module),
}


def loaded(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    new = type(module)(I, H, **of("lstm" if module.mode == "LSTM" else "gru"))
    new.load_state_dict(torch.load(file))
    return new


@grid(kind=MODULE_KINDS, way=COPIES)
def test_copies_keep_them(kind, way):
    ours = module_of(kind, **of(kind))
    nn.init.uniform_(ours.h_0)
    printed = repr(ours)
    assert "direction='reverse', learn_initial_state=True" in printed
    assert ("forget_bias=1.5" in printed) == (kind == "lstm")
    again = COPIES[way](ours)
    assert repr(again) == printed
    input = torch.randn(T, N, I)
    assert_close(list(tensors(again(input))), list(tensors(ours(input))), rtol=0, atol=0)


@grid(kind=MODULE_KINDS)
def test_convert_and_revert(kind):
    """What torch.nn lacks cannot be reverted; what was only an initialisation can."""
    for name in ("direction", "learn_initial_state"):
        model = nn.Sequential(module_of(kind, **{name: OPTIONS[name]}))
        with pytest.raises(ValueError, match=rf"cannot revert 0: its {name}="):
            fused_rnn.revert(model)
    plain = module_of(kind, **({"forget_bias": 1.5} if kind == "lstm" else {}))
    reverted = fused_rnn.revert(plain)
    assert not set(vars(reverted)) & set(OPTIONS)
    again = fused_rnn.convert(reverted)
    input, reset = torch.randn(T, N, I), torch.rand(T, N) < 0.3
    assert_close(list(tensors(again(input, reset=reset))), list(tensors(plain(input, reset=reset))))
    assert_close(list(tensors(reverted(input))), list(tensors(plain(input))))
    assert repr(again) == repr(module_of(kind))


def test_modules_pickled_before_they_existed_still_run():
    old = fused_rnn.LSTM(I, H)
    for name in OPTIONS:
        del old.__dict__[name]
    assert old(torch.randn(T, N, I))[0].shape == (T, N, H)
    assert repr(old) == "LSTM(5, 6)"


def test_wrong_values_are_refused():
    for kind in MODULE_KINDS:
        with pytest.raises(
            ValueError, match="direction must be 'forward' or 'reverse', got 'back'"
        ):
            module_of(kind, direction="back")
        with pytest.raises(ValueError, match="one of the two that bidirectional=True has"):
            module_of(kind, direction="reverse", bidirectional=True)
        if kind != "lstm":
            with pytest.raises(TypeError, match="forget_bias"):
                module_of(kind, forget_bias=1.0)
    with pytest.raises(ValueError, match="forget_bias needs the biases"):
        fused_rnn.LSTM(I, H, bias=False, forget_bias=1.0)


@pytest.mark.parametrize("device", ["meta", *DEVICES])
def test_learned_states_are_made_where_and_as_the_weights(device):
    lstm = fused_rnn.LSTM(
        I, H, 2, proj_size=P, learn_initial_state=True, device=device, dtype=torch.float64
    )
    assert (lstm.h_0.shape, lstm.c_0.shape) == ((2, P), (2, H))
    assert lstm.h_0.device.type == lstm.c_0.device.type == device
    assert lstm.h_0.dtype == lstm.half().c_0.to(torch.float64).dtype == torch.float64
    assert lstm.h_0.dtype == torch.float16


@grid(kind=MODULE_KINDS)
def test_resetting_parameters_forgets_the_learned_state(kind):
    ours = module_of(kind, learn_initial_state=True)
    nn.init.ones_(ours.h_0)
    before = ours.weight_hh_l0.clone()
    ours.reset_parameters()
    assert not ours.h_0.any()
    assert not torch.equal(ours.weight_hh_l0, before)
