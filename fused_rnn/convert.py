"""From torch.nn's recurrent modules to ours and back, in a model that is already built."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from . import cell_modules, modules, norm_modules, sequence_module
from .backends import check_name

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: cell_modules.RNNCell,
    nn.LSTMCell: cell_modules.LSTMCell,
    nn.GRUCell: cell_modules.GRUCell,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


def convert(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Replace every torch.nn RNN, LSTM, GRU and cell in ``model`` by ours.

    The new modules hold the same Parameter objects, so optimizers go on working, and the same
    hooks, buffers, parametrizations and mode. A module that stands in several places is replaced by
    one module in all of them. Subclasses of torch.nn's modules are left as they are, since what
    they override is unknown here; a warning names them.

    Args:
        model: changed in place, unless it is itself such a module.
        backend: of the new modules. Default: ``"auto"``

    Returns:
        ``model``, or the new module if ``model`` is itself such a module.

    Example::

        >>> model = fused_rnn.convert(model)
    """
    check_name(backend)
    _warn_of_subclasses("convert", "torch.nn", "fused_rnn", model, _OURS)
    return _replace(model, _OURS, {"backend": backend})


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`convert`: replace each of our modules in ``model`` by torch.nn's.

    Subclasses of ours are left as they are; a warning names them.

    Args:
        model: changed in place, unless it is itself one of our modules.

    Returns:
        ``model``, or the new module if ``model`` is itself one of ours.

    Raises:
        ValueError: a module is or has what torch.nn lacks. Nothing has been changed then.
    """
    for name, m in model.named_modules():
        if isinstance(m, norm_modules.LayerNormModule):
            raise ValueError(
                f"cannot revert {name or 'the model itself'}: torch.nn has no layer norms in a "
                "recurrent module"
            )
        if _plain_type(m) not in _TORCHS:
            continue
        if m.backend not in ("auto", "torch"):
            raise ValueError(
                f"cannot revert {name or 'the model itself'}: its backend={m.backend!r} has no "
                "counterpart in torch.nn; set its backend to 'auto' first"
            )
        for option in (option for option in sequence_module.OPTIONS if option != "forget_bias"):
            value = getattr(m, option, None)
            if isinstance(m, sequence_module.SequenceModule) and value != getattr(type(m), option):
                raise ValueError(
                    f"cannot revert {name or 'the model itself'}: its {option}={value!r} has no "
                    "counterpart in torch.nn"
                )
    _warn_of_subclasses("revert", "fused_rnn", "torch.nn", model, _TORCHS)
    return _replace(model, _TORCHS, {})


def _warn_of_subclasses(
    verb: str, family: str, other: str, model: nn.Module, types: dict[type[nn.Module], Any]
) -> None:
    classes: tuple[type[nn.Module], ...] = tuple(types)
    left = [
        f"{name or 'the model itself'} ({type(m).__module__}.{type(m).__qualname__})"
        for name, m in model.named_modules()
        if isinstance(m, classes) and _plain_type(m) not in types
    ]
    if left:
        warnings.warn(
            f"{verb} left these subclasses of {family}'s modules as they are: {', '.join(left)}; "
            f"to {verb} one, derive it from {other}'s module of the same name",
            stacklevel=3,
        )


def _plain_type(module: nn.Module) -> type[nn.Module]:
    """The type without the class that a parametrization put in its place."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _replace(
    model: nn.Module, types: dict[type[nn.Module], type[nn.Module]], extra: dict[str, str]
) -> nn.Module:
    new = {m: _as(m, types, extra) for m in model.modules() if _plain_type(m) in types}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def _as(
    old: nn.Module, types: dict[type[nn.Module], type[nn.Module]], extra: dict[str, str]
) -> nn.Module:
    """``old`` as a module of the other kind: another class over the same contents."""
    cls = types[_plain_type(old)]
    if is_parametrized(old):
        # The properties that compute the weights live in a class made for this one module.
        body = {k: v for k, v in vars(type(old)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), body)
    new = cls.__new__(cls)
    new.__dict__.update(old.__dict__)
    for option in ("backend", *sequence_module.OPTIONS):
        new.__dict__.pop(option, None)
    new.__dict__.update(extra)
    for name, value in old.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules") or isinstance(value, list):
            new.__dict__[name] = value.copy()
        elif isinstance(value, dict):
            # Dicts of hooks stay shared: a handle that removes a hook knows it by its dict.
            for key, hook in value.items():
                if getattr(hook, "with_module", False):
                    value[key] = type(hook)(hook.hook, new)
    if "_flat_weights" in new.__dict__:
        # torch.nn's forward leaves what a parametrization computed there: no deepcopy takes that.
        flat = new.__dict__["_flat_weights"]
        new.__dict__["_flat_weights"] = [w if w is None or w.is_leaf else None for w in flat]
    return new
