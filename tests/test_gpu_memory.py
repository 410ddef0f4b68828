"""Sizes and memory on a GPU: all H, long sequences, more elements than 32 bits count, peaks."""

import pytest
import torch
from devices import MISSING_GPU
from numerics import HALF, assert_as_good_as, grid
from torch.testing import assert_close
from twins import MODULE_KINDS, assert_twins, step, twins

from fused_rnn.cells import CELLS

if MISSING_GPU is not None:
    pytest.skip(f"needs a GPU: {MISSING_GPU}", allow_module_level=True)

GIB = 2**30


def needs_memory(gib):
    """Skip where less than this is free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free / GIB:.0f} are free")


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    torch.cuda.empty_cache()


@grid(
    lambda kind, dtype, **_: kind != "rnn_relu" or dtype not in HALF,
    kind=CELLS,
    dtype=(torch.float32, torch.bfloat16, torch.float16),
    hidden=(1, 25, 31, 60, 1150, 4096),
)
def test_sizes_that_no_tile_divides_and_large_ones(kind, dtype, hidden):
    theirs, ours = twins(kind, 7, hidden, dtype=dtype, device="cuda", backend="cuda")
    x = torch.randn(4, 3, 7, dtype=dtype, device="cuda")
    assert_twins(theirs, ours, x, what=(kind, hidden))


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_seventy_thousand_steps(kind):
    """More than 65,535, the most blocks that a grid has in y. The oracle is our CPU loop."""
    theirs, ours = twins(kind, 3, 8, device="cuda", backend="cuda")
    _, exact = twins(kind, 3, 8, dtype=torch.float64, backend="cpu")
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(70_000, 2, 3, device="cuda")
    expected, got = step(theirs, x), step(ours, x)
    right = step(exact, x.cpu().double())
    for name, value in got.items():
        torchs = expected[name].cpu()
        assert_as_good_as(value.cpu(), torchs, right[name], (kind, name), length=x.numel())


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_more_elements_than_32_bits_count(kind):
    """In the gates that are kept; more rows than blocks, too. Sequences do not know each other.

    So the last ones must come out as by themselves, and weights' gradients are sums over batches.
    """
    T, H = 20, 128
    gates = CELLS[kind].gates * H
    N = 2**31 // (T * gates) + 1000
    assert T * N * gates > 2**31
    needs_memory(48)
    _, ours = twins(kind, 1, H, device="cuda", backend="cuda")
    x = torch.randn(T, N, 1, device="cuda", requires_grad=True)
    last = x.detach()[:, -8:].clone().requires_grad_()

    def outputs_and_weights_gradients(x):
        ours.zero_grad(set_to_none=True)
        output, _ = ours(x)
        output.sum().backward()
        return output.detach(), [p.grad for p in ours.parameters()]

    output, gradients = outputs_and_weights_gradients(x)
    alone, _ = outputs_and_weights_gradients(last)
    assert_close(output[:, -8:], alone)
    assert_close(x.grad[:, -8:], last.grad)
    del output
    parts = [outputs_and_weights_gradients(part)[1] for part in x.detach().split(N // 8 + 1, dim=1)]
    for got, *sums in zip(gradients, *parts, strict=True):
        total = torch.stack(sums).double().sum(0)
        assert_close(got.double(), total, rtol=0, atol=1e-3 * total.abs().max().item())


def test_more_results_than_32_bits_count():
    """In inference, which keeps no gates."""
    T, N, H = 20, 2**20 + 100, 104
    assert T * N * H > 2**31
    needs_memory(4 + 3 * 2 * T * N * H // GIB)
    _, ours = twins("gru", 1, H, device="cuda", backend="cuda", dtype=torch.bfloat16)
    x = torch.randn(T, N, 1, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        output, h_n = ours(x)
        alone, _ = ours(x[:, -8:])
    # A unit in the last place of bfloat16 here or there, and what it becomes in 20 steps.
    assert_close(output[:, -8:], alone, rtol=0.02, atol=0.02)
    assert torch.equal(output[-1], h_n[0])


def peak(call):
    """Bytes allocated at most during the call, above what was there before; its result is freed."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_inference_keeps_no_gates(kind):
    """With T grow the results alone; training, for comparison, keeps more."""
    H = 256
    _, ours = twins(kind, 8, H, device="cuda", backend="cuda")
    short, long = (torch.randn(T, 32, 8, device="cuda") for T in (1000, 3000))
    result = (3000 - 1000) * 32 * H * 4

    def infer(x):
        with torch.no_grad():
            return peak(lambda: ours(x))

    def train(x):
        return peak(lambda: ours(x)[0].sum().backward())

    for run in (infer, train):  # workspaces
        run(short)
    growth = infer(long) - infer(short)
    assert growth <= 1.1 * result, f"{growth / result:.2f} times the results"
    kept = train(long) - train(short)
    assert kept > 1.5 * result, "training keeps nothing: then this test shows nothing"


def test_a_call_leaves_nothing_allocated():
    _, ours = twins("lstm", 8, 64, device="cuda", backend="cuda")
    x = torch.randn(50, 4, 8, device="cuda")

    def train():
        ours(x)[0].sum().backward()
        ours.zero_grad(set_to_none=True)

    train()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        train()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("kind", MODULE_KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_too_little_memory_is_torchs_own_exception(kind, training):
    """People catch it by its type and go on with a smaller batch."""
    _, ours = twins(kind, 1, 4096, device="cuda", backend="cuda")
    x = torch.zeros(1024, 2**16, 1, device="cuda")
    assert x.numel() * 4096 * 4 > torch.cuda.mem_get_info()[1]
    with torch.set_grad_enabled(training):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            ours(x)
        output, _ = ours(x[:2, :3])
    assert not output.isnan().any()
