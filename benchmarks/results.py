"""The files under ``results/<device>/``.

A run of ``suite.py`` writes ``<date>.csv`` there: names sort by date, and the newest file is what
the README's table is made of. Rows of chosen workloads are in files of other names.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
# The package is beside this folder, also where it is not installed.
sys.path.append(str(ROOT.parent))


def complete(folder: Path = RESULTS) -> list[Path]:
    """The complete runs below ``folder``, the latest first."""
    # Files of other kinds have other names.
    files = [path for path in folder.rglob("*.csv") if re.fullmatch(r"[\d-]+(T\d+Z)?", path.stem)]
    return sorted(files, key=lambda path: path.name, reverse=True)


def newest(folder: Path = RESULTS) -> Path:
    """The latest complete run below ``folder``."""
    files = complete(folder)
    if not files:
        raise FileNotFoundError(f"no results under {folder}: run `make bench` first")
    return files[0]


def of_run(rows: Path, what: str) -> Path:
    """Where else the run that wrote ``rows`` keeps results: ``losses``, the character models' loss
    curves; ``cpu``, rows of the CPU's loops by name; ``aims``, what they are to reach."""
    return rows.with_name(f"{rows.stem}-{what}.csv")
