"""Every Python block of the documents runs, alone, and every link between files leads somewhere."""

import re
from pathlib import Path

import pytest
import torch

HOUSE = Path(__file__).resolve().parents[1]
PAGES = [HOUSE / "README.md", *sorted((HOUSE / "docs").rglob("*.md"))]
PROSE = [
    path
    for folder in (".", "benchmarks", "examples", "tests")
    for path in (HOUSE / folder).glob("*.md")
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+://)([^)#\s]*)(#[^)\s]*)?\)")
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{at}")
    for page in PAGES
    for at, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]


def test_there_are_examples():
    pages = {block.id.rpartition("-")[0] for block in BLOCKS}
    assert pages >= {"README", "index", "migration", "guide", "sequences", "faq", "cuda-plan"}


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_runs_and_is_short(block, capsys):
    torch.manual_seed(0)
    exec(compile(block, "the example", "exec"), {})
    assert len(block.splitlines()) <= 15


def anchor(heading: str) -> str:
    """Where a heading's link goes, on GitHub as on the site."""
    return re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize(
    "page", [*PAGES[1:], *PROSE], ids=lambda page: page.relative_to(HOUSE).as_posix()
)
def test_links_lead_somewhere(page):
    for path, place in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        if place and target.suffix == ".md":
            text = target.read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert place[1:] in map(anchor, headings), path + place
