"""What people write with torch.nn today where our modules have one call for it, as modules.

Each runs torch.nn as people do, or ours in one call; and ours in torch.nn's way (``plain``), which
says what the call costs or saves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import LSTMCell, explain
from ..explain import Explanation
from ..sequence_module import SequenceModule


@dataclass(frozen=True)
class Words:
    """What torch.nn's row does, and what ours in torch.nn's way."""

    torch: str
    plain: str


TASKS = {
    "episodes": Words("loop over the steps", "no resets"),
    "ragged": Words("packed, padded again", "every step of all"),
    "ensemble": Words("loop over the models", "loop over ours"),
    "stream": Words("loop over LSTMCell", "loop over our LSTMCell"),
}


class Episodes(nn.Module):
    """Episodes that start where ``reset`` is true; ``None``: nowhere.

    With torch.nn it is the loop of cleanrl's ``ppo_atari_lstm.py`` (``get_states``) and of
    sb3-contrib's recurrent policies (``_process_sequence``).
    """

    reset: Tensor | None
    done: Any

    def __init__(self, rnn: nn.Module, reset: Tensor | None) -> None:
        super().__init__()
        self.rnn: Any = rnn
        self.register_buffer("reset", reset, persistent=False)
        self.register_buffer("done", None if reset is None else reset.float(), persistent=False)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if self.reset is None:
            return self.rnn(input, hx)
        if isinstance(self.rnn, SequenceModule):
            return self.rnn(input, hx, reset=self.reset)
        state = (input.new_zeros(1, input.size(1), self.rnn.hidden_size),) * 2
        outputs = []
        for x, d in zip(input, self.done, strict=True):
            entering = tuple((1.0 - d).view(1, -1, 1) * s for s in state)
            y, state = self.rnn(x.unsqueeze(0), entering)
            outputs.append(y)
        return torch.cat(outputs), state

    def explain(self, input: Tensor) -> Explanation:
        asked = {} if self.reset is None else {"reset": self.reset}
        return explain(self.rnn, input, **asked)


class Ragged(nn.Module):
    """A padded batch of sequences of ``lengths``; ``None``: all of T."""

    def __init__(self, rnn: nn.Module, lengths: Tensor | None) -> None:
        super().__init__()
        self.rnn: Any = rnn
        self.lengths = lengths

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if self.lengths is None:
            return self.rnn(input, hx)
        if isinstance(self.rnn, SequenceModule):
            return self.rnn(input, hx, lengths=self.lengths)
        packed = pack_padded_sequence(input, self.lengths, enforce_sorted=False)
        output, state = self.rnn(packed, hx)
        return pad_packed_sequence(output, total_length=input.size(0))[0], state

    def explain(self, input: Tensor) -> Explanation:
        asked = {} if self.lengths is None else {"lengths": self.lengths}
        return explain(self.rnn, input, **asked)


class Ensemble(nn.Module):
    """Models of one architecture on one input: one after the other, or ``together`` by vmap."""

    def __init__(self, models: Iterable[nn.Module], together: bool) -> None:
        super().__init__()
        models = [*models]
        self.like = (models[0],)  # in a tuple its parameters are not this module's
        self.models = None if together else nn.ModuleList(models)
        self.stacked = nn.ParameterDict(stack_module_state(models)[0] if together else {})

    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        if self.models is not None:
            return torch.stack([model(input)[0] for model in self.models])
        return vmap(lambda weights: functional_call(self.like[0], weights, (input,))[0])(
            dict(self.stacked)
        )

    def load_state_dict(self, state: Any, *more: Any) -> Any:
        return super().load_state_dict(together(state) if self.stacked else state, *more)

    def explain(self, input: Tensor) -> Explanation:
        if self.models is not None:
            return explain(self.like[0], input)
        found = []

        def ask(weight: Tensor) -> Tensor:
            found.append(explain(self.like[0], input))
            return weight

        vmap(ask)(next(iter(self.stacked.values())))
        return found[0]


def together(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is called ``models.0.<name>``, ``models.1.<name>``, ... as one ``stacked.<name>``."""
    groups: dict[str, list[Tensor]] = {}
    for name, x in named.items():
        groups.setdefault(re.sub(r"models\.\d+\.", "stacked.", name), []).append(x)
    return {name: xs[0] if name in named else torch.stack(xs) for name, xs in groups.items()}


class Stream(nn.Module):
    """One step after the other: ours by ``step``, or by the cell."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn: Any = rnn
        self.frames: dict[Tensor, tuple[Tensor, ...]] = {}

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        # Once: a stream's frames come one by one, and to cut one off is no part of a step.
        frames = self.frames.get(input) or self.frames.setdefault(input, input.unbind())
        rnn = self.rnn
        if isinstance(rnn, SequenceModule):
            for x in frames:
                y, hx = rnn.step(x, hx)
            return y, tuple(s[0] for s in hx)
        for x in frames:
            hx = rnn(x, hx)
        return hx[0], hx

    def load_state_dict(self, state: Any, *more: Any) -> Any:
        if isinstance(self.rnn, SequenceModule):
            state = {f"{name}_l0": x for name, x in state.items()}
        return super().load_state_dict(state, *more)

    def explain(self, input: Tensor) -> Explanation:
        cell = LSTMCell(input.size(-1), self.rnn.hidden_size, device=input.device)
        return explain(cell, input[0])
