"""Random problems for one layer in one direction, and ways to run them.

A problem is run three ways: by the function under test, by torch's cells in the same dtype (what
its error is measured against) and by the reference in float64 (the oracle).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numerics import HALF, assert_as_good_as, integers, signed_permutation
from torch import _VF, Tensor

from fused_rnn.backends import reference
from fused_rnn.cells import CELLS, Cell

CLEAR, HOLD, CUT = 1, 2, 4

# What fused_rnn.autograd.layer takes by position, and by keyword.
OPERANDS = ("x", "w_hh", "b_hh", "h0", "c0")
KEYWORDS = ("w_ih", "b_ih", "w_hr")
# Width of the input where its product is left to the layer.
WIDTH = 5

_TORCH_CELLS: dict[str, Callable[..., Any]] = {
    "rnn_tanh": _VF.rnn_tanh_cell,
    "rnn_relu": _VF.rnn_relu_cell,
    "lstm": _VF.lstm_cell,
    "gru": _VF.gru_cell,
}


def projects(cell: str, P: int, shape: tuple[int, int, int] = (1, 1, 33), **_: Any) -> bool:
    """Whether the case is one: only the LSTM has a projection, to fewer than H."""
    return not P or (cell == "lstm" and shape[2] > P)


@dataclass
class Problem:
    """One layer in one direction: ``operands`` by name, ``options``, gradients of the outputs."""

    cell: Cell
    T: int
    N: int
    H: int
    operands: dict[str, Tensor | None]
    grads: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = [name for name, x in (self.operands | self.options).items() if x is not None]
        return f"{self.cell.name} T{self.T} N{self.N} H{self.H} R{self.R} with {' '.join(given)}"

    @property
    def R(self) -> int:  # noqa: N802
        return self.operands["w_hh"].size(1)

    @property
    def dtype(self) -> torch.dtype:
        return self.operands["x"].dtype

    @property
    def differentiable(self) -> bool:
        keep = self.options.get("keep")
        return keep is None or not keep.is_floating_point()

    @property
    def length(self) -> int:
        """Of the longest sum behind a value: over a product at each step, or over all rows."""
        return self.T * max(self.N, self.cell.gates * self.H)

    def to(self, dtype: torch.dtype) -> Problem:
        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        groups = ("operands", "grads", "options")
        cast_groups = {
            group: {name: cast(x) for name, x in getattr(self, group).items()} for group in groups
        }
        return replace(self, **cast_groups)

    def arguments(self) -> tuple[Any, ...]:
        return (self.cell, *(self.operands[name] for name in OPERANDS))

    def keywords(self) -> dict[str, Any]:
        return self.options | {name: self.operands[name] for name in KEYWORDS}

    def op_arguments(self, *, save: bool = True, tf32: bool = False) -> list[Any]:
        """What torch.ops.fused_rnn.layer takes."""
        names = ("x", "w_ih", "b_ih", "w_hh", "b_hh", "h0", "c0")
        tensors = [self.operands[name] for name in names]
        masks = [self.options.get(name) for name in ("control", "rows", "h_mask", "keep")]
        masks.insert(2, self.operands["w_hr"])
        return [self.cell.id, *tensors, self.options["reverse"], save, *masks, 0, tf32]


def make_problem(
    cell: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    *,
    P: int = 0,
    states: bool = True,
    bias: bool = True,
    reverse: bool = False,
    control: bool = False,
    rows: str = "",
    product: bool = False,
    h_mask: bool = False,
    keep: bool = False,
    share: bool = False,
) -> Problem:
    """Draw a problem.

    Args:
        shape: T, N, H.
        P: width of the projection, 0 for none.
        control: draw all bits of ``control``, in all combinations.
        rows: ``"packed"`` for sequences of random length (0 and T among them) in the order of a
            PackedSequence, ``"scattered"`` for holes anywhere and rows in random order.
        product: leave the product of the input with ``w_ih`` to the layer.
        h_mask: recurrent dropout with probability 0.3.
        keep: zoneout of three elements in ten.
        share: zoneout's form in evaluation, which has no backward.
    """
    T, N, H = shape
    spec, G, R = CELLS[cell], CELLS[cell].gates, P or H
    live = _live(T, N, rows) if rows else torch.ones(T, N, dtype=torch.bool)
    lead = (int(live.sum()),) if rows else (T, N)
    exact = spec.name == "rnn_relu" and dtype in HALF

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return integers(*size, limit=1) if exact else scale * torch.randn(size)

    def weight(out: int, into: int) -> Tensor:
        if exact:
            return signed_permutation(out, into)
        return (torch.rand(out, into) * 2 - 1) / into**0.5

    operands: dict[str, Tensor | None] = dict.fromkeys(OPERANDS + KEYWORDS)
    operands |= {"x": draw(*lead, WIDTH if product else G * H), "w_hh": weight(G * H, R)}
    if product:
        operands["w_ih"] = weight(G * H, WIDTH)
    for name in ("b_ih", "b_hh") if product else ("b_hh",):
        operands[name] = draw(G * H, scale=0.3) if bias else None
    if states:
        operands["h0"] = draw(N, R, scale=0.5)
        operands["c0"] = draw(N, H) if spec.states == 2 else None
    if P:
        operands["w_hr"] = weight(P, H)
    grads = {"h": draw(*lead, R), "h_n": draw(N, R)}
    if spec.states == 2:
        grads |= {"c": draw(*lead, H), "c_n": draw(N, H)}
    options: dict[str, Any] = {"reverse": reverse}
    if control:
        options["control"] = _control(T, N)
    if rows:
        options["rows"] = _rows(live, shuffled=rows == "scattered")
    if h_mask:
        options["h_mask"] = (torch.rand(N, R) < 0.7) / (1.0 if exact else 0.7)
    if keep:
        options["keep"] = (torch.rand(T, N, R + (spec.states - 1) * H) < 0.3).byte()
    if share:
        shares = torch.rand(R + (spec.states - 1) * H)
        options["keep"] = shares.round() if exact else shares
        options["cells"] = True
    return Problem(spec, T, N, H, operands, grads, options).to(dtype)


def _live(T: int, N: int, rows: str) -> Tensor:
    if rows == "scattered":
        return torch.rand(T, N) < 0.7
    lengths = torch.randint(T + 1, (N,))
    lengths[:1], lengths[-1:] = 0, T
    return torch.arange(T).unsqueeze(1) < lengths


def _rows(live: Tensor, *, shuffled: bool) -> Tensor:
    rows = torch.full(live.shape, -1, dtype=torch.int32)
    count = int(live.sum())
    order = torch.randperm(count) if shuffled else torch.arange(count)
    rows[live] = order.int()
    return rows


def _control(T: int, N: int) -> Tensor:
    bits = (torch.rand(3, T, N) < torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1)).byte()
    return CLEAR * bits[0] + HOLD * bits[1] + CUT * bits[2]


def torch_layer(
    cell: Cell,
    x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    w_ih: Tensor | None = None,
    b_ih: Tensor | None = None,
    reverse: bool = False,
    control: Tensor | None = None,
    rows: Tensor | None = None,
    w_hr: Tensor | None = None,
    h_mask: Tensor | None = None,
    keep: Tensor | None = None,
    cells: bool = True,
    step: Callable[..., list[Tensor]] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The layer by torch's own cells, all in the dtype of ``x``; or by ``step`` in their place.
    ``cells`` changes nothing.

    A cell multiplies its input by ``w_ih``; with the identity there it takes ``gx`` as it is.
    """
    step = step or _torch_step
    T, N = (x if rows is None else rows).shape[:2]
    live = torch.ones(T, N, dtype=torch.bool) if rows is None else rows >= 0
    padded = x
    if rows is not None:
        places, compact = live.unsqueeze(-1), x[rows[live].long()]
        padded = x.new_zeros(T, N, x.size(-1)).masked_scatter(places, compact)
    if control is None:
        control = torch.zeros(T, N, dtype=torch.uint8)
    if w_ih is None:
        w_ih = torch.eye(x.size(-1), dtype=x.dtype)
        b_ih = None if b_hh is None else torch.zeros_like(b_hh)
    weights = (w_ih, w_hh, b_ih, b_hh)
    H = w_hh.size(0) // cell.gates
    states = [x.new_zeros(N, w_hh.size(1)) if h0 is None else h0]
    if cell.states == 2:
        states.append(x.new_zeros(N, H) if c0 is None else c0)
    shown = []
    for t in sorted(range(T), reverse=reverse):
        clear, hold, cut = ((control[t] & bit).bool().unsqueeze(-1) for bit in (CLEAR, HOLD, CUT))
        hold = hold | ~live[t].unsqueeze(-1)
        entering = [torch.where(clear, 0.0, torch.where(cut, s.detach(), s)) for s in states]
        after = step(cell, padded[t], entering, weights, w_hr, h_mask)
        widths = [s.size(1) for s in states]
        if keep is not None and keep.dtype is torch.uint8:
            after = list(map(torch.where, keep[t].bool().split(widths, -1), entering, after))
        elif keep is not None:
            stay = zip(keep.split(widths), entering, after, strict=True)
            after = [share * old + (1 - share) * new for share, old, new in stay]
        shown.append([torch.where(hold, 0.0, s) for s in after])
        states = [torch.where(hold, old, new) for old, new in zip(states, after, strict=True)]
    if reverse:
        shown.reverse()
    visible = [torch.stack(s) for s in zip(*shown, strict=True)]
    if rows is not None:
        back = rows[live].argsort()
        visible = [v[live][back] for v in visible]
    return *_pair(visible), *_pair(states)


def torch_cell(
    cell: Cell, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """torch's own step: ``h, c``; ``c`` is ``None`` but for the LSTM."""
    if cell.states == 1:
        return _TORCH_CELLS[cell.name](x, h, *weights), None
    return _TORCH_CELLS[cell.name](x, (h, c), *weights)


def _torch_step(
    cell: Cell,
    x: Tensor,
    states: list[Tensor],
    weights: tuple[Tensor | None, ...],
    w_hr: Tensor | None,
    h_mask: Tensor | None,
) -> list[Tensor]:
    if h_mask is not None:
        # torch's cells read one h for all purposes: a mask on the way into the product is one on
        # the columns of its weight, another for each row.
        w_ih, w_hh, *biases = weights
        each = []
        for row, mask, *entering in zip(
            x.split(1), h_mask, *(s.split(1) for s in states), strict=True
        ):
            masked = (w_ih, w_hh * mask, *biases)
            each.append(_torch_step(cell, row, entering, masked, w_hr, None))
        return [torch.cat(state) for state in zip(*each, strict=True)]
    if cell.states == 1:
        return [torch_cell(cell, x, states[0], None, *weights)[0]]
    if w_hr is None:
        return list(torch_cell(cell, x, *states, *weights))
    # torch has no cell with a projection: a sequence of one step.
    given = [w for w in (*weights, w_hr) if w is not None]
    options = (weights[2] is not None, 1, 0.0, False, False, False)
    _, h, c = _VF.lstm(x.unsqueeze(0), [s.unsqueeze(0) for s in states], given, *options)
    return [h[0], c[0]]


def oracle_layer(
    cell: Cell,
    x: Tensor,
    *tensors: Tensor | None,
    w_ih: Tensor | None = None,
    b_ih: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The reference backend's layer, with the input's product as fused_rnn.autograd.layer."""
    gx = x if w_ih is None else torch.nn.functional.linear(x, w_ih, b_ih)
    return reference.layer(cell, gx, *tensors, **options)


def _pair(states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return (states[0], states[1]) if len(states) == 2 else (states[0], None)


def run(layer: Callable[..., Any], problem: Problem) -> dict[str, Tensor]:
    """Outputs, final states and, where there is a backward, all gradients, by name."""
    leaves = {
        name: x.detach().requires_grad_(problem.differentiable)
        for name, x in problem.operands.items()
        if x is not None
    }
    leaf_problem = replace(problem, operands=problem.operands | leaves)
    outputs = layer(*leaf_problem.arguments(), **leaf_problem.keywords())
    named = {
        name: x for name, x in zip(("h", "c", "h_n", "c_n"), outputs, strict=True) if x is not None
    }
    assert named.keys() == problem.grads.keys()
    if not problem.differentiable:
        return named
    grads = [problem.grads[name].to(x.dtype) for name, x in named.items()]
    torch.autograd.backward(list(named.values()), grads)
    gradients = {
        f"d{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()
    }
    return {name: x.detach() for name, x in named.items()} | gradients


def check(
    layer: Callable[..., Any],
    problem: Problem,
    torchs_layer: Callable[..., Any] = torch_layer,
    exact_layer: Callable[..., Any] = oracle_layer,
) -> None:
    """Hold every output and gradient of ``layer`` to the rule."""
    ours, torchs = run(layer, problem), run(torchs_layer, problem)
    oracle = run(exact_layer, problem.to(torch.float64))
    # Gates are of size 1, and h may be a small difference of them. So may 1 - h^2, whose rounding
    # is multiplied by dL/dh.
    gradient = max(float(x.abs().max()) for x in problem.grads.values() if x.numel())
    assert ours.keys() == oracle.keys()
    for name, expected in oracle.items():
        assert_as_good_as(
            ours[name],
            torchs[name],
            expected,
            f"{name} of {problem}",
            length=problem.length,
            scale=gradient if name.startswith("d") else 1.0,
        )
