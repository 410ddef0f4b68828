"""What only a GPU has: streams, graphs, waiting, devices, TF32. The grids of the other files have
the device as an axis; test_gpu_memory.py is about sizes and memory."""

import contextlib
import copy
import io
import threading

import pytest
import torch
from devices import MISSING_GPU
from numerics import assert_as_good_as, grid
from test_errors import assert_same_refusal
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close
from twins import MODULE_KINDS, H, I, mapped, oracle, states, step, tensors, twins

import fused_rnn
from fused_rnn.cells import CELLS

if MISSING_GPU is not None:
    pytest.skip(f"needs a GPU: {MISSING_GPU}", allow_module_level=True)

# Long enough that the host is far ahead: some 20 ms.
CYCLES = 40_000_000

needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs, there is one"
)


def ours_on_cuda(kind, *args, **options):
    return twins(kind, *args, device="cuda", **options)[1]


def input_for(module, T=6, N=3, **options):
    lead = (T, N) if hasattr(module, "num_layers") else (N,)
    weight = next(module.parameters())
    return torch.randn(
        *lead, module.input_size, device=weight.device, dtype=weight.dtype, **options
    )


def backward_from(result):
    outputs = list(tensors(result))
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def train(module, x):
    """Results and gradients. Unlike twins.step it copies nothing from the host, which waits."""
    module.zero_grad(set_to_none=True)
    result = module(x)
    backward_from(result)
    return [*(t.detach() for t in tensors(result)), *(p.grad for p in module.parameters())]


# Streams


@grid(kind=CELLS, cell=(False, True))
def test_a_call_on_a_side_stream_keeps_its_place_there(kind, cell):
    """The input is written late on the stream; whoever runs elsewhere reads NaN."""
    ours = ours_on_cuda(kind, 64, 128, cell=cell)
    x = input_for(ours, 20, 16)
    expected = train(ours, x)
    late, stream = torch.full_like(x, torch.nan), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        late.copy_(x)
        got = train(ours, late)
    stream.synchronize()
    assert_close(got, expected)


@grid(kind=CELLS, training=(False, True))
def test_memory_is_not_reused_while_a_side_stream_uses_it(kind, training):
    """Everything is freed and written over at once, while the stream has not begun."""
    ours = ours_on_cuda(kind, 64, 128, 2)
    x = input_for(ours, 20, 16)
    reference = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.set_grad_enabled(training):
        torch.cuda._sleep(CYCLES)
        output, _ = ours(x)
        if training:
            output.sum().backward()
        output = output.detach().clone()
    x.record_stream(stream)
    del x
    for _ in range(50):
        torch.full_like(reference, torch.nan)
        torch.full((20, 16, 4 * 128), torch.nan, device="cuda")
    stream.synchronize()
    gradients = [p.grad for p in ours.parameters()]
    ours.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(training):
        expected, _ = ours(reference)
    assert_close(output, expected.detach())
    if training:
        expected.sum().backward()
        assert_close(gradients, [p.grad for p in ours.parameters()])


@grid(kind=CELLS, threads=(False, True))
def test_two_streams_at_once(kind, threads):
    """Each with its own module; issued by one thread, and by one each."""
    modules = [ours_on_cuda(kind, 64, 96, 2) for _ in range(2)]
    inputs = [input_for(module, 30, 8) for module in modules]
    expected = [train(module, x) for module, x in zip(modules, inputs, strict=True)]
    torch.cuda.synchronize()
    results = ([], [])
    streams = [torch.cuda.Stream() for _ in modules]

    def issue(at, times):
        with torch.cuda.stream(streams[at]):
            results[at].extend(train(modules[at], inputs[at]) for _ in range(times))

    if threads:
        workers = [threading.Thread(target=issue, args=(at, 6)) for at in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            assert not worker.is_alive(), "hung"
    else:
        for _ in range(6):
            issue(0, 1)
            issue(1, 1)
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert len(found) == 6
        for got in found:
            assert_close(got, right)


# CUDA graphs


@grid(
    lambda kind, cell, form, **_: not cell or form == "plain",
    kind=CELLS, cell=(False, True), training=(False, True), form=("plain", "two layers", "given"),
)  # fmt: skip
def test_a_captured_call_replays_on_new_input(kind, cell, training, form):
    options = {"num_layers": 2, "bidirectional": True} if form == "two layers" else {}
    ours = ours_on_cuda(kind, cell=cell, **options)
    eager = copy.deepcopy(ours)
    static = input_for(ours, requires_grad=training)
    hx = states(kind, ours, 3) if form == "given" else None
    leaves = [static, *ours.parameters()]

    def run(module, x):
        with torch.set_grad_enabled(training):
            outputs = list(tensors(module(x, hx)))
            if training:
                sum(y.square().sum() for y in outputs).backward()
        return outputs

    def forget_gradients():
        for leaf in leaves:
            leaf.grad = None

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(3):
            forget_gradients()
            run(ours, static)
    torch.cuda.current_stream().wait_stream(warm)
    forget_gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(ours, static)
    for _ in range(3):
        x = torch.randn_like(static).requires_grad_(training)
        with torch.no_grad():
            static.copy_(x)
        graph.replay()
        eager.zero_grad(set_to_none=True)
        assert_close(outputs, run(eager, x))
        if training:
            expected = [leaf.grad for leaf in (x, *eager.parameters())]
            assert_close([leaf.grad for leaf in leaves], expected)


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_compiled_with_cuda_graphs(kind):
    pytest.importorskip("triton", reason="on CUDA inductor needs triton")
    torch._dynamo.reset()
    ours = ours_on_cuda(kind)
    call = torch.compile(ours, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = input_for(ours)
            torch.compiler.cudagraph_mark_step_begin()
            assert_close(list(tensors(call(x))), list(tensors(ours(x))))
    torch._dynamo.reset()


# Waiting


@contextlib.contextmanager
def waiting_is(mode):
    """``"error"`` or ``"warn"`` where torch waits for the GPU. Waits of our own would not show."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@grid(kind=CELLS, cell=(False, True), given=(False, True), training=(False, True))
def test_nothing_waits_for_dense_input(kind, cell, given, training):
    ours = ours_on_cuda(kind, cell=cell)
    x, hx = input_for(ours, requires_grad=training), states(kind, ours, 3) if given else None
    with torch.set_grad_enabled(training):
        for mode in ("default", "error"):  # the first call makes handles
            with waiting_is(mode):
                result = ours(x, hx)
                if training:
                    backward_from(result)
    assert all(t.isfinite().all() for t in tensors(result))


@grid(kind=CELLS, where=("list", "device"), training=(False, True))
def test_nothing_waits_for_lengths_and_resets(kind, where, training):
    ours = ours_on_cuda(kind, bidirectional=True)
    x, lengths = input_for(ours, requires_grad=training), [6, 0, 3]
    lengths = lengths if where == "list" else torch.tensor(lengths, device="cuda")
    reset = torch.rand(6, 3, device="cuda") < 0.3
    asked = {"lengths": lengths, "reset": reset, "tbptt": 2, "padding_value": 1.0}
    with torch.set_grad_enabled(training):
        for mode in ("default", "error"):
            with waiting_is(mode):
                result = ours(x, **asked)
                if training:
                    backward_from(result)
    inside = dict(asked, lengths=[6, 0, 3])
    assert_close(list(tensors(result)), list(tensors(ours(x, **inside))))


@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_the_host_runs_ahead(kind):
    """A call returns while the GPU has not begun: also where a wait is our library's own."""
    ours = ours_on_cuda(kind)
    x = input_for(ours, requires_grad=True)
    backward_from(ours(x))
    torch.cuda.synchronize()
    torch.cuda._sleep(100 * CYCLES)
    begun = torch.cuda.Event()
    begun.record()
    backward_from(ours(x))
    assert not begun.query(), "the call waited for what stood before it"
    torch.cuda.synchronize()


@grid(kind=MODULE_KINDS, bidirectional=(False, True))
def test_nothing_waits_for_packed_input(kind, bidirectional):
    """How long the sequences are is known to the host alone; that copy is from pinned memory."""
    ours = ours_on_cuda(kind, I, H, 2, bidirectional=bidirectional)
    packed = pack_sequence([torch.randn(n, I, device="cuda") for n in (4, 2, 1)])
    backward_from(ours(packed))
    with waiting_is("error"):
        backward_from(ours(packed))
    assert all(p.grad.isfinite().all() for p in ours.parameters())


# Repeatability, TF32


@grid(kind=CELLS, dtype=(torch.float32, torch.bfloat16, torch.float16), packed=(False, True))
def test_results_and_gradients_repeat_bit_for_bit(kind, dtype, packed):
    ours = ours_on_cuda(kind, 70, 130, 2, bidirectional=True, dtype=dtype)
    x = 0.1 * input_for(ours, 40, 33)
    if packed:
        x = pack_sequence([x[: 1 + n, n] for n in range(33)], enforce_sorted=False)
    first = step(ours, x)
    for _ in range(4):
        for name, value in step(ours, x).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="this GPU has no TF32")
@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_float32_follows_cudnns_switch_for_tf32_as_torchs_modules_do(kind):
    """Not the switch for matrix products, which torch.nn.LSTM does not read either."""
    # Beyond the sizes for which cuDNN has kernels that may not use tensor cores.
    theirs, ours = twins(kind, 512, 512, device="cuda", backend="cuda")
    x = input_for(ours, 12, 32)
    exact, right = step(ours, x), oracle(ours, x)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert_close(step(ours, x), exact, rtol=0, atol=0)
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        expected, got = step(theirs, x), step(ours, x)
    assert not torch.equal(got["output 0"], exact["output 0"]), "the switch changed nothing"
    for name, value in got.items():
        assert_as_good_as(value, expected[name], right[name], (kind, "TF32", name))


# Devices


@grid(kind=MODULE_KINDS, cell=(False, True))
def test_a_device_may_have_its_index(kind, cell):
    _, ours = twins(kind, cell=cell, device="cuda:0", backend="cuda")
    x = input_for(ours)
    for where in (x, x.to("cuda"), x.to("cuda:0")):
        result = list(tensors(ours(where, states(kind, ours, 3))))
        assert {t.device for t in result} == {torch.device("cuda", 0)}


@needs_two_gpus
@grid(kind=MODULE_KINDS, cell=(False, True), packed=(False, True))
def test_another_device_than_the_current_one(kind, cell, packed):
    _, ours = twins(kind, cell=cell, device="cuda:1", backend="cuda")
    x = input_for(ours)
    if packed and not cell:
        x = pack_sequence([x[:4, 0], x[:2, 1]])
    expected = step(copy.deepcopy(ours).to("cuda:0"), mapped(x, lambda t: t.to("cuda:0")))
    assert torch.cuda.current_device() == 0
    got = step(ours, x)
    assert torch.cuda.current_device() == 0
    assert {t.device for t in got.values()} == {torch.device("cuda", 1)}
    assert_close({n: t.to("cuda:0") for n, t in got.items()}, expected)


@needs_two_gpus
@pytest.mark.parametrize("kind", MODULE_KINDS)
def test_data_parallel(kind):
    ours = ours_on_cuda(kind)
    x = input_for(ours, 6, 8)
    assert_close(list(tensors(nn.DataParallel(ours, dim=1)(x))), list(tensors(ours(x))))


@grid(kind=MODULE_KINDS, packed=(False, True))
def test_a_default_device_changes_nothing(kind, packed):
    """``torch.set_default_device``: what the host computes for itself stays on the host."""
    ours = ours_on_cuda(kind)
    x = input_for(ours)
    x = pack_sequence([x[:4, 0], x[:2, 1]]) if packed else x
    expected = list(tensors(ours(x)))
    with torch.device("cuda"):
        got = list(tensors(ours(x)))
    assert_close(got, expected, rtol=0, atol=0)


@grid(kind=MODULE_KINDS, cell=(False, True), how=("cuda", "to", "to and back"))
def test_a_moved_module_runs_where_it_is(kind, cell, how):
    _, ours = twins(kind, cell=cell)
    x = input_for(ours)
    expected = list(tensors(ours(x)))
    moved = ours.cuda() if how == "cuda" else ours.to("cuda")
    assert moved is ours
    with fused_rnn.use_backend("cuda"):
        got = list(tensors(ours(x.cuda())))
    assert all(t.is_cuda for t in got)
    assert_close([t.cpu() for t in got], expected)
    if how == "to and back":
        assert_close(list(tensors(ours.cpu()(x))), expected, rtol=0, atol=0)


def test_a_model_on_the_gpu_is_converted_in_place_and_its_checkpoint_loads_anywhere():
    model = nn.ModuleDict({"lstm": nn.LSTM(I, H, 2), "cell": nn.GRUCell(H, H)}).cuda()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}

    def results(model, x):
        output, _ = model["lstm"](x)
        return output, model["cell"](output[-1])

    x = torch.randn(6, 3, I, device="cuda")
    expected = results(model, x)
    assert fused_rnn.convert(model, backend="cuda") is model
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert_close(results(model, x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    elsewhere = nn.ModuleDict({"lstm": nn.LSTM(I, H, 2), "cell": nn.GRUCell(H, H)})
    elsewhere.load_state_dict(torch.load(file, map_location="cpu"))
    on_cpu = results(elsewhere, x.cpu())
    assert_close(on_cpu, tuple(t.cpu() for t in expected))


@grid(kind=MODULE_KINDS, cell=(False, True), wrong=("input", "states", "module"))
def test_tensors_on_different_devices_are_refused_as_by_torch(kind, cell, wrong):
    theirs, ours = twins(kind, cell=cell, device="cuda", backend="cuda")
    x, hx = input_for(ours), states(kind, ours, 3)
    if wrong == "input":
        x = x.cpu()
    elif wrong == "states":
        hx = mapped(hx, torch.Tensor.cpu)
    else:
        x, hx = x.cpu(), mapped(hx, torch.Tensor.cpu)
    if cell and wrong != "states":
        # A step asks its backend before all else, and was told which.
        with pytest.raises(RuntimeError, match="the input is on cpu"):
            ours(x, hx)
    else:
        assert_same_refusal(lambda: theirs(x, hx), lambda: ours(x, hx))
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run this"):
        twins(kind, cell=cell, device="cuda", backend="cpu")[1](input_for(ours))
