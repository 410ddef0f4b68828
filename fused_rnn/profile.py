"""Where the time of a workload goes: ``python -m fused_rnn.profile --workload rnnoise``.

Runs the workload under ``torch.profiler``, prints its time by phase, and saves a trace for
chrome://tracing or ui.perfetto.dev. On a GPU it also prints command lines of ``nsys`` and ``ncu``
for the kernels that it saw; those run this program with ``--nvtx``, which names every op for them
and records nothing itself.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import profiler as autograd_profiler
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from .bench import workloads
from .bench.arithmetic import DTYPES, tf32
from .bench.providers import find
from .bench.timing import Turn, interleave, torch_threads

CALL = "one call"
PYTHON = "Python and autograd"
OTHER = "other ops"
# On a CPU the recurrent op makes the products with the input and the weights' gradients in between
# the steps, so they are in its time.
_RECURRENT = r"(fused_rnn\w*::(layer|bidirectional|step)|aten::(mkldnn_rnn|_cudnn_rnn|_thnn_fused))"
OPS = {
    "recurrent op, backward": rf"^{_RECURRENT}\w*backward",
    "recurrent op, forward": rf"^{_RECURRENT}",
    "matrix products": r"^aten::(addmm|mm|bmm|baddbmm|mv|linear|matmul)$",
    "copies": r"^aten::(copy_|cat|stack|clone|fill_|zero_)$",
}
PRODUCT = re.compile(r"gemm|gemv|cublas|cutlass|nvjet|splitk", re.IGNORECASE)


def phase_of_op(name: str) -> str:
    """The phase that an op's own time on the CPU belongs to."""
    for phase, pattern in OPS.items():
        if re.search(pattern, name):
            return phase
    return OTHER if "::" in name and not name.startswith("autograd::") else PYTHON


def phase_of_kernel(op: str, kernel: str) -> str:
    """The phase that a GPU's kernel belongs to, launched by ``op``. Where every step has a product
    of its own, as in ``stepwise``, products are also the recurrent ones."""
    direction = phase_of_op(op).removeprefix("recurrent op, ")
    if direction not in ("forward", "backward"):
        return OTHER
    return f"{'products' if PRODUCT.search(kernel) else 'time loop'}, {direction}"


def phases(events: Iterable[Any]) -> tuple[dict[str, float], dict[str, float], Counter[str]]:
    """Microseconds by phase on the CPU and on the GPU, and those of each kernel."""
    cpu: dict[str, float] = defaultdict(float)
    gpu: dict[str, float] = defaultdict(float)
    kernels: Counter[str] = Counter()
    for event in events:
        cpu[phase_of_op(event.name)] += event.self_cpu_time_total
        for kernel in event.kernels:
            gpu[phase_of_kernel(event.name, kernel.name)] += kernel.duration
            kernels[kernel.name] += kernel.duration
    return dict(cpu), dict(gpu), kernels


class Split(TorchDispatchMode):
    """Under it each native op runs again without its products: microseconds of the time loops and,
    as the difference, of the products. The products' results then come from memory, not from a
    cache, so the loop is told a little too long."""

    def __init__(self) -> None:
        super().__init__()
        self.us: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "fused_rnn::layer" and args[2] is not None:
            cell, x, w_ih, b_ih, *others = args
            gx = torch.nn.functional.linear(x, w_ih, b_ih)
            self.add("forward", func, args, (cell, gx, None, None, *others))
        elif name == "fused_rnn::layer_backward":
            cell, _, *others = args
            self.add("backward", func, args, (cell, 0, *others))
        return func(*args, **(kwargs or {}))

    def add(self, direction: str, func: Any, args: Any, loop: Any) -> None:
        calls = {"whole": lambda: func(*args), "loop": lambda: func(*loop)}
        threads = torch.get_num_threads()
        turns = {name: Turn(call, threads) for name, call in calls.items()}
        seconds = interleave(turns, 0.0)
        whole, alone = (1e6 * median(seconds[name]) for name in ("whole", "loop"))
        self.us[f"time loop, {direction}"] += alone
        self.us[f"products, {direction}"] += max(0.0, whole - alone)


def table(title: str, found: dict[str, float], calls: int) -> str:
    """Milliseconds a call and the share of each phase, the largest first."""
    whole = sum(found.values())
    lines = [f"{title:32} {'ms a call':>10} {'share':>6}"]
    for phase, us in sorted(found.items(), key=lambda item: -item[1]):
        lines.append(f"  {phase:30} {us / calls / 1e3:10.4f} {us / whole:6.1%}")
    lines.append(f"  {'all':30} {whole / calls / 1e3:10.4f}")
    return "\n".join(lines)


def commands(kernels: Counter[str], options: list[str]) -> list[str]:
    """Command lines that look closer: ``nsys`` at all of it, ``ncu`` at the longest kernels."""
    program = f"python -m fused_rnn.profile {shlex.join(options)} --nvtx"
    found = [f"nsys profile --trace=cuda,nvtx,cublas -o timeline {program}"]
    for kernel, _ in kernels.most_common(3):
        base = re.sub(r"^void ", "", kernel)
        base = re.split(r"[<(]", base)[0].rpartition("::")[2]
        found.append(
            f"ncu --set full --kernel-name {base} --launch-skip 2 --launch-count 1 "
            f"-o {base} {program}"
        )
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workload", required=True, help="one of fused_rnn/bench/workloads.toml")
    add("--pass", dest="kind", help="forward, train or step (default: the workload's last)")
    add("--provider", default="fused_rnn", help="as in fused_rnn.bench (default: fused_rnn)")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--device", choices=("cpu", "cuda"), default=("cpu", "cuda")[torch.cuda.is_available()])
    add("--threads", type=int, default=1, help="default: 1")
    add("--calls", type=int, default=5, help="default: 5, after two to warm up")
    add("--trace", type=Path, help="default: <workload>-<pass>.json")
    add("--nvtx", action="store_true", help="names ops for nsys and ncu; records nothing")
    arguments = parser.parse_args(argv)
    try:
        (workload, *_), _ = workloads.select(workloads.load(), only=[arguments.workload])
        arguments.provider = find(arguments.provider)
    except ValueError as error:
        parser.error(str(error))
    arguments.workload = workload
    arguments.kind = arguments.kind or workload.passes[-1]
    if arguments.kind not in workload.passes:
        parser.error(f"{workload.name} has no pass {arguments.kind!r}: {workload.passes}")
    if arguments.nvtx and not torch.cuda.is_available():
        parser.error("--nvtx needs a GPU that torch sees")
    return arguments


def main(argv: list[str] | None = None) -> int:
    options = sys.argv[1:] if argv is None else argv
    arguments = parse(options)
    w, kind, cuda = arguments.workload, arguments.kind, arguments.device == "cuda"
    arithmetic = DTYPES[arguments.dtype]
    case = arguments.provider.case(w, arithmetic.dtype, arguments.device)
    case.module.train(kind == "train")
    call = case.call(kind)

    def wait_for_it() -> None:
        call()
        if cuda:
            torch.cuda.synchronize()

    print(f"{w.name}: {w.cell} {w.shape} {arguments.dtype} {kind}, {arguments.provider.name}")
    with tf32(arithmetic.tf32), torch_threads(arguments.threads), workloads.grad_mode(kind):
        for _ in range(2):
            wait_for_it()
        if arguments.nvtx:
            with autograd_profiler.emit_nvtx():
                for _ in range(arguments.calls):
                    with torch.cuda.nvtx.range(CALL):
                        wait_for_it()
            return 0
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with profile(activities=activities) as recorded:
            for _ in range(arguments.calls):
                with record_function(CALL):
                    wait_for_it()
    cpu, gpu, kernels = phases(recorded.events())
    print(table("phase, on the CPU", cpu, arguments.calls))
    if not cuda:
        grad = workloads.grad_mode(kind)
        with Split() as split, torch_threads(arguments.threads), grad:
            call()
        if split.us:
            print(table("in the recurrent op", split.us, 1))
    if gpu:
        print(table("phase, on the GPU", gpu, arguments.calls))
        print("\nTo look closer:", *commands(kernels, options), sep="\n  ")
    trace = arguments.trace or Path(f"{w.name}-{kind}.json")
    recorded.export_chrome_trace(str(trace))
    print(f"trace: {trace} (chrome://tracing, ui.perfetto.dev)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
