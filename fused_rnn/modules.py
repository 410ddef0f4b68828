"""Drop-ins for torch.nn's recurrent modules.

The sequence modules subclass ``torch.nn.RNNBase`` and not ``nn.LSTM`` and its siblings, because
dynamo refuses instances of those under ``fullgraph=True``. Weights are read by name at each call,
so whatever replaces them (parametrizations, weight_norm, ``functional_call``, replicas) is seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from . import functional
from .backends import Problem, check_name
from .cells import CELLS, Cell
from .functional import Weights

_PROJ_SIZE = "proj_size argument is only supported for LSTM, not RNN or GRU"


def fx_leaf(module: torch.nn.Module, input: Any, hx: Any) -> Proxy:
    """A ``call_module`` node under FX tracing, which is what torch.nn's modules become there."""
    tracer: Any = (input if isinstance(input, Proxy) else hx).tracer
    if tracer.root is module:
        raise TraceError(
            f"FX cannot trace {type(module).__name__} by itself, only as a part of a model, where "
            "it becomes one node; put it into a Module of its own"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, hx), {})


class SequenceModule(RNNBase):
    """What RNN, LSTM and GRU share: shapes in and out, around :func:`functional.rnn`."""

    backend: str = "auto"
    _expected_input = "Expected input to be 2D or 3D, got {}D instead"

    def __init__(self, mode: str, *args: Any, backend: str, **kwargs: Any) -> None:
        check_name(backend)
        super().__init__(mode, *args, **kwargs)
        self.backend = backend

    def extra_repr(self) -> str:
        return with_backend(super().extra_repr(), self.backend)

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat buffer to keep in step with the parameters."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run the module; arguments and results are those of torch.nn's module."""
        if isinstance(input, Proxy) or isinstance(hx, Proxy):
            return fx_leaf(self, input, hx)
        output, states = functional.rnn(
            *self._arguments(input, hx),
            dropout=self.dropout,
            training=self.training,
            backend=self.backend,
        )
        if isinstance(input, PackedSequence):
            _, batch_sizes, sorted_indices, unsorted_indices = input
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            hx = states if self._has_cell_state else states[0]
            return packed, self.permute_hidden(hx, unsorted_indices)
        if input.dim() == 2:
            output, states = output.squeeze(1), tuple(s.squeeze(1) for s in states)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, states if self._has_cell_state else states[0]

    def describe(self, input: Any, hx: Any = None) -> Problem:
        """What a call with these arguments asks of a backend; see :func:`fused_rnn.explain`."""
        return functional.describe(*self._arguments(input, hx))

    def _arguments(self, input: Any, hx: Any) -> tuple:
        """The first arguments of :func:`functional.rnn`: checked, time-major."""
        weights = self._weights()
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, _ = input
            if hx is not None:
                hx = self.permute_hidden(hx, sorted_indices)
            self._check(data, hx, batch_sizes, weights[0].w_ih)
        else:
            data, batch_sizes = input, None
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
        return self._cell, data, states, weights, batch_sizes, self.bidirectional

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
    def _cell(self) -> Cell:
        return CELLS[self.mode.lower()]

    @property
    def _has_cell_state(self) -> bool:
        return self.mode == "LSTM"

    def _check(self, data: Tensor, hx: Any, batch_sizes: Tensor | None, weight: Tensor) -> None:
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

    def _check_hidden_dim(self, hx: Tensor, batched: bool) -> None:
        expected, kind = (3, "batched") if batched else (2, "unbatched")
        if hx.dim() != expected:
            raise RuntimeError(
                f"For {kind} {expected}-D input, hx should also be {expected}-D "
                f"but got {hx.dim()}-D tensor"
            )


def with_backend(repr: str, backend: str) -> str:
    return repr if backend == "auto" else f"{repr}, backend={backend!r}"


class RNN(SequenceModule):
    r"""A multi-layer Elman RNN, a drop-in for :class:`torch.nn.RNN`.

    .. math::
        h_t = \tanh(x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh})

    with ReLU in place of tanh for ``nonlinearity="relu"``. Arguments, inputs, outputs, parameters
    and their initialisation are those of :class:`torch.nn.RNN`.

    Args:
        input_size: I, the size of each step's input.
        hidden_size: H, the size of the hidden state.
        num_layers: L. Default: 1
        nonlinearity: ``"tanh"`` or ``"relu"``. Default: ``"tanh"``
        bias: whether there are ``b_ih`` and ``b_hh``. Default: ``True``
        batch_first: input and output are ``[N,T,*]`` and not ``[T,N,*]``. Default: ``False``
        dropout: probability of dropout between layers, in training. Default: 0
        bidirectional: D is 2. Default: ``False``
        device, dtype: of the parameters. Default: ``None``, torch's defaults
        backend: name of a backend, or ``"auto"``: see :func:`fused_rnn.use_backend`.
            Default: ``"auto"``

    Inputs: input, h_0
        - **input** ``[T,N,I]``, ``[T,I]``, or a ``PackedSequence``
        - **h_0** ``[L*D,N,H]``, or ``[L*D,H]`` beside ``[T,I]``. Default: zeros

    Outputs: output, h_n
        - **output** ``[T,N,D*H]``, ``[T,D*H]``, or a ``PackedSequence``
        - **h_n** shaped as ``h_0``

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`torch.nn.RNN`; ``RuntimeError`` also if the
            backend asked for cannot run the input.

    Example::

        >>> rnn = fused_rnn.RNN(10, 20, 2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
    """

    _expected_input = "Expected input to be 2D or 3D, got {}D tensor instead"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *args: Any,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError(_PROJ_SIZE)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            *args,
            backend=backend,
            **kwargs,
        )


class LSTM(SequenceModule):
    r"""A multi-layer long short-term memory, a drop-in for :class:`torch.nn.LSTM`.

    .. math::
        \begin{aligned}
            i, f, o &= \sigma(x_t W_i^T + b_i + h_{t-1} W_h^T + b_h) \\
            g &= \tanh(x_t W_i^T + b_i + h_{t-1} W_h^T + b_h) \\
            c_t &= f \odot c_{t-1} + i \odot g \\
            h_t &= o \odot \tanh(c_t)
        \end{aligned}

    each gate with its own rows of ``weight_ih`` and ``weight_hh``, in the order i, f, g, o. With
    ``proj_size`` P, :math:`h_t` is multiplied by ``weight_hr`` ``[P,H]``. Arguments, inputs,
    outputs, parameters and their initialisation are those of :class:`torch.nn.LSTM`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype, backend: as for :class:`RNN`.
        proj_size: P, the size of h if not H. Default: 0, no projection

    Inputs: input, (h_0, c_0)
        - **input** ``[T,N,I]``, ``[T,I]``, or a ``PackedSequence``
        - **h_0** ``[L*D,N,H]`` (P in place of H with a projection) and **c_0** ``[L*D,N,H]``,
          without N beside ``[T,I]``. Default: zeros

    Outputs: output, (h_n, c_n)
        - **output** ``[T,N,D*H]``, ``[T,D*H]``, or a ``PackedSequence`` (P in place of H likewise)
        - **h_n**, **c_n** shaped as ``h_0``, ``c_0``

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`torch.nn.LSTM`; ``RuntimeError`` also if the
            backend asked for cannot run the input.

    Example::

        >>> lstm = fused_rnn.LSTM(10, 20, 2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            backend=backend,
        )

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        blocks, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return blocks, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        if batch_sizes is None:
            self.check_input(input, batch_sizes)
        for k, expected in enumerate((self.get_expected_hidden_size, self.get_expected_cell_size)):
            self.check_hidden_size(
                hidden[k],
                expected(input, batch_sizes),
                f"Expected hidden[{k}] size {{}}, got {{}}",
            )

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def _check_hidden_dim(self, hx: Any, batched: bool) -> None:
        expected, kind = (3, "batched") if batched else (2, "unbatched")
        if hx[0].dim() != expected or hx[1].dim() != expected:
            raise RuntimeError(
                f"For {kind} {expected}-D input, hx and cx should also be {expected}-D "
                f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        if isinstance(hx, Tensor):
            raise TypeError("lstm(): argument 'hx' must be tuple of Tensors, not Tensor")
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")


class GRU(SequenceModule):
    r"""A multi-layer gated recurrent unit, a drop-in for :class:`torch.nn.GRU`.

    .. math::
        \begin{aligned}
            r, z &= \sigma(x_t W_i^T + b_i + h_{t-1} W_h^T + b_h) \\
            n &= \tanh(x_t W_{in}^T + b_{in} + r \odot (h_{t-1} W_{hn}^T + b_{hn})) \\
            h_t &= (1 - z) \odot n + z \odot h_{t-1}
        \end{aligned}

    each gate with its own rows of ``weight_ih`` and ``weight_hh``, in the order r, z, n. Arguments,
    inputs, outputs, parameters and their initialisation are those of :class:`torch.nn.GRU`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype, backend: as for :class:`RNN`.

    Inputs, outputs, raises: as for :class:`RNN`.

    Example::

        >>> gru = fused_rnn.GRU(10, 20, 2)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *args: Any,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError(_PROJ_SIZE)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            *args,
            backend=backend,
            **kwargs,
        )
