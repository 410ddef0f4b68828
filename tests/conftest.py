"""What every test runs under: one seed, one thread, and the grids that ``--full`` completes."""

import random
from collections.abc import Iterator

import hypothesis
import numerics
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="run the complete grids; without it a subset that holds every pair of values",
    )
    parser.addoption(
        "--seed", type=int, default=0, help="seed of all random data (default: 0)", metavar="N"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module is imported: their decorators ask for the grids.
    numerics.FULL = config.getoption("full")
    hypothesis.settings.register_profile(
        "fused_rnn",
        max_examples=400 if numerics.FULL else 40,
        deadline=None,
        derandomize=True,
        database=None,
    )
    hypothesis.settings.load_profile("fused_rnn")


@pytest.fixture(autouse=True)
def _seed_and_one_thread(request: pytest.FixtureRequest) -> None:
    """Small tensors are fastest on one thread; tests about threads set their own number."""
    seed = request.config.getoption("seed")
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of the ops: torch fills what it allocates, so reading it before writing shows."""
    is_op_test = request.node.get_closest_marker("op") is not None
    torch.use_deterministic_algorithms(is_op_test)
    yield
    torch.use_deterministic_algorithms(False)
