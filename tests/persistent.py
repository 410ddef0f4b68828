"""What the tests of the algorithms share that keep the weights on the chip: the layer by name of
one, from the kernels' own source on the emulator or on a GPU."""

import functools

import numerics
import pytest
import torch
from directions import run_directions
from emulator import build
from layers import oracle_layer, run

from fused_rnn import autograd
from fused_rnn.backends import cuda
from fused_rnn.plan import ALGORITHMS

# Of an H200's clusters, how many of 1, 2, 4, 8 and 16 blocks are active at a time.
EVERY = (132, 66, 30, 15, 7)


def layer_by(algorithm, where, capability, monkeypatch):
    """``autograd.layer`` by an algorithm, for tensors of the CPU; ``where`` is emulator or gpu."""
    device = "cpu"
    if where == "emulator":
        if build.compiler() is None:
            pytest.skip("there is no C++ compiler to compile the emulator")
        monkeypatch.setattr(autograd, "ops", build.ops())
        build.seed(numerics.SEED)  # not the schedule that another test has left
        build.clusters(*EVERY)
        build.sms(EVERY[0])
    else:
        missing = cuda.available() or ("" if torch.cuda.is_available() else "there is no GPU")
        if missing or torch.cuda.get_device_capability() < capability:
            pytest.skip(missing or f"this GPU is before sm_{capability[0]}{capability[1]}")
        device = "cuda"
    number = ALGORITHMS.index(algorithm) + 1

    def there(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    def run_there(*operands, **options):
        options = {name: there(x) for name, x in options.items()}
        outputs = autograd.layer(*map(there, operands), **options, algorithm=number)
        return tuple(x if x is None else x.cpu() for x in outputs)

    return run_there


def is_emulated():
    return autograd.ops is not torch.ops.fused_rnn


def asked(problem, ops, algorithm, *, tf32=False):
    """The op's forward by an algorithm."""
    arguments = problem.op_arguments(tf32=tf32)
    arguments[-2] = ALGORITHMS.index(algorithm) + 1
    return ops.layer(*arguments)


class Tf32:
    """The ops with TF32 allowed: the last of their arguments."""

    def __init__(self, ops):
        self.ops = ops

    def __getattr__(self, name):
        return lambda *arguments: getattr(self.ops, name)(*arguments[:-1], True)


def check_tf32(algorithm, problem, monkeypatch):
    """To the rule, with stepwise in TF32 in the place of torch."""
    monkeypatch.setattr(autograd, "ops", Tf32(autograd.ops))
    ours, stepwise = (
        run(functools.partial(autograd.layer, algorithm=number), problem)
        for number in (ALGORITHMS.index(algorithm) + 1, 1)
    )
    for name, exact in run(oracle_layer, problem.to(torch.float64)).items():
        if exact.numel():
            errors = [float((x[name] - exact).abs().max()) for x in (ours, stepwise)]
            assert errors[0] <= 2 * errors[1] + 1e-6, name
            assert errors[1] < 1e-2 * max(1.0, float(exact.abs().max())), name


def check_schedules(layer, problem):
    """The same bits whatever runs first."""
    build.seed(0)
    first = run(layer, problem)
    for seed in range(1, 4):
        build.seed(seed)
        for name, x in run(layer, problem).items():
            assert torch.equal(x, first[name]), f"{name}, seed {seed}"


def check_both(algorithm, forward, reverse, launches, make_room=lambda: None):
    """The same bits by one call as by two; on the emulator, by so many launches of ``launches()``
    in forward and backward. ``make_room()`` for the other direction."""
    device = "cpu" if is_emulated() else "cuda"
    number = ALGORITHMS.index(algorithm) + 1
    two = run_directions(forward, reverse, together=False, algorithm=number, device=device)
    make_room()
    launches()
    one = run_directions(forward, reverse, together=True, algorithm=number, device=device)
    assert not is_emulated() or launches() == 2, f"{forward} and back"
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert torch.equal(x, two[name]), f"{name} of {forward} and back"
