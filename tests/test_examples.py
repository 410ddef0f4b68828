"""Every program under examples/ learns what it claims to learn and shows what it explains."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples that plot need matplotlib")

# Programs whose results several tests look at run once.
pytestmark = pytest.mark.xdist_group("examples")

FOLDER = Path(__file__).resolve().parent.parent / "examples"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        load(name).main(["--help"])
    assert exit_.value.code == 0
    assert "--seed" in capsys.readouterr().out


def test_readme_names_every_program():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in PROGRAMS if f"{name}.py" not in readme] == []


@pytest.fixture(scope="module")
def by_hand():
    return load("rnn_by_hand").main(["--steps", "150"])


def test_rnn_by_hand_and_fused_train_alike(by_hand):
    torch.testing.assert_close(by_hand.fused, by_hand.hand, rtol=1e-4, atol=1e-6)
    assert by_hand.hand[-1] < by_hand.silence / 50


def test_head_that_reads_past_the_hidden_state_cannot_remember(by_hand):
    assert not by_hand.past_h2h_has_grad
    assert min(by_hand.past[-20:]) > by_hand.silence / 2


def test_hello_is_answered_by_all_three_networks():
    results = load("hello_ohlol").main([])
    assert {name: said for name, (said, _) in results.items()} == {
        "RNNCell": "ohlol",
        "RNN": "ohlol",
        "Embedding + RNN + Linear": "ohlol",
    }
    # Cell by cell or in one call, it is the same network from the same start.
    assert results["RNNCell"][1] == pytest.approx(results["RNN"][1], rel=1e-3)
    # Only the third has a head, so only it can become sure.
    assert results["Embedding + RNN + Linear"][1] < 0.01 < results["RNN"][1]


@pytest.mark.parametrize(("dtype", "rounding"), [("float64", 1e-14), ("float32", 2e-6)])
def test_gates_recomputed_by_hand_are_equal(dtype, rounding):
    results = load("verify_gates").main(["--dtype", dtype])
    wrong_sum, wrong_max = results.pop("wrong, signed sum"), results.pop("wrong, max")
    assert len(results) == 6
    assert max(results.values()) < rounding
    # What the signed sum hides: many roundings add up, yet it stays next to nothing.
    assert abs(wrong_sum) < 100 * rounding
    assert wrong_max > 0.1


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_sine_needs_and_uses_the_carried_state(cell, tmp_path):
    result = load("sine").main(["--cell", cell, "--steps", "300", "--out", str(tmp_path)])
    assert result.carried < result.memoryless / 100
    assert result.first_carried < result.memoryless / 100
    assert result.first_cleared > result.memoryless / 2
    assert result.dreamed < result.memoryless
    assert is_png(result.plot)


def test_next_frame_is_predicted_and_the_chain_of_mlps_is_the_same(tmp_path):
    result = load("next_frame").main(["--epochs", "3", "--out", str(tmp_path)])
    assert result.error < result.copy_last / 25
    assert result.error > result.floor
    assert len(result.chain) == 3
    assert max(result.chain.values()) < 1e-12
    assert is_png(result.plot)


@pytest.fixture(scope="module")
def long_memory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    return load("long_memory").main(["--out", str(folder)])


def test_gradient_through_time_is_the_product_of_the_formula(long_memory):
    curves = long_memory.curves
    for gradient, formula in (
        ("one tanh, w = 0.9", "  product of σ'(z)·0.9"),
        ("one relu, w = 1.1", "  product of σ'(z)·1.1"),
        ("RNN", "  product of matrices"),
    ):
        torch.testing.assert_close(curves[gradient], curves[formula], rtol=1e-9, atol=0)
    assert (curves["RNN"] <= curves["  spectral bound"]).all()


def test_gradient_vanishes_or_explodes_and_open_gates_keep_it(long_memory):
    reach = {name: (curve[0] / curve[-1]).item() for name, curve in long_memory.curves.items()}
    assert reach["one relu, w = 1.1"] == pytest.approx(1.1**99)
    assert max(reach["one tanh, w = 0.9"], reach["RNN"], reach["LSTM"], reach["GRU"]) < 1e-9
    assert min(reach["LSTM, biases for T"], reach["GRU, biases for T"]) > 1e-3


def test_exploding_gradient_ends_in_nan_and_clipping_stops_it(long_memory):
    exploding = [loss for loss, _ in long_memory.exploding]
    assert math.isfinite(exploding[0])
    assert math.isnan(exploding[-1])
    clipped = [loss for loss, _ in long_memory.clipped]
    assert all(map(math.isfinite, clipped))
    assert clipped[0] == exploding[0]
    assert sum(clipped[-10:]) / 10 < load("long_memory").MEAN_LEVEL_ERROR / 2


def test_all_remember_ten_steps_and_only_gated_cells_a_hundred(long_memory):
    recall = long_memory.recall
    counts = [recall[cell, 10].parameters for cell in ("RNN", "LSTM", "GRU")]
    assert counts == [counts[0], 4 * counts[0], 3 * counts[0]]
    right = {key: row.right for key, row in recall.items()}
    assert min(right[cell, 10] for cell in ("RNN", "LSTM", "GRU")) > 0.95
    assert min(right[cell, 100] for cell in ("LSTM", "GRU")) > 0.9
    assert right["RNN", 100] < 0.5
    assert is_png(long_memory.plot)
