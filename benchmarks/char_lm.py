"""A character language model on Python's own standard library, once with each LSTM.

Embedding + LSTM + Linear learns to predict the next character of real text. Both models start
from the same weights and see the same batches, step by step in turn, so the loss curves must agree
and the two wall times are of the same minutes.

How closely must they agree? Two float32 implementations round differently, and training amplifies
the difference: it is neither one ulp nor bounded by a formula. So it is measured. A third model,
torch.nn's in float64, takes the same steps; the largest distance of torch.nn's float32 curve from
it is what float32 rounding does to this very training. By the rule of ``check.py`` our curve may be
twice as far from the float64 one, so ours and torch.nn's may be three times that distance apart.
"""

import hashlib
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FILES = (
    "argparse.py",
    "ast.py",
    "bdb.py",
    "calendar.py",
    "configparser.py",
    "dataclasses.py",
    "difflib.py",
    "doctest.py",
    "enum.py",
    "functools.py",
    "inspect.py",
    "mailbox.py",
    "optparse.py",
    "pdb.py",
    "pickletools.py",
    "random.py",
    "shutil.py",
    "statistics.py",
    "subprocess.py",
    "tarfile.py",
    "threading.py",
    "turtle.py",
    "typing.py",
)
EMBEDDING, HIDDEN, STEPS_PER_BATCH, BATCH = 64, 128, 64, 32
LEARNING_RATE = 2.0
MOMENTUM = 0.9
CLIP = 1.0
SHAPE = f"T{STEPS_PER_BATCH} N{BATCH} I{EMBEDDING} H{HIDDEN} L1 D1"
MARGIN = 3
FLOOR_ULPS = 8


@dataclass(frozen=True)
class Corpus:
    files: int
    data: Tensor
    vocabulary: str
    sha256: str

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets ``[T,N]`` from random places, the same for the same ``step``."""
        generator = torch.Generator().manual_seed(step)
        last = len(self.data) - STEPS_PER_BATCH - 1
        starts = torch.randint(last, (BATCH,), generator=generator)
        window = self.data[starts + torch.arange(STEPS_PER_BATCH + 1)[:, None]]
        return window[:-1], window[1:]


def load_corpus() -> Corpus:
    """The sources of this Python as one text; which characters it holds is the vocabulary."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = [folder / name for name in FILES if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(
            f"no standard-library sources in {folder}: install Python's own .py files"
        )
    text = "".join(path.read_text(encoding="utf-8") for path in found)
    text = text.encode("ascii", "replace").decode()
    vocabulary = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(vocabulary)}
    data = torch.tensor([index[character] for character in text])
    return Corpus(len(found), data, vocabulary, hashlib.sha256(text.encode()).hexdigest())


class CharLM(nn.Module):
    def __init__(self, namespace: ModuleType, characters: int, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.lstm = namespace.LSTM(EMBEDDING, HIDDEN, **options)
        self.head = nn.Linear(HIDDEN, characters)

    def forward(self, characters: Tensor) -> Tensor:
        output, _ = self.lstm(self.embedding(characters))
        return self.head(output)


def lstm_input() -> Tensor:
    """A tensor such as the LSTM is given."""
    return torch.zeros(STEPS_PER_BATCH, BATCH, EMBEDDING)


@dataclass
class Learner:
    """One model on its way: its losses (nats a character) and the seconds of each step."""

    model: CharLM
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM
        )

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Agreement:
    """Largest relative difference between the two curves, and the largest that rounding allows."""

    difference: float
    rounding: float

    @property
    def allowed(self) -> float:
        return MARGIN * self.rounding + FLOOR_ULPS * torch.finfo(torch.float32).eps

    @property
    def ok(self) -> bool:
        return self.difference <= self.allowed


def train(
    providers: dict[str, ModuleType],
    options: dict[str, dict[str, Any]],
    corpus: Corpus,
    steps: int,
    on_step: Callable[[int, dict[str, "Learner"]], object] = lambda step, learners: None,
) -> dict[str, Learner]:
    """Trains a model of each provider and the float64 ``"oracle"``, in turn within each step."""
    torch.manual_seed(0)
    characters = len(corpus.vocabulary)
    weights = CharLM(nn, characters).state_dict()
    learners = {}
    for name, namespace in (providers | {"oracle": nn}).items():
        model = CharLM(namespace, characters, **options.get(name, {}))
        model.load_state_dict(weights)
        learners[name] = Learner(model.double() if name == "oracle" else model)
    order = list(learners)
    for step in range(steps):
        inputs, targets = corpus.batch(step)
        for name in order:
            learners[name].step(inputs, targets)
        order.reverse()
        on_step(step, learners)
    return learners


def agreement(learners: dict[str, Learner]) -> Agreement:
    ours, theirs, oracle = (
        torch.tensor(learners[name].losses, dtype=torch.float64)
        for name in ("fused_rnn", "torch", "oracle")
    )
    return Agreement(
        ((ours - theirs) / theirs).abs().max().item(),
        ((theirs - oracle) / oracle).abs().max().item(),
    )
