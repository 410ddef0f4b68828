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
LONG = 2000  # steps: a run that its test has to end


@pytest.fixture(autouse=True)
def _no_group_is_left() -> Iterator[None]:
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def arguments(folder: Path, steps: int) -> list[str]:
    return [*SMALL, "--folder", str(folder), "--steps", str(steps)]


def newest(folder: Path) -> int:
    """How many steps the newest whole checkpoint has."""
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)


def torchrun(*args: str) -> subprocess.Popen:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [sys.executable, *command, str(FOLDER / "char_lm.py"), *args],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_as_one_and_each_goes_on_where_another_was_killed(tmp_path):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    ddp = torchrun(*arguments(shared, LONG), "--parallel", "ddp")
    while newest(shared) < 3:
        assert ddp.poll() is None
        time.sleep(0.01)
    os.kill(int((shared / "lock").read_text()), signal.SIGKILL)
    assert ddp.wait() == 1  # torchrun ends the other
    by_ddp = newest(shared)
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


KILLS = 10


def killed_again_and_again(_: int, folder: Path, seed: int) -> None:
    """In a process of its own, which has not yet computed and may fork."""
    main, choose = load("char_lm").main, random.Random(seed)

    def start(steps: int) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                main(arguments(folder, steps))
                status = 0
            finally:
                os._exit(status)
        return pid

    for at in range(KILLS):
        before = newest(folder)
        pid = start(LONG)
        if at % 4:  # a checkpoint later, while the next steps are taken and saved
            while newest(folder) == before:
                assert os.waitpid(pid, os.WNOHANG) == (0, 0)
                time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert os.waitpid(start(newest(folder) + 3), 0)[1] == 0


def test_a_run_that_is_killed_at_any_moment_goes_on_from_the_last_whole_checkpoint(
    tmp_path, request
):
    args = (tmp_path / "killed", request.config.getoption("seed"))
    torch.multiprocessing.spawn(killed_again_and_again, args=args)
    char_lm, steps = load("char_lm"), newest(tmp_path / "killed")
    assert steps >= 10
    killed = char_lm.main(arguments(tmp_path / "killed", steps))
    whole = char_lm.main(arguments(tmp_path / "whole", steps))
    assert (killed.resumed, whole.resumed) == (steps, 0)
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


def test_torch_nn_trains_to_the_same_losses_and_goes_on_from_our_checkpoint(tmp_path):
    main = load("char_lm").main
    ours = main(arguments(tmp_path / "ours", 8))
    half = main(arguments(tmp_path / "both", 4))
    theirs = main([*arguments(tmp_path / "both", 8), "--torch"])
    assert (len(half.losses), theirs.resumed) == (4, 4)
    torch.testing.assert_close(theirs.losses, ours.losses, **ROUNDING)
