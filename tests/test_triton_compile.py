"""The Triton backend's loops, compiled for GPUs that are not there."""

import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numerics
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton_compile
from triton_compile import N, T, arguments, bound, compiled, points, usage

from fused_rnn.backends import triton
from fused_rnn.backends.triton import tuning
from fused_rnn.cells import CELLS

pytestmark = [
    pytest.mark.skipif(triton.INTERPRETS, reason="Triton interprets in this process"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux"),
]

EVERY = list(points())
# The one of each kernel that takes most, on each architecture.
FEW = [
    p
    for p in EVERY
    if p.cell == "lstm"
    and p.precision == "half"
    and p.H in (1001, 128)
    and (p.direction == "forward" or p.arch == 90)
]


@pytest.mark.parametrize("point", EVERY if numerics.FULL else FEW, ids=str)
def test_every_launch_shape_compiles_without_spills(point):
    """With every option given, which takes the most registers."""
    kernel = compiled(point)
    used = usage(kernel)
    assert used.stack == 0, f"{point}: {used}"
    assert used.registers <= 255
    assert used.shared <= triton_compile.SHARED[point.arch], f"{point}: {used}"
    ptx = kernel.asm["ptx"]
    # compute-sanitizer is told to look at what has the package's name in its own.
    assert f".entry fused_rnn_{point.direction}_{point.kernel}(" in ptx
    assert ".ftz" not in ptx  # no instruction takes numbers below the normal range for 0
    assert not re.search(r"\b(atom|red)\.", ptx)  # sums have one order: bits repeat


def test_a_spill_is_seen():
    point = next(p for p in FEW if p.kernel == "resident")
    starved = point._replace(shape=point.shape._replace(registers=64))
    used = usage(compiled(starved))
    assert used.registers <= 64
    assert used.stack > 0


@pytest.mark.parametrize("point", FEW, ids=str)
def test_offsets_of_rows_have_64_bits(point):
    """What a row's number is multiplied by is a row's width: 32 bits may not hold the product."""
    ttir = compiled(point).asm["ttir"]
    products = re.findall(rf"arith\.muli .*: tensor<{point.shape.rows}(?:x1)?x(i\d+)>", ttir)
    assert {*products} == {"i64"}


def test_few_are_some_of_each():
    assert {(p.kernel, p.direction) for p in FEW} == {(p.kernel, p.direction) for p in EVERY}
    assert {p.arch for p in FEW} == triton_compile.SHARED.keys()
    shapes = {p.shape for p in EVERY}
    for known in (*tuning.RESIDENT_SHAPES.values(), tuning.TILED_SHAPES.values()):
        assert shapes.issuperset(known)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kernel", ["resident", "tiled"])
def test_no_new_compilation_for_another_batch_or_length(kernel, direction):
    """1, multiples of 16 and what is neither are the same to the compiler; so is the direction."""
    from fused_rnn.backends.triton import launch

    cell, H = CELLS["gru"], 60
    _, shape = tuning.choose(cell, H, "half", 0, tuning.A100_BYTES)
    shape = shape if kernel == "resident" else tuning.TILED_SHAPES["half"]
    constants = launch.loop_constants(cell, H, kernel, shape, "half")
    values = arguments(cell, H, torch.bfloat16, direction)

    def key(t, n, reverse, given=values):
        function = launch.KERNELS[direction][kernel]
        _, _, specialization, options = bound(function, 90, (given, t, n, reverse), constants)
        return specialization, options

    expected = key(T, N, 0)
    for t, n, reverse in ((1, 1, 0), (16, 16, 1), (1000, 1, 1), (7, 48, 0), (70_000, 3, 1)):
        assert key(t, n, reverse) == expected
    assert key(T, N, 0, values._replace(control=None)) != expected


def test_sizes_are_told_to_every_kernel_at_run_time():
    """Those beside the loops as well: what is no tensor and no constant is not specialized."""
    from fused_rnn.backends.triton import backward, forward, launch, step

    loops = [kernel for of in launch.KERNELS.values() for kernel in of.values()]
    others = [forward.gates_again, backward.trace_back, backward.gather_operands]
    for kernel in (*loops, *others, step.step_forward, step.step_backward):
        given = {p.name: p.do_not_specialize for p in kernel.params if not p.is_constexpr}
        sizes = given.keys() - {"a", "before", "operand"}
        assert sizes
        assert all(given[name] for name in sizes), kernel


def test_a_barrier_orders_memory_of_the_whole_block():
    """``tiled`` hands states from step to step through memory, behind debug_barrier."""
    point = next(p for p in FEW if p.kernel == "tiled" and p.direction == "backward")
    ptx = compiled(point).asm["ptx"]
    assert "bar.sync" in ptx or "barrier.sync" in ptx
    assert "ld.global.nc" not in ptx  # a cache that does not see the block's own stores


@pytest.mark.parametrize("tf32", [False, True])
def test_products_follow_torchs_flag_for_rnns(tf32):
    """torch's flag for matrix products is what it was, after an exception too."""
    from fused_rnn.backends.triton import launch

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for dtype in (torch.float32, torch.bfloat16):
        like = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cpu"))
        with launch._products(like, tf32):
            follows = dtype is torch.float32
            assert matmul.fp32_precision == (("ieee", "tf32")[tf32] if follows else before)
        assert matmul.fp32_precision == before
        with pytest.raises(KeyError), launch._products(like, tf32):
            raise KeyError
        assert matmul.fp32_precision == before


def test_triton_is_imported_when_used_and_interpreting_is_decided_then(tmp_path):
    """With Triton imported, the variable comes too late: said in words, before anything runs."""
    code = """
import os, sys, torch
before = "triton" in sys.modules
import fused_rnn
assert ("triton" in sys.modules) == before
import triton
os.environ["TRITON_INTERPRET"] = "1"
from fused_rnn.backends.triton import INTERPRETS
assert not INTERPRETS
try:
    import fused_rnn.backends.triton.launch
except RuntimeError as error:
    assert "TRITON_INTERPRET was changed" in str(error)
else:
    raise AssertionError("it was not noticed")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)


def test_tensors_of_the_cpu_are_refused_in_words():
    from fused_rnn.backends.triton import ops

    x, w = torch.zeros(2, 1, 3), torch.zeros(3, 1)
    arguments = (CELLS["gru"].id, x, None, None, w, None, None, None, False, True)
    with pytest.raises(RuntimeError, match="run on GPUs, and the input is on cpu"):
        ops.library.layer(*arguments, *[None] * 5, 0, False)
    gates = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="run on GPUs, and the input is on cpu"):
        ops.library.step(CELLS["gru"].id, gates, gates, gates[:, :1], None, True)
