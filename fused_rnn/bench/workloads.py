"""What is run: the shapes of ``workloads.toml``, and one of them as a module with its inputs.

Letters as everywhere in fused_rnn: T time, N batch, I input, H hidden, P projection, L layers,
D directions.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .today import TASKS, Ensemble, Episodes, Ragged, Stream, together

FILE = Path(__file__).with_name("workloads.toml")
TODAY = FILE.with_name("today.toml")
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
LENGTHS = (None, "full", "uniform", "zipf")
PASSES = {"train": ("forward", "train"), "infer": ("forward",), "step": ("step",)}
SMALL_GFLOP = 15.0
"""One call of a small workload: a fifth of a second or less on one core of a present-day server,
so that five interleaved repeats of every small row fit into ``make bench``."""
SMALL_GIGABYTES = 2.0
"""The same limit for packed training, where torch.nn is bound by memory (pytorch#149194)."""


@dataclass(frozen=True)
class Workload:
    """A shape and how it is used.

    ``mode`` is ``"train"`` (timed forward and forward + backward), ``"infer"`` (forward) or
    ``"step"`` (one call of the cell module). ``lengths`` is ``None`` (dense) or the distribution
    of the lengths of a :class:`~torch.nn.utils.rnn.PackedSequence`. ``reset`` is the share of
    steps that start an episode; torch.nn has no such thing, so without a ``task`` both run without.
    A ``task`` is one of ``today.py``, for LSTMs; then ``lengths`` are those of a padded batch,
    ``models`` how many there are, and ``plain`` asks for what ours is measured against there.
    """

    name: str
    cell: str
    I: int  # noqa: E741
    H: int
    T: int
    N: int
    mode: str
    L: int = 1
    D: int = 1
    P: int = 0
    lengths: str | None = None
    reset: float = 0.0
    dropout: float = 0.0
    bias: bool = True
    batch_first: bool = False
    task: str | None = None
    models: int = 1
    plain: bool = False

    def __post_init__(self) -> None:
        if self.cell not in GATES:
            raise ValueError(f"{self.name}: unknown cell {self.cell!r}, expected one of {[*GATES]}")
        if self.mode not in PASSES:
            raise ValueError(f"{self.name}: unknown mode {self.mode!r}, expected {[*PASSES]}")
        if self.lengths not in LENGTHS:
            raise ValueError(f"{self.name}: unknown lengths {self.lengths!r}, expected {LENGTHS}")
        if self.task and self.task not in TASKS:
            raise ValueError(f"{self.name}: unknown task {self.task!r}, expected one of {[*TASKS]}")
        if self.task in ("episodes", "stream") and self.cell != "lstm":
            raise ValueError(f"{self.name}: {self.task!r} is written for an LSTM")
        if self.mode == "step" and (self.T, self.L, self.D) != (1, 1, 1):
            raise ValueError(f"{self.name}: a step is one layer, one direction and T = 1")

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES[self.mode]

    @property
    def shape(self) -> str:
        extra = (f" P{self.P}" if self.P else "") + (f" {self.lengths}" if self.lengths else "")
        extra += f" {self.models} models" if self.models > 1 else ""
        return f"T{self.T} N{self.N} I{self.I} H{self.H} L{self.L} D{self.D}{extra}"

    @property
    def note(self) -> str:
        return "resets left out: torch.nn has none" if self.reset and not self.task else ""

    def sequence_lengths(self) -> Tensor:
        """The same lengths in every run; the longest is T, so that T means the same everywhere."""
        if self.lengths in (None, "full") or self.plain:
            return torch.full((self.N,), self.T)
        weights = (
            torch.ones(self.T) if self.lengths == "uniform" else 1 / torch.arange(1, self.T + 1)
        )
        lengths = 1 + torch.multinomial(
            weights, self.N, replacement=True, generator=torch.Generator().manual_seed(0)
        )
        lengths[self.N // 2] = self.T
        return lengths

    def resets(self) -> Tensor:
        """Where episodes start, bool ``[T,N]``: the same in every run."""
        size, generator = self.T * self.N, torch.Generator().manual_seed(0)
        order = torch.randperm(size, generator=generator)
        return (order < round(size * self.reset)).view(self.T, self.N)

    @property
    def _weights(self) -> int:
        """Entries of all weights: a row of input is multiplied once by each."""
        R, gates = self.P or self.H, GATES[self.cell] * self.H
        widths = [self.I] + (self.L - 1) * [R * self.D]
        a_model = sum(self.D * ((width + R) * gates + self.P * self.H) for width in widths)
        return self.models * a_model

    def gflop(self, kind: str, *, input_gradient: bool = False) -> float:
        """The matrix products of one call, in 10⁹ operations. Backward has two for each one of
        forward, but by default none for the gradient of the input."""
        macs = self._weights
        if kind == "train":
            macs *= 3
            if not input_gradient:
                macs -= self.models * self.D * self.I * GATES[self.cell] * self.H
        return 2e-9 * int(self.sequence_lengths().sum()) * macs

    def mbyte(self, kind: str, size: int, *, input_gradient: bool = False) -> float:
        """The least that one call moves to and from memory, in 10⁶ bytes, at ``size`` bytes a
        number: input, weights and output, in a backward the three again with the gradients of
        weights and output. What a layer gives the next may stay in a cache."""
        rows = int(self.sequence_lengths().sum())
        x, weights = rows * self.I, self._weights
        y = self.models * rows * (self.P or self.H) * self.D
        numbers = x + y + weights
        if kind == "train":
            numbers += x + 2 * y + 2 * weights + (x if input_gradient else 0)
        return 1e-6 * size * numbers

    def packed_gigabytes(self) -> float:
        """What torch.nn writes in one backward of packed input: it slices the gates of every step
        out of those of all rows, and the gradient of each slice is as large as the whole."""
        if self.lengths is None or self.plain or self.mode != "train":
            return 0.0
        rows = int(self.sequence_lengths().sum())
        return 4e-9 * self.T * rows * GATES[self.cell] * self.H * self.L * self.D

    @property
    def why_large(self) -> str | None:
        """Why the default run leaves this workload out, or ``None`` if it is small."""
        if (written := self.packed_gigabytes()) > SMALL_GIGABYTES:
            return f"torch.nn writes {written:.0f} GB a call, small is {SMALL_GIGABYTES:.0f}"
        gflop = max(map(self.gflop, self.passes))
        return (
            f"{gflop:.0f} GFLOP a call, small is {SMALL_GFLOP:.0f}" if gflop > SMALL_GFLOP else None
        )


def load(path: Path = FILE) -> list[Workload]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with path.open("rb") as file:
        table = tomllib.load(file)
    return [Workload(name=name, **entry) for name, entry in table.items()]


def square(cell: str, H: int, N: int, T: int, **more: Any) -> Workload:
    """A workload to train with, I = H unless ``more`` says otherwise."""
    name = "-".join([cell, *map(str, (T, N, H)), *(f"{k}{v}" for k, v in more.items())])
    given: dict[str, Any] = {"I": H, "H": H, "T": T, "N": N, **more}
    return Workload(name, cell, mode="train", **given)


def grid(cells: Iterable[str], axes: Iterable[str], kinds: Collection[str]) -> list[Workload]:
    """Workloads of every combination of ``axes``, each ``"H=64,128"``: letters and their values.
    Where ``kinds`` are passes that are wanted, ``"step"`` among them asks for single steps."""
    values = {"T": [128], "N": [16], "H": [64]}
    for axis in axes:
        letter, _, numbers = axis.partition("=")
        if letter not in tuple("TNIHLDP") or not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise ValueError(f"{axis!r} is no axis: expected a letter of TNIHLDP, as in H=64,128")
        values[letter] = [int(number) for number in numbers.split(",")]
    found = []
    for cell in cells:
        for sizes in product(*values.values()):
            w = square(cell, **dict(zip(values, sizes, strict=True)))
            if set(kinds) != {"step"}:
                found.append(w)
            if "step" in kinds:
                found.append(replace(w, name=f"{cell}-step-{w.N}-{w.H}", T=1, mode="step"))
    return list(dict.fromkeys(found))


def make_module(namespace: ModuleType, w: Workload, **options: Any) -> nn.Module:
    """The module of ``w`` from ``torch.nn`` or ``fused_rnn``, which take the same arguments."""
    one, ours = replace(w, task=None), namespace is not nn
    if w.task == "episodes":
        return Episodes(make_module(namespace, one, **options), None if w.plain else w.resets())
    if w.task == "ragged":
        lengths = None if w.plain else w.sequence_lengths()
        return Ragged(make_module(namespace, one, **options), lengths)
    if w.task == "ensemble":
        models = (make_module(namespace, one, **options) for _ in range(w.models))
        return Ensemble(models, together=ours and not w.plain)
    if w.task == "stream":
        whole = ours and not w.plain
        one = replace(one, mode=w.mode if whole else "step", T=w.T if whole else 1)
        return Stream(make_module(namespace, one, **options))
    kind, _, nonlinearity = w.cell.partition("_")
    if nonlinearity:
        options["nonlinearity"] = nonlinearity
    if w.mode == "step":
        return getattr(namespace, f"{kind.upper()}Cell")(w.I, w.H, bias=w.bias, **options)
    if w.P:
        options["proj_size"] = w.P
    return getattr(namespace, kind.upper())(
        w.I,
        w.H,
        num_layers=w.L,
        bias=w.bias,
        batch_first=w.batch_first,
        dropout=w.dropout,
        bidirectional=w.D == 2,
        **options,
    )


@dataclass
class Case:
    """A provider's module with its inputs; :meth:`forward`, :meth:`train` and :meth:`step` are
    what is timed, in their :func:`grad_mode`; :meth:`results` what is compared. What is timed
    leaves the input without gradient, as data has none, unless ``input_gradient``; what is compared
    asks for it too."""

    module: nn.Module
    input: Tensor | PackedSequence
    states: Tensor | tuple[Tensor, ...] | None
    leaves: dict[str, Tensor]
    draw: Callable[[torch.Size], Tensor]
    cotangents: list[Tensor] = field(default_factory=list)
    input_gradient: bool = False

    @property
    def data(self) -> Tensor | PackedSequence:
        if isinstance(self.input, PackedSequence):
            return PackedSequence(self.input.data.detach(), *self.input[1:])
        return self.input.detach()

    def forward(self) -> Any:
        return self.module(self.input, self.states)

    step = forward

    def train(self) -> tuple[Tensor, ...]:
        if self.input_gradient:
            outputs = flatten(self.module(self.input, self.states))
            return self._backward(outputs, [*self.leaves.values()])
        leaves = [leaf for name, leaf in self.leaves.items() if name != "input"]
        return self._backward(flatten(self.module(self.data, self.states)), leaves)

    def _backward(self, outputs: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        if not self.cotangents:
            self.cotangents = [self.draw(output.shape) for output in outputs]
        return torch.autograd.grad(outputs, leaves, self.cotangents)

    def another(self) -> "Case":
        """The same with input elsewhere in memory, of other values."""
        data = self.leaves["input"].detach().flip(-1).requires_grad_()
        packed = isinstance(self.input, PackedSequence)
        input = PackedSequence(data, *self.input[1:]) if packed else data
        return replace(self, input=input, leaves=self.leaves | {"input": data})

    def call(self, kind: str) -> Callable[[], Any]:
        return {"forward": self.forward, "train": self.train, "step": self.step}[kind]

    def results(self, kind: str) -> dict[str, Tensor]:
        """Outputs and final states and, for ``"train"``, the gradient of every leaf, by name.
        The random stream is set first: dropout must draw what torch's draws."""
        torch.manual_seed(0)
        names = ("h", "c") if isinstance(self.module, nn.RNNCellBase) else ("output", "h_n", "c_n")
        if kind != "train":
            with grad_mode(kind):
                return dict(zip(names, flatten(self.forward()), strict=False))
        outputs = flatten(self.module(self.input, self.states))
        gradients = self._backward(outputs, [*self.leaves.values()])
        wheres = (f"d {name}" for name in self.leaves)
        found = dict(zip(wheres, gradients, strict=True))
        # Of parameters in a layout of their own.
        as_torch: Any = getattr(self.module, "as_torch", lambda gradients: gradients)
        found = as_torch(found)
        return dict(zip(names, outputs, strict=False)) | together(found)


def grad_mode(kind: str) -> torch.set_grad_enabled:
    """The context in which a pass is timed. To enter it takes as long as a tenth of a step, and
    users enter it once for many."""
    return torch.set_grad_enabled(kind == "train")


def flatten(result: Any) -> list[Tensor]:
    """The tensors of a module's result, in order; of a PackedSequence its data."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flatten(part)]


def make_case(
    w: Workload,
    module: nn.Module,
    dtype: torch.dtype,
    *,
    values: torch.dtype | None = None,
    with_states: bool | None = None,
    integers: bool = False,
    device: str = "cpu",
) -> Case:
    """``module`` in ``dtype`` with the inputs of ``w``: the same for every provider, rounded to
    ``values`` (default ``dtype``), or with ``integers`` to those. By default a step
    is given states and a sequence starts from none."""
    generator = torch.Generator(device).manual_seed(0)
    step = w.mode == "step"

    def draw(size: Sequence[int]) -> Tensor:
        sample = torch.randn(size, generator=generator, device=device)
        return (sample.round() if integers else sample).to(values or dtype).to(dtype)

    size = (w.N,) if step else (w.N, w.T) if w.batch_first else (w.T, w.N)
    data = draw((*size, w.I))
    packed = None
    if w.lengths and not w.task:
        lengths = w.sequence_lengths()
        packed = pack_padded_sequence(data, lengths, w.batch_first, enforce_sorted=False)
        data = packed.data
    leaves = {"input": data.requires_grad_()}

    states: tuple[Tensor, ...] = ()
    if step if with_states is None else with_states:
        rows = () if step else (w.L * w.D,)
        widths = {"h0": w.P or w.H} | ({"c0": w.H} if w.cell == "lstm" else {})
        for name, width in widths.items():
            leaves[name] = draw((*rows, w.N, width)).requires_grad_()
        states = tuple(leaves[name] for name in widths)

    module.to(device, dtype).train(w.mode == "train")
    return Case(
        module,
        data if packed is None else PackedSequence(data, *packed[1:]),
        (states if w.cell == "lstm" else states[0]) if states else None,
        leaves | dict(module.named_parameters()),
        draw,
    )


def make_cases(
    w: Workload,
    providers: dict[str, ModuleType],
    dtype: torch.dtype = torch.float32,
    *,
    options: dict[str, dict[str, Any]] | None = None,
    with_states: bool | None = None,
    integers: bool = False,
    device: str = "cpu",
    oracle: bool = True,
) -> dict[str, Case]:
    """One case for each provider and ``"oracle"``, torch.nn in float64, all with the same weights
    and inputs. ``options`` are further arguments of a provider's modules. ``integers`` makes
    every input one, and every row of every parameter zero but for one ±1."""
    torch.manual_seed(0)
    with torch.device(device):
        weights = make_module(nn, w).state_dict()
    if integers:
        weights = {name: largest_sign(value) for name, value in weights.items()}
    weights = {name: value.to(dtype) for name, value in weights.items()}
    cases = {}
    for name, namespace in (providers | ({"oracle": nn} if oracle else {})).items():
        with torch.device(device):
            module = make_module(namespace, w, **(options or {}).get(name, {}))
        module.load_state_dict(weights)
        own = torch.float64 if name == "oracle" else dtype
        cases[name] = make_case(
            w,
            module,
            own,
            values=dtype,
            with_states=with_states,
            integers=integers,
            device=device,
        )
    return cases


def largest_sign(value: Tensor) -> Tensor:
    """The sign of the largest entry of each row where it stands, zero elsewhere."""
    size = value.abs()
    return value.sign() * (size == size.amax(-1, keepdim=True))


def select(
    workloads: list[Workload], *, only: Iterable[str] = (), everything: bool = False
) -> tuple[list[Workload], dict[str, str]]:
    """What to run, and what is left out with the reason. What one of the patterns ``only`` (such as
    ``"lstm-*"``) matches is wanted whatever its size."""
    wanted = [*only]
    for pattern in wanted:
        if not any(fnmatchcase(w.name, pattern) for w in workloads):
            names = ", ".join(w.name for w in workloads)
            raise ValueError(f"there is no workload {pattern!r}: expected some of {names}")
    chosen: list[Workload] = []
    left_out: dict[str, str] = {}
    for w in workloads:
        if wanted and not any(fnmatchcase(w.name, pattern) for pattern in wanted):
            continue
        if w.why_large and not everything and not wanted:
            left_out[w.name] = w.why_large
        else:
            chosen.append(w)
    return chosen, left_out
