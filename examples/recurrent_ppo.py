"""Balance a pole without seeing speeds: recurrent PPO whose update is one call with ``reset=``.

CartPole's observation is cut down to the two positions. How fast cart and pole move, which decides
what to do, has to be remembered, so the policy is a GRU. Several games are played side by side, and
where one ends the next begins in the middle of the rollout. The update has to run the GRU over the
rollout as it was played, with the state cleared at each beginning:

    h, _ = gru(x, state, reset=begins)

torch.nn's modules have no such argument, and what libraries do is a loop over steps that clears the
state by hand. The program compares: the same loss, the same gradients, and the time of each.

Proximal policy optimisation as Schulman et al. (2017, arXiv:1707.06347) have it: the clipped
objective, and generalised advantages (Schulman et al., 2016, arXiv:1506.02438). A game that is
merely broken off, after ``--longest`` steps, goes on in the value of its last observation.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import mse_loss

import fused_rnn

SEEN = [0, 2]  # positions of cart and pole; 1 and 3 are their speeds
LIMITS = torch.tensor([2.4, 0.2095])  # a game ends beyond them
DISCOUNT, LAMBDA, CLIP = 0.99, 0.95, 0.2
EPOCHS, PARTS = 4, 4  # times that a rollout is used, parts that it is cut into by games
VALUE_WEIGHT, ENTROPY_WEIGHT = 0.5, 0.01


class Policy(nn.Module):
    def __init__(self, namespace: ModuleType, hidden: int):
        super().__init__()
        self.gru = namespace.GRU(len(SEEN), hidden)
        self.actor = nn.Linear(hidden, 2)
        self.critic = nn.Linear(hidden, 1)

    def heads(self, h: Tensor) -> tuple[Categorical, Tensor]:
        actions = Categorical(logits=self.actor(h), validate_args=False)
        return actions, self.critic(h).squeeze(-1)

    def step(self, x: Tensor, state: Tensor) -> tuple[Categorical, Tensor, Tensor]:
        """One step ``[N, I]`` to actions, values and the next state."""
        _, state = self.gru(x.unsqueeze(0), state)
        return *self.heads(state[0]), state


class Rollout(NamedTuple):
    """What happened in T steps of N games; ``[T, N]`` but for ``x`` and ``state``."""

    state: Tensor  # [1, N, H], that the first step found
    x: Tensor  # [T, N, I]
    begins: Tensor  # a game begins here
    action: Tensor
    log_prob: Tensor
    advantage: Tensor
    goal: Tensor  # of the values

    def part(self, games: Tensor) -> Rollout:
        return Rollout(*(tensor[:, games] for tensor in self))


def by_reset(gru: Any, part: Rollout) -> Tensor:
    """Hidden states of all steps, ``[T, N, H]``."""
    h, _ = gru(part.x, part.state, reset=part.begins)
    return h


def by_steps(gru: Any, part: Rollout) -> Tensor:
    """The same, as it is done without ``reset=``."""
    state, steps = part.state, []
    for x, begins in zip(part.x, part.begins, strict=True):
        h, state = gru(x.unsqueeze(0), state * ~begins.unsqueeze(-1))
        steps.append(h)
    return torch.cat(steps)


Unroll = Callable[[Any, Rollout], Tensor]


def loss_of(policy: Policy, part: Rollout, unroll: Unroll) -> Tensor:
    actions, value = policy.heads(unroll(policy.gru, part))
    ratio = (actions.log_prob(part.action) - part.log_prob).exp()
    advantage = (part.advantage - part.advantage.mean()) / (part.advantage.std() + 1e-8)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    objective = torch.minimum(ratio * advantage, clipped * advantage).mean()
    value_loss = mse_loss(value, part.goal)
    return -objective + VALUE_WEIGHT * value_loss - ENTROPY_WEIGHT * actions.entropy().mean()


class Games:
    """N games of CartPole, each followed by the next."""

    def __init__(self, count: int, hidden: int, longest: int, seed: int):
        try:
            import gymnasium
        except ModuleNotFoundError:
            sys.exit("recurrent_ppo.py plays gymnasium's CartPole: pip install gymnasium")
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        self.envs = gymnasium.make_vec(
            "CartPole-v1",
            count,
            "sync",
            vector_kwargs={"autoreset_mode": mode},
            max_episode_steps=longest,
        )
        self.x = self.see(self.envs.reset(seed=seed)[0])
        self.begins = torch.ones(count, dtype=torch.bool)
        self.state = torch.zeros(1, count, hidden)
        self.played = torch.zeros(count, dtype=torch.float64)
        self.returns: list[float] = []  # of the games that have ended

    @staticmethod
    def see(observation: Any) -> Tensor:
        return torch.as_tensor(observation, dtype=torch.float32)[..., SEEN] / LIMITS

    @torch.no_grad()
    def play(self, policy: Policy, steps: int) -> Rollout:
        first, rows = self.state, []
        for _ in range(steps):
            x, begins = self.x, self.begins
            actions, value, self.state = policy.step(x, self.state * ~begins.unsqueeze(-1))
            action = actions.sample()
            seen, reward, lost, broken_off, info = self.envs.step(action.numpy())
            self.x, self.played = self.see(seen), self.played + torch.as_tensor(reward)
            reward = torch.as_tensor(reward, dtype=torch.float32) * (1 - DISCOUNT)
            if broken_off.any():
                last = self.x.clone()
                for game in broken_off.nonzero()[0]:
                    last[game] = self.see(info["final_obs"][game])
                beyond = policy.step(last, self.state)[1]
                reward += DISCOUNT * beyond * torch.as_tensor(broken_off)
            self.begins = torch.as_tensor(lost | broken_off)
            self.returns += self.played[self.begins].tolist()
            self.played[self.begins] = 0
            rows.append((x, begins, action, actions.log_prob(action), reward, value))
        x, begins, action, log_prob, reward, value = map(torch.stack, zip(*rows, strict=True))
        after = policy.step(self.x, self.state * ~self.begins.unsqueeze(-1))[1]
        ended = torch.cat([begins[1:], self.begins.unsqueeze(0)])
        advantage = advantages(reward, torch.cat([value, after.unsqueeze(0)]), ended)
        return Rollout(first, x, begins, action, log_prob, advantage, advantage + value)


def advantages(reward: Tensor, value: Tensor, ended: Tensor) -> Tensor:
    """A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} - V_t; a game's last step looks no further.

    Rewards and whether the game has ended after the step ``[T, N]``, values ``[T + 1, N]``.
    """
    goes_on = 1 - ended.float()
    delta = reward + DISCOUNT * goes_on * value[1:] - value[:-1]
    found, later = [], torch.zeros_like(reward[0])
    for delta_t, goes_on_t in zip(delta.flip(0), goes_on.flip(0), strict=True):
        later = delta_t + DISCOUNT * LAMBDA * goes_on_t * later
        found.append(later)
    return torch.stack(found).flip(0)


def parts(rollout: Rollout) -> Iterator[Rollout]:
    for games in torch.randperm(rollout.x.shape[1]).chunk(PARTS):
        yield rollout.part(games)


def update(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, how: Unroll) -> None:
    for _ in range(EPOCHS):
        for part in parts(rollout):
            loss = loss_of(policy, part, how)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()


WAYS: dict[str, tuple[ModuleType, Unroll]] = {
    "fused_rnn, reset=": (fused_rnn, by_reset),
    "fused_rnn, step loop": (fused_rnn, by_steps),
    "torch.nn, step loop": (nn, by_steps),
}


def gradients(policy: Policy, rollout: Rollout, how: Unroll) -> list[Tensor]:
    loss = loss_of(policy, rollout, how)
    return [loss.detach(), *torch.autograd.grad(loss, list(policy.parameters()))]


class Way(NamedTuple):
    seconds: float  # of one update's forward and backward passes, the least of some
    difference: float  # of loss and gradients from torch.nn's, largest, relative, in float64


def compare(policy: Policy, rollout: Rollout, repeats: int = 5) -> dict[str, Way]:
    """The same update in each way: how long it takes, and whether the results are the same."""
    twins = {}
    for name, (namespace, how) in WAYS.items():
        twin = Policy(namespace, policy.gru.hidden_size)
        twin.load_state_dict(policy.state_dict())
        twins[name] = twin, how
    seconds: dict[str, list[float]] = {name: [] for name in twins}
    for _ in range(repeats):  # in turn, since the machine has other work, too
        for name, (twin, how) in twins.items():
            start = time.perf_counter()
            for part in parts(rollout):
                gradients(twin, part, how)
            seconds[name].append(EPOCHS * (time.perf_counter() - start))
    exact = Rollout(*(t.double() if t.is_floating_point() else t for t in rollout))
    results = {n: gradients(copy.deepcopy(t).double(), exact, how) for n, (t, how) in twins.items()}
    want = results["torch.nn, step loop"]
    return {
        name: Way(
            min(seconds[name]),
            max(
                ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True)
            ),
        )
        for name, got in results.items()
    }


class Result(NamedTuple):
    returns: list[float]  # of the games in the order in which they ended
    playing: float  # seconds
    updating: float
    ways: dict[str, Way]


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--games", type=int, default=16, help="played side by side")
    parser.add_argument("--steps", type=int, default=128, help="of each game between updates")
    parser.add_argument("--longest", type=int, default=500, help="steps of a game")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--torch", action="store_true", help="use torch.nn.GRU, with a step loop")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # a step of some games is too little for more
    torch.manual_seed(args.seed)
    policy = Policy(nn if args.torch else fused_rnn, args.hidden)
    how = by_steps if args.torch else by_reset
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-5)
    games = Games(args.games, args.hidden, args.longest, args.seed)
    playing = updating = 0.0
    print(f"{args.games} games, {args.steps} steps of each between updates")
    print("  update   steps  games  mean return of the last 50")
    for at in range(args.updates):
        start = time.perf_counter()
        rollout = games.play(policy, args.steps)
        between = time.perf_counter()
        update(policy, optimizer, rollout, how)
        playing, updating = playing + between - start, updating + time.perf_counter() - between
        if (at + 1) % 10 == 0 or at + 1 == args.updates:
            last = games.returns[-50:]
            print(
                f"  {at + 1:>6}  {(at + 1) * args.games * args.steps:>6}  {len(games.returns):>5}"
                f"  {sum(last) / max(1, len(last)):>6.1f}"
            )
    result = Result(games.returns, playing, updating, compare(policy, rollout))
    print(f"seconds: playing {playing:.1f}, updating {updating:.1f}")
    print("one update, forward and backward; difference of loss and gradients in float64")
    for name, way in result.ways.items():
        print(f"  {name:<21} {way.seconds * 1e3:>7.1f} ms  {way.difference:.1e}")
    return result


if __name__ == "__main__":
    main()
