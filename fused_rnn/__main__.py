"""``python -m fused_rnn``: what a bug report should hold.

What was built, what runs here and why the rest does not, and a self-test: each backend that is
available against torch.nn in float64. The exit status is 1 where one is wrong.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from itertools import product

import torch
from torch import nn

import fused_rnn

from . import __version__, native
from .backends import BACKENDS
from .bench import check
from .bench.arithmetic import tf32
from .bench.workloads import GATES, make_cases


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


def _libraries() -> Iterator[tuple[str, str]]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    yield "triton", triton
    yield "oneDNN", "available" if torch.backends.mkldnn.is_available() else "not in this torch"
    yield (
        "CUDA",
        native.CUDA_UNAVAILABLE or f"the library is loaded; torch has {torch.version.cuda}",
    )
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, cuDNN {_cudnn()}"


def _cudnn() -> str:
    return str(torch.backends.cudnn.version() or "none")


def _self_test() -> Iterator[tuple[str, str, bool]]:
    """A line for each backend and device that it runs on, and whether its results are right."""
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    for (name, backend), device in product(BACKENDS.items(), devices):
        if backend.available() is not None:
            continue
        found: list[check.Comparison] = []
        try:
            for cell in GATES:
                w = replace(check.PLAIN, cell=cell)
                providers, options = {"fused_rnn": fused_rnn, "torch": nn}, {"backend": name}
                cases = make_cases(w, providers, options={"fused_rnn": options}, device=device)
                case = cases["fused_rnn"]
                # mypy takes an attribute of an nn.Module for a tensor or a module.
                problem = case.module.describe(case.input)  # type: ignore[operator]
                if backend.supports(problem) is not None:
                    break
                with tf32(False):
                    found += check.compare_cases(cell, cases, "train")
        except Exception as error:  # told in a report, whatever it is
            yield f"test {name}", f"{device}: failed: {error}", False
            continue
        if found:
            worst = max(found, key=lambda c: (c.share != c.share, c.share))
            told = f"{device}: {len(found)} tensors, worst error {worst.share:.0%} of the allowed"
            yield f"test {name}", told if worst.ok else f"{told}: {worst}", worst.ok


def main() -> int:
    lines = [
        ("fused_rnn", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        *_native(),
        *_libraries(),
        *(
            (f"backend {name}", backend.available() or "available")
            for name, backend in BACKENDS.items()
        ),
    ]
    tested = [*_self_test()]
    lines += [(name, text) for name, text, _ in tested]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    return 0 if all(right for *_, right in tested) else 1


if __name__ == "__main__":
    sys.exit(main())
