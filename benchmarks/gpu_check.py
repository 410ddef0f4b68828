"""``make gpu-check``: all that a GPU is needed for, in one command, offline.

Pieces, in this order: ``build``, ``test``, ``sanitize``, ``micro``, ``stacks``, ``bench``,
``bench_triton`` (``gpu_pieces.py`` says what each does). Each takes at most eight minutes and goes
on where it was stopped: run the command again. All that is found stands in ``<out>/<device>/``,
with a summary in ``summary.md``. The exit status is 0 if every piece that ran passed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import results
from gpu_pieces import PIECES
from gpu_run import PIECE_S, ROOT, STATE, Check, Outcome, say

from fused_rnn.bench import rows

# One line of JSON about the machine, from a process that ends: the GPU is the pieces' alone.
ASK = """
import json, torch
from torch import cuda
gpu = cuda.get_device_properties() if cuda.is_available() else None
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda,
    "device": gpu and cuda.get_device_name(), "capability": gpu and [gpu.major, gpu.minor],
    "memory_gib": gpu and round(gpu.total_memory / 2**30, 1)}))
"""


def ask_device() -> dict[str, Any]:
    answer = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"gpu-check: {sys.executable} has no torch that runs:\n{answer.stderr}")
    return json.loads(answer.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def fetch_earlier(folder: Path) -> None:
    """Results that an earlier run left in the checkout, where ``folder`` is elsewhere and empty."""
    earlier = results.RESULTS / folder.name
    if earlier.is_dir() and not folder.exists():
        shutil.copytree(earlier, folder)
        say(f"going on from {earlier.relative_to(ROOT)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--piece", help="one of them (default: all)")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="results folder")
    parser.add_argument(
        "--cpu-built", type=Path, help="a library built beside a torch without CUDA"
    )
    parser.add_argument("--pytest", default="", help="further options of pytest")
    return parser.parse_args(argv)


def main(
    argv: list[str] | None = None,
    pieces: Mapping[str, Callable[[Check], Outcome]] = PIECES,
    device: dict[str, Any] | None = None,
    limit: float = PIECE_S,
) -> int:
    """The command. ``pieces``, ``device`` and ``limit`` stand in for the real ones in tests."""
    options = parse(argv)
    chosen = [options.piece] if options.piece else [*pieces]
    if chosen[0] not in pieces:
        say(f"gpu-check: there is no piece {chosen[0]!r}: expected one of {', '.join(pieces)}")
        return 2
    device = device or ask_device()
    if not device["device"]:
        say(f"gpu-check: torch {device['torch']} sees no GPU, and all of this needs one")
        return 2
    folder = options.out.resolve() / rows.slug(device["device"])
    fetch_earlier(folder)
    check = Check(folder, device, rows.git_commit(), options)
    if (folder / STATE).exists():
        check.state = json.loads((folder / STATE).read_text())
    say(f"{device['device']}; torch {device['torch']}, commit {check.commit}; results in {folder}")
    passed = [check.run(piece, pieces[piece], limit) for piece in chosen]
    say(f"{sum(passed)} of {len(passed)} pieces passed; see {folder / 'summary.md'}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
