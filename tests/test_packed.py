"""A PackedSequence goes in and comes out as with torch.nn."""

import torch
from devices import DEVICES, without_cudnn
from numerics import DTYPES, HALF, grid
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)
from torch.testing import assert_close
from twins import (
    BACKEND_NAMES,
    MODULE_KINDS,
    H,
    I,
    P,
    assert_twins,
    mapped,
    states,
    step,
    tensors,
    twins,
)

from fused_rnn.cells import CELLS

LENGTHS = {
    "equal": (4, 4, 4),
    "sorted": (6, 3, 3, 1),
    "unsorted": (2, 6, 1, 3, 6),
    "ones": (1, 1, 1),
    "single": (5,),
    "single step": (1,),
    "longest last": (1, 2, 3, 4, 5),
}
SORTED = {name for name, lengths in LENGTHS.items() if lengths == tuple(sorted(lengths)[::-1])}


def packed_input(lengths, *, enforce_sorted=False, dtype=torch.float64, device="cpu"):
    rows = [torch.randn(length, I, dtype=dtype, device=device) for length in lengths]
    return pack_sequence(rows, enforce_sorted=enforce_sorted)


def one_of(hx, sequence):
    """``hx`` of one sequence, batch kept."""
    return mapped(hx, lambda h: h[:, sequence : sequence + 1])


@grid(
    lambda kind, lengths, enforce_sorted, dtype, proj_size, **_: (
        (not enforce_sorted or lengths in SORTED)
        and (not proj_size or kind == "lstm")
        and not (kind == "rnn_relu" and dtype in HALF)
    ),
    kind=CELLS,
    backend=BACKEND_NAMES,
    device=DEVICES,
    dtype=DTYPES,
    lengths=LENGTHS,
    enforce_sorted=(True, False),
    bidirectional=(False, True),
    num_layers=(1, 2),
    proj_size=(0, P),
    bias=(True, False),
    given=(True, False),
)
def test_results_and_gradients_are_torchs(
    kind, backend, device, dtype, lengths, enforce_sorted, bidirectional, num_layers, proj_size,
    bias, given,
):  # fmt: skip
    options = {"proj_size": proj_size} if proj_size else {}
    theirs, ours = twins(
        kind, I, H, num_layers, bidirectional=bidirectional, bias=bias, dtype=dtype,
        backend=backend, device=device, **options,
    )  # fmt: skip
    input = packed_input(
        LENGTHS[lengths], enforce_sorted=enforce_sorted, dtype=dtype, device=device
    )
    hx = states(kind, ours, len(LENGTHS[lengths]), dtype=dtype) if given else None
    assert_twins(theirs, ours, input, hx, what=(kind, backend, device, lengths))
    output, _ = ours(input, hx)
    assert isinstance(output, PackedSequence)
    assert torch.equal(output.batch_sizes, input.batch_sizes)
    for name in ("sorted_indices", "unsorted_indices"):
        expected, got = getattr(input, name), getattr(output, name)
        assert (got is None) if expected is None else torch.equal(got, expected), name


@grid(
    kind=CELLS, backend=BACKEND_NAMES, device=DEVICES, bidirectional=(False, True), lengths=LENGTHS
)  # fmt: skip
def test_each_sequence_is_run_as_if_alone(kind, backend, device, bidirectional, lengths):
    """Outputs and final states, those in the caller's order, against one call a sequence."""
    lengths = LENGTHS[lengths]
    options = {"dtype": torch.float64, "device": device}
    _, ours = twins(kind, I, H, 2, bidirectional=bidirectional, backend=backend, **options)
    rows = [torch.randn(length, I, **options) for length in lengths]
    hx = states(kind, ours, len(lengths), dtype=torch.float64)
    output, final = ours(pack_sequence(rows, enforce_sorted=False), hx)
    padded, got_lengths = pad_packed_sequence(output)
    assert got_lengths.tolist() == list(lengths)
    for n, row in enumerate(rows):
        alone, alone_final = ours(row.unsqueeze(1), one_of(hx, n))
        assert_close(padded[: len(row), n : n + 1], alone)
        assert not padded[len(row) :, n].any()
        for got, expected in zip(tensors(one_of(final, n)), tensors(alone_final), strict=True):
            assert_close(got, expected)


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES, batch_first=(False, True),
      sort=(False, True))  # fmt: skip
def test_padded_in_padded_out(kind, backend, device, batch_first, sort):
    """The usual way round: gradients reach the padded input and are zero on its padding."""
    options = {"dtype": torch.float64, "device": device}
    theirs, ours = twins(
        kind, batch_first=batch_first, bidirectional=True, backend=backend, **options
    )
    lengths = torch.tensor([5, 4, 2] if sort else [2, 5, 4])
    shape = (3, 5, I) if batch_first else (5, 3, I)
    input = torch.randn(shape, **options)

    def through(module):
        def call(input, hx):
            packed = pack_padded_sequence(
                input, lengths, batch_first=batch_first, enforce_sorted=sort
            )
            output, final = module(packed, hx)
            padded, _ = pad_packed_sequence(
                output, batch_first=batch_first, padding_value=-1.0, total_length=7
            )
            return padded, final

        return call

    expected = step(theirs, input, call=through(theirs))
    got = step(ours, input, call=through(ours))
    assert_close(got, expected)
    gradient = got["d input 0"] if batch_first else got["d input 0"].transpose(0, 1)
    for n, length in enumerate(lengths):
        assert gradient[n, :length].any()
        assert not gradient[n, length:].any()


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES, bidirectional=(False, True))
@without_cudnn()
def test_dropout_draws_torchs_random_numbers(kind, backend, device, bidirectional):
    theirs, ours = twins(
        kind, I, H, 3, dropout=0.5, bidirectional=bidirectional, backend=backend, device=device,
        dtype=torch.float64,
    )  # fmt: skip
    input = packed_input((2, 5, 3), device=device)
    assert_twins(theirs, ours, input, what=(kind, backend, device), seed=4)


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
def test_packed_and_padded_calls_share_the_module(kind, backend, device):
    """Alternating, and without a gradient: nothing is remembered from the other call."""
    theirs, ours = twins(kind, I, H, backend=backend, device=device, dtype=torch.float64)
    packed = packed_input((3, 1), device=device)
    plain = torch.randn(4, 2, I, dtype=torch.float64, device=device)
    with torch.no_grad():
        for input in (packed, plain, packed):
            expected, got = theirs(input), ours(input)
            for a, b in zip(tensors(got), tensors(expected), strict=True):
                assert_close(a, b)
            assert not any(t.requires_grad for t in tensors(got))


@grid(backend=BACKEND_NAMES, device=DEVICES)
def test_long_ragged_batches(backend, device):
    """Lengths spread over 1 to 40, more sequences than any tile: the general case at size."""
    theirs, ours = twins("lstm", bidirectional=True, backend=backend, device=device)
    lengths = torch.randint(1, 41, (37,)).tolist()
    input = packed_input(lengths, dtype=torch.float32, device=device)
    assert_twins(theirs, ours, input, what=("lengths", lengths))


@grid(kind=MODULE_KINDS, backend=BACKEND_NAMES, device=DEVICES)
def test_indices_in_any_order_that_unsorts(kind, backend, device):
    """Permutations that another package made, not pack_sequence, with equal lengths swapped."""
    theirs, ours = twins(kind, backend=backend, device=device, dtype=torch.float64)
    plain = packed_input((3, 3, 2), enforce_sorted=True, device=device)
    orders = torch.tensor([[1, 2, 0], [2, 0, 1]], device=device)
    swapped = PackedSequence(plain.data, plain.batch_sizes, *orders)
    hx = states(kind, ours, 3, dtype=torch.float64)
    assert_twins(theirs, ours, swapped, hx, what=(kind, backend, device))
