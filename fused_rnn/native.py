"""The native library: loading it, and what its ops return when there are only shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .cells import CELLS, carry_dtype

_LIBRARY = Path(__file__).with_name("libfused_rnn_cpu.so")


def _load() -> str | None:
    if not _LIBRARY.exists():
        return (
            f"{_LIBRARY.name} is not in this installation; install fused_rnn with a C++ compiler "
            "at hand and without FUSED_RNN_PURE_PYTHON"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load with torch {torch.__version__}: {error}"
    return None


def _no_small_step(*operands: object) -> bool:
    return False


def _connect() -> Callable[..., bool]:
    """``_C.small_step``, told where the kernel is; without either, a function that declines."""
    try:
        from . import _C
    except ImportError:
        return _no_small_step
    if UNAVAILABLE is not None or not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return _no_small_step
    kernel = ctypes.cast(ctypes.CDLL(str(_LIBRARY)).fused_rnn_cell, ctypes.c_void_p).value
    _C.connect(Tensor, torch.nn.Parameter, kernel)
    return _C.small_step


# Why the native ops cannot be used, or None.
UNAVAILABLE = _load()
small_step = _connect()


def _one_device(device: torch.device, **others: Tensor | None) -> None:
    """A fake runs for real tensors too, where one of them is on the meta device."""
    for name, x in others.items():
        if x is not None and x.device != device:
            raise RuntimeError(
                f"fused_rnn: {name} is on another device than gx; move it there with .to(gx.device)"
            )


_BY_ID = {cell.id: cell for cell in CELLS.values()}


def _fake_layer(
    cell, gx, w_hh, b_hh, h0, c0, reverse, save, control, rows, w_hr, h_mask, keep
) -> tuple[Tensor, ...]:
    _one_device(
        gx.device, w_hh=w_hh, b_hh=b_hh, h0=h0, c0=c0, control=control, rows=rows, w_hr=w_hr
    )
    spec = _BY_ID[cell]
    hidden, width = w_hh.shape[0] // spec.gates, w_hh.shape[1]
    lead, batch = gx.shape[:-1], (gx if rows is None else rows).shape[1]
    carry = carry_dtype(gx.dtype)
    has_c = spec.states == 2
    return (
        gx.new_empty((*lead, width)),
        gx.new_empty((*lead, hidden) if has_c and save else (0,)),
        gx.new_empty((batch, width), dtype=carry),
        gx.new_empty((batch, hidden) if has_c else (0,), dtype=carry),
        gx.new_empty((*lead, spec.saved * hidden) if save and spec.saved else (0,)),
    )


def _fake_layer_in_place(cell, gx, w_hh, b_hh, h0, c0, reverse, *options) -> tuple[Tensor, ...]:
    return _fake_layer(cell, gx, w_hh, b_hh, h0, c0, reverse, True, *options)[:4]


def _fake_layer_backward(
    cell,
    dh,
    dc,
    dh_n,
    dc_n,
    h,
    c,
    saved,
    w_hh,
    h0,
    c0,
    reverse,
    control,
    rows,
    w_hr,
    h_mask,
    keep,
) -> tuple[Tensor, ...]:
    _one_device(
        h.device,
        dh=dh,
        dc=dc,
        dh_n=dh_n,
        dc_n=dc_n,
        c=c,
        saved=saved,
        w_hh=w_hh,
        h0=h0,
        c0=c0,
        control=control,
        rows=rows,
        w_hr=w_hr,
    )
    spec = _BY_ID[cell]
    hidden, width = w_hh.shape[0] // spec.gates, w_hh.shape[1]
    lead, batch = h.shape[:-1], (h if rows is None else rows).shape[1]
    carry = carry_dtype(h.dtype)
    gates = (*lead, spec.gates * hidden)
    has_holes = control is not None or rows is not None
    return (
        h.new_empty(gates),
        h.new_empty((0,) if spec.folds_bias else gates),
        h.new_empty((batch, width), dtype=carry),
        h.new_empty((batch, hidden) if spec.states == 2 else (0,), dtype=carry),
        h.new_empty((*lead, width) if has_holes else (0,)),
        h.new_empty((0,) if w_hr is None else (*lead, width)),
    )


def _fake_step(cell, gx, gh, h, c, save) -> tuple[Tensor, ...]:
    _one_device(gx.device, gh=gh, h=h, c=c)
    spec = _BY_ID[cell]
    batch, hidden = h.shape
    return (
        gx.new_empty((batch, hidden)),
        gx.new_empty((batch, hidden) if spec.states == 2 else (0,)),
        gx.new_empty((batch, spec.saved * hidden) if save and spec.saved else (0,)),
    )


def _fake_step_backward(cell, dh1, dc1, h1, c1, saved, h, c) -> tuple[Tensor, ...]:
    _one_device(h1.device, dh1=dh1, dc1=dc1, c1=c1, saved=saved, h=h, c=c)
    spec = _BY_ID[cell]
    batch, hidden = h1.shape
    gates = (batch, spec.gates * hidden)
    return (
        h1.new_empty(gates),
        h1.new_empty((0,) if spec.folds_bias else gates),
        h1.new_empty((0,) if spec.folds_bias else (batch, hidden)),
        h1.new_empty((batch, hidden) if spec.states == 2 else (0,)),
    )


if UNAVAILABLE is None:
    torch.library.register_fake("fused_rnn::layer", _fake_layer)
    torch.library.register_fake("fused_rnn::layer_", _fake_layer_in_place)
    torch.library.register_fake("fused_rnn::layer_backward", _fake_layer_backward)
    torch.library.register_fake("fused_rnn::step", _fake_step)
    torch.library.register_fake("fused_rnn::step_backward", _fake_step_backward)
