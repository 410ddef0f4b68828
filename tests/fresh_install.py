"""Installs each file of dist/ into a virtual environment of its own and tries it there:
`make dist`. torch and what builds come from the environment that runs this."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TRY = """
import sys
from pathlib import Path
import torch, fused_rnn
from fused_rnn import native
package = Path(fused_rnn.__file__).parent
assert package.is_relative_to(sys.prefix), f"{package} is not what was installed"
assert native.UNAVAILABLE is None, native.UNAVAILABLE
for name in ("py.typed", "_C.pyi", "backends/tuning.csv", "bench/workloads.toml"):
    assert (package / name).is_file(), f"{name} was not installed"
model = torch.nn.Sequential(torch.nn.LSTM(8, 16, 2, bidirectional=True)).double()
x = torch.randn(5, 3, 8, dtype=torch.float64)
expected, _ = model(x)
ours = fused_rnn.convert(model)
with fused_rnn.use_backend("cpu"):
    y, _ = ours(x)
y.sum().backward()
torch.testing.assert_close(y, expected)
"""


def attempt(file: Path, folder: Path) -> None:
    """Raises ``CalledProcessError`` where something does not work."""
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": folder, "platbase": folder}))
    # What this environment has besides: not its editable fused_rnn, which hangs on a .pth file
    # that is read here alone.
    (site / "torch_of_another.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    install = ["install", "--no-index", "--no-deps", "--ignore-installed", "--no-build-isolation"]
    away = {"cwd": folder, "env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}
    for arguments in (
        [*pip, "uninstall", "-y", "setuptools"],  # what venv brings is too old to build
        [*pip, *install, str(file)],
        ["-c", TRY],
        ["-m", "fused_rnn"],
    ):
        subprocess.run([python, *arguments], check=True, **away)


def main() -> None:
    files = sorted((ROOT / "dist").iterdir())
    if not files:
        raise SystemExit("there is nothing in dist/")
    for file in files:
        attempt(file, ROOT / "build" / "dist" / file.name)
        print(f"dist/{file.name}: installs and runs", flush=True)


if __name__ == "__main__":
    sys.exit(main())
