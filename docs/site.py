"""What the site shows of files outside docs/: pictures as they are, other files by their names."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HOUSE = Path(__file__).resolve().parents[1]
PICTURE = re.compile(r"\]\(\.\./(benchmarks/results/[^)]+\.png)\)")
OUTSIDE = re.compile(
    r"\[([^]]+)\]\(\.\./((?:benchmarks|examples|tests|csrc)/[^)#]+|README\.md)[^)]*\)"
)


def on_files(files: Files, config: Any) -> Files:
    for name in PICTURE.findall((HOUSE / "docs" / "benchmarks.md").read_text()):
        files.append(File(name, str(HOUSE), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"\1 (`\2` in the repository)", PICTURE.sub(r"](\1)", markdown))
