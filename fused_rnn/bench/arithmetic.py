"""In which numbers a row is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Arithmetic:
    """What a column ``dtype`` means: the tensors' dtype, whether float32 may be multiplied in TF32,
    and the distance of 1 to the next number of the products' operands."""

    dtype: torch.dtype
    tf32: bool
    eps: float


def _of(dtype: torch.dtype) -> Arithmetic:
    return Arithmetic(dtype, False, torch.finfo(dtype).eps)


DTYPES = {
    "float32": _of(torch.float32),
    "float64": _of(torch.float64),
    "bfloat16": _of(torch.bfloat16),
    "float16": _of(torch.float16),
    "tf32": Arithmetic(torch.float32, True, 2.0**-10),
}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Both of torch's flags: cuDNN heeds one, matrix products the other."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    before = matmul.allow_tf32
    # As a context: plain assignment is refused once torch's own test helpers are imported.
    with cudnn.flags(**kept, allow_tf32=allowed):
        try:
            matmul.allow_tf32 = allowed
            yield
        finally:
            matmul.allow_tf32 = before
