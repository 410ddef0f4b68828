"""Every op on a GPU, forward and backward, on small shapes: what compute-sanitizer watches.

``make gpu-check PIECE=sanitize`` runs it once under each tool. Whether results are right is the
tests' business; here they only have to be finite.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fused_rnn import autograd
from fused_rnn.backends import triton
from fused_rnn.cells import CELLS, Cell
from fused_rnn.plan import ALGORITHMS, describe, plan
from fused_rnn.wavefront import wavefront

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMS = ("plain", "control", "rows", "reverse", "projection")
# T, N, H: odd sizes, and more units than a block has threads.
SHAPES = ((3, 5, 33), (2, 3, 300))
WIDTH, PROJECTED = 7, 19


def calls(device: str) -> Iterator[str]:
    """Makes every call, and names it after it."""
    for (name, cell), dtype, shape in product(CELLS.items(), DTYPES, SHAPES):
        for form in FORMS:
            if form == "projection" and name != "lstm":
                continue
            for algorithm in algorithms(name, dtype, shape, form, device):
                layer(cell, dtype, shape, form, device, algorithm)
                yield f"{name}, {dtype}, {shape}, {form}, {algorithm}"
        if device == "cuda":  # the CPU has no stacks
            for algorithm in algorithms(name, dtype, shape, "stack", device):
                stack(cell, dtype, shape, device, algorithm)
                yield f"{name}, {dtype}, {shape}, stack, {algorithm}"
        step(cell, dtype, shape, device)
        yield f"{name}, {dtype}, {shape}, step"


def triton_calls(device: str) -> Iterator[str]:
    """The same for Triton's ops. A kernel is compiled when it is called, which takes seconds, and
    is the same source for all cells and dtypes: a few of each."""
    from fused_rnn.backends.triton import ops, tuning

    shared = tuning.shared_bytes(0 if device == "cuda" else None)
    dtypes = (torch.float32, torch.bfloat16)
    for name, dtype, shape in product(("lstm", "gru"), dtypes, SHAPES):
        cell = CELLS[name]
        fits = tuning.resident(cell, shape[-1], tuning.precision(dtype, False), shared)[0]
        for form, algorithm in product(("control", "rows"), tuning.ALGORITHMS):
            if algorithm != "resident" or fits:
                number = tuning.ALGORITHMS.index(algorithm) + 1
                layer(cell, dtype, shape, form, device, number, ops.library)
                yield f"{name}, {dtype}, {shape}, {form}, triton:{algorithm}"
        step(cell, dtype, shape, device, ops.library)
        yield f"{name}, {dtype}, {shape}, step, triton"


def algorithms(
    cell: str, dtype: torch.dtype, shape: tuple[int, int, int], form: str, device: str
) -> list[int]:
    """Those that can run it on this GPU, by their numbers; 0 where there is nothing to choose."""
    if device != "cuda":
        return [0]
    P = PROJECTED if form == "projection" else 0
    refused = plan(cell, dtype, *shape, P, device=describe(0)).refusals
    return [number for number, name in enumerate(ALGORITHMS, 1) if name not in refused]


def layer(
    cell: Cell,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    form: str,
    device: str,
    algorithm: int,
    library: Any = None,
) -> None:
    T, N, H = shape
    P = PROJECTED if form == "projection" else 0
    R, G = P or H, cell.gates * H
    lead: tuple[int, ...] = (T, N)
    options: dict[str, Any] = {"reverse": form == "reverse"}
    if form == "control":  # clear, hold and cut in all combinations
        options["control"] = (torch.arange(T * N) % 8).view(T, N).byte().to(device)
    if form == "rows":
        live = torch.arange(T).unsqueeze(1) < torch.arange(N) % (T + 1)
        options["rows"] = (live.flatten().cumsum(0).view(T, N) - 1).where(live, -1).int().to(device)
        lead = (int(live.sum()),)

    def draw(*size: int) -> Tensor:
        return (torch.randn(size) / 4).to(device, dtype).requires_grad_()

    operands = [draw(*lead, WIDTH), draw(G, R), draw(G), draw(N, R)]
    c0 = draw(N, H) if cell.states == 2 else None
    more = {"w_ih": draw(G, WIDTH), "b_ih": draw(G), "w_hr": draw(P, H) if P else None}
    options |= {"algorithm": algorithm, "library": library}
    outputs = autograd.layer(cell, *operands, c0, **more, **options)
    finish(outputs, [*operands, c0, *more.values()])


def stack(
    cell: Cell,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: str,
    algorithm: int,
    library: Any = None,
) -> None:
    """Two layers side by side, with dropout between them, a step at a time."""
    T, N, H = shape
    G = cell.gates * H

    def draw(*size: int) -> Tensor:
        return (torch.randn(size) / 4).to(device, dtype).requires_grad_()

    x = draw(T, N, WIDTH)
    layers = [{"w_ih": draw(G, width), "w_hh": draw(G, H)} for width in (WIDTH, H)]
    passed = [(torch.arange(T * N * H) % 3 > 0).view(T, N, H).byte().to(device)]
    how = {"chunks": (1, 1), "algorithm": algorithm, "library": library}
    *_, last = wavefront(cell, x, layers, passed=passed, scales=(1.5, 1.5), **how)
    finish(last, [x, *layers[0].values(), *layers[1].values()])


def step(
    cell: Cell,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: str,
    library: Any = None,
) -> None:
    _, N, H = shape
    sizes = (cell.gates * H, cell.gates * H, H, H)[: 3 if cell.states == 1 else 4]
    operands = [torch.randn(N, size).to(device, dtype).requires_grad_() for size in sizes]
    c = operands[3] if cell.states == 2 else None
    finish(autograd.step(cell, *operands[:3], c, library=library), operands)


def finish(outputs: tuple[Tensor | None, ...], inputs: list[Tensor | None]) -> None:
    """Runs the backward, and raises where a result is not finite."""
    results = [x for x in outputs if x is not None and x.requires_grad]
    torch.autograd.backward(results, [torch.ones_like(x) for x in results])
    gradients = [x.grad for x in inputs if x is not None and x.grad is not None]
    if not gradients:
        raise SystemExit("gpu_sanitize: no input has a gradient")
    for x in (*results, *gradients):
        if not x.isfinite().all():
            raise SystemExit("gpu_sanitize: a result is not finite")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(argv).device
    torch.manual_seed(0)
    made = [*calls(device)]
    if (reason := triton.available()) is None and (device == "cpu") == triton.INTERPRETS:
        made += triton_calls(device)
    else:
        print(f"Triton's ops are left out: {reason or f'they do not run on {device}'}")
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(made)} calls made, forward and backward, on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
