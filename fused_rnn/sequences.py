"""What torch.nn's modules cannot do with sequences: ends, resets and cuts inside the loop.

All of it becomes what a backend's loop takes: ``control`` and ``rows``
(``docs/architecture.md`` has their meaning). Everything here is time-major.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import States

CLEAR, HOLD, CUT = 1, 2, 4


_ENDS = (
    "cannot be had with {}, which says itself where sequences end; pass the padded tensor instead"
)
_REFUSED = {
    ("lengths", "packed"): _ENDS.format("a PackedSequence"),
    ("reset", "packed"): _ENDS.format("a PackedSequence"),
    ("lengths", "jagged"): _ENDS.format("jagged input"),
    ("reset", "jagged"): _ENDS.format("jagged input"),
    ("lengths", "unbatched"): "are for a batch; of a single sequence pass the steps that count",
}


class Options(NamedTuple):
    """What a call asks for beyond torch.nn.

    Args:
        lengths: ``[N]`` integers in [0, T], on the input's device: where each sequence ends.
        reset: ``[T,N]`` bool: the state is cleared before these steps.
        padding_value: of the output past a sequence's end.
        return_cell_states: return c of the last layer over time.
        last_step_only: return the output of each sequence's last step alone.
        tbptt: gradients are cut each so many steps.
        reverse: one direction only, from the end to the start.
        rows: ``[T,N]`` int32: where each step stands in compact input, -1 past the end.
        initial: the state that a reset brings back, a tuple of ``[L*D,*]``. ``None``: zeros.
        recurrent_dropout: probability that a unit of h is zeroed, for a whole sequence, on its way
            into the recurrent product.
        weight_dropout: probability that an element of a recurrent weight is zeroed.
        zoneout: for each state the probability that a unit stays what it was. Empty: 0
        training: whether zoneout draws; without, each unit stays by its share.
        recompute: keep for the backward the states at few steps only.
        flow: what ``gradient_flow`` records of this call.
    """

    lengths: Tensor | None = None
    reset: Tensor | None = None
    padding_value: float = 0.0
    return_cell_states: bool = False
    last_step_only: bool = False
    tbptt: int | None = None
    reverse: bool = False
    rows: Tensor | None = None
    initial: States | None = None
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: tuple[float, ...] = ()
    training: bool = False
    recompute: bool = False
    flow: Any = None

    def given(self) -> dict[str, Any]:
        """What differs from the defaults, by name."""
        found = {}
        for name, value, default in zip(self._fields, self, Options(), strict=True):
            # A tensor, or what stands for one in a trace, is not to be compared.
            known = not isinstance(value, (bool, int, float)) or value != default
            if value is not default and known:
                found[name] = value
        return found

    def checked(self, data: Tensor, layout: str) -> Options:
        """The same, valid and time-major.

        Args:
            data: the input, time-major, or compact rows.
            layout: how the caller passes it: ``"dense"``, ``"batch_first"``, ``"unbatched"``,
                ``"jagged"`` or ``"packed"``.
        """
        if not isinstance(self.padding_value, (int, float, torch.SymInt, torch.SymFloat)):
            kind = type(self.padding_value).__name__
            raise TypeError(f"fused_rnn: padding_value must be a number, got {kind}")
        found = self if self.tbptt is None else self._replace(tbptt=check_tbptt(self.tbptt))
        for name in ("lengths", "reset"):
            if getattr(self, name) is not None and (name, layout) in _REFUSED:
                raise ValueError(f"fused_rnn: {name} {_REFUSED[name, layout]}")
        if self.lengths is not None:
            lengths = check_lengths(self.lengths, data.size(0), data.size(1), data.device)
            found = found._replace(lengths=lengths)
        if self.reset is not None:
            steps, batch = data.shape[:2]
            by_sequence = layout in ("batch_first", "unbatched")
            shape = (steps,) if layout == "unbatched" else (steps, batch)
            check_reset(self.reset, shape[::-1] if by_sequence else shape, data.device)
            if by_sequence:
                found = found._replace(reset=self.reset.reshape(batch, steps).t())
        return found

    @property
    def asked(self) -> tuple[str, ...]:
        """Their names in :attr:`fused_rnn.backends.Problem.options`."""
        asked = {
            "control": self._asks_control,
            "h_mask": self.recurrent_dropout > 0,
            "keep": bool(self.zoneout) and self.training,
            "keep_share": bool(self.zoneout) and not self.training,
            "cell_states": self.return_cell_states,
            "last_step": self.last_step_only,
            "reverse": self.reverse,
            "jagged": self.rows is not None,
            "episodes": self.initial is not None,
            "recompute": self.recompute,
            "gradient_flow": self.flow is not None,
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    @property
    def is_control_only(self) -> bool:
        """Whether ``control`` says it all, but for the padding's value."""
        if self.rows is not None or self.return_cell_states or self.last_step_only:
            return False
        return self._asks_control and self[6:] == _NOTHING[6:]

    @property
    def _asks_control(self) -> bool:
        return self.lengths is not None or self.reset is not None or self.tbptt is not None

    @property
    def ends(self) -> Tensor | None:
        """``[N]``: how many steps each sequence has; None: all that there are."""
        return self.lengths if self.rows is None else (self.rows >= 0).sum(0)

    def ended(self, steps: int) -> Tensor | None:
        """``[T,N]``: which steps lie past their sequence's end."""
        if self.lengths is None:
            return None
        return torch.arange(steps, device=self.lengths.device).unsqueeze(1) >= self.lengths

    def starts(self, ended: Tensor | None) -> Tensor | None:
        """``reset`` without what lies past the end."""
        return self.reset if self.reset is None or ended is None else self.reset & ~ended

    def loop(self, steps: int, batch: int, device: torch.device, rows: Tensor | None) -> Loop:
        """How the call goes through the op; ``rows`` are packed input's."""
        options = self if rows is None else self._replace(rows=rows)
        kind = Loop if self.reset is None or self.initial is None else Episodes
        return kind(options, steps, batch, device)


_NOTHING = Options()


class Loop:
    """A call's way through the op: what its layers and directions get, and what they give back.

    Args:
        options: what the caller asks for.
        steps, batch: T and N.
        device: of the input.
    """

    def __init__(self, options: Options, steps: int, batch: int, device: torch.device) -> None:
        self.options, self.steps, self.batch, self.device = options, steps, batch, device
        self.rows, self.ended = options.rows, options.ended(steps)
        self.controls: dict[bool, Tensor | None] = {}

    def control(self, reverse: bool) -> Tensor | None:
        """The op's ``control`` for a direction, made once for all layers."""
        if reverse not in self.controls:
            self.controls[reverse] = self.made(reverse)
        return self.controls[reverse]

    def made(self, reverse: bool) -> Tensor | None:
        """The op's ``control`` ``[T,N]`` for a direction.

        Backwards in time an episode begins at its last step, the one before a reset, and a window
        of ``tbptt`` steps at its last one: both directions see the same episodes and windows. The
        state that the caller gave is neither cleared nor cut.
        """
        options, steps, ended = self.options, self.steps, self.ended
        control, starts = None, options.starts(ended)
        if options.tbptt is not None:
            t = torch.arange(steps, device=self.device).unsqueeze(1)
            if reverse:
                ends = options.ends
                cut = ((t + 1) % options.tbptt == 0) & (t + 1 < (steps if ends is None else ends))
            else:
                cut = (t % options.tbptt == 0) & (t > 0)
            control = _flagged(cut.expand(steps, self.batch), CUT, control)
        if starts is not None:
            if reverse:
                t = torch.arange(steps, device=self.device).unsqueeze(1)
                starts = starts.roll(-1, 0) & (t + 1 < steps)
            control = _flagged(starts, CLEAR, control)
        return control if ended is None else _flagged(ended, HOLD, control)

    def input(self, x: Tensor, clean: bool) -> Tensor:
        """The input as the op takes it; with ``clean`` the padding is 0."""
        return x if self.ended is None or not clean else x.masked_fill(self.ended.unsqueeze(-1), 0)

    def output(self, y: Tensor) -> Tensor:
        """What the op shows as the caller gets it."""
        value = self.options.padding_value
        if self.ended is None or not value:
            return y
        return y.masked_fill(self.ended.unsqueeze(-1), value)

    def h_mask(self, width: int, dtype: torch.dtype) -> Tensor | None:
        """The op's ``h_mask`` ``[N,R]``, drawn anew."""
        p = self.options.recurrent_dropout
        if not p:
            return None
        return torch.dropout(
            torch.ones(self.batch, width, dtype=dtype, device=self.device), p, True
        )

    def keep(self, widths: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The op's ``keep``: drawn anew ``[T,N,R]`` (LSTM: ``R+H``), or shares ``[R]`` (``R+H``).

        Args:
            widths: of the states.
            dtype: in which they are carried.
        """
        if not self.options.zoneout:
            return None
        pairs = zip(self.options.zoneout, widths, strict=True)
        shares = torch.cat([torch.full((width,), p, dtype=dtype) for p, width in pairs])
        shares = shares.to(self.device)
        if not self.options.training:
            return shares
        shape = (self.steps, self.batch, sum(widths))
        keep = torch.empty(shape, dtype=torch.uint8, device=self.device)
        return keep.bernoulli_(shares.float())  # the same draws in every dtype

    def enter(self, states: States | None, layer: int, reverse: bool) -> States | None:
        """The states with which the op begins, from the caller's."""
        return states

    def leave(self, final: States, reverse: bool) -> States:
        """The caller's final states from the op's."""
        return final

    def by_step(self, x: Tensor) -> Tensor:
        """``[T,N]`` of what the op gave for each row of its input; 0 where there is none."""
        rows = self.options.rows
        if rows is None:
            return x
        live, found = rows >= 0, x.new_zeros(rows.shape)
        found[live] = x[rows[live].long()]
        return found

    def last(self, y: Tensor, final: Tensor, reverse: bool) -> Tensor:
        """The output of each sequence's last step, ``[N,*]``.

        Forward in time that is the final state, and nothing keeps the output for it.
        """
        ends = self.options.ends
        if not reverse:
            last = final.to(y.dtype)
        elif ends is None:
            last = y.view(self.steps, self.batch, -1)[-1].clone()  # a view would keep the rest
        elif not y.numel():
            last = torch.zeros_like(final, dtype=y.dtype)
        else:
            t, n = (ends - 1).clamp(min=0), torch.arange(self.batch, device=self.device)
            rows = self.options.rows
            at = t * self.batch + n if rows is None else rows[t, n].clamp(min=0)
            last = y.reshape(-1, y.size(-1)).index_select(0, at)
        if ends is None:
            return last
        return last.masked_fill((ends == 0).unsqueeze(1), self.options.padding_value)


class Episodes(Loop):
    """Episodes as sequences of their own, each of which enters with a state that may be any.

    The op clears to zero. Where a reset brings back a learned state, the input's rows are therefore
    read by ``rows``, one column an episode. How many there are is read from ``reset``: on a GPU the
    host waits for it.

    ``lengths`` and ``tbptt`` act as ever.
    """

    def __init__(self, options: Options, steps: int, batch: int, device: torch.device) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "fused_rnn: reset with learn_initial_state cannot be compiled, because the number "
                "of episodes decides the shapes; call the module outside of the compiled region"
            )
        super().__init__(options, steps, batch, device)
        starts = options.starts(self.ended)
        assert starts is not None
        begins = starts.t().clone(memory_format=torch.contiguous_format)
        begins[:, 0] = True
        at = begins.flatten().nonzero().squeeze(1)
        # Which episode each step of each sequence belongs to, [N,T]; which sequence an episode.
        self.of = begins.flatten().cumsum(0).view(batch, steps) - 1
        self.sequence, first_step = at // steps, at % steps
        # A sequence's first episode enters with the caller's state, unless a reset stands there.
        self.given = (first_step == 0) & ~starts[0][self.sequence]
        place = torch.arange(steps, device=device) - first_step[self.of]
        longest = int(place.max()) + 1 if batch else steps
        row = torch.arange(steps, device=device) * batch
        row = row + torch.arange(batch, device=device).unsqueeze(1)
        self.rows = torch.full((longest, at.numel()), -1, dtype=torch.int32, device=device)
        self.rows[place, self.of] = row.int()

    def made(self, reverse: bool) -> Tensor | None:
        """In the order of ``rows``. Where an episode begins there is nothing to clear or to cut."""
        assert self.rows is not None
        control = super().made(reverse)
        assert control is not None
        control = control.where((control & CLEAR) == 0, 0)
        found = control.flatten()[self.rows.clamp(min=0).long()]
        return found.where(self.rows >= 0, 0)

    def input(self, x: Tensor, clean: bool) -> Tensor:
        return super().input(x, clean).flatten(0, 1)

    def output(self, y: Tensor) -> Tensor:
        return super().output(y.unflatten(0, (self.steps, self.batch)))

    def by_step(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.steps, self.batch))

    def h_mask(self, width: int, dtype: torch.dtype) -> Tensor | None:
        """All episodes of a sequence have its mask."""
        mask = super().h_mask(width, dtype)
        return mask if mask is None else mask[self.sequence]

    def keep(self, widths: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """An episode has what was drawn for its steps."""
        keep = super().keep(widths, dtype)
        if keep is None or keep.dim() == 1:
            return keep
        assert self.rows is not None
        return keep.flatten(0, 1)[self.rows.clamp(min=0).long()]

    def enter(self, states: States | None, layer: int, reverse: bool) -> States:
        assert self.options.initial is not None
        initial = tuple(s[layer] for s in self.options.initial)
        if states is None:
            states = tuple(torch.zeros_like(s).expand(self.batch, -1) for s in initial)
        given = self.given
        if reverse:
            given = torch.zeros_like(given)
            given[self.of[:, -1]] = True
        pairs = zip(states, initial, strict=True)
        return tuple(torch.where(given.unsqueeze(1), s[self.sequence], i) for s, i in pairs)

    def leave(self, final: States, reverse: bool) -> States:
        last = self.of[:, 0 if reverse else -1]
        return tuple(s[last] for s in final)


def check_lengths(lengths: Any, steps: int, batch: int, device: torch.device) -> Tensor:
    """``lengths`` as a tensor ``[N]`` on ``device``, all in [0, T].

    What the host can read is checked at once. What is on another device, or has no values yet
    because ``torch.compile`` traces, is clamped, and checked when the device comes to it.

    Raises:
        TypeError: they are no integers.
        ValueError: they are not ``[N]``, outside of [0, T], or on a device of their own.
    """
    readable = True
    if isinstance(lengths, Tensor):
        if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
            raise TypeError(f"fused_rnn: lengths must be integers, got {lengths.dtype}")
        lengths = lengths.long()
        readable = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        shape = tuple(lengths.shape)
        bounds = [int(n) for n in _unwrapped(lengths).aminmax()] if readable and batch else []
    else:
        try:
            given = list(lengths)
            bounds = whole = [int(n) for n in given]
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"fused_rnn: lengths must be integers, got {lengths}") from error
        if whole != given:
            raise TypeError(f"fused_rnn: lengths must be integers, got {lengths}")
        shape = (len(whole),)
    if shape != (batch,):
        raise ValueError(
            "fused_rnn: lengths must hold one number for each sequence: expected shape "
            f"({batch},), got {shape}"
        )
    for n in bounds:
        if n < 0 or n > steps:
            raise ValueError(
                f"fused_rnn: lengths must be from 0 to {steps}, the number of steps of the input; "
                f"got {n}"
            )
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(whole, dtype=torch.int64)
    if lengths.device != device:
        if lengths.device.type != "cpu":
            raise ValueError(
                f"fused_rnn: lengths are on {lengths.device} and the input on {device}; move them "
                "there with .to(input.device)"
            )
        lengths = sent(lengths, device, "lengths of the host", "pass a tensor on the GPU")
    if not readable:
        inside = ((lengths >= 0) & (lengths <= steps)).all()
        torch._assert_async(inside, "fused_rnn: lengths must be from 0 to the number of steps")
        lengths = lengths.clamp(0, steps)
    return lengths


def sent(x: Tensor, device: torch.device, what: str, cure: str) -> Tensor:
    """``x`` of the host on ``device``, without waiting for a GPU."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"fused_rnn: {what} cannot be captured in a CUDA graph: how long sequences are "
                f"would be read anew from the host's memory by each replay; {cure} instead"
            )
        x = x.pin_memory()  # from elsewhere the copy would wait
    return x.to(device, non_blocking=True)


def _unwrapped(x: Tensor) -> Tensor:
    """The tensor inside of those by which ``torch.func`` sees what is done with it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def check_reset(reset: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """``reset`` has to be a bool tensor of ``shape`` on ``device``.

    Raises:
        TypeError: it is no tensor of bools.
        ValueError: it has another shape, or is on another device.
    """
    if not isinstance(reset, Tensor) or reset.dtype is not torch.bool:
        kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"fused_rnn: reset must be a tensor of torch.bool, got {kind}")
    if reset.shape != shape:
        raise ValueError(
            f"fused_rnn: reset must have a value for each step: expected shape {tuple(shape)}, "
            f"got {tuple(reset.shape)}"
        )
    if reset.device != device:
        raise ValueError(
            f"fused_rnn: reset is on {reset.device} and the input on {device}; move it there with "
            ".to(input.device)"
        )


def _flagged(steps: Tensor, flag: int, control: Tensor | None) -> Tensor:
    """``control`` with ``flag`` alone at these steps, both ``[T,N]``."""
    if control is not None:
        return torch.where(steps, flag, control)
    found = steps.byte().contiguous()
    return found if flag == 1 else found * flag


def jagged_rows(input: Any) -> tuple[Tensor, Tensor]:
    """The values of a jagged tensor ``[N,j,I]`` and where each step stands in them, ``[T,N]``."""
    if input.layout is not torch.jagged or input.dim() != 3 or input._ragged_idx != 1:
        raise ValueError(
            "fused_rnn: nested input must be [N,j,I] of layout torch.jagged, with time as the "
            "ragged dimension: torch.nested.nested_tensor(sequences, layout=torch.jagged)"
        )
    if input.lengths() is not None:
        raise ValueError("fused_rnn: nested input must not have holes; pass input.contiguous()")
    values, offsets = input.values(), input.offsets()
    if torch.compiler.is_compiling():
        # The longest length is data, unless the tensor knows it; steps that all hold are cheap.
        known = input._maybe_max_seqlen
        longest = values.size(0) if known is None else known
    else:
        longest = max(1, input._get_max_seqlen())
    at = offsets[:-1] + torch.arange(longest, device=offsets.device).unsqueeze(1)
    return values, torch.where(at < offsets[1:], at, -1).int()


def check_tbptt(tbptt: Any) -> Any:
    """``tbptt`` if it is a whole number of steps; ValueError otherwise."""
    if isinstance(tbptt, bool) or not isinstance(tbptt, (int, torch.SymInt)) or tbptt < 1:
        raise ValueError(f"fused_rnn: tbptt must be a number of steps from 1 on, got {tbptt!r}")
    return tbptt if tbptt < 2**62 else 2**62
