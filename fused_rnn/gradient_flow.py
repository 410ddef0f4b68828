"""How much gradient reaches each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Self

from .autograd import in_transform
from .backends import Problem
from .cells import carry_dtype
from .sequence_module import SequenceModule


class gradient_flow:  # noqa: N801
    r"""Context manager that records how much gradient reaches each step of each layer.

    For the output h of step t of a sequence that is the norm, over the R units of h, of the total
    gradient

    .. math::
        \frac{dL}{dh_t} = \frac{\partial L}{\partial h_t}
            + \Big(\frac{\partial h_{t+1}}{\partial h_t}\Big)^T \frac{dL}{dh_{t+1}}
            + \Big(\frac{\partial c_{t+1}}{\partial h_t}\Big)^T \frac{dL}{dc_{t+1}}

    which reaches it through what reads the output (a loss, the next layer) and through all later
    steps; the last term is an LSTM's. Where it vanishes or explodes towards early steps shows
    here (Bengio et al. 1994; Pascanu et al. 2013). With a projection h is what it gives, and a
    reverse direction's later steps are those of smaller t.

    The native CPU backward has these gradients at hand, and takes a norm more for each row of a
    step. The other backends lack it: on a GPU the reference's loop runs inside of the context,
    slowly.

    Args:
        module: one of our RNN, LSTM and GRU, or a model with some in it. Forwards inside of the
            context are recorded; a backward may also come after it.

    Raises:
        TypeError: there is none in ``module``.
        RuntimeError: from a forward inside: under ``torch.compile`` or a transform of
            ``torch.func``, or on a backend that was asked for by name and lacks it.

    Example::

        >>> with fused_rnn.gradient_flow(lstm) as flow:
        ...     lstm(input)[0][-1].sum().backward()
        >>> flow.norms["l0"]  # [T,N]
        >>> flow.plot()
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = {n: m for n, m in module.named_modules() if isinstance(m, SequenceModule)}
        if not self.modules:
            raise TypeError(
                f"gradient_flow expects a module with an RNN, LSTM or GRU of fused_rnn, got "
                f"{type(module).__name__}; fused_rnn.convert makes them out of torch.nn's"
            )
        self.calls: dict[SequenceModule, Call] = {}
        self.around: list[Any] = []

    def __enter__(self) -> Self:
        self.around = [module._flow for module in self.modules.values()]
        for module in self.modules.values():
            module._flow = self
        return self

    def __exit__(self, *exc: object) -> None:
        for module, before in zip(self.modules.values(), self.around, strict=True):
            module._flow = before

    def call(self, module: SequenceModule, input: Any) -> Call:
        """What a forward of ``module`` with ``input`` fills."""
        order = input.unsorted_indices if isinstance(input, PackedSequence) else None
        return Call(self, module, order)

    @property
    def norms(self) -> dict[str, Tensor]:
        """Of each module's last forward: ``[T,N]`` in float32 (float64 where h is), for each layer
        and direction by torch.nn's names for them, ``"l0"``, ``"l0_reverse"``, ``"encoder.l1"``.
        Time comes first also with ``batch_first``; where a sequence has ended, and before the
        backward, it is 0."""
        found = {}
        for name, module in self.modules.items():
            if module in self.calls:
                layers = (names[0].removeprefix("weight_ih_") for names in module._all_weights)
                for layer, norm in zip(layers, self.calls[module].norms(), strict=True):
                    found[f"{name}.{layer}" if name else layer] = norm
        return found

    def plot(self, ax: Any = None) -> Any:
        """Draw the norm over the whole batch, a line for each layer and direction, over the steps.

        Args:
            ax: axes of matplotlib. Default: ``None``, those of a new figure

        Returns:
            the axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("gradient_flow draws with matplotlib: install it") from error
            _, ax = pyplot.subplots()
        for name, norm in self.norms.items():
            ax.plot(norm.double().norm(dim=1).cpu(), label=name)
        ax.set(xlabel="step t", ylabel="norm of dL/dh_t", yscale="log")
        ax.legend()
        return ax


class Call:
    """What one forward of one module leaves for its backward to fill."""

    def __init__(self, flow: gradient_flow, module: SequenceModule, order: Tensor | None) -> None:
        self.flow, self.module, self.order = flow, module, order
        self.filled: list[tuple[Tensor, Any]] = []

    def begin(self, problem: Problem) -> None:
        if problem.compiling or problem.transformed or in_transform():
            raise RuntimeError(
                "fused_rnn: gradient_flow records plain backwards, which torch.compile and "
                "torch.func rewrite; call the module without them to look at its gradients"
            )
        self.flow.calls[self.module] = self

    def room(self, input: Tensor, dtype: torch.dtype, loop: Any) -> Tensor:
        """For a layer in one direction: the op's ``dh_norm``."""
        norms = torch.zeros(input.shape[:-1], dtype=carry_dtype(dtype), device=input.device)
        self.filled.append((norms, loop))
        return norms

    def norms(self) -> list[Tensor]:
        """``[T,N]`` for each layer and direction, in the caller's order of the batch."""
        by_step = [loop.by_step(norms) for norms, loop in self.filled]
        order = self.order
        return by_step if order is None else [norms.index_select(1, order) for norms in by_step]
