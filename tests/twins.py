"""A torch.nn module and ours with the same weights, and what one training step makes of them.

``kind`` is a key of :data:`fused_rnn.cells.CELLS`, so a new cell joins every test that names none.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numerics
import torch
from devices import DEVICES, native
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn.backends import BACKENDS
from fused_rnn.cells import CELLS

# The CPU's tensors run on these; triton, which lacks float64 and projections, has its own tests.
RUN_HERE = tuple(name for name in BACKENDS if name not in ("cuda", "triton"))
# Every request that some device here can meet; numerics.grid leaves out what does not go together.
BACKEND_NAMES = (*RUN_HERE, *(("cuda",) if "cuda" in DEVICES else ()), "auto")
# One of each module: where the nonlinearity cannot matter.
MODULE_KINDS = tuple(kind for kind in CELLS if kind != "rnn_relu")

I, H, P = 5, 6, 4  # noqa: E741


def name_of(kind: str, *, cell: bool = False) -> tuple[str, dict[str, Any]]:
    """Name of the module, torch's and ours, and the arguments that make it of this kind."""
    name, _, nonlinearity = CELLS[kind].mode.partition("_")
    options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
    return name + "Cell" * cell, options


def twins(
    kind: str,
    *args: Any,
    cell: bool = False,
    backend: str | None = None,
    device: str = "cpu",
    **kwargs: Any,
) -> tuple[nn.Module, nn.Module]:
    """torch's module and ours, equal weights; sizes are ``I, H`` unless given.

    Without ``backend``, ours runs on our kernels for the device.
    """
    name, options = name_of(kind, cell=cell)
    args, options = args or (I, H), options | {"device": device}
    backend = backend or native(device)
    theirs = getattr(nn, name)(*args, **options, **kwargs)
    ours = getattr(fused_rnn, name)(*args, **options, **kwargs, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(kind: str, module: nn.Module, *batch: int, **options: Any) -> Any:
    """Random ``hx`` for ``module`` (a sequence module or a cell), there and in torch.nn's form."""
    options = {"device": next(module.parameters()).device} | options
    layers = getattr(module, "num_layers", None)
    lead = () if layers is None else (layers * (2 if module.bidirectional else 1),)
    h = torch.randn(*lead, *batch, getattr(module, "proj_size", 0) or module.hidden_size, **options)
    if CELLS[kind].states == 1:
        return h
    return h, torch.randn(*lead, *batch, module.hidden_size, **options)


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating point tensors in nested tuples; of a PackedSequence, its data."""
    if isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, Tensor):
        yield value
    elif value is not None:
        for item in value:
            yield from tensors(item)


def mapped(value: Any, change: Any) -> Any:
    """``value`` with ``change`` applied to each of :func:`tensors`."""
    if isinstance(value, PackedSequence):
        return PackedSequence(change(value.data), *value[1:])
    if value is None or isinstance(value, Tensor):
        return None if value is None else change(value)
    return tuple(mapped(item, change) for item in value)


def leaf(tensor: Tensor) -> Tensor:
    """Same values and strides, and asks for a gradient."""
    return tensor.detach().requires_grad_()


def step(
    module: nn.Module, input: Any, hx: Any = None, *, seed: int | None = None, call: Any = None
) -> dict[str, Tensor]:
    """Outputs, states and every gradient of one forward and backward, by name.

    The loss weighs each element differently. ``seed`` is set before the forward; ``call`` stands
    for the module where it is called through something, such as its compiled form.
    """
    input, hx = mapped(input, leaf), mapped(hx, leaf)
    module.zero_grad(set_to_none=True)
    if seed is not None:
        torch.manual_seed(seed)
    outputs = list(tensors((module if call is None else call)(input, hx)))
    results = {f"output {at}": output.detach() for at, output in enumerate(outputs)}
    random = torch.Generator().manual_seed(1)
    torch.autograd.backward(
        outputs,
        [torch.randn(o.shape, generator=random, dtype=torch.float64).to(o) for o in outputs],
    )
    leaves = {f"d input {at}": t for at, t in enumerate((*tensors(input), *tensors(hx)))}
    leaves |= {f"d {name}": p for name, p in module.named_parameters()}
    return results | {name: t.grad for name, t in leaves.items() if t.grad is not None}


def oracle(ours: nn.Module, input: Any, hx: Any = None, **options: Any) -> dict[str, Tensor]:
    """:func:`step` in float64 on the backend that is the oracle."""
    exact = copy.deepcopy(ours).double()
    exact.backend = "reference"
    return step(exact, mapped(input, Tensor.double), mapped(hx, Tensor.double), **options)


def assert_twins(
    theirs: nn.Module, ours: nn.Module, input: Any, hx: Any = None, *, what: object, **options: Any
) -> None:
    """Outputs, states and all gradients of ours are as good as torch's, in torch's dtypes."""
    expected, got = step(theirs, input, hx, **options), step(ours, input, hx, **options)
    exact = oracle(ours, input, hx, **options)
    assert got.keys() == expected.keys(), f"{what}: {got.keys() ^ expected.keys()}"
    length = max(t.numel() for t in tensors(input))
    for name, value in got.items():
        assert value.dtype == expected[name].dtype, f"{what}: {name} is {value.dtype}"
        numerics.assert_as_good_as(
            value, expected[name], exact[name], f"{what}: {name}", length=length
        )
