"""What every test runs under: one seed, one thread, exact float32, and ``--full``'s grids."""

import fcntl
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

import numerics
import pytest
import torch

LOCKS = Path(__file__).resolve().parents[1] / "build" / "locks"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="run the complete grids; without it a subset that holds every pair of values",
    )
    parser.addoption(
        "--most",
        type=int,
        default=300,
        metavar="N",
        help="of a grid with more combinations --full runs a random sample of as many, another "
        "with each --seed (default: 300; 0: all)",
    )
    parser.addoption(
        "--seed", type=int, default=0, help="seed of all random data (default: 0)", metavar="N"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # of several processes that collect at once
    # Before any test module is imported: their decorators ask for the grids.
    for name in ("full", "most", "seed"):
        setattr(numerics, name.upper(), config.getoption(name))
    # A machine with a GPU may have torch and pytest alone.
    if importlib.util.find_spec("hypothesis") is not None:
        import hypothesis

        hypothesis.settings.register_profile(
            "fused_rnn",
            max_examples=400 if numerics.FULL else 40,
            deadline=None,
            derandomize=True,
            database=None,
        )
        hypothesis.settings.load_profile("fused_rnn")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Under pytest-xdist: a test that is marked ``alone`` waits until the others have ended."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    LOCKS.mkdir(parents=True, exist_ok=True)
    with (LOCKS / "room").open("w") as room:
        # One at a time through the door, or those who share the room would never leave it empty.
        with (LOCKS / "door").open("w") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            return (yield)
        finally:
            # A process that the test left behind may hold the file open.
            fcntl.flock(room, fcntl.LOCK_UN)


@pytest.fixture(autouse=True)
def _seed_and_one_thread(request: pytest.FixtureRequest) -> None:
    """Small tensors are fastest on one thread; tests about threads set their own number."""
    seed = request.config.getoption("seed")
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """cuDNN multiplies float32 in TF32 unless told otherwise; the tests' rule is for float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of the ops: torch fills what it allocates, so reading it before writing shows.

    On CUDA torch's own products would refuse, unless an environment variable gives cuBLAS another
    workspace: a warning will do.
    """
    is_op_test = request.node.get_closest_marker("op") is not None
    torch.use_deterministic_algorithms(is_op_test, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)
