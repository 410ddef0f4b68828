"""Does a library that was built elsewhere, say beside a torch without CUDA, run with this torch?

``python benchmarks/gpu_load.py path/to/libfused_rnn_cuda.so``: a copy of the package with that
library, and the others beside it, in place of its own; one LSTM by it and by the reference.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1] / "fused_rnn"


def assemble(library: Path, folder: Path) -> None:
    """The package in ``folder``, with the libraries that stand beside ``library``."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for found in {library, *library.parent.glob("libfused_rnn_*.so")}:
        shutil.copy(found, folder / PACKAGE.name / found.name)


def answer(folder: Path, backend: str) -> str:
    """Runs an LSTM of the package in ``folder``; raises where it cannot, or is wrong."""
    sys.path.insert(0, str(folder))
    import fused_rnn

    if Path(fused_rnn.__file__).resolve().parent != (folder / PACKAGE.name).resolve():
        raise SystemExit(f"gpu_load: another fused_rnn was imported, {fused_rnn.__file__}")
    torch.manual_seed(0)
    module = fused_rnn.LSTM(5, 6, backend=backend).to("cuda" if backend == "cuda" else "cpu")
    x = torch.randn(4, 3, 5).to(module.weight_hh_l0)
    expected = fused_rnn.LSTM(5, 6, backend="reference").to(x)
    expected.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x)[0], expected(x)[0], rtol=1e-3, atol=1e-4)
    return f"loads with torch {torch.__version__}, and its LSTM agrees with the reference"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--backend", default="cuda")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        assemble(arguments.library, Path(folder))
        print(answer(Path(folder), arguments.backend))


if __name__ == "__main__":
    main()
