"""Compiles the Triton backend's loops for GPUs that are not there, and says what they take.

``python tests/triton_compile.py docs/kernels/triton.md`` compiles all and writes the page's table.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn.backends.triton import tuning
from fused_rnn.cells import CELLS, Cell

# Shared memory that a block may have, by architecture: A100, H100, B200.
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
BEGIN, END = "<!-- compiled:start -->", "<!-- compiled:end -->"
T, N = 5, 64


class Point(NamedTuple):
    """What is compiled: one kernel of one configuration."""

    arch: int
    cell: str
    direction: str
    kernel: str
    precision: str
    H: int
    shape: tuning.Shape

    def __str__(self) -> str:
        names = (self.direction, self.kernel, self.cell, self.precision)
        return f"sm_{self.arch}-{'-'.join(names)}-H{self.H}"


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int


def points() -> Iterator[Point]:
    for arch, cell in itertools.product(SHARED, CELLS):
        for kernel, precision, H, shape in tuning.configurations(CELLS[cell], SHARED[arch]):
            for direction in ("forward", "backward"):
                yield Point(arch, cell, direction, kernel, precision, H, shape)


def arguments(cell: Cell, H: int, dtype: torch.dtype, direction: str, **left_out: None) -> Any:
    """A loop's arguments with every option given; their contents do not matter."""
    from fused_rnn.backends.triton.backward import Backward
    from fused_rnn.backends.triton.forward import Forward

    gates, M = cell.gates * H, T * N

    def new(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype)

    def carry() -> Tensor:
        return new(N, H, dtype=torch.float32)

    has_c = cell.states == 2
    options = {
        "control": new(T, N, dtype=torch.uint8),
        "rows": new(T, N, dtype=torch.int32),
        "h_mask": new(N, H),
        "keep": new(T, N, cell.states * H, dtype=torch.uint8),
    }
    common = {
        "w_hh": new(gates, H),
        "h0": carry(),
        "c0": carry() if has_c else None,
        "h": new(M, H),
        "c": new(M, H) if has_c else None,
        "saved": new(M, cell.saved * H) if cell.saved else None,
    } | options
    if direction == "forward":
        states = {"h_n": carry(), "c_n": carry() if has_c else None, "operand": new(2, N, H)}
        given = {"gx": new(M, gates), "b_hh": new(gates)} | common | states
        return Forward(**(given | left_out))
    outside = {"dh": new(M, H), "dc": new(M, H) if has_c else None}
    found = {"dgx": new(M, gates), "dgh": new(M, gates) if cell.splits_gates else None}
    found |= {"dh0": carry(), "dc0": carry() if has_c else None}
    given = outside | common | found | {"before": new(T, N, dtype=torch.int64)}
    return Backward(**(given | left_out))


def bound(kernel: Any, arch: int, values: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """As a launch would have them: arguments, what of them it is compiled for, options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return backend, *bind(*values, **constants)


def compiled(point: Point, dtype: torch.dtype | None = None) -> Any:
    """The point's kernel, for the half type bfloat16 unless told otherwise."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fused_rnn.backends.triton import launch

    cell = CELLS[point.cell]
    dtype = dtype or (torch.bfloat16 if point.precision == "half" else torch.float32)
    kernel = launch.KERNELS[point.direction][point.kernel]
    values = (arguments(cell, point.H, dtype, point.direction), T, N, 0)
    constants = launch.loop_constants(cell, point.H, point.kernel, point.shape, point.precision)
    backend, *specialized = bound(kernel, point.arch, values, constants)
    options, *source = kernel._pack_args(backend, constants, *specialized)
    target = GPUTarget("cuda", point.arch, 32)
    return triton.compile(ASTSource(kernel, *source), target=target, options=options.__dict__)


def usage(kernel: Any) -> Usage:
    """Of a compiled kernel, asked of its cubin. A spill lies on the stack."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [tool, "-res-usage", cubin]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", told)
    assert found, told
    registers, stack, local = map(int, found.groups())
    return Usage(registers, stack + local, kernel.metadata.shared)


def table() -> Iterator[str]:
    """Rows of a table in Markdown: one a configuration, its architectures side by side."""
    columns = "".join(f" sm_{arch} |" for arch in SHARED)
    yield f"| kernel, cell, precision | H | rows × units × depth, warps, stages |{columns}"
    yield "|---|---:|---|" + "---:|" * len(SHARED)
    found: dict[tuple[Any, ...], dict[int, Usage]] = {}
    for point in points():
        if point.cell == "rnn_relu":
            continue
        used = usage(compiled(point))
        print(point, used, flush=True)
        found.setdefault(point[1:], {})[point.arch] = used
    for (cell, direction, kernel, precision, H, shape), by_arch in found.items():
        tile = f"{shape.rows} × {shape.units} × {shape.depth or H}, {shape.warps}, {shape.stages}"
        cells = "".join(
            f" {by_arch[arch].registers}, {by_arch[arch].shared:,}"
            f"{f', **{by_arch[arch].stack}**' if by_arch[arch].stack else ''} |"
            if arch in by_arch
            else " |"
            for arch in SHARED
        )
        yield f"| `{direction}_{kernel}`, {cell}, {precision} | {H} | {tile} |{cells}"


def main(page: Path) -> None:
    text = page.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(table()) + f"\n{END}{after}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
