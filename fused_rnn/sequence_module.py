"""What RNN, LSTM and GRU share: shapes in and out, options and checks.

They subclass ``torch.nn.RNNBase`` and not ``nn.LSTM`` and its siblings, because dynamo refuses
instances of those under ``fullgraph=True``. Weights are read by name at each call, so whatever
replaces them (parametrizations, weight_norm, ``functional_call``, replicas) is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn import Parameter, RNNBase
from torch.nn.utils.rnn import PackedSequence

from . import functional, steps
from .backends import Problem, check_name
from .cells import Cell, States
from .functional import Weights
from .norm_cells import NormCell
from .sequences import Options, jagged_rows

# What our constructors take beyond torch.nn's and the backend; attributes of the same names.
OPTIONS = (
    "direction",
    "learn_initial_state",
    "forget_bias",
    "recurrent_dropout",
    "weight_dropout",
    "zoneout",
    "recompute",
)


def fx_leaf(module: torch.nn.Module, input: Any, hx: Any, **options: Any) -> Proxy:
    """A ``call_module`` node under FX tracing, which is what torch.nn's modules become there."""
    tracer: Any = (input if isinstance(input, Proxy) else hx).tracer
    if tracer.root is module:
        raise TraceError(
            f"FX cannot trace {type(module).__name__} by itself, only as a part of a model, where "
            "it becomes one node; put it into a Module of its own"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, hx), options)


class SequenceModule(RNNBase):
    """What RNN, LSTM and GRU share: shapes in and out, around :func:`functional.rnn`."""

    backend: str = "auto"
    # Of modules that convert makes of torch.nn's, or that were pickled before these were.
    direction: str = "forward"
    learn_initial_state: bool = False
    forget_bias: float | None = None
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    recompute: bool = False
    _flow: Any = None  # the gradient_flow around the call
    _expected_input = "Expected input to be 2D or 3D, got {}D instead"
    _cell: Cell
    _reads_parameters: bool

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._reads_parameters = steps.reads_parameters(cls)

    def __init__(
        self,
        mode: str,
        *args: Any,
        backend: str,
        direction: str = "forward",
        learn_initial_state: bool = False,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        check_name(backend)
        check_probability("recurrent_dropout", recurrent_dropout)
        check_probability("weight_dropout", weight_dropout)
        for p in zoneout if mode == "LSTM" and isinstance(zoneout, tuple) else (zoneout,):
            check_probability("zoneout", p)
        if direction not in ("forward", "reverse"):
            raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
        super().__init__(mode, *args, **kwargs)
        if direction == "reverse" and self.bidirectional:
            raise ValueError("direction='reverse' is one of the two that bidirectional=True has")
        self.backend = backend
        self.direction = direction
        self.learn_initial_state = learn_initial_state
        self.recurrent_dropout = recurrent_dropout
        self.weight_dropout = weight_dropout
        self.zoneout = zoneout
        self.recompute = recompute
        if learn_initial_state:
            like: Any = self.weight_hh_l0
            blocks = len(self._all_weights)
            self.h_0 = Parameter(like.new_zeros(blocks, self.proj_size or self.hidden_size))
            if self._has_cell_state:
                self.c_0 = Parameter(like.new_zeros(blocks, self.hidden_size))

    def reset_parameters(self) -> None:
        """As torch.nn's; a learned initial state is zero, ``forget_bias`` is what it was."""
        super().reset_parameters()
        with torch.no_grad():
            for state in self._initial() or ():
                state.zero_()
            if self.forget_bias is not None:
                forget = slice(self.hidden_size, 2 * self.hidden_size)
                for w in self._weights():
                    assert w.b_ih is not None
                    assert w.b_hh is not None
                    w.b_ih[forget] = self.forget_bias
                    w.b_hh[forget] = 0.0

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in OPTIONS}
        given = (f", {k}={v!r}" for k, v in options.items() if v != getattr(SequenceModule, k))
        return with_backend(super().extra_repr() + "".join(given), self.backend)

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat buffer to keep in step with the parameters."""

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Any = None,
        reset: Tensor | None = None,
        padding_value: float = 0.0,
        return_cell_states: bool = False,
        last_step_only: bool = False,
        tbptt: int | None = None,
    ) -> Any:
        """Run the module; ``input``, ``hx`` and the results are those of torch.nn's module.

        Args:
            lengths: how many steps each sequence has, ``[N]`` integers from 0 to T in any order: a
                list or a tensor. Past its end a sequence is padding: not computed, whatever it
                holds, and not differentiated. ``h_n`` and ``c_n`` are those of its last step, and
                the reverse direction starts there. A tensor on a GPU is checked there, without
                waiting for it. Default: ``None``, T each
            reset: bool ``[T,N]`` (``batch_first``: ``[N,T]``, unbatched: ``[T]``), true where an
                episode starts: the state is cleared before that step, to zero or to the learned
                initial state, and no gradient passes. The reverse direction clears at an episode's
                last step. ``hx`` enters the first episode (backwards: the last one); a reset at
                step 0 clears it. Default: ``None``
            padding_value: of the output past a sequence's end. Default: 0
            return_cell_states: return the last layer's cell states over time as well,
                ``[T,N,D*H]``, as a third result (LSTM). Default: ``False``
            last_step_only: the output is that of each sequence's last step alone, ``[N,D*R]``
                (R is H, or P with a projection), ``padding_value`` where a sequence has none.
                Default: ``False``
            tbptt: gradients through the state are cut at every so many steps, counted from step 0,
                as if the sequence ran in windows with the state detached between them; the windows
                of both directions are the same. Default: ``None``, never

        Returns:
            ``(output, state)`` as torch.nn's module, or ``(output, state, c)``.

        Raises:
            ValueError: ``lengths`` outside of 0 to T (on a GPU: a device-side assertion); a shape
                or a device that is not the input's; ``tbptt`` below 1; ``return_cell_states``
                without cell states; ``lengths`` or ``reset`` with a ``PackedSequence`` or jagged
                input, ``lengths`` with unbatched input.
            TypeError: ``lengths`` that are not integers, ``reset`` that is not bool.
        """
        asked = None
        tensors = lengths is not None or reset is not None
        if tensors or tbptt is not None or return_cell_states or last_step_only:
            asked = Options(
                lengths, reset, padding_value, return_cell_states, last_step_only, tbptt
            )
        if isinstance(input, Proxy) or isinstance(hx, Proxy):
            return fx_leaf(self, input, hx, **(asked.given() if asked else {}))
        output, states, c = functional.rnn(
            *self._arguments(input, hx, asked),
            dropout=self.dropout,
            training=self.training,
            backend=self.backend,
        )
        if not last_step_only:
            output = self._as_given(output, input)
        state: Any = states if self._has_cell_state else states[0]
        if isinstance(input, PackedSequence):
            order = input.unsorted_indices
            state = self.permute_hidden(state, order)
            if last_step_only and order is not None:
                output = output.index_select(0, order)
        elif input.dim() == 2:
            state = _each(state, lambda s: s.squeeze(1))
            output = output.squeeze(0) if last_step_only else output
        return (output, state) if c is None else (output, state, self._as_given(c, input))

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One step of all layers: what streaming and decoding need.

        So many steps, each with the state of the one before, are a forward over as many. In the
        half types the forward rounds its state at its end, and this after each step; under
        autocast results have the dtypes of torch.nn's cells. ``torch.compile`` takes ``step`` as
        any function, and FSDP2 after ``register_fsdp_forward_method(module, "step")``.

        Args:
            x: the step's input, ``[N,I]`` or ``[I]``.
            state: in torch.nn's form: ``h`` or ``(h, c)``, each ``[L,N,*]``, or ``[L,*]`` beside
                ``[I]``. Default: ``None``, zeros or the learned initial state

        Returns:
            the output ``[N,H]`` (P in place of H with a projection) and the next state. Of a single
            layer they may share their memory, as a cell's output is its state.

        Raises:
            ValueError: the module reads sequences from their end, or ``x`` is no single step.
            RuntimeError: sizes that do not fit, as the cells of torch.nn.
        """
        cell, backwards = self._cell, self.bidirectional or self.direction == "reverse"
        whole = self.proj_size or self.zoneout or isinstance(cell, NormCell)  # no cell has these
        masks = self.training and (self.dropout or self.recurrent_dropout or self.weight_dropout)
        other = backwards or whole or masks or not self._reads_parameters
        if state is not None and not (other or is_grad_enabled()):
            # The common case, at once.
            stepped = steps.small_step(
                cell, x, state, self._parameters, self._all_weights, self.backend
            )
            if stepped is not None:
                return stepped
        if backwards:
            raise ValueError(
                "fused_rnn: step goes forward in time, and this module also reads its input from "
                "the end; call it on whole sequences"
            )
        if self._is_regularised:
            raise ValueError(
                "fused_rnn: step would draw another mask for each step, and recurrent_dropout and "
                "weight_dropout have one for a whole sequence; call eval() first, or the module on "
                "whole sequences"
            )
        if not isinstance(x, Tensor) or x.dim() not in (1, 2):
            got = f"{x.dim()}D" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"fused_rnn: step expects x to be 2D [N,I] or 1D [I], got {got}")
        if x.dim() == 1:
            one = state if state is None else _each(state, lambda s: s.unsqueeze(1))
            # Not self.step, which a subclass or FSDP may have wrapped around this one.
            y, state = SequenceModule.step(self, x.unsqueeze(0), one)
            return y.squeeze(0), _each(state, lambda s: s.squeeze(1))
        if state is None and not (self.learn_initial_state or whole):
            zeros = x.new_zeros(self.num_layers, x.size(0), self.hidden_size)
            state = (zeros, zeros) if self._has_cell_state else zeros
            return SequenceModule.step(self, x, state)
        weights = self._weights()
        if state is None:
            states = self._start(x.size(0))
        else:
            states = state if self._has_cell_state else (state,)
            self._check_step_state(state, states)
        if whole:  # a sequence of one step
            self._check(x.unsqueeze(1 if self.batch_first else 0), state, None, weights[0].w_ih)
            y, final, _ = functional.rnn(
                cell,
                x.unsqueeze(0),
                states,
                weights,
                options=Options(zoneout=self._zoneout, training=self.training),
                dropout=self.dropout,
                training=self.training,
                backend=self.backend,
            )
            return y.squeeze(0), final if self._has_cell_state else final[0]
        layers = []
        for k, w in enumerate(weights):
            if k and self.dropout and self.training:
                x = torch.dropout(x, self.dropout, True)
            entering = None if states is None else tuple(s[k] for s in states)
            layers.append(steps.step(cell, x, entering, w[:4], self.backend))
            x = layers[-1][0]
        if len(layers) == 1:
            states = tuple(s.unsqueeze(0) for s in layers[0])
        else:
            states = tuple(map(torch.stack, zip(*layers, strict=True)))
        return x, states if self._has_cell_state else states[0]

    def describe(self, input: Any, hx: Any = None, **asked: Any) -> Problem:
        """What a call with these arguments asks of a backend; see :func:`fused_rnn.explain`."""
        return functional.describe(*self._arguments(input, hx, Options(**asked) if asked else None))

    def _arguments(self, input: Any, hx: Any, asked: Options | None = None) -> tuple[Any, ...]:
        """The first arguments of :func:`functional.rnn`: checked, time-major."""
        weights, batch_sizes, rows = self._weights(), None, None
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, _ = input
            if hx is not None:
                hx = self.permute_hidden(hx, sorted_indices)
            self._check(data, hx, batch_sizes, weights[0].w_ih)
        elif getattr(input, "is_nested", False):
            data, rows = jagged_rows(input)
            self._check(data, hx, [rows.size(1)], weights[0].w_ih)
        else:
            data = input
            if data.dim() not in (2, 3):
                expected = self._expected_input.format(data.dim())
                raise ValueError(f"{self.mode.partition('_')[0]}: {expected}")
            batched = data.dim() == 3
            if not batched:
                data = data.unsqueeze(0 if self.batch_first else 1)
            if hx is not None:
                self._check_hidden_dim(hx, batched)
                if not batched:
                    hx = (
                        tuple(s.unsqueeze(1) for s in hx)
                        if self._has_cell_state
                        else hx.unsqueeze(1)
                    )
            self._check(data, hx, None, weights[0].w_ih)
            if self.batch_first:
                data = data.transpose(0, 1)
        states = hx if hx is None or self._has_cell_state else (hx,)
        if hx is None and self.learn_initial_state:
            if rows is not None:
                batch = rows.size(1)
            else:
                batch = data.size(1) if batch_sizes is None else int(batch_sizes[0])
            states = self._start(batch)
        if asked is not None and asked.return_cell_states and not self._has_cell_state:
            raise ValueError("fused_rnn: return_cell_states is for an LSTM; here c does not exist")
        options = self._with_own(asked, input, rows)
        if options is not None:
            options = options.checked(data, self._layout(input))
        return self._cell, data, states, weights, batch_sizes, self.bidirectional, options

    def _with_own(self, asked: Options | None, input: Any, rows: Tensor | None) -> Options | None:
        """What a call asks for beyond torch.nn, with what the module and its input do."""
        own = rows is not None or self.direction == "reverse" or bool(self._zoneout)
        own = own or self._is_regularised or self._recomputes or self._is_watched
        restarts = self.learn_initial_state and asked is not None and asked.reset is not None
        if not (own or restarts):
            return asked
        regularised = self._is_regularised
        return (asked or Options())._replace(
            reverse=self.direction == "reverse",
            rows=rows,
            initial=self._initial() if restarts else None,
            recurrent_dropout=self.recurrent_dropout if regularised else 0.0,
            weight_dropout=self.weight_dropout if regularised else 0.0,
            zoneout=self._zoneout,
            training=self.training,
            recompute=self._recomputes,
            flow=self._flow.call(self, input) if self._is_watched else None,
        )

    def _layout(self, input: Any) -> str:
        """How a call passes its input: :meth:`fused_rnn.sequences.Options.checked`."""
        if isinstance(input, PackedSequence):
            return "packed"
        if input.is_nested:
            return "jagged"
        if input.dim() == 2:
            return "unbatched"
        return "batch_first" if self.batch_first else "dense"

    def _as_given(self, y: Tensor, input: Any) -> Any:
        """``y``, time-major or compact, in the form in which the input came."""
        if isinstance(input, PackedSequence):
            return PackedSequence(y, *input[1:])
        if input.dim() == 2:
            return y.squeeze(1)
        if input.is_nested:
            return torch.nested.nested_tensor_from_jagged(y, input.offsets())
        return y.transpose(0, 1) if self.batch_first else y

    def _start(self, batch: int) -> States | None:
        """The learned initial state of ``batch`` sequences, ``[L*D,N,*]`` each, or None: zeros."""
        initial = self._initial()
        return initial and tuple(s.unsqueeze(1).expand(-1, batch, -1) for s in initial)

    def _initial(self) -> States | None:
        """The learned initial state, ``[L*D,*]`` each."""
        if not self.learn_initial_state:
            return None
        return (self.h_0, self.c_0) if self._has_cell_state else (self.h_0,)

    def _weights(self) -> list[Weights]:
        """The weights of each layer and direction, each read once, by name."""
        weights = []
        for names in self._all_weights:
            read = [getattr(self, name) for name in names]
            w_hr = read.pop() if self.proj_size else None
            b_ih, b_hh = read[2:] or (None, None)
            weights.append(Weights(read[0], read[1], b_ih, b_hh, w_hr))
        return weights

    @property
    def _is_regularised(self) -> bool:
        return self.training and (self.recurrent_dropout > 0 or self.weight_dropout > 0)

    @property
    def _zoneout(self) -> tuple[float, ...]:
        """Its probability for each state; empty where all are 0."""
        p = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)
        return p[: self._cell.states] if any(p) else ()

    @property
    def _recomputes(self) -> bool:
        """An RNN saves nothing but its states anyway."""
        return self.recompute and self._cell.saved > 0 and torch.is_grad_enabled()

    @property
    def _is_watched(self) -> bool:
        return self._flow is not None and torch.is_grad_enabled()

    @property
    def _has_cell_state(self) -> bool:
        return self.mode == "LSTM"

    def _check(self, data: Tensor, hx: Any, batch_sizes: Any, weight: Tensor) -> None:
        if data.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({data.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), "
                f"or convert model: model.to({data.dtype})"
            )
        if hx is None:
            self.check_input(data, batch_sizes)
        else:
            self.check_forward_args(data, hx, batch_sizes)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """RNNBase's hook without its look at the dtype of a weight, which may be out of date."""
        expected_dim = 2 if batch_sizes is not None else 3
        if input.dim() != expected_dim:
            raise RuntimeError(f"input must have {expected_dim} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def _check_step_state(self, state: Any, states: States) -> None:
        """As much as the steps of the single layers do not check."""
        if self._has_cell_state and (isinstance(state, Tensor) or len(state) != 2):
            raise TypeError("fused_rnn: step expects the state of an LSTM to be a pair (h, c)")
        for s in states:
            if s.dim() != 3 or s.size(0) != self.num_layers:
                raise RuntimeError(
                    f"fused_rnn: step expects a state of [{self.num_layers}, N, *], got "
                    f"{tuple(s.shape)}"
                )

    def _check_hidden_dim(self, hx: Tensor, batched: bool) -> None:
        expected, kind = (3, "batched") if batched else (2, "unbatched")
        if hx.dim() != expected:
            raise RuntimeError(
                f"For {kind} {expected}-D input, hx should also be {expected}-D "
                f"but got {hx.dim()}-D tensor"
            )


def check_probability(name: str, p: Any) -> None:
    """Refuse what torch.nn refuses as ``dropout``."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(
            f"{name} should be a number in range [0, 1] representing the probability of an element "
            f"being zeroed, got {p!r}"
        )


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``h`` or ``(h, c)`` with ``change`` applied."""
    return change(state) if isinstance(state, Tensor) else tuple(map(change, state))


def with_backend(repr: str, backend: str) -> str:
    return repr if backend == "auto" else f"{repr}, backend={backend!r}"
