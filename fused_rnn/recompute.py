"""Training that keeps the states at few places, and computes the rest again in its backward.

Ops beside those of a library (the native ones, Triton's), of the same form, so that the functions
of ``autograd.py`` serve both: ``layer`` runs the library's forward chunk by chunk and keeps the
states between the chunks, ``layer_backward`` runs each chunk's forward again before its backward.
They are ops and not Python in those functions so that ``torch.compile`` sees one node.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cells import CELLS, carry_dtype
from .native import FAKES, SCHEMAS
from .sequences import HOLD

CHUNKS = 16
"""As many at most: a backward holds what one of them saves."""
ROWS = 1024
"""Of a chunk at least: each call packs the weights, and makes gradients and workspace anew."""

_DX, _DH_NORM = 1, 64  # bits of ``wanted``
_BY_ID = {cell.id: cell for cell in CELLS.values()}
_SCHEMAS = SCHEMAS | {
    # The biases for the forward, in place of what it would have left.
    "layer_backward": SCHEMAS["layer_backward"].replace(
        "Tensor h, Tensor c, Tensor saved", "Tensor? b_ih, Tensor? b_hh, Tensor saved"
    ),
}


class Chunks:
    """The chunks of a layer's steps in the order in which its forward runs: slices of time.

    A chunk of compact rows is padded, and its padding holds: finding out which rows there are would
    wait for a GPU.
    """

    def __init__(
        self,
        lead: torch.Size,
        reverse: bool,
        control: Tensor | None,
        rows: Tensor | None,
        keep: Tensor | None,
    ) -> None:
        self.control, self.rows, self.keep = control, rows, keep
        self.count = lead[0]  # of compact rows, or of steps
        T, N = lead if rows is None else rows.shape
        steps = max(-(-T // CHUNKS), -(-ROWS // max(N, 1)))
        self.slices = [slice(t, min(t + steps, T)) for t in range(0, max(T, 1), steps)]
        if reverse:
            self.slices = [slice(T - at.stop, T - at.start) for at in self.slices]

    def masks(self, at: slice) -> tuple[Tensor | None, Tensor | None]:
        """``control`` and ``keep`` of a chunk."""
        control = None if self.control is None else self.control[at]
        if self.rows is not None:
            held = (self.rows[at] < 0).to(torch.uint8) * HOLD
            control = held if control is None else control | held
        return control, None if self.keep is None else self.keep[at]

    def read(self, x: Tensor | None, at: slice) -> Tensor | None:
        """A chunk of ``x``, ``[steps,N,*]``; an empty tensor stands for none."""
        if x is None or x.dim() == 1:
            return None
        if self.rows is None:
            return x[at]
        rows = self.rows[at]
        if self.count == 0:
            return x.new_zeros((*rows.shape, x.size(-1)))
        return x.index_select(0, rows.clamp(min=0).flatten()).unflatten(0, rows.shape)

    def room(self, like: Tensor) -> Tensor:
        """What :meth:`write` fills; of compact rows there is one more, where padding goes."""
        if self.rows is None or like.dim() == 1:
            return like
        return like.new_empty((self.count + 1, like.size(-1)))

    def write(self, whole: Tensor, at: slice, part: Tensor) -> None:
        if part.dim() == 1:
            return
        if self.rows is None:
            whole[at] = part
        else:
            rows = self.rows[at].flatten()
            whole.index_copy_(0, rows.where(rows >= 0, self.count).long(), part.flatten(0, 1))

    def written(self, whole: Tensor) -> Tensor:
        return whole if self.rows is None or whole.dim() == 1 else whole[: self.count]


def fake_layer(*arguments: Any) -> tuple[Tensor, ...]:
    """As the library's, but that ``save`` asks for c alone.

    ``saved`` are the states that enter the chunks after the first, ``[CHUNKS-1,N,R+(S-1)*H]``.
    Where there are fewer chunks, the rest is zeros.
    """
    *results, h_n, c_n, _ = FAKES["layer"](*arguments)
    width = h_n.size(1) + (c_n.size(1) if c_n.dim() > 1 else 0)
    return *results, h_n, c_n, h_n.new_empty((CHUNKS - 1, h_n.size(0), width))


def layer(
    library, cell, x, w_ih, b_ih, w_hh, b_hh, h0, c0, reverse, save, control, rows, w_hr, h_mask,
    keep, algorithm, tf32,
):  # fmt: skip
    weights, how = (w_ih, b_ih, w_hh, b_hh), (algorithm, tf32)
    options = (control, rows, w_hr, h_mask, keep)
    h, c, *_, saved = fake_layer(cell, x, *weights, h0, c0, reverse, save, *options, *how)
    chunks = Chunks(x.shape[:-1], reverse, control, rows, keep)
    saved[len(chunks.slices) - 1 :].zero_()
    shown, entering = [chunks.room(h), chunks.room(c)], (h0, c0)
    for number, at in enumerate(chunks.slices):
        if number:
            torch.cat(entering[: _BY_ID[cell].states], -1, out=saved[number - 1])
        control_at, keep_at = chunks.masks(at)
        *found, h_n, c_n, _ = library.layer(
            cell, chunks.read(x, at), *weights, *entering, reverse, save, control_at, None, w_hr,
            h_mask, keep_at, *how,
        )  # fmt: skip
        for whole, part in zip(shown, found, strict=True):
            chunks.write(whole, at, part)
        entering = h_n, c_n
    return *map(chunks.written, shown), *entering, saved


def layer_backward(
    library, cell, wanted, dh, dc, dh_n, dc_n, b_ih, b_hh, saved, x, w_ih, w_hh, h0, c0, reverse,
    control, rows, w_hr, h_mask, keep, algorithm, tf32,
):  # fmt: skip
    """Gradients of weights are summed over the chunks in the carry dtype."""
    chunks, has_c = Chunks(x.shape[:-1], reverse, control, rows, keep), _BY_ID[cell].states == 2
    carry, how = carry_dtype(x.dtype), (algorithm, tf32)
    dx = chunks.room(torch.empty_like(x) if wanted & _DX else x.new_empty(0))
    norms = x.new_empty((*x.shape[:-1], 1) if wanted & _DH_NORM else 0, dtype=carry)
    norms = chunks.room(norms)

    def gradients(number: int, at: slice, dh_n: Any, dc_n: Any) -> list[Tensor]:
        """Those of a chunk but dx; what it was computed from is gone before the next one."""
        entering = h0, c0
        if number:
            h_at, c_at = saved[number - 1].tensor_split([w_hh.size(1)], -1)
            entering = h_at, c_at if has_c else None
        control_at, keep_at = chunks.masks(at)
        x_at, options = chunks.read(x, at), (control_at, None, w_hr, h_mask, keep_at)
        h, c, _, _, gates = library.layer(
            cell, x_at, w_ih, b_ih, w_hh, b_hh, *entering, reverse, True, *options, *how
        )
        dx_at, *found, norms_at = library.layer_backward(
            cell, wanted, chunks.read(dh, at), chunks.read(dc, at), dh_n, dc_n, h, c, gates, x_at,
            w_ih, w_hh, *entering, reverse, *options, *how,
        )  # fmt: skip
        chunks.write(dx, at, dx_at)
        chunks.write(norms, at, norms_at.unsqueeze(-1) if norms.dim() > 1 else norms_at)
        return found

    sums: list[Tensor] = []
    for number, at in reversed([*enumerate(chunks.slices)]):
        *found, dh_n, dc_n, dw_hr = gradients(number, at, dh_n, dc_n)
        found.append(dw_hr)
        if sums:
            for total, part in zip(sums, found, strict=True):
                total.add_(part)
        else:
            sums = [part.to(carry) for part in found]
    *found, dw_hr = (total.to(x.dtype) for total in sums)
    norms = chunks.written(norms)
    norms = norms.squeeze(-1) if norms.dim() > 1 else norms
    return chunks.written(dx), *found, dh_n, dc_n, dw_hr, norms


def define(library: str) -> torch.library.Library:
    """Define the ops over ``torch.ops.<library>``'s; they stay as long as what is returned."""
    name = f"{library}_recompute"
    made = torch.library.Library(name, "DEF")
    fakes = {"layer": fake_layer, "layer_backward": FAKES["layer_backward"]}
    for implementation in (layer, layer_backward):
        op = implementation.__name__
        made.define(op + _SCHEMAS[op])
        for device in ("CPU", "CUDA"):
            made.impl(op, partial(implementation, getattr(torch.ops, library)), device)
        torch.library.register_fake(f"{name}::{op}", fakes[op], lib=made)
    return made


def over(library: Any) -> Any:
    """What has the ops over those of ``library`` as attributes."""
    return getattr(torch.ops, f"{library.name}_recompute")


_native = define("fused_rnn")
