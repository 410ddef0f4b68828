"""The devices that the grids read, and ways to bring a test's tensors there."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import autograd
from fused_rnn.backends import cuda

# Without a usable GPU there are no cases for one, and so no skips.
MISSING_GPU = cuda.available() or (None if torch.cuda.is_available() else "there is no GPU")
DEVICES = ("cpu", "cuda") if MISSING_GPU is None else ("cpu",)


def native(device: str) -> str:
    """The request that gets our kernels: on CUDA, "auto" is torch.nn until ours are measured."""
    return "cuda" if device == "cuda" else "auto"


def meet(backend: str = "auto", device: str = "cpu", **_: Any) -> bool:
    """Whether the backend may be asked for with tensors of the device."""
    return device == (backend if backend in ("cpu", "cuda") else device)


def device_of(case: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The device of a case of :func:`numerics.cases`, and the other axes."""
    return case["device"], {name: value for name, value in case.items() if name != "device"}


def there(value: Any, device: str) -> Any:
    """``value`` with the tensors in its lists, tuples and dicts on the device, but meta's."""
    if isinstance(value, PackedSequence):
        return value.to(device)
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to(device)
    if isinstance(value, dict):
        return {name: there(item, device) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(there(item, device) for item in value)
    return value


def layer_on(device: str) -> Callable[..., Any]:
    """:func:`fused_rnn.autograd.layer` for tensors of the CPU, run on the device."""

    def run(*operands: Any, **options: Any) -> tuple[Tensor | None, ...]:
        outputs = autograd.layer(*there(operands, device), **there(options, device))
        return tuple(there(outputs, "cpu"))

    return autograd.layer if device == "cpu" else run


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """torch.nn's own loops on CUDA, which draw and differentiate as on the CPU.

    cuDNN draws dropout from a generator of its own, has no backward in eval mode, no second
    derivative and no promise to repeat itself.
    """
    return torch.backends.cudnn.flags(enabled=False, allow_tf32=False)
