"""A module's forward, with all its options, as the plainest loop: the oracle of the sequences.

One sequence, one layer, one direction, one step after the other, in the equations of torch.nn's
documentation. It knows nothing of ``control`` or ``rows``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def one_step(mode: str, x: Tensor, state: list[Tensor], w: dict[str, Tensor]) -> list[Tensor]:
    """The next state of one sequence, ``[*]`` each."""
    gx = linear(x, w["weight_ih"], w.get("bias_ih"))
    gh = linear(state[0], w["weight_hh"], w.get("bias_hh"))
    if mode == "RNN_TANH":
        return [torch.tanh(gx + gh)]
    if mode == "RNN_RELU":
        return [torch.relu(gx + gh)]
    if mode == "GRU":
        (rx, zx, nx), (rh, zh, nh) = gx.chunk(3), gh.chunk(3)
        n, z = torch.tanh(nx + torch.sigmoid(rx + rh) * nh), torch.sigmoid(zx + zh)
        return [(1 - z) * n + z * state[0]]
    i, f, g, o = (gx + gh).chunk(4)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return [linear(h, w["weight_hr"]) if "weight_hr" in w else h, c]


def forward(
    module: Any,
    input: Tensor,
    hx: Any = None,
    *,
    lengths: Any = None,
    reset: Tensor | None = None,
    padding_value: float = 0.0,
    tbptt: int | None = None,
    zoned: Callable[..., list[Tensor]] | None = None,
) -> tuple[Tensor, Any, Tensor | None]:
    """Output, final state and the last layer's cell states; tensors as the module has them.

    ``zoned(k, t, n, before, after)`` is what zoneout makes of a state.
    """
    parameters = dict(module.named_parameters())
    if module.batch_first:
        input = input.transpose(0, 1)
        reset = None if reset is None else reset.t()
    T, N = input.shape[:2]
    ends = [T] * N if lengths is None else [int(n) for n in lengths]
    directions = 2 if module.bidirectional else 1
    lstm = module.mode == "LSTM"
    given = None if hx is None else (hx if lstm else (hx,))
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 1 + lstm]
    finals, columns = [], [[input[t, n] for t in range(T)] for n in range(N)]
    for layer in range(module.num_layers):
        shown: list[Any] = [[[[], []] for _ in range(T)] for _ in range(N)]
        for direction in range(directions):
            k = layer * directions + direction
            suffix = f"_l{layer}" + "_reverse" * direction
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            w = {s: parameters[s + suffix] for s in names if s + suffix in parameters}
            start = [input.new_zeros(size) for size in sizes]
            if module.learn_initial_state:
                start = [parameters[name][k] for name in ("h_0", "c_0")[: 1 + lstm]]
            backwards = direction == 1 or module.direction == "reverse"
            finals.append([])
            for n, end in enumerate(ends):
                state = start if given is None else [s[k, n] for s in given]
                for t in reversed(range(end)) if backwards else range(end):
                    border = t + 1 if backwards else t  # between this step and the one before it
                    inner = 0 < border < end
                    if tbptt is not None and inner and border % tbptt == 0:
                        state = [s.detach() for s in state]
                    if reset is not None and border < end and reset[border, n]:
                        state = start
                    before, state = state, one_step(module.mode, columns[n][t], state, w)
                    if zoned is not None:
                        state = zoned(k, t, n, before, state)
                    for at, value in enumerate(state):
                        shown[n][t][at].append(value)
                finals[-1].append(state)
        widths = [input.new_full((directions * size,), padding_value) for size in sizes]
        past = [torch.zeros_like(widths[0]), *widths][layer == module.num_layers - 1]
        columns = [
            [torch.cat(shown[n][t][0]) if t < ends[n] else past for t in range(T)] for n in range(N)
        ]
    dim = 1 if module.batch_first else 0
    output = torch.stack([torch.stack(column) for column in columns], 1 - dim)
    states = tuple(
        torch.stack([torch.stack([state[at] for state in final]) for final in finals])
        for at in range(1 + lstm)
    )
    if not lstm:
        return output, states[0], None
    cells = [
        [torch.cat(shown[n][t][1]) if t < ends[n] else widths[1] for t in range(T)]
        for n in range(N)
    ]
    return output, states, torch.stack([torch.stack(column) for column in cells], 1 - dim)
