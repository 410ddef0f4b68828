"""What can be known of the CUDA backend without a GPU: who answers, and torch's rule for cuDNN."""

from types import SimpleNamespace

import pytest
import torch
from twins import twins

import fused_rnn
from fused_rnn import backends, native
from fused_rnn.backends import cudnn
from fused_rnn.plan import KNOWN_DEVICES, Device

H100 = ((9, 0), 132)


def problem(cell="lstm", dtype=torch.float16, T=1024, N=16, I=768, H=768, **more):  # noqa: E741
    options = {"P": 0, "layers": 1, "directions": 1, "grad": True, "packed": False}
    options |= {"compiling": False, "device": "cuda"} | more
    return backends.Problem(cell=cell, dtype=dtype, T=T, N=N, I=I, H=H, **options)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, cudnn.PERSIST_STATIC),
        ({"dtype": torch.bfloat16}, cudnn.STANDARD),
        ({"dtype": torch.float32}, cudnn.STANDARD),
        ({"cell": "gru"}, cudnn.STANDARD),
        ({"N": 12}, cudnn.STANDARD),
        ({"N": 128}, cudnn.PERSIST_STATIC),
        ({"N": 136}, cudnn.STANDARD),
        ({"H": 1024, "cell": "rnn_tanh", "N": 96}, cudnn.STANDARD),
        ({"H": 1024, "cell": "rnn_tanh", "N": 88}, cudnn.PERSIST_STATIC),
        ({"H": 1152}, cudnn.STANDARD),
        ({"I": 100}, cudnn.STANDARD),
        ({"layers": 2}, cudnn.STANDARD),
        ({"directions": 2}, cudnn.STANDARD),
        ({"packed": True}, cudnn.STANDARD),
        ({"P": 64}, cudnn.STANDARD),
        ({"H": 192, "dtype": torch.float32}, cudnn.PERSIST_STATIC_SMALL_H),
        ({"H": 193, "dtype": torch.float32}, cudnn.STANDARD),
        ({"H": 384, "cell": "rnn_relu", "N": 3}, cudnn.PERSIST_STATIC_SMALL_H),
        ({"H": 192, "dtype": torch.float64}, cudnn.STANDARD),
        ({"H": 128, "layers": 3, "directions": 2}, cudnn.PERSIST_STATIC_SMALL_H),
    ],
    ids=str,
)
def test_torchs_rule_for_cudnn(changed, expected):
    assert cudnn.algorithm(problem(**changed), *H100) == expected


@pytest.mark.parametrize(("cell", "limit"), [("lstm", 128), ("gru", 128), ("rnn_tanh", 256)])
def test_torchs_rule_for_cudnn_backward_has_lower_limits(cell, limit):
    inside, outside = problem(cell, H=limit, N=3), problem(cell, H=limit + 1, N=3)
    assert cudnn.algorithm(inside, *H100, backward=True) == cudnn.PERSIST_STATIC_SMALL_H
    assert cudnn.algorithm(outside, *H100, backward=True) == cudnn.STANDARD
    assert cudnn.algorithm(outside, *H100) == cudnn.PERSIST_STATIC_SMALL_H


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (((8, 0), 108), cudnn.PERSIST_STATIC),
        (((8, 0), 56), cudnn.STANDARD),  # A30: too few processors
        (((8, 6), 100), cudnn.STANDARD),
        (((7, 0), 80), cudnn.PERSIST_STATIC),
        (((7, 5), 72), cudnn.STANDARD),
    ],
    ids=str,
)
def test_torchs_rule_for_cudnn_by_device(device, expected):
    assert cudnn.algorithm(problem(), *device) == expected


def test_cuda_by_name_is_refused_on_the_cpu_with_the_reason():
    _, ours = twins("lstm", backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this"):
        ours(torch.randn(4, 3, 5))


def test_an_installation_without_the_cuda_library_says_so():
    if native.CUDA_UNAVAILABLE is None:
        pytest.skip("this installation has the CUDA library")
    explanation = str(fused_rnn.explain(fused_rnn.LSTM(5, 6), torch.randn(4, 3, 5)))
    assert native.CUDA_UNAVAILABLE in explanation


@pytest.mark.parametrize("compiling", [False, True])
def test_auto_on_cuda_takes_torchs_kernels_until_ours_are_measured(compiling, monkeypatch):
    asked = problem(compiling=compiling)
    monkeypatch.setattr(backends.cuda, "available", lambda: None)
    chosen, why = backends.choose(asked, "auto")
    assert ("reference" if compiling else "torch") == chosen.NAME
    assert why
    assert backends.choose(asked, "cuda")[0].NAME == "cuda"
    monkeypatch.setattr(backends.cuda, "available", lambda: "there is no moon tonight")
    chosen, _ = backends.choose(asked, "auto")
    assert ("reference" if compiling else "torch") == chosen.NAME
    with pytest.raises(RuntimeError, match="no moon"):
        backends.choose(asked, "cuda")


def refuse(_: int) -> Device:
    raise RuntimeError("there is no moon tonight")


@pytest.mark.parametrize("known", [True, False])
def test_the_explanation_holds_the_plan_for_the_gpu_or_why_there_is_none(known, monkeypatch):
    describe = (lambda _: KNOWN_DEVICES["H100 SXM"]) if known else refuse
    monkeypatch.setattr(backends.cuda, "describe", describe)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    text = backends.cuda.explain(problem(packed=True))
    assert text.startswith("stepwise")
    assert ("not built grid, predicted" in text) == known
    assert ("T=1024 N=16 H=768" in text) == known
    assert ("no plan: there is no moon tonight" in text) != known


def test_the_explanation_of_torchs_kernels_names_cudnns_algorithm(monkeypatch):
    device = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)
    monkeypatch.setattr(backends.torch_nn, "cudnn_can_run", lambda _: True)
    text = backends.torch_nn.explain(problem(cell="gru"))
    assert "cuDNN" in text
    assert cudnn.STANDARD in text
