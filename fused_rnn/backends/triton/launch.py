"""What the ops run: torch's products over all rows, and between them the loop's one launch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from ...cells import Cell
from . import backward as back
from . import forward as fore
from . import tuning
from .step import Step
from .step import step_backward as step_backward_kernel
from .step import step_forward as step_forward_kernel
from .steps import WIDENS

if TYPE_CHECKING:
    from .ops import Layer

KERNELS: dict[str, dict[str, Any]] = {
    "forward": {"resident": fore.forward_resident, "tiled": fore.forward_tiled},
    "backward": {"resident": back.backward_resident, "tiled": back.backward_tiled},
}
if isinstance(fore.forward_resident, triton.JITFunction) == bool(WIDENS):
    raise RuntimeError(
        "fused_rnn: TRITON_INTERPRET was changed after Triton had been imported; set it before"
    )
# Of kernels whose rows and units are independent.
ROWS, UNITS, DEPTH = 16, 64, 32
_flags = threading.Lock()


@contextlib.contextmanager
def _products(like: Tensor, tf32: bool) -> Iterator[None]:
    """torch's products, as torch's flag for RNNs wants them, not its flag for matrix products.

    The latter is one for the whole process: another thread's products that are launched in the same
    moment follow it as well.
    """
    matmul: Any = torch.backends.cuda.matmul
    wanted = "tf32" if tf32 else "ieee"
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(like.device.type):
            stack.enter_context(torch.autocast(like.device.type, enabled=False))
        if like.is_cuda and like.dtype is torch.float32:
            stack.enter_context(_flags)
            before = matmul.fp32_precision
            if before != wanted:
                matmul.fp32_precision = wanted
                stack.callback(setattr, matmul, "fp32_precision", before)
        yield


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if not x.is_cuda and not WIDENS:
        raise RuntimeError(
            f"fused_rnn: Triton's kernels run on GPUs, and the input is on {x.device}; on the CPU "
            "its interpreter runs them (TRITON_INTERPRET=1)"
        )
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _constants(cell: Cell, H: int) -> dict[str, int]:
    return {"CELL": cell.id, "GATES": cell.gates, "SAVED": cell.saved, "H": H}


def _precision(p: Layer) -> str:
    return tuning.precision(p.x.dtype, p.tf32)


def _choice(p: Layer) -> tuple[str, tuning.Shape]:
    shared = tuning.shared_bytes(p.x.device.index if p.x.is_cuda else None)
    return tuning.choose(p.cell, p.H, _precision(p), p.algorithm, shared)


def _loop(p: Layer, kernels: dict[str, Any], arguments: Any) -> None:
    kernel, shape = _choice(p)
    constants = loop_constants(p.cell, p.H, kernel, shape, _precision(p))
    grid = (triton.cdiv(p.N, shape.rows),)
    kernels[kernel][grid](arguments, p.T, p.N, int(p.reverse), **constants)


def loop_constants(
    cell: Cell, H: int, kernel: str, shape: tuning.Shape, precision: str
) -> dict[str, Any]:
    """What a loop is compiled for, beside the dtypes of its arguments and which are None."""
    sizes = {"ROWS": shape.rows, "UNITS": shape.units} | _constants(cell, H)
    if kernel == "tiled":
        sizes |= {"DEPTH": shape.depth, "width": H}
    limit = {} if torch.version.hip else {"maxnreg": shape.registers}  # NVIDIA's word
    return {
        **sizes,
        **limit,
        "STATES": cell.states,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",  # half types have but one way
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        "enable_fp_fusion": True,
    }


def _input_product(p: Layer, b_ih: Tensor | None) -> Tensor:
    if p.w_ih is None:
        return p.x
    with _products(p.x, p.tf32):
        return torch.nn.functional.linear(p.x, p.w_ih, b_ih)


def forward(
    p: Layer,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    h_n: Tensor,
    c_n: Tensor | None,
    saved: Tensor | None,
) -> None:
    """Fills h, c, h_n, c_n and saved."""
    gx = _input_product(p, b_ih)
    operand = None
    if _choice(p)[0] == "tiled":
        operand = gx.new_empty((2, p.N, p.H))
    options = (p.control, p.rows, p.h_mask, p.keep)
    arguments = fore.Forward(gx, p.w_hh, b_hh, h0, c0, *options, h, c, saved, h_n, c_n, operand)
    with _on(gx):
        _loop(p, KERNELS["forward"], arguments)


def backward(
    p: Layer,
    wanted: int,
    grads: tuple[Any, ...],
    kept: tuple[Any, ...],
    h0: Tensor | None,
    c0: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_ih, b_ih, w_hh and b_hh; dh0 and dc0, of the final states, are replaced by
    those of the initial ones."""
    (dh, dc, dh0, dc0), (h, c, saved, biases) = grads, kept
    shown = p.rows_of(p.gates)
    dgx = p.x.new_empty(shown)
    dgh = p.x.new_empty(shown) if p.cell.splits_gates else None
    before = None
    with _on(p.x):
        if p.control is not None or p.rows is not None:
            before = torch.empty((p.T, p.N), dtype=torch.int64, device=p.x.device)
        options = (p.control, p.rows, p.h_mask, p.keep)
        arguments = back.Backward(
            dh, dc, h, c, saved, p.w_hh, h0, c0, before, *options, dgx, dgh, dh0, dc0
        )
        if before is not None:
            back.trace_back[(triton.cdiv(p.N, ROWS),)](
                arguments, before, p.T, p.N, int(p.reverse), ROWS=ROWS, num_warps=1,
                enable_fp_fusion=True,
            )  # fmt: skip
        operand = _operands(p, arguments) if wanted & 8 or p.again else None
        if biases is not None and operand is not None:
            arguments = arguments._replace(saved=_gates(p, biases, operand))
        _loop(p, KERNELS["backward"], arguments)
    flat = dgx.view(-1, p.gates)
    flat_h = flat if dgh is None else dgh.view(-1, p.gates)
    with _products(p.x, p.tf32):
        dx = dgx if p.w_ih is None else (dgx @ p.w_ih if wanted & 1 else None)
        dw_ih = flat.T @ p.x.view(-1, p.I) if wanted & 2 and p.w_ih is not None else None
        dw_hh = flat_h.T @ operand if operand is not None else None
        db_ih = _sum(flat) if wanted & 4 and p.w_ih is not None else None
        db_hh = _sum(flat_h) if wanted & 16 else None
    return dx, dw_ih, db_ih, dw_hh, db_hh


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=torch.float32).to(rows.dtype)


def _operands(p: Layer, arguments: back.Backward) -> Tensor:
    """``[M,H]``: the h that entered each row's recurrent product, cleared and masked."""
    operand = p.x.new_empty((p.M, p.H))
    grid = (triton.cdiv(p.T * p.N, ROWS), triton.cdiv(p.H, UNITS))
    back.gather_operands[grid](
        arguments, operand, p.T, p.N, int(p.reverse), H=p.H, ROWS=ROWS, UNITS=UNITS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return operand


def _gates(p: Layer, biases: Tensor, operand: Tensor) -> Tensor:
    """What the forward would have saved, from the states."""
    b_ih, b_hh = biases.view(2, -1)
    gx = _input_product(p, None if p.w_ih is None else b_ih)
    saved = operand.new_empty((p.M, p.cell.saved * p.H))
    arguments = fore.Gates(gx, operand, p.w_hh, b_hh, saved)
    fore.gates_again[_each(p.M, p.H)](
        arguments, p.M, p.H, **_constants(p.cell, p.H), ROWS=ROWS, UNITS=UNITS, DEPTH=DEPTH,
        PRECISION="tf32" if p.tf32 else "ieee", enable_fp_fusion=True,
    )  # fmt: skip
    return saved


def _each(N: int, H: int) -> tuple[int, int]:
    return triton.cdiv(N, ROWS), triton.cdiv(H, UNITS)


def step(cell: Cell, *tensors: Any) -> None:
    """``gx, gh, h, c, h1, c1, saved``, of which the last three are filled."""
    arguments = Step(*tensors)
    N, H = arguments.h.shape
    with _on(arguments.h):
        step_forward_kernel[_each(N, H)](
            arguments, N, **_constants(cell, H), ROWS=ROWS, UNITS=UNITS, enable_fp_fusion=True
        )


def step_backward(cell: Cell, kept: tuple[Any, ...], found: Any) -> None:
    """``h, c, h1, c1, saved, dh1, dc1``; dgx, dgh, dh and dc are filled."""
    arguments = Step(None, None, *kept, *found)
    N, H = arguments.h.shape
    with _on(arguments.h):
        step_backward_kernel[_each(N, H)](
            arguments, N, **_constants(cell, H), ROWS=ROWS, UNITS=UNITS, enable_fp_fusion=True
        )
