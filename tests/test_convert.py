"""convert and revert: the same model on the other modules, with everything that hung on it."""

import copy
import warnings

import pytest
import torch
from devices import DEVICES, native, without_cudnn
from numerics import grid
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from twins import H, I, tensors

import fused_rnn
from fused_rnn.backends import BACKENDS

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
ROUND_TRIPS = {"convert": fused_rnn.convert, "revert": fused_rnn.revert}
PACKAGES = {"convert": (nn, fused_rnn), "revert": (fused_rnn, nn)}


class Tagger(nn.Module):
    """Every module in every kind of container, one of them in two places."""

    def __init__(self, package):
        super().__init__()
        self.embedding = nn.Embedding(9, I)
        self.encoder = nn.Sequential(
            package.LSTM(I, H, 2, batch_first=True, dropout=0.25, bidirectional=True)
        )
        self.layers = nn.ModuleList(
            [package.GRU(2 * H, H, bias=False), package.RNN(H, H, nonlinearity="relu")]
        )
        self.cells = nn.ModuleDict(
            {
                "lstm": package.LSTMCell(H, H),
                "gru": package.GRUCell(H, H, bias=False),
                "rnn": package.RNNCell(H, H, nonlinearity="relu"),
            }
        )
        self.projected = package.LSTM(H, H, proj_size=H - 2)
        self.again = self.layers[1]
        self.register_module("missing", None)

    def forward(self, tokens):
        x, _ = self.encoder[0](self.embedding(tokens))
        for layer in (*self.layers, self.again):
            x, _ = layer(x)
        h = self.cells["gru"](x[-1])
        h, _ = self.cells["lstm"](h)
        return self.projected(x + self.cells["rnn"](h))[0]


def ours_on(device):
    """Context in which converted modules run on our kernels for the device."""
    return fused_rnn.use_backend(native(device))


def of_package(model, package):
    types = tuple(getattr(package, name) for name in NAMES)
    return [name for name, m in model.named_modules() if isinstance(m, types)]


@grid(way=ROUND_TRIPS, device=DEVICES)
def test_a_nested_model_computes_the_same_on_the_same_parameters(way, device):
    source, target = PACKAGES[way]
    model = Tagger(source).eval().to(device)
    tokens = torch.randint(9, (4, 3), device=device)
    with ours_on(device):
        expected = model(tokens)
    parameters = dict(model.named_parameters())
    places, printed = of_package(model, source), repr(model)
    keys = list(model.state_dict())
    assert len(places) == 7
    assert ROUND_TRIPS[way](model) is model
    assert of_package(model, target) == places
    assert not of_package(model, source)
    assert model.again is model.layers[1]
    assert repr(model) == printed
    assert list(model.state_dict()) == keys
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys()
    assert all(now[name] is parameters[name] for name in now)
    with ours_on(device):
        assert_close(model(tokens), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_the_new_modules_have_the_backend_asked_for(backend):
    model = fused_rnn.convert(nn.ModuleList([nn.GRU(I, H), nn.LSTMCell(I, H)]), backend=backend)
    assert [module.backend for module in model] == [backend, backend]
    with pytest.raises(ValueError, match="fortran"):
        fused_rnn.convert(nn.GRU(I, H), backend="fortran")


@grid(name=NAMES, training=(True, False), way=ROUND_TRIPS, device=DEVICES)
def test_a_module_by_itself_comes_back_as_a_new_one(name, training, way, device):
    source, target = PACKAGES[way]
    module = getattr(source, name)(I, H, bias=False, device=device).train(training).double()
    module.weight_hh_frozen = 1  # an attribute that somebody added
    new = ROUND_TRIPS[way](module)
    assert type(new) is getattr(target, name)
    assert type(module) is getattr(source, name)
    assert new.training == training
    assert new.weight_hh_frozen == 1
    for (a, p), (b, q) in zip(new.named_parameters(), module.named_parameters(), strict=True):
        assert a == b
        assert p is q
    shape = ((3,) if "Cell" in name else (5, 3)) + (I,)
    input = torch.randn(shape, dtype=torch.float64, device=device)
    with ours_on(device):
        assert_close(list(tensors(new(input))), list(tensors(module(input))))


def test_converting_twice_changes_nothing_more():
    model = nn.Sequential(nn.GRU(I, H))
    inner = fused_rnn.convert(model)[0]
    assert fused_rnn.convert(model)[0] is inner
    back = fused_rnn.revert(model)[0]
    assert fused_rnn.revert(model)[0] is back
    root = fused_rnn.GRU(I, H)
    assert fused_rnn.convert(root) is root


@pytest.mark.parametrize("way", ROUND_TRIPS)
def test_shared_parameters_stay_shared(way):
    source, _ = PACKAGES[way]
    model = nn.ModuleList([source.LSTM(I, H), source.LSTM(I, H), nn.Linear(I, 4 * H)])
    model[1].weight_ih_l0 = model[0].weight_ih_l0
    model[2].weight = model[0].weight_ih_l0
    ROUND_TRIPS[way](model)
    assert model[1].weight_ih_l0 is model[0].weight_ih_l0 is model[2].weight
    with torch.no_grad():
        model[2].weight.zero_()
        model[0].bias_ih_l0.zero_()
        model[0].bias_hh_l0.zero_()
    assert not model[0](torch.randn(3, 2, I))[0].any()


@grid(way=ROUND_TRIPS, device=DEVICES)
@without_cudnn()
def test_an_optimizer_made_before_goes_on_after(way, device):
    source, _ = PACKAGES[way]
    torch.manual_seed(0)
    model = Tagger(source).to(device)
    untouched = copy.deepcopy(model)
    tokens = torch.randint(9, (4, 3), device=device)

    def train(model, optimizer, steps):
        for at in range(steps):
            torch.manual_seed(at)
            optimizer.zero_grad()
            with ours_on(device):
                model(tokens).square().sum().backward()
            optimizer.step()

    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, untouched)]
    for m, optimizer in zip((model, untouched), optimizers, strict=True):
        train(m.double(), optimizer, 2)
    ROUND_TRIPS[way](model)
    before = model.eval()(tokens)
    for m, optimizer in zip((model, untouched), optimizers, strict=True):
        train(m.train(), optimizer, 2)
    after = model.eval()(tokens)
    assert not torch.equal(after, before)
    assert_close(after, untouched.eval()(tokens))


@pytest.mark.parametrize("way", ROUND_TRIPS)
@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_hooks_of_every_kind_come_along(way, name):
    source, target = PACKAGES[way]
    seen = []

    def note(what):
        return lambda *args, **kwargs: seen.append((what, type(args[0]))) and None

    model = nn.Sequential(getattr(source, name)(I, H))
    module = model[0]
    module.register_forward_pre_hook(note("forward pre"))
    module.register_forward_pre_hook(note("forward pre, keywords"), with_kwargs=True)
    module.register_forward_hook(note("forward"))
    module.register_forward_hook(note("forward, keywords"), with_kwargs=True, always_call=True)
    module.register_full_backward_hook(note("backward"))
    module.register_full_backward_pre_hook(note("backward pre"))
    module.register_state_dict_post_hook(note("state dict"))
    module.register_state_dict_pre_hook(note("state dict pre"))
    module.register_load_state_dict_pre_hook(note("load pre"))
    removed = module.register_load_state_dict_post_hook(note("load"))
    next(module.parameters()).register_hook(lambda grad: seen.append(("gradient", None)))

    def run():
        seen.clear()
        x = torch.randn(*((3,) if "Cell" in name else (5, 3)), I, requires_grad=True)
        sum(t.sum() for t in tensors(model(x))).backward()
        model.load_state_dict(model.state_dict())
        return list(seen)

    swap = {getattr(source, name): getattr(target, name)}
    before = run()
    assert len({what for what, _ in before}) == 11
    ROUND_TRIPS[way](model)
    assert run() == [(what, swap.get(kind, kind)) for what, kind in before]
    removed.remove()
    assert "load" not in [what for what, _ in run()], "the handle no longer removes its hook"


@pytest.mark.parametrize("way", ROUND_TRIPS)
def test_buffers_submodules_and_frozen_weights_come_along(way):
    source, _ = PACKAGES[way]
    model = nn.Sequential(source.LSTM(I, H))
    model[0].register_buffer("mean", torch.ones(I))
    model[0].register_buffer("scratch", torch.ones(1), persistent=False)
    model[0].add_module("norm", nn.LayerNorm(H))
    model[0].weight_hh_l0.requires_grad_(False)
    model[0].bias_hh_l0.grad = torch.ones(4 * H)
    keys, mean, norm = list(model.state_dict()), model[0].mean, model[0].norm
    ROUND_TRIPS[way](model)
    assert list(model.state_dict()) == keys
    assert model[0].mean is mean
    assert model[0].norm is norm
    assert torch.equal(model[0].scratch, torch.ones(1))
    assert not model[0].weight_hh_l0.requires_grad
    assert torch.equal(model[0].bias_hh_l0.grad, torch.ones(4 * H))


PARAMETRIZED = {
    "weight_norm": (parametrizations.weight_norm, False),
    "orthogonal": (parametrizations.orthogonal, False),
    "spectral_norm": (parametrizations.spectral_norm, False),
    "weight_norm, old": (nn.utils.weight_norm, True),
}


@grid(way=ROUND_TRIPS, name=("LSTM", "GRU", "RNNCell"), norm=PARAMETRIZED, device=DEVICES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_parametrized_modules_are_swapped(way, name, norm, device):
    """weight_norm makes the type a ParametrizedLSTM: still torch's LSTM, nobody's own class."""
    source, target = PACKAGES[way]
    apply, old = PARAMETRIZED[norm]
    weight = "weight_hh" if "Cell" in name else "weight_hh_l0"
    options = {"dtype": torch.float64, "device": device}
    model = nn.Sequential(apply(getattr(source, name)(I, H, **options), weight)).eval()
    input = torch.randn(*((3,) if "Cell" in name else (5, 3)), I, **options)

    def results(model):
        with ours_on(device):
            return list(tensors(model(input)))

    expected = results(model)
    keys = list(model.state_dict())
    parameters = dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ROUND_TRIPS[way](model)
    assert isinstance(model[0], getattr(target, name))
    assert list(model.state_dict()) == keys
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert parametrize.is_parametrized(model[0], weight) != old
    assert_close(results(model), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(results(model)[0], expected[0]), "a stale weight is in use"
    if not old and way == "convert":  # torch's own keep a stale list of weights that cannot be
        copied = copy.deepcopy(model)
        assert_close(results(copied), results(model))
    if not old:
        parametrize.remove_parametrizations(model[0], weight)
        assert type(model[0]) is getattr(target, name)


@pytest.mark.parametrize("way", ROUND_TRIPS)
def test_users_own_subclasses_are_left_alone_and_named(way):
    source, target = PACKAGES[way]

    class Mine(source.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    model = nn.Sequential(Mine(I, H), source.GRU(H, H))
    mine = model[0]
    with pytest.warns(UserWarning, match="Mine"):
        ROUND_TRIPS[way](model)
    assert model[0] is mine
    assert type(model[1]) is target.GRU


@pytest.mark.parametrize("way", ROUND_TRIPS)
def test_a_module_within_a_module(way):
    """A subclass that is left alone can hold modules that are not."""
    source, target = PACKAGES[way]

    class Stack(source.GRU):
        def __init__(self):
            super().__init__(I, H)
            self.second = source.GRU(H, H)

    model = nn.Sequential(Stack())
    with pytest.warns(UserWarning, match="Stack"):
        ROUND_TRIPS[way](model)
    assert type(model[0].second) is target.GRU


def test_there_and_back_is_the_same_model():
    model = Tagger(nn).eval()
    tokens, printed = torch.randint(9, (4, 3)), repr(model)
    expected = model(tokens)
    fused_rnn.revert(fused_rnn.convert(model))
    assert repr(model) == printed
    assert_close(model(tokens), expected, rtol=0, atol=0)
    assert {type(m).__module__.split(".")[0] for m in model.modules()} <= {"torch", __name__}


def test_a_model_without_any_is_returned_as_it_is():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    inside = list(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_rnn.convert(model) is model
        assert fused_rnn.revert(model) is model
    assert list(model) == inside


@pytest.mark.parametrize("way", ROUND_TRIPS)
def test_deepcopy_pickle_and_dtype_changes_work_afterwards(way):
    source, _ = PACKAGES[way]
    model = ROUND_TRIPS[way](nn.Sequential(source.LSTM(I, H, 2)))
    input = torch.randn(4, 2, I)
    expected = model(input)
    assert_close(copy.deepcopy(model)(input), expected)
    output, _ = copy.deepcopy(model).double()(input.double())
    assert output.dtype == torch.float64
    assert_close(output.float(), expected[0])
