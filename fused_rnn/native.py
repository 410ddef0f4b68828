"""The native library: loading it, and what its ops return when there are only shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cells import CELLS, carry_dtype

_LIBRARY = Path(__file__).with_name("libfused_rnn_cpu.so")
_CUDA_LIBRARY = _LIBRARY.with_name("libfused_rnn_cuda.so")


# Up to either of these, rows or multiplications, one pass over the weights beats two GEMMs and
# their calls.
SMALL_ROWS = 4
SMALL_PRODUCTS = 2**21


def _load(library: Path, cure: str) -> str | None:
    if not library.exists():
        return f"{library.name} is not in this installation; {cure}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load with torch {torch.__version__}: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return UNAVAILABLE or _load(
        _CUDA_LIBRARY, "install fused_rnn with nvcc at hand, or with FORCE_CUDA=1"
    )


def _no_small_step(*operands: object) -> None:
    return None


def _connect() -> Callable[..., Any]:
    """``_C.small_step``, told where the kernel is; a function that declines without either, or with
    a torch whose tensors it does not know."""
    if UNAVAILABLE is not None or not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return _no_small_step
    kernel = ctypes.cast(ctypes.CDLL(str(_LIBRARY)).fused_rnn_cell, ctypes.c_void_p).value
    try:
        from . import _C

        _C.connect(Tensor, torch.nn.Parameter, kernel, SMALL_ROWS, SMALL_PRODUCTS)
    except (ImportError, AttributeError, ValueError):
        return _no_small_step
    return _C.small_step


class _Gpu(ctypes.Structure):
    """``fused_rnn::Gpu`` of ``csrc/plan.h``."""

    _fields_ = (
        ("name", ctypes.c_char * 256),
        ("capability", ctypes.c_int64),
        ("sms", ctypes.c_int64),
        ("shared_per_sm", ctypes.c_int64),
        ("shared_per_block", ctypes.c_int64),
        ("registers_per_sm", ctypes.c_int64),
        ("registers_per_block", ctypes.c_int64),
        ("threads_per_block", ctypes.c_int64),
        ("l2_bytes", ctypes.c_int64),
        ("clock_ghz", ctypes.c_double),
        ("dram_gb_s", ctypes.c_double),
        ("clusters", ctypes.c_int64 * 5),
    )


def describe_gpu(index: int) -> dict[str, Any]:
    """What the CUDA library says of a device: the fields of :class:`fused_rnn.plan.Device`."""
    if CUDA_UNAVAILABLE is not None:
        raise RuntimeError(f"fused_rnn cannot describe a GPU: {CUDA_UNAVAILABLE}")
    gpu, reason = _Gpu(), ctypes.create_string_buffer(1024)
    describe = ctypes.CDLL(str(_CUDA_LIBRARY)).fused_rnn_describe
    if describe(ctypes.c_int(index), ctypes.byref(gpu), reason, ctypes.c_int(len(reason))):
        raise RuntimeError(f"fused_rnn: {reason.value.decode()}")
    fields = {name: getattr(gpu, name) for name, *_ in _Gpu._fields_}
    return fields | {"name": gpu.name.decode(), "clusters": tuple(gpu.clusters)}


# Why the native ops cannot be used, or None.
UNAVAILABLE = _load(
    _LIBRARY,
    "install fused_rnn with a C++ compiler at hand and without FUSED_RNN_PURE_PYTHON",
)
CUDA_UNAVAILABLE = _load_cuda()
small_step = _connect()


def _one_device(like: str, device: torch.device, **others: Tensor | None) -> None:
    """A fake runs for real tensors too, where one of them is on the meta device."""
    for name, x in others.items():
        if x is not None and x.device != device:
            raise RuntimeError(
                f"fused_rnn: {name} is on another device than {like}; "
                f"move it there with .to({like}.device)"
            )


_BY_ID = {cell.id: cell for cell in CELLS.values()}


def fake_layer(
    cell,
    x,
    w_ih,
    b_ih,
    w_hh,
    b_hh,
    h0,
    c0,
    reverse,
    save,
    control,
    rows,
    w_hr,
    h_mask,
    keep,
    algorithm,
    tf32,
) -> tuple[Tensor, ...]:
    weights = {"w_ih": w_ih, "b_ih": b_ih, "w_hh": w_hh, "b_hh": b_hh, "w_hr": w_hr}
    options = {"control": control, "rows": rows, "h_mask": h_mask, "keep": keep}
    _one_device("x", x.device, **weights, h0=h0, c0=c0, **options)
    spec = _BY_ID[cell]
    *models, gates, width = w_hh.shape
    hidden, lead = gates // spec.gates, x.shape[:-1]
    batch = (*models, (x if rows is None else rows).shape[len(models) + 1])
    carry = carry_dtype(x.dtype)
    has_c = spec.states == 2
    return (
        x.new_empty((*lead, width)),
        x.new_empty((*lead, hidden) if has_c and save else (0,)),
        x.new_empty((*batch, width), dtype=carry),
        x.new_empty((*batch, hidden) if has_c else (0,), dtype=carry),
        x.new_empty((*lead, spec.saved * hidden) if save and spec.saved else (0,)),
    )


def fake_layer_backward(
    cell,
    wanted,
    dh,
    dc,
    dh_n,
    dc_n,
    h,
    c,
    saved,
    x,
    w_ih,
    w_hh,
    h0,
    c0,
    reverse,
    control,
    rows,
    w_hr,
    h_mask,
    keep,
    algorithm,
    tf32,
) -> tuple[Tensor, ...]:
    grads = {"dh": dh, "dc": dc, "dh_n": dh_n, "dc_n": dc_n}
    inputs = {"w_ih": w_ih, "w_hh": w_hh, "h0": h0, "c0": c0, "w_hr": w_hr}
    options = {"control": control, "rows": rows, "h_mask": h_mask, "keep": keep}
    _one_device("x", x.device, **grads, **inputs, h=h, c=c, saved=saved, **options)
    spec = _BY_ID[cell]
    *models, gates, width = w_hh.shape
    hidden = gates // spec.gates
    batch = (*models, (x if rows is None else rows).shape[len(models) + 1])
    carry = carry_dtype(x.dtype)

    def gradient(bit: int, exists: bool, shape: tuple[int, ...], dtype: Any = None) -> Tensor:
        return x.new_empty(shape if wanted & bit and exists else (0,), dtype=dtype)

    return (
        gradient(1, True, x.shape),
        gradient(2, w_ih is not None, (*models, gates, x.shape[-1])),
        gradient(4, w_ih is not None, (*models, gates)),
        gradient(8, True, (*models, gates, width)),
        gradient(16, True, (*models, gates)),
        x.new_empty((*batch, width), dtype=carry),
        x.new_empty((*batch, hidden) if spec.states == 2 else (0,), dtype=carry),
        gradient(32, w_hr is not None, (*models, width, hidden)),
        gradient(64, True, x.shape[:-1], carry),
    )


def fake_step(cell, gx, gh, h, c, save) -> tuple[Tensor, ...]:
    _one_device("gx", gx.device, gh=gh, h=h, c=c)
    spec = _BY_ID[cell]
    batch, hidden = h.shape
    return (
        gx.new_empty((batch, hidden)),
        gx.new_empty((batch, hidden) if spec.states == 2 else (0,)),
        gx.new_empty((batch, spec.saved * hidden) if save and spec.saved else (0,)),
    )


def fake_step_backward(cell, dh1, dc1, h1, c1, saved, h, c) -> tuple[Tensor, ...]:
    _one_device("h1", h1.device, dh1=dh1, dc1=dc1, c1=c1, saved=saved, h=h, c=c)
    spec = _BY_ID[cell]
    batch, hidden = h1.shape
    gates = (batch, spec.gates * hidden)
    return (
        h1.new_empty(gates),
        h1.new_empty(gates if spec.splits_gates else (0,)),
        h1.new_empty((batch, hidden) if spec.splits_gates else (0,)),
        h1.new_empty((batch, hidden) if spec.states == 2 else (0,)),
    )


def fake_bidirectional(
    cell, x, forward, reverse, save, rows, algorithm, tf32
) -> tuple[Tensor, ...]:
    def one(own: Any, is_reverse: bool) -> tuple[Tensor, ...]:
        *operands, control, w_hr, h_mask, keep = own
        options: tuple[Any, ...] = (control, rows, w_hr, h_mask, keep, algorithm, tf32)
        return fake_layer(*(cell, x, *operands, is_reverse, save, *options))

    return one(forward, False) + one(reverse, True)


def fake_bidirectional_backward(
    cell, wanted, grads, kept, x, forward, reverse, rows, algorithm, tf32
) -> tuple[Tensor, ...]:
    def one(i: int, own: Any) -> tuple[Tensor, ...]:
        w_ih, _, w_hh, _, h0, c0, control, w_hr, h_mask, keep = own
        given = (*grads[4 * i : 4 * i + 4], *kept[3 * i : 3 * i + 3], x, w_ih, w_hh, h0, c0)
        options = (i == 1, control, rows, w_hr, h_mask, keep, algorithm, tf32)
        return fake_layer_backward(*(cell, wanted[i], *given, *options))

    return one(0, forward) + one(1, reverse)


def fake_stack(
    cell, x, operands, passed, scale, reverse, save, chunk, side_by_side, algorithm, tf32
) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = ()
    for i in range(0, len(operands), 10):
        *own, control, w_hr, h_mask, keep = operands[i : i + 10]
        drops = i > 0 and len(passed) > 0
        options: tuple[Any, ...] = (control, None, w_hr, h_mask, keep, algorithm, tf32)
        made = fake_layer(*(cell, x, *own, reverse, save, *options))
        results += (torch.empty_like(x) if drops else x.new_empty(0), *made)
        x = made[0]
    return results


def fake_stack_backward(
    cell,
    wanted,
    grads,
    kept,
    x,
    operands,
    passed,
    scale,
    reverse,
    chunk,
    side_by_side,
    algorithm,
    tf32,
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = ()
    for i, of_layer in enumerate(wanted):
        w_ih, _, w_hh, _, h0, c0, control, w_hr, h_mask, keep = operands[10 * i : 10 * i + 10]
        _, h, c, saved = kept[4 * i : 4 * i + 4]
        given = (*grads[4 * i : 4 * i + 4], h, c, saved, x, w_ih, w_hh, h0, c0)
        options = (reverse, control, None, w_hr, h_mask, keep, algorithm, tf32)
        found += fake_layer_backward(*(cell, of_layer | (1 if i else 0), *given, *options))
        x = h
    return found


# csrc/schemas.h, for ops in Python that are to have the same.
SCHEMAS = {
    "layer": "(int cell, Tensor x, Tensor? w_ih, Tensor? b_ih, Tensor w_hh, Tensor? b_hh, "
    "Tensor? h0, Tensor? c0, bool reverse, bool save, Tensor? control, Tensor? rows, "
    "Tensor? w_hr, Tensor? h_mask, Tensor? keep, int algorithm, bool tf32) "
    "-> (Tensor h, Tensor c, Tensor h_n, Tensor c_n, Tensor saved)",
    "layer_backward": "(int cell, int wanted, Tensor? dh, Tensor? dc, Tensor? dh_n, Tensor? dc_n, "
    "Tensor h, Tensor c, Tensor saved, Tensor x, Tensor? w_ih, Tensor w_hh, Tensor? h0, "
    "Tensor? c0, bool reverse, Tensor? control, Tensor? rows, Tensor? w_hr, Tensor? h_mask, "
    "Tensor? keep, int algorithm, bool tf32) -> (Tensor dx, Tensor dw_ih, Tensor db_ih, "
    "Tensor dw_hh, Tensor db_hh, Tensor dh0, Tensor dc0, Tensor dw_hr, Tensor dh_norm)",
    "step": "(int cell, Tensor gx, Tensor gh, Tensor h, Tensor? c, bool save) "
    "-> (Tensor h1, Tensor c1, Tensor saved)",
    "step_backward": "(int cell, Tensor? dh1, Tensor? dc1, Tensor h1, Tensor c1, Tensor saved, "
    "Tensor h, Tensor? c) -> (Tensor dgx, Tensor dgh, Tensor dh, Tensor dc)",
}

FAKES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "layer": fake_layer,
    "layer_backward": fake_layer_backward,
    "bidirectional": fake_bidirectional,
    "bidirectional_backward": fake_bidirectional_backward,
    "stack": fake_stack,
    "stack_backward": fake_stack_backward,
    "step": fake_step,
    "step_backward": fake_step_backward,
}

if UNAVAILABLE is None:
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"fused_rnn::{_name}", _fake)
