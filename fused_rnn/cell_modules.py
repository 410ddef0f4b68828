"""Drop-ins for torch.nn's cells: one step of one layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, is_grad_enabled
from torch.fx import Proxy
from torch.nn.modules.rnn import RNNCellBase

from . import steps
from .backends import Problem, check_name
from .cells import CELLS, Cell, States
from .sequence_module import fx_leaf, with_backend
from .steps import CellWeights

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class CellModule(RNNCellBase):
    """What the cells share: one step around :func:`steps.step`."""

    backend: str = "auto"
    _name: str  # in torch.nn's sentences
    _cell: Cell
    _reads_parameters: bool

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._reads_parameters = steps.reads_parameters(cls)

    def __init__(self, *args: Any, backend: str, **kwargs: Any) -> None:
        check_name(backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    def extra_repr(self) -> str:
        return with_backend(super().extra_repr(), self.backend)

    def describe(self, input: Tensor, hx: Any = None) -> Problem:
        """What a call with these arguments asks of a backend; see :func:`fused_rnn.explain`."""
        if input.dim() == 1:
            input = input.unsqueeze(0)
        states = (hx,) if isinstance(hx, Tensor) else hx
        return steps.describe_step(self._cell, input, states, self._weights())

    def _weights(self) -> CellWeights:
        # Where Module.__getattr__ would find them, at a quarter of its time.
        p: Any = self._parameters if self._reads_parameters else {}
        try:
            return tuple([p[name] for name in WEIGHTS])
        except KeyError:
            return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def _step(self, input: Tensor, states: States | None) -> States:
        return steps.step(self._cell, input, states, self._weights(), self.backend)

    def _forward(self, input: Tensor, states: States | None) -> States:
        """One step on batched or unbatched input."""
        if input.dim() == 2:
            return self._step(input, states)
        states = None if states is None else tuple(s.unsqueeze(0) for s in states)
        return tuple(s.squeeze(0) for s in self._step(input.unsqueeze(0), states))

    def _check_dim(self, what: str, tensor: Tensor) -> None:
        if tensor.dim() not in (1, 2):
            raise ValueError(
                f"{self._name}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead"
            )


class _OneStateCell(CellModule):
    """What RNNCell and GRUCell share."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
        """Run the module; arguments and results are those of torch.nn's module."""
        if hx is not None and self._reads_parameters and not is_grad_enabled():
            # The common case, at once.
            stepped = steps.small_step(
                self._cell, input, hx, self._parameters, WEIGHTS, self.backend
            )
            if stepped is not None:
                return stepped
        if isinstance(input, Proxy) or isinstance(hx, Proxy):
            return fx_leaf(self, input, hx)
        self._check_dim("input", input)
        if hx is None:
            return self._forward(input, None)[0]
        self._check_dim("hidden", hx)
        return self._forward(input, (hx,))[0]


class RNNCell(_OneStateCell):
    r"""One step of an Elman RNN, a drop-in for :class:`torch.nn.RNNCell`: see :class:`RNN`.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype, backend: as for :class:`RNN`.

    Inputs: input ``[N,I]`` or ``[I]``, hidden ``[N,H]`` or ``[H]`` (default: zeros)

    Outputs: the next hidden state, shaped as ``hidden``

    Example::

        >>> cell = fused_rnn.RNNCell(10, 20)
        >>> h = cell(torch.randn(3, 10))
    """

    __constants__ = [*RNNCellBase.__constants__, "nonlinearity"]
    _name = "RNNCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias, 1, device=device, dtype=dtype, backend=backend
        )
        self.nonlinearity = nonlinearity

    # A property where the others have a constant: users may set nonlinearity, as torch.nn's.
    @property
    def _cell(self) -> Cell:  # type: ignore[override]
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return CELLS["rnn_tanh" if self.nonlinearity == "tanh" else "rnn_relu"]


class LSTMCell(CellModule):
    r"""One step of an LSTM, a drop-in for :class:`torch.nn.LSTMCell`: see :class:`LSTM`.

    Args:
        input_size, hidden_size, bias, device, dtype, backend: as for :class:`RNN`.

    Inputs: input ``[N,I]`` or ``[I]``, (h, c) each ``[N,H]`` or ``[H]`` (default: zeros)

    Outputs: the next (h, c)

    Example::

        >>> cell = fused_rnn.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
    """

    _name = "LSTMCell"
    _cell = CELLS["lstm"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias, 4, device=device, dtype=dtype, backend=backend
        )

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        """Run the module; arguments and results are those of torch.nn's module."""
        if hx is not None and self._reads_parameters and not is_grad_enabled():
            # The common case, at once.
            stepped = steps.small_step(
                self._cell, input, hx, self._parameters, WEIGHTS, self.backend
            )
            if stepped is not None:
                return stepped
        if isinstance(input, Proxy) or isinstance(hx, Proxy):
            return fx_leaf(self, input, hx)
        self._check_dim("input", input)
        if hx is not None:
            for k, state in enumerate(hx):
                self._check_dim(f"hx[{k}]", state)
            if isinstance(hx, Tensor):
                raise TypeError(
                    "lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor"
                )
            if len(hx) != 2:
                raise RuntimeError("lstm_cell expects two hidden states")
        return self._forward(input, hx)


class GRUCell(_OneStateCell):
    r"""One step of a GRU, a drop-in for :class:`torch.nn.GRUCell`: see :class:`GRU`.

    Args:
        input_size, hidden_size, bias, device, dtype, backend: as for :class:`RNN`.

    Inputs: input ``[N,I]`` or ``[I]``, hidden ``[N,H]`` or ``[H]`` (default: zeros)

    Outputs: the next hidden state, shaped as ``hidden``

    Example::

        >>> cell = fused_rnn.GRUCell(10, 20)
        >>> h = cell(torch.randn(3, 10))
    """

    _name = "GRUCell"
    _cell = CELLS["gru"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            input_size, hidden_size, bias, 3, device=device, dtype=dtype, backend=backend
        )
