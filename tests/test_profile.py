"""`python -m fused_rnn.profile` and `FUSED_RNN_LOG=1`."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import fused_rnn
from fused_rnn import backends, native, profile

KERNEL = "void fused_rnn::cluster_forward<fused_rnn::Lstm, c10::BFloat16>(fused_rnn::Layer)"


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("fused_rnn::layer", "recurrent op, forward"),
        ("fused_rnn_triton::layer", "recurrent op, forward"),
        ("fused_rnn::layer_backward", "recurrent op, backward"),
        ("aten::mkldnn_rnn_layer", "recurrent op, forward"),
        ("aten::mkldnn_rnn_layer_backward", "recurrent op, backward"),
        ("aten::_cudnn_rnn", "recurrent op, forward"),
        ("aten::_thnn_fused_gru_cell_backward", "recurrent op, backward"),
        ("aten::addmm", "matrix products"),
        ("aten::copy_", "copies"),
        ("aten::tanh", profile.OTHER),
        ("_LayerBackward", profile.PYTHON),
        ("autograd::engine::evaluate_function: _LayerBackward", profile.PYTHON),
        (profile.CALL, profile.PYTHON),
    ],
)
def test_ops_belong_to_phases(name, phase):
    assert profile.phase_of_op(name) == phase


def test_kernels_belong_to_the_phase_of_their_op():
    def event(name, us, **kernels):
        kernels = [SimpleNamespace(name=k, duration=v) for k, v in kernels.items()]
        return SimpleNamespace(name=name, self_cpu_time_total=us, kernels=kernels)

    cpu, gpu, kernels = profile.phases(
        [
            event("fused_rnn::layer", 5.0, **{"sm90_xmma_gemm_bf16": 30.0, KERNEL: 100.0}),
            event("fused_rnn::layer_backward", 6.0, cluster_backward=200.0, nvjet_tst=40.0),
            event("aten::fill_", 1.0, vectorized=3.0),
            event(profile.CALL, 2.0),
        ]
    )
    assert cpu == {
        "recurrent op, forward": 5.0,
        "recurrent op, backward": 6.0,
        "copies": 1.0,
        profile.PYTHON: 2.0,
    }
    assert gpu == {
        "products, forward": 30.0,
        "time loop, forward": 100.0,
        "time loop, backward": 200.0,
        "products, backward": 40.0,
        profile.OTHER: 3.0,
    }
    assert kernels[KERNEL] == 100.0


def test_command_lines_name_the_longest_kernels_and_the_same_workload():
    kernels = Counter({KERNEL: 100.0, "sm90_xmma_gemm_bf16": 30.0})
    nsys, ours, product = profile.commands(kernels, ["--workload", "gru-768"])
    program = "python -m fused_rnn.profile --workload gru-768 --nvtx"
    assert nsys.startswith("nsys profile ")
    assert ours.startswith("ncu ")
    assert " --kernel-name cluster_forward " in ours
    assert " --kernel-name sm90_xmma_gemm_bf16 " in product
    assert all(line.endswith(program) for line in (nsys, ours, product))


def test_a_workload_is_profiled_and_its_trace_saved(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    options = ["--workload", "darts-rnn", "--provider", "fused_rnn:reference", "--calls", "2"]
    assert profile.main([*options, "--trace", str(trace)]) == 0
    told = capsys.readouterr().out
    assert "darts-rnn: rnn_tanh T24 N32 I1 H25 L1 D1 float32 train" in told
    for phase in ("matrix products", "other ops", "Python and autograd", "all"):
        assert phase in told
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::tanh") == 2 * 24
    assert "CUDA" not in told


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="needs the native library")
@pytest.mark.parametrize("module", [fused_rnn.LSTM, fused_rnn.GRU])
def test_the_op_without_its_products_is_the_same_loop(module, monkeypatch):
    seen = []

    def compare(self, direction, func, whole, loop):
        seen.append(direction)
        # h and the final states; backward the gradients of the first states.
        results = slice(0, 4) if direction == "forward" else slice(5, 7)
        torch.testing.assert_close(func(*loop)[results], func(*whole)[results])

    monkeypatch.setattr(profile.Split, "add", compare)
    rnn = module(3, 5, num_layers=2, bidirectional=True, backend="cpu")
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    for input in (torch.randn(4, 2, 3), packed):
        expected = rnn(input)[1]
        with profile.Split():
            output, final = rnn(input)
            (output.data if input is packed else output).sum().backward()
        torch.testing.assert_close(final, expected, rtol=0, atol=0)
    assert seen == 2 * (4 * ["forward"] + 4 * ["backward"])


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason="needs the native library")
def test_loop_and_products_are_told_apart(capsys, tmp_path):
    options = ["--workload", "darts-rnn", "--provider", "fused_rnn:cpu", "--calls", "1"]
    assert profile.main([*options, "--trace", str(tmp_path / "trace.json")]) == 0
    _, table = capsys.readouterr().out.split("in the recurrent op")
    for direction in ("forward", "backward"):
        assert float(re.search(rf"time loop, {direction} +([\d.]+) ", table)[1]) > 0
        assert f"products, {direction} " in table


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--workload", "nosuch"], "there is no workload 'nosuch'"),
        (["--workload", "silero-vad", "--pass", "train"], "silero-vad has no pass 'train'"),
        (["--workload", "darts-rnn", "--provider", "magic"], "unknown provider 'magic'"),
        (["--workload", "darts-rnn", "--nvtx"], "--nvtx needs a GPU"),
    ],
)
def test_what_there_is_not_is_refused(options, sentence, capsys):
    if "--nvtx" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        profile.main(options)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("on", [False, True])
def test_each_shape_is_logged_once_and_only_where_asked(on, monkeypatch, caplog):
    monkeypatch.setattr(backends, "LOG", on)
    backends._log.cache_clear()
    gru = fused_rnn.GRU(4, 5, backend="reference")
    cell = fused_rnn.LSTMCell(4, 5, backend="reference")
    with caplog.at_level("INFO", "fused_rnn"):
        for T in (3, 3, 6):
            gru(torch.randn(T, 2, 4))
        for _ in range(2):
            cell(torch.randn(2, 4))
        torch.compile(gru, backend="eager", fullgraph=True)(torch.randn(2, 2, 4))
    told = [record.getMessage().splitlines() for record in caplog.records]
    assert len(told) == (3 if on else 0)
    for (what, *more), sizes in zip(told, ("T=3 N=2", "T=6 N=2", "N=2"), strict=False):
        assert what.startswith("reference runs cell=")
        assert f" device=cpu {sizes} I=4 H=5 " in what
        assert more == ["    why: asked for", "    how: one PyTorch loop over the steps"]


def test_the_environment_turns_the_log_on():
    path = os.pathsep.join(filter(None, sys.path))
    settings = os.environ | {"PYTHONPATH": path, "FUSED_RNN_LOG": "1"}
    call = "import torch, fused_rnn; fused_rnn.GRU(4, 5)(torch.randn(3, 2, 4))"
    command = [sys.executable, "-c", call]
    run = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    assert " runs cell=gru dtype=torch.float32 device=cpu T=3 N=2 " in run.stderr
