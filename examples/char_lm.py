"""Train a character language model on one process or on many, through kills, to the same loss.

    python examples/char_lm.py
    torchrun --standalone --nproc-per-node=2 examples/char_lm.py --parallel ddp
    torchrun --standalone --nproc-per-node=2 examples/char_lm.py --parallel fsdp

Embedding, LSTM and Linear learn to predict the next character of the sources of Python's own
standard library. A batch follows from the seed and the step's number alone, and each process takes
its share of the columns; gradients are averaged. So any number of processes takes the same steps,
and losses differ by rounding only. ``ddp`` keeps the whole model in each process, ``fsdp``
(``fully_shard``) a part of each parameter, of its gradient and of the optimizer's state. With a GPU
for each process the same runs there.

Every ``--save-every`` steps model, optimizer and losses go into a checkpoint, which holds whole
tensors' names and the pieces that were written: any number of processes, parallel in any way, goes
on from it. It is written beside the others under a name of its own and renamed when it is whole;
only then is the one before the last removed. Whenever a run is killed, the same command goes on
from the last whole checkpoint.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed import HashStore
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import fused_rnn

CHARACTERS = 128  # ASCII; what is not becomes a question mark
EMBEDDING, STEPS_PER_BATCH = 64, 64
KEPT = 2  # checkpoints


class CharLM(nn.Module):
    def __init__(self, namespace: ModuleType, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, EMBEDDING)
        self.lstm = namespace.LSTM(EMBEDDING, hidden)
        self.head = nn.Linear(hidden, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        """Of characters ``[T, N]``, how hard each was to predict: nats a character."""
        h, _ = self.lstm(self.embedding(characters[:-1]))
        return cross_entropy(self.head(h).flatten(0, 1), characters[1:].flatten())


def read_text() -> Tensor:
    """The sources of this Python's standard library, one after another, ``[characters]``."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    if not sources:
        sys.exit(f"char_lm.py: no sources in {folder}: install Python's own .py files")
    text = torch.frombuffer(bytearray(b"".join(sources)), dtype=torch.uint8)
    return torch.where(text < CHARACTERS, text, ord("?")).long()


class Group(NamedTuple):
    """The processes that train together."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> Group:
        """Meet the others that torchrun has started; without torchrun, be one of one."""
        on_gpu = torch.cuda.is_available()
        device = torch.device("cpu")
        if on_gpu:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1, "store": HashStore()}
        distributed.init_process_group("nccl" if on_gpu else "gloo", **alone)
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    def mean(self, value: Tensor) -> float:
        """The mean of all processes' values."""
        distributed.all_reduce(value)
        return value.item() / self.size

    def parallel(self, model: nn.Module, kind: str) -> nn.Module:
        if self.size == 1:
            return model
        if kind == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        return fully_shard(model, mesh=init_device_mesh(self.device.type, (self.size,)))


class Run(Stateful):
    """What a checkpoint holds: model, optimizer and the loss of each step so far."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.losses = state["losses"]


class Checkpoints:
    """The whole checkpoints of a folder, which all processes see and one run at a time writes."""

    def __init__(self, folder: Path, group: Group):
        self.folder, self.group = folder, group
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = (folder / "lock").open("a+")
        if group.rank == 0:
            try:  # the kernel lets go of it, however the process ends
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.lock.seek(0)
                holder = self.lock.read()
                sys.exit(f"char_lm.py: process {holder} writes to {folder}: end it, or --folder")
            self.lock.truncate(0)
            print(os.getpid(), end="", file=self.lock, flush=True)
        distributed.barrier()

    def close(self) -> None:
        self.lock.close()

    def whole(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def load(self, run: Run) -> None:
        if whole := self.whole():
            dcp.load({"run": run}, checkpoint_id=whole[-1])

    def save(self, run: Run) -> None:
        part = self.folder / "unfinished"
        if self.group.rank == 0:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        distributed.barrier()
        dcp.save({"run": run}, checkpoint_id=part)
        if self.group.rank == 0:
            part.rename(self.folder / f"step-{len(run.losses):06d}")
            for old in self.whole()[:-KEPT]:
                old.rename(part)  # half removed, it must not look whole
                shutil.rmtree(part)


def windows(text: Tensor, count: int, seed: int, group: Group) -> Tensor:
    """This process's share of ``count`` random windows, ``[T + 1, N]``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - STEPS_PER_BATCH, (count,), generator=generator)
    mine = starts[group.rank :: group.size]
    return text[mine + torch.arange(STEPS_PER_BATCH + 1)[:, None]].to(group.device)


class Result(NamedTuple):
    resumed: int  # steps that the checkpoint had
    losses: list[float]  # of each step, nats a character, of all processes
    unseen: float  # the same of text that was not trained on


def train(args: argparse.Namespace, group: Group) -> Result:
    say: Callable[..., None] = print if group.rank == 0 else lambda *_: None
    if args.batch % group.size:
        sys.exit(f"char_lm.py: --batch {args.batch} must divide among {group.size} processes")
    text = read_text()
    seen, unseen = text[: -len(text) // 20], text[-len(text) // 20 :]

    torch.manual_seed(args.seed)
    model = CharLM(nn if args.torch else fused_rnn, args.hidden)
    model.to(group.device, getattr(torch, args.dtype))
    model = group.parallel(model, args.parallel)
    run = Run(model, torch.optim.Adam(model.parameters(), lr=4e-3))
    checkpoints = Checkpoints(args.folder, group)
    checkpoints.load(run)
    resumed = len(run.losses)
    say(f"{group.size} process(es) on {group.device.type}, {resumed} steps done before")

    for step in range(resumed, args.steps):
        loss = model(windows(seen, args.batch, (args.seed << 32) + step, group))
        run.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.losses.append(group.mean(loss.detach()))
        done = step + 1
        if done % args.save_every == 0 or done == args.steps:
            checkpoints.save(run)
            say(f"  step {done:>5}  loss {run.losses[-1]:.6f}  saved")

    with torch.no_grad():
        loss = model(windows(unseen, 8 * args.batch, args.seed, group))
        result = Result(resumed, run.losses, group.mean(loss))
    say(f"unseen text  loss {result.unseen:.6f}")
    checkpoints.close()
    return result


def main(argv: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="of all processes together")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp", help="under torchrun")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"))
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--torch", action="store_true", help="use torch.nn.LSTM")
    args = parser.parse_args(argv)

    group = Group.join()
    result = train(args, group)
    # DDP's last reference has to be gone by now: ended after its group, it may wait for ever.
    gc.collect()
    distributed.destroy_process_group()
    return result


if __name__ == "__main__":
    main()
