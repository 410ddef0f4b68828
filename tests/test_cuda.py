"""What can be known of the CUDA backend without a GPU: who answers, and torch's rule for cuDNN."""

import csv
import dataclasses
import io
from types import SimpleNamespace

import pytest
import torch
from twins import twins

import fused_rnn
from fused_rnn import backends, native
from fused_rnn.backends import cudnn, tuning
from fused_rnn.plan import KNOWN_DEVICES, Device, plan

H100 = ((9, 0), 132)


def problem(cell="lstm", dtype=torch.float16, T=1024, N=16, I=768, H=768, **more):  # noqa: E741
    options = {"P": 0, "layers": 1, "directions": 1, "grad": True, "packed": False}
    options |= {"compiling": False, "device": "cuda"} | more
    return backends.Problem(cell=cell, dtype=dtype, T=T, N=N, I=I, H=H, **options)


@pytest.fixture
def tf32_flag():
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    yield rnn
    rnn.fp32_precision = before


@pytest.fixture
def on_h200(monkeypatch):
    """As if there were an H200 that runs our kernels, and nothing measured on it."""
    monkeypatch.setattr(backends.cuda, "available", lambda: None)
    monkeypatch.setattr(backends.cuda, "describe", lambda _: KNOWN_DEVICES["H200"])
    monkeypatch.setattr(backends.torch_nn, "cudnn_can_run", lambda _: True)
    monkeypatch.setattr(tuning, "table", dict)
    backends.cuda.faster_than_torch.cache_clear()
    yield
    backends.cuda.faster_than_torch.cache_clear()


def row(speedup, T=1024, N=16, H=768, *, device="H200", tf32=False, **changed):
    key = tuning.key(problem(**changed), device, tf32)
    return tuning.Row(key, T, N, H, speedup, "stepwise", "a file")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(1.3)], "cuda"),
        ([row(0.9)], "torch"),
        ([row(1.3, T=2048, N=8, H=1536)], "cuda"),
        ([row(1.3, T=2049)], "torch"),
        ([row(1.3, N=7)], "torch"),
        ([row(1.3, device="H100")], "torch"),
        ([row(1.3, cell="gru")], "torch"),
        ([row(1.3, dtype=torch.bfloat16)], "torch"),
        ([row(1.3, packed=True)], "torch"),
        ([row(1.3, layers=3)], "torch"),
        ([row(1.3, grad=False)], "torch"),
        ([row(0.5, N=32), row(1.3, N=15), row(0.5, H=1024)], "cuda"),
    ],
    ids=str,
)
def test_auto_goes_by_the_nearest_measurement(rows, expected, on_h200, monkeypatch):
    monkeypatch.setattr(tuning, "table", lambda: tuning.by_key(rows))
    chosen, why = backends.choose(problem(), "auto")
    assert expected == chosen.NAME
    speaks = expected == "cuda" or rows[0].speedup < 1
    assert ("measured at" in why) == speaks


def test_a_measurement_speaks_for_tf32_or_for_exact_products(on_h200, monkeypatch, tf32_flag):
    rows = [row(1.3, dtype=torch.float32, tf32=True), row(0.7, dtype=torch.float32)]
    monkeypatch.setattr(tuning, "table", lambda: tuning.by_key(rows))
    for value, expected in (("tf32", "cuda"), ("ieee", "torch")):
        tf32_flag.fp32_precision = value
        assert expected == backends.choose(problem(dtype=torch.float32), "auto")[0].NAME


def test_the_table_in_the_package_is_read():
    with tuning.TABLE.open() as file:
        columns = file.readline().strip().split(",")
    assert columns == [*tuning.Key._fields, *tuning.Row._fields[1:]]
    text = ",".join(columns) + "\nH200,gru,float32,1,0,1,1,0,64,16,512,1.5,grid,x.csv\n"
    key = tuning.Key("H200", "gru", "float32", True, False, 1, 1, False)
    lines = csv.DictReader(io.StringIO(text))
    assert list(tuning.read(lines)) == [tuning.Row(key, 64, 16, 512, 1.5, "grid", "x.csv")]
    assert all(r.speedup > 0 and r.source for rows in tuning.table().values() for r in rows)


@pytest.mark.parametrize(
    ("changed", "proven", "expected"),
    [
        ({"cell": "gru"}, True, "cuda"),  # STANDARD, and the weights fit the chip
        ({"cell": "gru"}, False, "torch"),
        ({"cell": "lstm"}, True, "torch"),  # PERSIST_STATIC
        ({"cell": "gru", "dtype": torch.float64}, True, "torch"),
        ({"cell": "lstm", "H": 4096}, True, "torch"),  # STANDARD, and nothing of ours fits
        ({"cell": "gru", "T": 0}, True, "torch"),
        # Forward STANDARD would be beaten, backward too; small H is not STANDARD.
        ({"cell": "gru", "H": 150}, True, "torch"),
        ({"cell": "gru", "H": 193}, True, "cuda"),
    ],
    ids=str,
)
def test_auto_without_a_measurement(changed, proven, expected, on_h200, monkeypatch):
    """Ours where torch would launch for each step and ours would not."""
    if proven:

        def as_if_proven(*args, **keywords):
            return plan(*args, **keywords, proven_only=False)

        monkeypatch.setattr(backends.cuda, "plan", as_if_proven)
    assert expected == backends.choose(problem(**changed), "auto")[0].NAME


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
def test_auto_on_cuda_takes_torchs_kernels_until_ours_are_measured(compiling, on_h200, monkeypatch):
    """But while compiling, where torch's would be unrolled."""
    asked = problem(compiling=compiling)
    chosen, why = backends.choose(asked, "auto")
    assert ("cuda" if compiling else "torch") == chosen.NAME
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
    text = backends.cuda.explain(problem(packed=True))
    assert text.startswith("stepwise")
    assert ("by name   grid, predicted" in text) == known
    assert ("T=1024 N=16 H=768" in text) == known
    assert ("no plan: there is no moon tonight" in text) != known


@pytest.mark.parametrize(
    ("H", "words"),
    [
        (512, ["lstm forward, bf16", "lstm backward, bf16", "16 CTAs"]),
        (200, ["lstm forward, bf16", "the backward is stepwise: algorithm 'cluster' cannot"]),
    ],
)
def test_the_explanation_holds_the_backwards_plan_too(H, words, monkeypatch):
    only_16 = dataclasses.replace(KNOWN_DEVICES["H100 SXM"], clusters=(0, 0, 0, 0, 7))
    monkeypatch.setattr(backends.cuda, "describe", lambda _: only_16)
    asked = problem(dtype=torch.bfloat16, H=H, grad=True)
    text = backends.cuda.explain(asked, "cluster")
    assert all(word in text for word in words)
    assert "backward" not in backends.cuda.explain(asked._replace(grad=False), "cluster")


def test_the_explanation_of_torchs_kernels_names_cudnns_algorithm(monkeypatch):
    device = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(backends.torch_nn, "cudnn_can_run", lambda _: True)
    text = backends.torch_nn.explain(problem(cell="gru"))
    assert "cuDNN" in text
    assert cudnn.STANDARD in text


def test_auto_does_not_fail_where_the_gpu_cannot_be_described(on_h200, monkeypatch):
    monkeypatch.setattr(backends.cuda, "describe", refuse)
    chosen, why = backends.choose(problem(), "auto")
    assert chosen.NAME == "torch"
    assert "no moon tonight" in why


@pytest.mark.parametrize("compiled", [False, True])
def test_tf32_follows_torchs_flag(compiled, tf32_flag):
    """Also in a compiled graph, which is made anew when the flag changes."""

    def shifted(x):
        return x + 1 if cudnn.allows_tf32() else x - 1

    function = torch.compile(shifted, backend="eager", fullgraph=True) if compiled else shifted
    for value, expected in (("tf32", 1), ("ieee", -1), ("tf32", 1)):
        tf32_flag.fp32_precision = value
        assert function(torch.zeros(())) == expected


def test_tf32_follows_the_older_flag_too():
    for allowed in (False, True):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            assert cudnn.allows_tf32() == allowed
