"""The larger programs under examples/: reinforcement learning, sound and a real time series."""

import sys

import pytest
import torch
from test_examples import is_png, load

import fused_rnn

pytestmark = pytest.mark.xdist_group("real models")

TINY_PPO = ["--updates", "2", "--games", "4", "--steps", "48", "--hidden", "16"]


@pytest.fixture(scope="module")
def ppo():
    pytest.importorskip("gymnasium", reason="recurrent_ppo.py plays gymnasium's CartPole")
    return load("recurrent_ppo")


@pytest.fixture(scope="module")
def played(ppo):
    return ppo.main(TINY_PPO)


def test_update_with_reset_is_the_step_loop_and_faster(played):
    ours, *loops = played.ways.values()
    assert len(loops) == 2
    assert max(way.difference for way in played.ways.values()) < 1e-12
    assert ours.seconds < min(way.seconds for way in loops)


def test_update_that_forgets_resets_is_another_one(ppo, monkeypatch):
    """The rollouts that are compared do have games that begin inside."""
    monkeypatch.setattr(
        ppo,
        "WAYS",
        {**ppo.WAYS, "wrong": (fused_rnn, lambda gru, part: gru(part.x, part.state)[0])},
    )
    assert ppo.main(TINY_PPO).ways["wrong"].difference > 1e-3


def test_ppo_on_torch_nn_plays_the_same_games(ppo, played):
    assert len(played.returns) > 3
    assert ppo.main([*TINY_PPO, "--torch"]).returns == played.returns


@pytest.mark.parametrize("longest", [4, 500])
def test_a_game_that_is_broken_off_goes_on_and_one_that_is_lost_does_not(ppo, longest):
    """Where each value is 1, a step that is worth 1 - γ and one that goes on have no advantage."""
    torch.manual_seed(0)
    policy = ppo.Policy(fused_rnn, 8)
    torch.nn.init.zeros_(policy.critic.weight)
    torch.nn.init.ones_(policy.critic.bias)
    games = ppo.Games(3, 8, longest, seed=0)
    rollout = games.play(policy, 40)
    assert games.returns
    assert rollout.begins[1:].any()
    ended = torch.cat([rollout.begins[1:], games.begins.unsqueeze(0)])
    want, later = torch.zeros_like(rollout.advantage), torch.zeros(3)
    if longest == 500:
        for t in reversed(range(40)):
            later = torch.where(ended[t], -ppo.DISCOUNT, ppo.DISCOUNT * ppo.LAMBDA * later)
            want[t] = later
    torch.testing.assert_close(rollout.advantage, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.goal, want + 1, rtol=0, atol=1e-5)


def test_policy_learns_to_balance(ppo, request):
    if not request.config.getoption("full"):
        pytest.skip("half a minute: with --full")
    returns = ppo.main(["--updates", "40"]).returns
    assert sum(returns[-50:]) > 4 * sum(returns[:50])


@pytest.mark.parametrize("namespace", [[], ["--torch"]], ids=["fused_rnn", "torch"])
def test_sound_is_denoised_as_it_comes_in(namespace, tmp_path):
    size = ["--hidden", "24", "--batch", "4", "--steps", "25", "--seconds", "2"]
    result = load("denoiser").main([*size, "--out", str(tmp_path), *namespace])
    assert result.after > result.before + 1
    assert result.difference < 1e-12
    assert len(result.seconds) == 200
    assert [path.read_bytes()[:4] for path in result.sounds] == [b"RIFF"] * 3


def test_bands_of_the_denoiser_share_out_each_frequency():
    denoiser = load("denoiser")
    bands = denoiser.triangles()
    assert bands.shape == (denoiser.HOP + 1, denoiser.BANDS)
    assert bands.min() >= 0
    torch.testing.assert_close(bands.sum(1), torch.ones(denoiser.HOP + 1))
    assert bands.sum(0).min() > 0


def test_sunspots_are_forecast_better_than_by_the_last_cycle(tmp_path):
    pytest.importorskip("statsmodels", reason="sunspots.py reads the data that come with it")
    sunspots = load("sunspots")
    size = ["--steps", "150", "--out", str(tmp_path)]
    ours, theirs, unvaried = (
        sunspots.main([*size, *more]) for more in ([], ["--torch"], ["--vary", "0"])
    )
    mean = {name: row.mean().item() for name, row in ours.table.items()}
    assert mean.pop("the network") < min(mean[name] for name in mean if name != "autoregression")
    assert unvaried.table["the network"].mean() > ours.table["the network"].mean()
    torch.testing.assert_close(theirs.training.losses, ours.training.losses, rtol=1e-3, atol=0)
    assert is_png(ours.plot)
    # What each year's forecasts are compared with.
    numbers = torch.arange(20.0)
    assert sunspots.next_years(numbers)[3].tolist() == list(range(4, 4 + sunspots.AHEAD))
    assert sunspots.next_years(numbers)[-1].isnan().all()


@pytest.mark.parametrize(
    ("program", "package"),
    [("recurrent_ppo", "gymnasium"), ("sunspots", "statsmodels"), ("sunspots", "matplotlib")],
)
def test_a_package_that_is_absent_is_named(program, package, monkeypatch, tmp_path):
    if package == "matplotlib":
        pytest.importorskip("statsmodels", reason="sunspots.py reads the data that come with it")
    monkeypatch.chdir(tmp_path)
    for module in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=f"pip install {package}$"):
        load(program).main(["--steps", "10"])
