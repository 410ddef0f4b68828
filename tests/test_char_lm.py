"""``examples/char_lm.py``: on one process or two, killed or not, every run has the same losses."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_examples import FOLDER, load
from torch import distributed

pytestmark = [
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()),
        reason="needs torch.distributed with gloo",
    ),
    pytest.mark.xdist_group("char_lm"),
]

# In float64 rounding is far below what one step changes.
SMALL = ["--dtype", "float64", "--hidden", "8", "--batch", "4", "--save-every", "1"]
ROUNDING = {"rtol": 1e-11, "atol": 0}


@pytest.fixture(autouse=True)
def _no_group_is_left() -> Iterator[None]:
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def arguments(folder: Path, steps: int) -> list[str]:
    return [*SMALL, "--folder", str(folder), "--steps", str(steps)]


def torchrun(*args: str) -> subprocess.Popen:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [sys.executable, *command, str(FOLDER / "char_lm.py"), *args],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_as_one_and_each_goes_on_where_another_was_killed(tmp_path):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    ddp = torchrun(*arguments(shared, 10**6), "--parallel", "ddp")
    while not (shared / "step-000003").exists():
        assert ddp.poll() is None
        time.sleep(0.01)
    os.kill(int((shared / "lock").read_text()), signal.SIGKILL)
    assert ddp.wait() == 1  # torchrun ends the other
    by_ddp = max(int(path.name.removeprefix("step-")) for path in shared.glob("step-*"))
    fsdp = torchrun(*arguments(shared, by_ddp + 3), "--parallel", "fsdp")
    assert fsdp.wait() == 0

    main = load("char_lm").main
    finished = main(arguments(shared, by_ddp + 5))
    assert finished.resumed == by_ddp + 3
    expected = main(arguments(alone, by_ddp + 5))
    assert expected.resumed == 0
    assert expected.losses[-1] < expected.losses[0]
    torch.testing.assert_close(finished.losses, expected.losses, **ROUNDING)
    torch.testing.assert_close(finished.unseen, expected.unseen, **ROUNDING)


STEPS, KILLS = 6, 10


def killed_again_and_again(_: int, folder: Path, seed: int) -> None:
    """Each run is to go ``STEPS`` further than the one before, which was killed on its way.

    In a process of its own, which has not yet computed and may fork.
    """
    main, choose = load("char_lm").main, random.Random(seed)

    def start(name: str, steps: int) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                main(arguments(folder / name, steps))
                status = 0
            finally:
                os._exit(status)
        return pid

    begin = time.monotonic()
    assert os.waitpid(start("first", STEPS), 0)[1] == 0
    lasts, killed = time.monotonic() - begin, 0
    for at in range(KILLS):
        pid = start("killed", STEPS * (at + 1))
        time.sleep(choose.uniform(0, lasts))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert killed > KILLS / 2
    assert os.waitpid(start("killed", STEPS * KILLS), 0)[1] == 0


def test_a_run_that_is_killed_at_any_moment_goes_on_from_the_last_whole_checkpoint(
    tmp_path, request
):
    args = (tmp_path, request.config.getoption("seed"))
    torch.multiprocessing.spawn(killed_again_and_again, args=args)
    char_lm = load("char_lm")
    killed = char_lm.main(arguments(tmp_path / "killed", STEPS * KILLS))
    whole = char_lm.main(arguments(tmp_path / "whole", STEPS * KILLS))
    assert (killed.resumed, whole.resumed) == (STEPS * KILLS, 0)
    assert killed.losses == whole.losses
    assert killed.unseen == whole.unseen
    assert len(list((tmp_path / "killed").glob("step-*"))) == char_lm.KEPT


def test_what_cannot_run_says_why(tmp_path, monkeypatch):
    char_lm = load("char_lm")
    group = char_lm.Group.join()
    monkeypatch.setattr(char_lm.Group, "join", lambda: group._replace(size=3))
    with pytest.raises(SystemExit, match="--batch 4 must divide among 3 processes"):
        char_lm.main(arguments(tmp_path, 1))
    first = char_lm.Checkpoints(tmp_path, group)
    with pytest.raises(SystemExit, match=f"process {os.getpid()} writes to"):
        char_lm.Checkpoints(tmp_path, group)
    first.close()
    char_lm.Checkpoints(tmp_path, group).close()
