"""Every example of docs/sequences.md runs, alone."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sequences.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def test_there_are_examples():
    assert len(BLOCKS) == 8


@pytest.mark.parametrize("at", range(len(BLOCKS)))
def test_an_example_runs_and_is_short(at):
    torch.manual_seed(0)
    exec(compile(BLOCKS[at], f"{PAGE.name}, {at + 1}", "exec"), {})
    assert len(BLOCKS[at].splitlines()) <= 15
