"""Which CUDA algorithm runs a layer, cut up how, and why. No GPU is needed to ask.

The planner is C++, ``csrc/plan.cpp``, so that the kernels' launches and this module read the same
plan; ``docs/cuda-plan.md`` has its formulae and where its constants come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import native

__all__ = ["ALGORITHMS", "KNOWN_DEVICES", "Device", "Plan", "describe", "plan"]

ALGORITHMS = ("stepwise", "cluster", "grid")

_ARITHMETIC = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


@dataclass(frozen=True)
class Device:
    """A GPU, in the terms of ``cudaGetDeviceProperties``; :func:`describe` asks for it.

    Args:
        name: what the device is called.
        capability: compute capability, ``10 * major + minor``.
        sms: streaming multiprocessors.
        shared_per_sm, shared_per_block: bytes of shared memory, the latter with opt-in.
        registers_per_sm, registers_per_block: registers of 32 bits.
        threads_per_block: the most of a CTA.
        l2_bytes: size of the L2 cache.
        clock_ghz: highest SM clock in GHz.
        dram_gb_s: bandwidth of global memory in 10^9 bytes a second, from its highest clock.
        clusters: the most clusters of 1, 2, 4, 8 and 16 CTAs that are active at a time with one
            CTA an SM, as ``cudaOccupancyMaxActiveClusters`` counts them; 0 where none fits.
    """

    name: str
    capability: int
    sms: int
    shared_per_sm: int
    shared_per_block: int
    registers_per_sm: int
    registers_per_block: int
    threads_per_block: int
    l2_bytes: int
    clock_ghz: float
    dram_gb_s: float
    clusters: tuple[int, int, int, int, int]


def describe(index: int) -> Device:
    """The description of a CUDA device of this machine, by the run time in the CUDA library.

    A device is asked once a process. Where its driver does not tell a clock, what follows from it
    is 0, and :func:`plan` refuses the device.

    Args:
        index: the device's number, as in ``torch.device("cuda", index)``.

    Raises:
        RuntimeError: the installation has no CUDA library, or CUDA has no such device; the reason
            is in words.
    """
    return Device(**native.describe_gpu(index))


def _known(
    name: str,
    capability: int,
    sms: int,
    shared_kb: tuple[int, int],
    l2_mb: int,
    clock_ghz: float,
    dram_gb_s: float,
    clusters: tuple[int, ...] = (),
) -> Device:
    per_sm, per_block = (kb * 1024 for kb in shared_kb)
    active = (sms, *clusters, 0, 0, 0, 0)
    return Device(
        name=name,
        capability=capability,
        sms=sms,
        shared_per_sm=per_sm,
        shared_per_block=per_block,
        registers_per_sm=65536,
        registers_per_block=65536,
        threads_per_block=1024,
        l2_bytes=l2_mb * 2**20,
        clock_ghz=clock_ghz,
        dram_gb_s=dram_gb_s,
        clusters=(active[0], active[1], active[2], active[3], active[4]),
    )


# For tests and for looking at plans; describe() asks the GPU that is there. Registers, threads and
# shared memory, of which CUDA keeps 1 KB for each CTA: the CUDA C++ Programming Guide's table of
# compute capabilities. SMs, L2, highest clock, bandwidth: NVIDIA's data sheets, white papers and
# tuning guides.
#
# Most active clusters, NOT MEASURED: half as many pairs as SMs; of 8 CTAs at most 15 were seen on
# an H100 (one unreviewed repository); of 16 at most 7, since a cluster does not leave its GPC, a
# GPC has at most 18 SMs, and not every one has 16; of 4 twice as many as of 8. The B200 is given
# the H100's numbers.
_HOPPER_CLUSTERS = (66, 30, 15, 7)
KNOWN_DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _known("T4", 75, 40, (64, 64), 4, 1.59, 320),
        _known("A100", 80, 108, (164, 163), 40, 1.41, 2039),
        _known("RTX 4090", 89, 128, (100, 99), 72, 2.52, 1008),
        _known("H100 SXM", 90, 132, (228, 227), 50, 1.98, 3350, _HOPPER_CLUSTERS),
        _known("H200", 90, 132, (228, 227), 50, 1.98, 4800, _HOPPER_CLUSTERS),
        _known("B200", 100, 148, (228, 227), 126, 1.965, 8000, _HOPPER_CLUSTERS),
    )
}


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class Plan:
    """How one algorithm runs one layer, in one direction or in both; prints as a short explanation.

    Bytes, threads and registers are a CTA's or a thread's; times are predicted, never measured.

    Args:
        problem: what is run, and on which device, in words.
        algorithm: ``"stepwise"`` (a GEMM and a pointwise kernel a step), ``"cluster"`` (clusters of
            CTAs that hold ``W_hh``) or ``"grid"`` (all SMs hold ``W_hh`` together).
        proven: whether its kernels have run on a GPU; before that it runs only by name.
        team: CTAs that hold ``W_hh`` together: the cluster, or a group of the grid's CTAs.
        directions: how many of the layer's one launch runs; its others have launches of their own.
        teams: how many are at work at a time, for all directions of a launch.
        line: how many CTAs of a team have the same rows of ``W_hh``, each for its part of K, and
            add up their sums; 1 but for the grid's backward.
        overlaid: whether sums take the operand's place in shared memory, behind more barriers.
        batch_tile: rows of the batch that a team runs together; tile ``i`` is rows
            ``i * batch_tile`` to ``min(N, (i + 1) * batch_tile)`` in one direction.
        tiles: of a launch, ``directions * ceil(N / batch_tile)``.
        waves: ``ceil(tiles / teams)``, tiles that run one after another.
        ctas: CTAs of the launch; 0 where torch's GEMM decides.
        units: hidden units of the CTA that owns most.
        rows: their rows of ``W_hh``, ``G * units``.
        unit_bounds: CTA ``i`` of a team owns units ``unit_bounds[i]`` to ``unit_bounds[i + 1]``.
        threads: of a CTA.
        registers: of a thread, weights included.
        k_split: parts into which the product's sums are split over the warps.
        weight_bytes: a CTA's part of ``W_hh``, padded to whole tensor-core tiles:
            ``register_bytes + shared_weight_bytes``. With ``"stepwise"``, all of it, and none held.
        register_bytes: what of it stays in registers.
        shared_weight_bytes: what of it stays in shared memory.
        shared_bytes: all shared memory of a CTA.
        workspace_bytes: global memory for the exchange.
        costs: what a step costs, as ``(words, µs)``.
        limit: the words of the largest cost.
        us_per_step: predicted µs of a step of the whole batch, in all of the layer's directions.
        setup_us: predicted µs before the first step.
        chunk: how many steps each layer of a stack runs at a time, while the layer before it runs
            the next ones; 0 where layers run one after the other.
        stack_us: predicted µs of all layers.
        why: the reason for the choice.
        wanted: where a faster algorithm is planned but not proven, its plan.
        refusals: each algorithm that cannot run the problem, and why.
    """

    problem: str
    algorithm: str
    proven: bool
    team: int
    directions: int
    teams: int
    line: int
    overlaid: bool
    batch_tile: int
    tiles: int
    waves: int
    ctas: int
    units: int
    rows: int
    unit_bounds: tuple[int, ...]
    threads: int
    registers: int
    k_split: int
    weight_bytes: int
    register_bytes: int
    shared_weight_bytes: int
    shared_bytes: int
    workspace_bytes: int
    costs: tuple[tuple[str, float], ...]
    limit: str
    us_per_step: float
    setup_us: float
    chunk: int
    stack_us: float
    why: str
    wanted: Plan | None
    refusals: dict[str, str]

    def layout(self) -> str:
        """One sentence: how the work is cut up."""
        if self.algorithm == "stepwise":
            return "a step is torch's GEMM, then one pointwise kernel"
        teams = _count(self.teams, "cluster" if self.algorithm == "cluster" else "group")
        lines = f" in lines of {self.line}" if self.line > 1 else ""
        kb = 1024
        launch = "both directions in one launch; " if self.directions == 2 else ""
        return launch + (
            f"{teams} of {_count(self.team, 'CTA')}{lines}, each with {self.batch_tile} rows of "
            f"the batch at a time; {_count(self.tiles, 'tile')} in {_count(self.waves, 'wave')}; "
            f"a CTA has up to {_count(self.units, 'unit')}, {_count(self.rows, 'row')} of W_hh: "
            f"{self.register_bytes / kb:.0f} KB in registers, "
            f"{self.shared_weight_bytes / kb:.0f} KB in shared memory "
            f"({self.shared_bytes / kb:.0f} KB used in all)"
        )

    def __str__(self) -> str:
        lines = [
            f"{self.problem}: {self.algorithm}, predicted {self.us_per_step:.2f} µs a step",
            f"  why       {self.why}",
            f"  layout    {self.layout()}",
            f"  limit     {self.limit}",
            "  costs     " + "; ".join(f"{what}: {us:.2f} µs" for what, us in self.costs),
        ]
        if self.chunk:
            lines.append(
                f"  stack     side by side, {self.chunk} steps at a time: predicted "
                f"{self.stack_us:.0f} µs for all layers"
            )
        if self.wanted is not None:
            lines.append(
                f"  by name   {self.wanted.algorithm}, predicted {self.wanted.us_per_step:.2f} µs "
                f"a step, limit {self.wanted.limit}: {self.wanted.layout()}"
            )
        lines += [f"  {name:<9} {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


def plan(
    cell: str,
    dtype: torch.dtype,
    T: int,
    N: int,
    H: int,
    P: int = 0,
    *,
    device: Device,
    backward: bool = False,
    directions: int = 1,
    layers: int = 1,
    tf32: bool = False,
    algorithm: str = "auto",
    proven_only: bool = True,
) -> Plan:
    """Plan one layer on a CUDA device, and how a stack of them runs.

    Args:
        cell: a key of :data:`fused_rnn.cells.CELLS`.
        dtype: float64, float32, bfloat16 or float16.
        T: steps.
        N: rows of the batch.
        H: hidden units.
        P: size of the LSTM's projection, 0 for none. Default: 0
        device: the GPU, from :func:`describe` or out of :data:`KNOWN_DEVICES`.
        backward: plan the backward pass. Default: ``False``
        directions: 1, or 2 for both directions of a layer. Default: 1
        layers: how many like it stand one above the other. Default: 1
        tf32: float32 may be multiplied in TF32. Default: ``False``
        algorithm: one of :data:`ALGORITHMS`, or ``"auto"`` for the one predicted to be the fastest.
            Default: ``"auto"``
        proven_only: choose among the algorithms that have run on a GPU; the fastest of the others
            stands in ``wanted``. Default: ``True``

    Raises:
        ValueError: an argument makes no sense.
        RuntimeError: the named algorithm cannot run the problem, with the reason; or the
            installation has no native module.
    """
    try:
        from . import _C
    except ImportError as error:
        raise RuntimeError("planning needs fused_rnn._C: install with a C++ compiler") from error
    if dtype not in _ARITHMETIC:
        raise ValueError(
            f"expected float64, float32, bfloat16 or float16, and dtype is {str(dtype)[6:]}"
        )
    arithmetic = "tf32" if tf32 and dtype is torch.float32 else _ARITHMETIC[dtype]
    choice = _C.plan(
        device=vars(device),
        cell=cell,
        arithmetic=arithmetic,
        T=T,
        N=N,
        H=H,
        P=P,
        backward=backward,
        directions=directions,
        layers=layers,
        algorithm=algorithm,
        proven_only=proven_only,
    )
    sizes = f"T={T} N={N} H={H}" + (f" P={P}" if P else "")
    if directions == 2:
        sizes += ", both directions"
    if layers > 1:
        sizes += f", {layers} layers"
    shared: dict[str, Any] = {
        "problem": (
            f"{cell} {'backward' if backward else 'forward'}, {arithmetic}, {sizes}, "
            f"on {device.name} (sm_{device.capability})"
        ),
        "refusals": choice["refusals"],
    }
    wanted, fastest = None, choice["plans"][choice["fastest"]]
    if proven_only and not fastest["proven"]:
        why = "predicted to be the fastest, but not run on a GPU yet"
        wanted = Plan(**fastest, **shared, why=why, wanted=None)
    return Plan(**choice["plans"][choice["runs"]], **shared, why=choice["why"], wanted=wanted)
