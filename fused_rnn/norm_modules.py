"""LayerNormLSTM and LayerNormGRU: recurrent modules with layer norms inside of the time loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import Parameter

from .functional import Weights
from .modules import TwoStates
from .norm_cells import NORM_CELLS, NormCell
from .sequence_module import SequenceModule

# The parameters by their place in Weights; their names end in _l0, _l0_reverse, _l1, ...
_SEPARATE = {
    "w_ih": "weight_ih",
    "w_hh": "weight_hh",
    "g_ih": "gain_ih",
    "g_hh": "gain_hh",
    "b_ih": "bias_ih",
    "b_hh": "bias_hh",
}
_OF_C = {"g_c": "gain_c", "b_c": "bias_c"}
_JOINT = {"w_ih": "weight_ih", "w_hh": "weight_hh", "g_hh": "gain", "b_hh": "bias"}


class LayerNormModule(SequenceModule):
    """What LayerNormLSTM and LayerNormGRU share: the norms' parameters."""

    _cell: NormCell

    def __init__(self, cell: NormCell, *sizes: int, bias: bool, **options: Any) -> None:
        # RNNBase's own biases would be added before a norm, and their mean taken out again.
        super().__init__(cell.mode, *sizes, bias=False, **options)
        self.bias = bias
        self._cell = cell
        self._names = _JOINT if cell.joint else _SEPARATE | (_OF_C if cell.states == 2 else {})
        like: Any = self.weight_hh_l0
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            for place, stem in self._names.items():
                if place.startswith("w") or (place.startswith("b") and not bias):
                    continue
                size = self.hidden_size * (1 if place in _OF_C else cell.gates)
                self.register_parameter(stem + suffix, Parameter(like.new_empty(size)))
                names.append(stem + suffix)
        self._reset_norms()

    def reset_parameters(self) -> None:
        """Weights as torch.nn's, gains 1, biases 0; a learned initial state is zero."""
        super().reset_parameters()
        self._reset_norms()

    @torch.no_grad()
    def _reset_norms(self) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith("gain"):
                parameter.fill_(1.0)
            elif name.startswith("bias"):
                parameter.zero_()

    @property
    def eps(self) -> float:
        return self._cell.eps

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"

    def _weights(self) -> list[Weights]:
        """As :meth:`SequenceModule._weights`; a bias may not be there."""
        weights = []
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            found = {p: s + suffix for p, s in self._names.items() if s + suffix in names}
            weights.append(Weights(**{p: getattr(self, name) for p, name in found.items()}))
        return weights


class LayerNormLSTM(LayerNormModule, TwoStates):
    r"""A multi-layer LSTM with layer norms (Ba et al. 2016, equations 20 to 22).

    .. math::
        \begin{aligned}
            i, f, g, o &= \mathrm{LN}_i(x_t W_{ih}^T) + \mathrm{LN}_h(h_{t-1} W_{hh}^T) \\
            c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g) \\
            h_t &= \sigma(o) \odot \tanh(\mathrm{LN}_c(c_t)) \\
            \mathrm{LN}(y) &= \frac{y - \mathrm{mean}(y)}{\sqrt{\mathrm{var}(y) + \epsilon}}
                \odot \mathrm{gain} + \mathrm{bias}
        \end{aligned}

    Mean and variance (the biased one, as in :class:`torch.nn.LayerNorm`) are those of a row: of all
    four gates of a product together, and of c. The paper's further bias of the gates is left out:
    it is added to the norms' two.

    Args:
        input_size, hidden_size, num_layers, batch_first, dropout, bidirectional, device, dtype,
            backend, direction, learn_initial_state, recurrent_dropout, weight_dropout: as for
            :class:`LSTM`.
        bias: whether the norms have biases. Default: ``True``
        eps: what is added to a variance. Default: 1e-5
        forget_bias: what ``bias_ih`` of the forget gate is at first. Default: ``None``, 0

    Parameters, of each layer and direction (``_l0``, ``_l0_reverse``, ``_l1``, ...):
        - **weight_ih** ``[4H,I]`` and **weight_hh** ``[4H,H]``, at first as torch.nn's; gates in
          the order i, f, g, o
        - **gain_ih**, **gain_hh** ``[4H]`` and **gain_c** ``[H]``, at first 1
        - **bias_ih**, **bias_hh** ``[4H]`` and **bias_c** ``[H]``, at first 0

    Inputs, outputs: as for :class:`LSTM`, without a projection

    :meth:`forward` has the keywords of :class:`LSTM`'s. Only the backends ``cpu`` and ``reference``
    have layer norms; ``auto`` takes the one that can run the input.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`LSTM`.

    Example::

        >>> lstm = fused_rnn.LayerNormLSTM(10, 20, 2)
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
        device: Any = None,
        dtype: Any = None,
        *,
        eps: float = 1e-5,
        backend: str = "auto",
        direction: str = "forward",
        learn_initial_state: bool = False,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        forget_bias: float | None = None,
    ) -> None:
        if forget_bias is not None and not bias:
            raise ValueError("forget_bias needs the biases that bias=False leaves out")
        super().__init__(
            replace(NORM_CELLS["layer_norm_lstm"], eps=eps),
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
            direction=direction,
            learn_initial_state=learn_initial_state,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )
        self.forget_bias = forget_bias
        self._reset_norms()

    @torch.no_grad()
    def _reset_norms(self) -> None:
        super()._reset_norms()
        if self.forget_bias is not None:
            for w in self._weights():
                assert w.b_ih is not None
                w.b_ih[self.hidden_size : 2 * self.hidden_size] = self.forget_bias


class LayerNormGRU(LayerNormModule):
    r"""A multi-layer GRU with layer norms, in one of two forms.

    ``norm="separate"`` normalises the products apart (Ba et al. 2016, equations 23 to 26):

    .. math::
        \begin{aligned}
            r, z &= \sigma(\mathrm{LN}_i(x_t W_i^T) + \mathrm{LN}_h(h_{t-1} W_h^T)) \\
            n &= \tanh(\mathrm{LN}_{in}(x_t W_{in}^T)
                + r \odot \mathrm{LN}_{hn}(h_{t-1} W_{hn}^T)) \\
            h_t &= (1 - z) \odot h_{t-1} + z \odot n
        \end{aligned}

    with mean and variance of r and z together, and of n apart. ``norm="joint"`` normalises all
    gates of the sum together, as DreamerV3's GRU does (Hafner et al. 2023, and its code):

    .. math::
        \begin{aligned}
            y_r, y_z, y_n &= \mathrm{LN}(x_t W_{ih}^T + h_{t-1} W_{hh}^T) \\
            r, z &= \sigma(y_r), \sigma(y_z - 1) \\
            n &= \tanh(r \odot y_n) \\
            h_t &= (1 - z) \odot h_{t-1} + z \odot n
        \end{aligned}

    LN is that of :class:`LayerNormLSTM`. In both forms z weighs the new n, as in both papers, where
    in :class:`torch.nn.GRU` it weighs the old state.

    Args:
        input_size, hidden_size, num_layers, batch_first, dropout, bidirectional, device, dtype,
            backend, direction, learn_initial_state, recurrent_dropout, weight_dropout: as for
            :class:`GRU`.
        bias: whether the norms have biases. Default: ``True``
        norm: ``"separate"`` or ``"joint"``. Default: ``"separate"``
        eps: what is added to a variance; DreamerV3's is 1e-3. Default: 1e-5

    Parameters, of each layer and direction (``_l0``, ``_l0_reverse``, ``_l1``, ...):
        - **weight_ih** ``[3H,I]`` and **weight_hh** ``[3H,H]``, at first as torch.nn's; gates in
          the order r, z, n
        - separate: **gain_ih**, **gain_hh**, at first 1, and **bias_ih**, **bias_hh**, at first 0,
          ``[3H]``
        - joint: **gain**, at first 1, and **bias**, at first 0, ``[3H]``

    Inputs, outputs: as for :class:`GRU`

    :meth:`forward` has the keywords of :class:`GRU`'s. Only the backends ``cpu`` and ``reference``
    have layer norms; ``auto`` takes the one that can run the input.

    Raises:
        ValueError: ``norm`` is neither; else as :class:`GRU`.
        TypeError, RuntimeError: as :class:`GRU`.

    Example::

        >>> gru = fused_rnn.LayerNormGRU(10, 20, norm="joint", eps=1e-3)
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
        device: Any = None,
        dtype: Any = None,
        *,
        norm: str = "separate",
        eps: float = 1e-5,
        backend: str = "auto",
        direction: str = "forward",
        learn_initial_state: bool = False,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        if norm not in ("separate", "joint"):
            raise ValueError(f"norm must be 'separate' or 'joint', got {norm!r}")
        cell = NORM_CELLS["layer_norm_gru_joint" if norm == "joint" else "layer_norm_gru"]
        super().__init__(
            replace(cell, eps=eps),
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            backend=backend,
            direction=direction,
            learn_initial_state=learn_initial_state,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )

    @property
    def norm(self) -> str:
        return "joint" if self._cell.joint else "separate"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm!r}"
