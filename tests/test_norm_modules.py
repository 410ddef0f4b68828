"""LayerNormLSTM and LayerNormGRU against plain PyTorch loops over torch.nn's layers."""

import copy
import pickle

import pytest
import torch
from numerics import DTYPES, assert_as_good_as, cases, grid
from torch import nn
from torch.testing import assert_close
from twins import mapped, oracle, step, tensors

import fused_rnn
from fused_rnn import native

T, N, I, H = 9, 3, 5, 6  # noqa: E741
BACKENDS = ("reference",) if native.UNAVAILABLE else ("cpu", "reference")


class PlainLSTM(nn.Module):
    """Ba et al. 2016, equations 20 to 22; b is left out."""

    def __init__(self, I, H):  # noqa: E741
        super().__init__()
        self.ih, self.hh = nn.Linear(I, 4 * H, bias=False), nn.Linear(H, 4 * H, bias=False)
        self.norm_ih, self.norm_hh, self.norm_c = map(nn.LayerNorm, (4 * H, 4 * H, H))

    def forward(self, input, hx):
        gx, shown = self.norm_ih(self.ih(input)), []
        h, c = (s[0] for s in hx)
        for x in gx:
            i, f, g, o = (x + self.norm_hh(self.hh(h))).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.norm_c(c).tanh()
            shown.append(h)
        return torch.stack(shown), (h[None], c[None])

    def renamed(self):
        """Its parameters as ours are called."""
        return {
            "weight_ih_l0": self.ih.weight,
            "weight_hh_l0": self.hh.weight,
            "gain_ih_l0": self.norm_ih.weight,
            "gain_hh_l0": self.norm_hh.weight,
            "bias_ih_l0": self.norm_ih.bias,
            "bias_hh_l0": self.norm_hh.bias,
            "gain_c_l0": self.norm_c.weight,
            "bias_c_l0": self.norm_c.bias,
        }


class PlainGRU(nn.Module):
    """Ba et al. 2016, equations 23 to 26: r and z have norms of their own, n has two."""

    def __init__(self, I, H):  # noqa: E741
        super().__init__()
        self.ih, self.hh = nn.Linear(I, 3 * H, bias=False), nn.Linear(H, 3 * H, bias=False)
        self.gates_ih, self.gates_hh, self.n_ih, self.n_hh = map(nn.LayerNorm, (2 * H, 2 * H, H, H))

    def forward(self, input, hx):
        h, shown = hx[0], []
        for x in self.ih(input):
            (rz_x, n_x), (rz_h, n_h) = (y.split([2 * H, H], -1) for y in (x, self.hh(h)))
            r, z = (self.gates_ih(rz_x) + self.gates_hh(rz_h)).sigmoid().chunk(2, -1)
            n = (self.n_ih(n_x) + r * self.n_hh(n_h)).tanh()
            h = (1 - z) * h + z * n
            shown.append(h)
        return torch.stack(shown), h[None]

    def renamed(self):
        named = {"weight_ih_l0": self.ih.weight, "weight_hh_l0": self.hh.weight}
        for side in ("ih", "hh"):
            pair = getattr(self, f"gates_{side}"), getattr(self, f"n_{side}")
            named[f"gain_{side}_l0"] = torch.cat([norm.weight for norm in pair])
            named[f"bias_{side}_l0"] = torch.cat([norm.bias for norm in pair])
        return named


class PlainDreamer(nn.Module):
    """DreamerV3's: one Linear and one LayerNorm over input and state; parts reset, cand, update."""

    def __init__(self, I, H):  # noqa: E741
        super().__init__()
        self.linear = nn.Linear(I + H, 3 * H, bias=False)
        self.norm = nn.LayerNorm(3 * H, eps=1e-3)

    def forward(self, input, hx):
        h, shown = hx[0], []
        for x in input:
            reset, cand, update = self.norm(self.linear(torch.cat([x, h], -1))).chunk(3, -1)
            cand = torch.tanh(torch.sigmoid(reset) * cand)
            update = torch.sigmoid(update - 1)
            h = update * cand + (1 - update) * h
            shown.append(h)
        return torch.stack(shown), h[None]

    def renamed(self):
        named = {"gain_l0": self.norm.weight, "bias_l0": self.norm.bias}
        named["weight_ih_l0"], named["weight_hh_l0"] = self.linear.weight.split([I, H], 1)
        order = torch.tensor([0, 2, 1])
        return {k: w.unflatten(0, (3, H))[order].flatten(0, 1) for k, w in named.items()}


def joint(*args, **options):
    return fused_rnn.LayerNormGRU(*args, norm="joint", eps=1e-3, **options)


KINDS = {
    "lstm": (PlainLSTM, fused_rnn.LayerNormLSTM),
    "gru": (PlainGRU, fused_rnn.LayerNormGRU),
    "joint": (PlainDreamer, joint),
}


def shaken(module):
    """Gains and biases that are not all the same."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def made(kind, *args, **options):
    return shaken(KINDS[kind][1](*(args or (I, H)), **options))


def states(kind, dtype=torch.float64, blocks=1):
    draw = [torch.randn(blocks, N, H, dtype=dtype) for _ in range(2)]
    return tuple(draw) if kind == "lstm" else draw[0]


@grid(kind=KINDS, backend=BACKENDS, dtype=DTYPES)
def test_it_is_the_papers(kind, backend, dtype):
    """Results and gradients as good as those of the plain loop in the same dtype."""
    plain = shaken(KINDS[kind][0](I, H)).to(dtype)
    ours = KINDS[kind][1](I, H, backend=backend, dtype=dtype)
    ours.load_state_dict(plain.renamed())
    input, hx = torch.randn(T, N, I, dtype=dtype), states(kind, dtype)
    expected, got, exact = step(plain, input, hx), step(ours, input, hx), oracle(ours, input, hx)
    # Of the plain loop's gradients those of its parameters, renamed as these are.
    for parameter in plain.parameters():
        parameter.data, parameter.grad = parameter.grad, None
    expected |= {f"d {name}": p.detach() for name, p in plain.renamed().items()}
    scale = max(float(g.abs().max()) for g in exact.values())
    for name, value in got.items():
        assert value.dtype == expected[name].dtype
        assert_as_good_as(
            value, expected[name], exact[name], f"{kind} {name}", length=T * 4 * H, scale=scale
        )


@cases(
    kind=KINDS,
    num_layers=(1, 2),
    bidirectional=(False, True),
    batch_first=(False, True),
    bias=(False, True),
    given=(False, True),
)
def test_backends_agree_on_stacks(case):
    kind, given = case.pop("kind"), case.pop("given")
    ours = made(kind, dtype=torch.float64, **case)
    blocks = ours.num_layers * (1 + ours.bidirectional)
    hx = states(kind, blocks=blocks) if given else None
    input = torch.randn(*((N, T) if ours.batch_first else (T, N)), I, dtype=torch.float64)
    found = []
    for ours.backend in BACKENDS:
        found.append(step(ours, input, hx))
    assert_close(found[0], found[-1], rtol=1e-10, atol=1e-10)


@cases(
    kind=KINDS,
    bidirectional=(False, True),
    lengths=(None, (9, 0, 4)),
    reset=(False, True),
    tbptt=(None, 4),
    learn_initial_state=(False, True),
    recurrent_dropout=(0.0, 0.4),
)
def test_backends_agree_on_options(case):
    kind, lengths, tbptt = (case.pop(name) for name in ("kind", "lengths", "tbptt"))
    reset = torch.rand(T, N) < 0.3 if case.pop("reset") else None
    ours = made(kind, dtype=torch.float64, weight_dropout=0.2, **case)
    input = torch.randn(T, N, I, dtype=torch.float64)
    if lengths is not None:
        input[torch.arange(T)[:, None] >= torch.tensor(lengths)] = float("nan")
    asked = {"lengths": lengths, "reset": reset, "tbptt": tbptt}
    asked["return_cell_states"] = kind == "lstm"
    found = []
    for ours.backend in BACKENDS:
        found.append(step(ours, input, seed=3, call=lambda x, _: ours(x, **asked)))
        assert all(x.isfinite().all() for x in found[-1].values())
    assert_close(found[0], found[-1], rtol=1e-10, atol=1e-10)


@grid(kind=KINDS)
def test_packed_and_jagged_input_are_sequences_alone(kind):
    ours, lengths = made(kind, dtype=torch.float64, bidirectional=True), [4, 9, 2]
    each = [torch.randn(n, I, dtype=torch.float64) for n in lengths]
    packed, _ = ours(nn.utils.rnn.pack_sequence(each, enforce_sorted=False))
    jagged, _ = ours(torch.nested.nested_tensor(each, layout=torch.jagged))
    for n, x in enumerate(each):
        alone, _ = ours(x)
        for output in (nn.utils.rnn.unpack_sequence(packed)[n], jagged[n]):
            assert_close(output, alone)


@grid(kind=KINDS)
def test_steps_are_a_sequence(kind):
    ours = made(kind, I, H, 2, dtype=torch.float64)
    input, state = torch.randn(T, N, I, dtype=torch.float64), None
    expected, final = ours(input)
    for x, y in zip(input, expected, strict=True):
        shown, state = ours.step(x, state)
        assert_close(shown, y)
    assert_close(list(tensors(state)), list(tensors(final)))
    alone, state = ours.step(input[0, 0])
    assert_close(alone, expected[0, 0])
    assert all(s.shape == (2, H) for s in tensors(state))


@grid(kind=KINDS)
def test_compiled_training_equals_eager(kind):
    torch._dynamo.reset()
    ours = made(kind, I, H, 2, bidirectional=True, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    input = torch.randn(T, N, I, dtype=torch.float64)
    hx = states(kind, blocks=4)
    assert_close(step(ours, input, hx, call=compiled), step(ours, input, hx))
    with torch.no_grad():
        assert_close(compiled(input)[0], ours(input)[0])


@grid(kind=KINDS)
def test_second_derivatives_and_transforms(kind):
    ours = made(kind, dtype=torch.float64)
    input, hx = torch.randn(T, N, I, dtype=torch.float64), states(kind)

    def slope(x):
        return torch.autograd.grad(ours(x, hx)[0].sin().sum(), x, create_graph=True)[0]

    found = []
    for ours.backend in ("auto", "reference"):
        x = input.clone().requires_grad_()
        found.append(torch.autograd.grad(slope(x).square().sum(), x)[0])
    assert_close(*found)
    ours.backend = "auto"
    _, tangent = torch.func.jvp(lambda x: ours(x, hx)[0], (input,), (torch.ones_like(input),))
    x = input.clone().requires_grad_()
    pulled = torch.autograd.grad(ours(x, hx)[0].sin().sum(), x)[0]
    assert_close((ours(input, hx)[0].cos() * tangent).sum(), pulled.sum())


@grid(kind=KINDS, way=("state_dict", "pickle", "deepcopy"), bias=(True, False))
def test_copies_are_the_same(kind, way, bias):
    ours = made(kind, I, H, 2, bidirectional=True, bias=bias)
    if way == "state_dict":
        again = KINDS[kind][1](I, H, 2, bidirectional=True, bias=bias)
        again.load_state_dict(ours.state_dict())
    else:
        again = pickle.loads(pickle.dumps(ours)) if way == "pickle" else copy.deepcopy(ours)
    assert repr(again) == repr(ours)
    assert ("bias=False" in repr(ours)) == (not bias)
    assert any("bias" in name for name in ours.state_dict()) == bias
    input = torch.randn(T, N, I)
    assert_close(step(again, input), step(ours, input), rtol=0, atol=0)


@grid(kind=KINDS)
def test_parameters_at_first(kind):
    ours = KINDS[kind][1](I, H, 2, learn_initial_state=True)
    nn.init.constant_(ours.h_0, 3.0)
    for again in range(2):
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 1:
                assert (parameter == ("gain" in name)).all(), (again, name)
            elif "weight" in name:
                assert 0 < parameter.abs().max() <= H**-0.5, (again, name)
        shaken(ours).reset_parameters()
    assert not ours.h_0.any()


def test_the_forget_gates_bias_is_what_was_asked_for():
    ours = fused_rnn.LayerNormLSTM(I, H, 2, forget_bias=1.5)
    for _ in range(2):
        for layer in range(2):
            bias = ours.get_parameter(f"bias_ih_l{layer}")
            assert bias.tolist() == [0.0] * H + [1.5] * H + [0.0] * 2 * H
        shaken(ours).reset_parameters()
    with pytest.raises(ValueError, match="forget_bias needs the biases"):
        fused_rnn.LayerNormLSTM(I, H, forget_bias=1.5, bias=False)


@grid(kind=KINDS, name=("torch", "triton", "cuda"))
def test_backends_without_the_kernel_are_refused_by_name(kind, name):
    ours, input = made(kind), torch.randn(T, N, I)
    with fused_rnn.use_backend(name), pytest.raises(RuntimeError, match=f"backend '{name}' cannot"):
        ours(input)
    answers = fused_rnn.explain(ours, input).answers
    if name == "torch":
        assert answers[name] == "torch.nn has no layer norms"
    problem = ours.describe(input)._replace(device="cuda", compiling=True)
    for backend in (fused_rnn.backends.cuda, fused_rnn.backends.triton):
        assert backend.supports(problem) == "it has no kernels for layer norms"


@grid(kind=KINDS)
def test_what_runs_is_explained(kind):
    ours, input = made(kind), torch.randn(T, N, I)
    found = fused_rnn.explain(ours, input, lengths=[1, 2, 3])
    assert found.backend == BACKENDS[0]
    name = {"lstm": "layer_norm_lstm", "gru": "layer_norm_gru", "joint": "layer_norm_gru_joint"}
    assert str(found).startswith(f"{name[kind]} on '{BACKENDS[0]}'")
    elsewhere = found.problem._replace(device="cuda")
    backend, why = fused_rnn.backends.choose(elsewhere, "auto")
    assert (backend.NAME, why) == ("reference", "nothing else can run this")


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="needs the native library")
def test_the_native_loop_says_what_it_does():
    found = fused_rnn.explain(made("lstm"), torch.randn(T, N, I))
    assert found.algorithm.startswith("input product (and its norm, unless it is joint) in torch")


@grid(kind=KINDS)
def test_autocast_gives_what_torchs_ops_would(kind):
    ours, plain = made(kind), KINDS[kind][0](I, H)
    input, hx = torch.randn(T, N, I), states(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = plain(input, hx), ours(input, hx)
    assert [x.dtype for x in tensors(got)] == [x.dtype for x in tensors(expected)]
    assert_close(got[0].float(), ours(input, hx)[0], atol=0.05, rtol=0.05)


@grid(kind=KINDS)
def test_what_does_not_fit_is_refused(kind):
    ours = made(kind)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        ours(torch.randn(0, N, I))
    hx = mapped(states(kind, torch.float32), torch.Tensor.double)
    with pytest.raises(RuntimeError, match="on one device and of one dtype"):
        ours(torch.randn(T, N, I), hx)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        ours(torch.randn(T, N, I), mapped(hx, lambda s: s[:, :1].float()))
    with pytest.raises(ValueError, match=r"cannot revert 0: torch\.nn has no layer norms"):
        fused_rnn.revert(nn.Sequential(ours))
    with pytest.raises(ValueError, match="norm must be 'separate' or 'joint', got 'both'"):
        fused_rnn.LayerNormGRU(I, H, norm="both")
