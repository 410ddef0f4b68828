"""Fast recurrent networks, drop-in for ``torch.nn``'s RNN, LSTM, GRU and their cells."""

from .backends import use_backend
from .cell_modules import GRUCell, LSTMCell, RNNCell
from .convert import convert, revert
from .explain import explain
from .gradient_flow import gradient_flow
from .modules import GRU, LSTM, RNN
from .norm_modules import LayerNormGRU, LayerNormLSTM

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormLSTM",
    "RNNCell",
    "convert",
    "explain",
    "gradient_flow",
    "revert",
    "use_backend",
]
