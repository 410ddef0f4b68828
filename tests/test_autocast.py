"""Under autocast: torch's dtypes out, torch's accuracy, gradients in the weights' dtype."""

import contextlib

import pytest
import torch
from devices import DEVICES
from numerics import HALF, assert_as_good_as, grid
from twins import BACKEND_NAMES, MODULE_KINDS, H, I, mapped, oracle, states, step, tensors, twins

from fused_rnn.cells import CELLS

HALF_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in HALF}


pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")


# oneDNN, which runs torch's LSTM, has no float16 on many CPUs: there torch raises. The dtypes to
# expect are then those of bfloat16, and the accuracy that of torch's own loop.
def without_onednn(dtype):
    if dtype == torch.float16:
        return torch.backends.mkldnn.flags(enabled=False)
    return contextlib.nullcontext()


def torch_can(kind, cell, backend, device, half, input_half=False, **_):
    """backend="torch" meets the same refusal of oneDNN that torch.nn.LSTM does."""
    refused = ("lstm", False, "torch", "cpu", "float16", False)
    return (kind, cell, backend, device, half, input_half) != refused


def to_bfloat16(tensor):
    return tensor.to(torch.bfloat16)


def under(dtype, module, device):
    def call(input, hx):
        with torch.autocast(device, dtype):
            return module(input, hx)

    return call


@grid(
    lambda cell, packed, **case: not (cell and packed) and torch_can(cell=cell, **case),
    kind=MODULE_KINDS, cell=(False, True), backend=BACKEND_NAMES, device=DEVICES,
    half=HALF_NAMES, input_half=(False, True), given=(True, False), packed=(False, True),
    grad=(True, False),
)  # fmt: skip
def test_dtypes_are_torchs(kind, cell, backend, device, half, input_half, given, packed, grad):
    dtype = HALF_NAMES[half]
    theirs, ours = twins(kind, cell=cell, backend=backend, device=device)
    input = torch.randn(*((3,) if cell else (5, 3)), I, device=device)
    input = input.to(dtype) if input_half else input
    hx = states(kind, ours, 3, dtype=input.dtype) if given else None
    if packed:
        input = torch.nn.utils.rnn.pack_padded_sequence(
            input, torch.tensor([5, 1, 3]), enforce_sorted=False
        )
    with torch.set_grad_enabled(grad), torch.autocast(device, torch.bfloat16):
        as_bfloat16 = [mapped(t, to_bfloat16) if input_half else t for t in (input, hx)]
        expected = [t.dtype for t in tensors(theirs(*as_bfloat16))]
    expected = [dtype if e == torch.bfloat16 else e for e in expected]
    with torch.set_grad_enabled(grad), torch.autocast(device, dtype):
        got = list(tensors(ours(input, hx)))
    assert [t.dtype for t in got] == expected
    assert all(t.requires_grad == grad for t in got)


@grid(torch_can, kind=MODULE_KINDS, cell=(False, True), backend=BACKEND_NAMES, device=DEVICES,
      half=HALF_NAMES)  # fmt: skip
def test_results_and_gradients_are_as_good_as_torchs(kind, cell, backend, device, half):
    """Against float64 from the rounded weights and input, which is what autocast computes from."""
    dtype = HALF_NAMES[half]
    theirs, ours = twins(kind, cell=cell, backend=backend, device=device)
    for module in (theirs, ours):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.to(dtype))
    input = torch.randn(*((3,) if cell else (9, 3)), I, device=device).to(dtype).float()
    hx = mapped(states(kind, ours, 3), lambda h: h.to(dtype).float())
    with without_onednn(dtype):
        expected = step(theirs, input, hx, call=under(dtype, theirs, device))
    got = step(ours, input, hx, call=under(dtype, ours, device))
    exact = oracle(ours, input, hx)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        # Where torch returns float32, what it computed was a half all the same.
        what = (kind, backend, device, name)
        assert_as_good_as(value, expected[name].to(dtype), exact[name], what)


@grid(kind=MODULE_KINDS, cell=(False, True), backend=BACKEND_NAMES, device=DEVICES)
def test_autocast_switched_off_inside_changes_nothing(kind, cell, backend, device):
    _, ours = twins(kind, cell=cell, backend=backend, device=device)
    input = torch.randn(*((3,) if cell else (5, 3)), I, device=device)
    expected = ours(input)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        torch.testing.assert_close(ours(input), expected, rtol=0, atol=0)


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
def test_training_under_autocast_learns(kind, backend, device):
    """Weights stay float32, and the loss falls as with torch."""
    losses = []
    for module in twins(kind, I, H, backend=backend, device=device):
        torch.manual_seed(1)
        head = torch.nn.Linear(H, 1, device=device)
        optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=0.03)
        input = torch.randn(8, 6, I, device=device)
        target = input.sum((0, 2), keepdim=True)[0].tanh()
        for _ in range(25):
            with torch.autocast(device, torch.bfloat16):
                loss = (head(module(input)[0][-1]).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert losses[1] < 0.5
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


@grid(cell_kind=CELLS, backend=BACKEND_NAMES, device=DEVICES)
def test_weights_in_the_autocast_dtype_stay_there(cell_kind, backend, device):
    _, ours = twins(cell_kind, dtype=torch.bfloat16, backend=backend, device=device)
    with torch.autocast(device, torch.bfloat16):
        output, _ = ours(torch.randn(5, 3, I, device=device))
    assert output.dtype in (torch.bfloat16, torch.float32)
    output.float().sum().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert output.shape[-1] == H
