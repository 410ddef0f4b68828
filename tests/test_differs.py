"""Each line of README's "What differs", with its cure."""

import copy
import io
import pickletools
import zipfile

import pytest
import torch
from devices import DEVICES, without_cudnn
from numerics import grid, needs_native
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close
from twins import BACKEND_NAMES, MODULE_KINDS, H, I, twins

import fused_rnn

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Model(nn.Module):
    def __init__(self, package, name="LSTM"):
        super().__init__()
        self.rnn = getattr(package, name)(I, H)
        self.head = nn.Linear(H, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_isinstance_of_torchs_class_is_false(name):
    """Cure: torch's base class, which both have; or convert after an initialiser that asks."""

    def initialise(model):
        for module in model.modules():
            if isinstance(module, getattr(nn, name)):
                for parameter in module.parameters():
                    nn.init.constant_(parameter, 0.5)

    base = nn.RNNCellBase if "Cell" in name else nn.RNNBase
    ours = getattr(fused_rnn, name)(I, H)
    assert not isinstance(ours, getattr(nn, name))
    assert isinstance(ours, base)
    assert isinstance(getattr(nn, name)(I, H), base)
    initialise(ours)
    assert not all((p == 0.5).all() for p in ours.parameters())

    model = nn.Sequential(getattr(nn, name)(I, H))
    initialise(model)
    fused_rnn.convert(model)
    assert all((p == 0.5).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torch_jit_script_does_not_know_ours(name):
    """Cure: torch.jit.trace under no_grad, or revert."""
    model, x = Model(fused_rnn, name), torch.randn(4, 3, I)
    expected = model(x)
    with pytest.raises((RuntimeError, ValueError)):
        torch.jit.script(model)
    with torch.no_grad():
        assert_close(torch.jit.trace(model, (x,))(x), expected)
    assert_close(torch.jit.script(fused_rnn.revert(model))(x), expected)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_that_records_gradients_cannot_be_saved(name):
    """Cure: trace under no_grad."""
    model, x = Model(fused_rnn, name), torch.randn(4, 3, I)

    def trace_and_save():
        torch.jit.save(torch.jit.trace(model, (x,)), io.BytesIO())

    with pytest.raises((RuntimeError, torch.jit.TracingCheckError)):
        trace_and_save()
    with torch.no_grad():
        trace_and_save()


def test_quantize_dynamic_leaves_ours_in_float():
    """Cure: revert before quantizing."""
    quantize = torch.ao.quantization.quantize_dynamic
    x = torch.randn(4, 3, I)
    model = Model(fused_rnn)
    kept = quantize(model, {nn.LSTM}, dtype=torch.qint8)
    assert type(kept.rnn) is fused_rnn.LSTM
    quantized = quantize(fused_rnn.revert(model), {nn.LSTM}, dtype=torch.qint8)
    assert type(quantized.rnn) is torch.ao.nn.quantized.dynamic.LSTM
    assert quantized(x).shape == (4, 3, 2)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_onnx_does_not_know_our_op(dynamo):
    """Cure: revert before the export."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs the onnxscript package")
    model, x = Model(fused_rnn).eval(), torch.randn(4, 3, I)

    def export():
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo, verbose=False)

    with torch.no_grad():
        with pytest.raises(RuntimeError):
            export()
        fused_rnn.revert(model)
        export()


def test_fx_cannot_trace_one_of_ours_by_itself():
    """Cure: as a part of a model, where it is one node, as torch's are."""
    ours = fused_rnn.GRU(I, H)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(ours)
    graph = torch.fx.symbolic_trace(nn.Sequential(ours))
    x = torch.randn(4, 3, I)
    assert_close(graph(x), ours(x))


def names_in_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    with zipfile.ZipFile(file) as archive:
        pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    return {str(argument) for _, argument, _ in pickletools.genops(pickled)}


def test_a_whole_model_saved_needs_this_package_to_load():
    """Cure: save the state_dict, which is torch's, or revert first."""
    model = Model(fused_rnn)
    assert any("fused_rnn" in name for name in names_in_pickle(model))
    nn_model = Model(nn)
    nn_model.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, I)
    assert_close(nn_model(x), model(x))
    assert not any("fused_rnn" in name for name in names_in_pickle(fused_rnn.revert(model)))


def test_torchs_switch_for_onednn_does_not_reach_ours():
    """Cure: backend="torch" for who wants torch's own kernels."""
    lstm, x = fused_rnn.LSTM(I, H, backend="cpu"), torch.randn(4, 3, I)
    expected = lstm(x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_close(lstm(x), expected, rtol=0, atol=0)


def answer(call):
    """What a call returns, or what it says when it refuses."""
    try:
        return call()
    except (NotImplementedError, RuntimeError) as refusal:
        return str(refusal)


def derivative(module, cell, seed=2):
    """Forward-mode derivative of the first result in a random direction, or the refusal."""
    random = torch.Generator().manual_seed(seed)
    shape = (3, I) if cell else (4, 3, I)
    x, direction = torch.randn(2, *shape, dtype=torch.float64, generator=random)

    def first(x):
        result = module(x)
        return result if isinstance(result, torch.Tensor) else result[0]

    return torch.func.jvp(first, (x,), (direction,))[1]


@grid(kind=MODULE_KINDS, cell=(False, True), backend=BACKEND_NAMES, grad=(False, True),
      frozen=(False, True))  # fmt: skip
def test_forward_mode_is_torchs_or_refused(kind, cell, backend, grad, frozen):
    """Never a derivative of zero. Cure where it is refused: the reference."""
    theirs, ours = twins(kind, cell=cell, backend=backend, dtype=torch.float64)
    ours.requires_grad_(not frozen)
    expected = derivative(theirs, cell)
    with torch.set_grad_enabled(grad):
        got = answer(lambda: derivative(ours, cell))
        if isinstance(got, str):
            assert backend not in ("reference", "torch")
            assert "jvp" in got or "forward" in got
            with fused_rnn.use_backend("reference"):
                ours.backend = "auto"
                got = derivative(ours, cell)
    assert_close(got, expected)


@grid(kind=MODULE_KINDS, cell=(False, True), backend=BACKEND_NAMES, grad=(False, True))
def test_vmap_is_right_or_refused(kind, cell, backend, grad):
    """Cure where it is refused, as torch's modules do too: the reference."""
    _, ours = twins(kind, cell=cell, backend=backend, dtype=torch.float64)
    batch = torch.randn(2, *((3, I) if cell else (4, 3, I)), dtype=torch.float64)

    def first(x):
        result = ours(x)
        return result if isinstance(result, torch.Tensor) else result[0]

    with torch.set_grad_enabled(grad):
        got = answer(lambda: torch.func.vmap(first)(batch))
        if isinstance(got, str):
            assert backend != "reference"
            assert "torch.func" in got or "Batching rule" in got
            with fused_rnn.use_backend("reference"):
                ours.backend = "auto"
                got = torch.func.vmap(first)(batch)
    assert_close(got, torch.stack([first(x) for x in batch]))


@grid(kind=MODULE_KINDS, cell=(False, True), backend=BACKEND_NAMES, device=DEVICES)
@without_cudnn()
def test_second_derivatives_are_torchs(kind, cell, backend, device):
    """Nothing differs: the line is here so that nobody has to ask."""
    options = {"dtype": torch.float64, "device": device}
    theirs, ours = twins(kind, cell=cell, backend=backend, **options)
    results = []
    x = torch.randn(*((3,) if cell else (4, 3)), I, **options, requires_grad=True)
    for module in (theirs, ours):
        result = module(x)
        first = result if isinstance(result, torch.Tensor) else result[0]
        leaves = [x, *module.parameters()]
        gradients = torch.autograd.grad(first.square().sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in gradients)
        results.append(torch.autograd.grad(penalty, leaves))
    assert_close(results[1], results[0])


@grid(backend=BACKEND_NAMES, device=DEVICES)
def test_packed_input_of_the_wrong_size_is_refused_by_the_lstm_too(backend, device):
    """torch.nn.LSTM reads past the end of each row there and returns numbers."""
    ours = fused_rnn.LSTM(I, H, backend=backend, device=device)
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        ours(pack_sequence([torch.randn(3, I + 1, device=device)]))


def test_flatten_parameters_does_nothing():
    """No cure needed: weights are read at each call, so views, ties and copies of them are fine."""
    lstm = fused_rnn.LSTM(I, H)
    storage = torch.randn(4 * H, I + H)
    lstm.weight_ih_l0.data, lstm.weight_hh_l0.data = storage[:, :I], storage[:, I:]
    theirs = nn.LSTM(I, H)
    theirs.load_state_dict(copy.deepcopy(lstm.state_dict()))
    x = torch.randn(4, 3, I)
    lstm.flatten_parameters()
    assert lstm.weight_hh_l0.data_ptr() == storage[:, I:].data_ptr()
    assert_close(lstm(x), theirs(x))


@needs_native
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_the_results_of_small_steps_do_not_grow(name, frozen):
    """Cure: clone."""
    cell, state = getattr(fused_rnn, name)(I, H), torch.randn(1, H)
    cell.requires_grad_(not frozen)
    state = (state, state) if name == "LSTMCell" else state
    with torch.set_grad_enabled(frozen):
        stepped = cell(torch.randn(1, I), state)
    h = stepped[0] if name == "LSTMCell" else stepped
    with pytest.raises(RuntimeError, match="Trying to resize storage that is not resizable"):
        h.resize_(2, H)
    assert h.clone().resize_(2, H).shape == (2, H)
    assert h.resize_(1).shape == (1,)
