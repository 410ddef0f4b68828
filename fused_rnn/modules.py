"""RNN, LSTM and GRU: drop-ins for torch.nn's recurrent modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cells import CELLS, Cell
from .sequence_module import SequenceModule

_PROJ_SIZE = "proj_size argument is only supported for LSTM, not RNN or GRU"


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
        direction: ``"reverse"`` reads the input from its end only; the parameters are called
            ``_l0`` as ever. Default: ``"forward"``
        learn_initial_state: there are parameters ``h_0`` ``[L*D,H]`` (LSTM: and ``c_0``), zero at
            first, in place of a state that is not given. Default: ``False``
        recurrent_dropout: probability that a unit of h is zeroed on its way into the recurrent
            product, in training; what is left is scaled by 1 / (1 - p). One mask for all steps of a
            sequence, another for each sequence, layer, direction and call (Gal and Ghahramani
            2016). Default: 0
        weight_dropout: probability that an element of ``weight_hh`` is zeroed, in training, and
            scaled likewise; drawn for each call (DropConnect, as in Merity et al. 2017). Default: 0
        zoneout: probability p that a unit of the state stays what it was before the step, in
            training, drawn for each step; in evaluation the state is p times what it was and 1 - p
            times what it would become (Krueger et al. 2017). Default: 0
        recompute: for less memory in training, keep the states at up to 15 steps only, and compute
            what lies between them again in the backward, a part at a time, the input's product
            included. On a CPU results are those of ``False``, bit for bit; so are gradients, but
            that those of weights are summed in another order. An RNN keeps only states anyway; a
            second derivative keeps all. Default: ``False``

    Inputs: input, h_0
        - **input** ``[T,N,I]``, ``[T,I]``, a ``PackedSequence``, or ``[N,j,I]`` of jagged layout
        - **h_0** ``[L*D,N,H]``, or ``[L*D,H]`` beside ``[T,I]``. Default: zeros

    Outputs: output, h_n
        - **output** ``[T,N,D*H]``, ``[T,D*H]``, a ``PackedSequence``, or ``[N,j,D*H]`` of jagged
          layout
        - **h_n** shaped as ``h_0``

    :meth:`forward` has keywords for what torch.nn cannot do (lengths, resets, truncated gradients),
    :meth:`step` runs a single step.

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

    # A property where the others have a constant, which is what the base declares and mypy minds.
    @property
    def _cell(self) -> Cell:  # type: ignore[override]
        return CELLS[self.mode.lower()]


class TwoStates(SequenceModule):
    """A module whose state is ``(h, c)``, as torch.nn.LSTM checks it."""

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


class LSTM(TwoStates):
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
            dtype, backend, direction, learn_initial_state, recurrent_dropout, weight_dropout,
            zoneout, recompute: as for :class:`RNN`; ``zoneout`` may be a pair, for h and for c.
        proj_size: P, the size of h if not H. Default: 0, no projection
        forget_bias: what ``b_ih`` and ``b_hh`` of the forget gate add up to at first; the first is
            set to it, the second to 0. Default: ``None``, both drawn as torch.nn's

    Inputs: input, (h_0, c_0)
        - **input** ``[T,N,I]``, ``[T,I]``, a ``PackedSequence``, or ``[N,j,I]`` of jagged layout
        - **h_0** ``[L*D,N,H]`` (P in place of H with a projection) and **c_0** ``[L*D,N,H]``,
          without N beside ``[T,I]``. Default: zeros

    Outputs: output, (h_n, c_n)
        - **output** ``[T,N,D*H]``, ``[T,D*H]``, a ``PackedSequence``, or ``[N,j,D*H]`` of jagged
          layout (P in place of H likewise)
        - **h_n**, **c_n** shaped as ``h_0``, ``c_0``

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`torch.nn.LSTM`; ``RuntimeError`` also if the
            backend asked for cannot run the input.

    Example::

        >>> lstm = fused_rnn.LSTM(10, 20, 2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
    """

    _cell = CELLS["lstm"]

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
        direction: str = "forward",
        learn_initial_state: bool = False,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        recompute: bool = False,
        forget_bias: float | None = None,
    ) -> None:
        if forget_bias is not None and not bias:
            raise ValueError("forget_bias needs the biases that bias=False leaves out")
        self.forget_bias = forget_bias
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
            direction=direction,
            learn_initial_state=learn_initial_state,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            recompute=recompute,
        )


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
            dtype, backend, direction, learn_initial_state, recurrent_dropout, weight_dropout,
            zoneout, recompute: as for :class:`RNN`.

    Inputs, outputs, raises: as for :class:`RNN`.

    Example::

        >>> gru = fused_rnn.GRU(10, 20, 2)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
    """

    _cell = CELLS["gru"]

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
