"""``python -m fused_rnn``: what was built, what runs here, and why the rest does not."""

from __future__ import annotations

import platform

import torch

from . import __version__
from .backends import BACKENDS


def _native() -> list[tuple[str, str]]:
    try:
        from . import _C
    except ImportError as error:
        return [("native", f"not built: {error}")]
    info = _C.build_info()
    has = [name for name, present in _C.cpu_features().items() if present]
    return [
        ("compiler", info["compiler"]),
        ("flags", info["flags"]),
        ("built with", f"torch {info['torch']}; runs with torch 2.10 and newer"),
        ("kernels", ", ".join(info["instruction_sets"])),
        ("processor", ", ".join(has) or "baseline"),
        ("runs", f"the {_C.instruction_set()} kernels"),
    ]


def main() -> None:
    lines = [
        ("fused_rnn", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        *_native(),
        *(
            (f"backend {name}", backend.available() or "available")
            for name, backend in BACKENDS.items()
        ),
    ]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    main()
