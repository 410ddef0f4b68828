"""Input of jagged layout: each sequence as if alone, without padding."""

import pytest
import torch
from devices import DEVICES
from numerics import DTYPES, HALF, grid
from torch.testing import assert_close
from twins import BACKEND_NAMES, MODULE_KINDS, H, I, P, mapped, name_of, states, tensors

import fused_rnn
from fused_rnn.cells import CELLS

LOOPS = tuple(name for name in BACKEND_NAMES if name != "torch")
LENGTHS = (3, 0, 6, 1)
N = len(LENGTHS)
MODULES = {
    "plain": {},
    "bidirectional": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "reverse": {"direction": "reverse"},
    "learned": {"learn_initial_state": True, "num_layers": 2},
    "projected": {"proj_size": P, "bidirectional": True},
}


def exists(kind, form="plain", dtype=None, **_):
    return (form != "projected" or kind == "lstm") and (kind != "rnn_relu" or dtype not in HALF)


def module_of(kind, **options):
    name, extra = name_of(kind)
    return getattr(fused_rnn, name)(I, H, **extra, **options)


def jagged(values, lengths=LENGTHS):
    offsets = torch.tensor([0, *lengths], device=values.device).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def padded_call(ours, values, hx, **asked):
    """The same by ``lengths``, which has tests of its own; results back in compact order."""
    rows = values.split(LENGTHS)
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=ours.batch_first)
    output, state, *c = ours(x, hx, lengths=LENGTHS, **asked)

    def compact(y):
        y = y if ours.batch_first else y.transpose(0, 1)
        return torch.cat([y[n, :length] for n, length in enumerate(LENGTHS)])

    return compact(output), state, *map(compact, c)


@grid(
    exists, kind=CELLS, backend=LOOPS, device=DEVICES, dtype=DTYPES, form=MODULES,
    given=(True, False), tbptt=(None, 2),
)  # fmt: skip
def test_results_and_gradients_are_those_of_lengths(
    kind, backend, device, dtype, form, given, tbptt
):
    ours = module_of(kind, backend=backend, device=device, dtype=dtype, **MODULES[form])
    values = torch.randn(sum(LENGTHS), I, dtype=dtype, device=device, requires_grad=True)
    hx = states(kind, ours, N, dtype=dtype) if given else None
    asked = {"tbptt": tbptt, "return_cell_states": CELLS[kind].states == 2}
    output, state, *c = ours(jagged(values), hx, **asked)
    assert output.is_nested
    assert output.offsets().diff().tolist() == list(LENGTHS)
    got = [output.values(), *tensors(state), *(y.values() for y in c)]
    expected = list(tensors(padded_call(ours, values, hx, **asked)))
    # On the CPU the same rows in the same order; elsewhere products of other shapes.
    exact = {"rtol": 0, "atol": 0} if backend == "cpu" else {}
    assert_close(got, expected, **exact)
    leaves = [values, *(p for name, p in ours.named_parameters() if not (given and "_0" in name))]
    weight = [torch.randn_like(y) for y in got]
    slack = {"rtol": 0, "atol": 32 * torch.finfo(dtype).eps} if dtype in HALF else {}
    assert_close(
        torch.autograd.grad(got, leaves, weight),
        torch.autograd.grad(expected, leaves, weight),
        **slack,
    )


@grid(exists, kind=MODULE_KINDS, backend=LOOPS, device=DEVICES, form=MODULES)
def test_each_sequence_is_run_as_if_alone(kind, backend, device, form):
    options = {"dtype": torch.float64, "device": device, "backend": backend}
    ours = module_of(kind, **options, **MODULES[form])
    rows = [torch.randn(n, I, dtype=torch.float64, device=device) for n in LENGTHS]
    hx = states(kind, ours, N, dtype=torch.float64)
    output, state = ours(torch.nested.nested_tensor(rows, layout=torch.jagged), hx)
    last, _ = ours(torch.nested.nested_tensor(rows, layout=torch.jagged), hx, last_step_only=True)
    for n, (row, got) in enumerate(zip(rows, output.unbind(), strict=True)):
        one = mapped(hx, lambda s, n=n: s[:, n])
        if not len(row):
            assert_close([s[:, n] for s in tensors(state)], list(tensors(one)))
            assert not last[n].any()
            continue
        alone, final = ours(row, one)
        assert_close(got, alone)
        assert_close(last[n], alone[-1])
        assert_close([s[:, n] for s in tensors(state)], list(tensors(final)))


@grid(kind=MODULE_KINDS, backend=LOOPS)
def test_no_rows_at_all(kind, backend):
    ours = module_of(kind, backend=backend, bidirectional=True)
    output, state = ours(jagged(torch.zeros(0, I), (0, 0)))
    assert output.values().shape == (0, 2 * H)
    assert not any(s.any() for s in tensors(state))
    last, _ = ours(jagged(torch.zeros(0, I), (0, 0)), last_step_only=True)
    assert torch.equal(last, torch.zeros(2, 2 * H))


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_other_nested_tensors_are_refused(kind):
    ours, values = module_of(kind), torch.zeros(10, I)
    with pytest.raises(ValueError, match=r"must be \[N,j,I\] of layout torch.jagged"):
        ours(torch.nested.nested_tensor([values]))
    with pytest.raises(ValueError, match="must be"):
        ours(jagged(torch.zeros(10, 2, I)))
    with pytest.raises(ValueError, match="must be"):
        ours(jagged(values).transpose(1, 2))
    holes = torch.nested.narrow(
        torch.zeros(2, 5, I), 1, torch.tensor([0, 1]), torch.tensor([3, 2]), layout=torch.jagged
    )
    with pytest.raises(ValueError, match="must not have holes"):
        ours(holes)
    for asked in ({"lengths": LENGTHS}, {"reset": torch.zeros(6, N).bool()}):
        with pytest.raises(ValueError, match="cannot be had with jagged input"):
            ours(jagged(values), **asked)
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        ours(jagged(torch.zeros(10, I + 1)))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        ours(jagged(values), states(kind, ours, N + 1))
    ours.backend = "torch"
    with pytest.raises(RuntimeError, match=r"torch\.nn has no input of jagged layout"):
        ours(jagged(values))
