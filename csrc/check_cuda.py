"""check_cuda.py [PAGE [FOLDER]]: what ptxas said of the kernels and what it made; a spill fails.

ptxas prints, for every kernel and architecture, the registers that a thread has, and what did not
fit into them. A spilled register costs a trip to memory in every step of a loop, so none is
accepted. Nor is a warning: by one ptxas says that launch bounds ask for more than an SM has, and
that it goes on without them. And each kernel must be there for each architecture that nvcc was told
of.

In the machine code, which cuobjdump shows, the kernels that keep weights on the chip must multiply
on the tensor cores, but for exact float32, which must not; and none may go to local memory. With
PAGE, docs/kernels.md, the table is written there.
"""

import re
import runpy
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Where setup.py builds with this Python: FOLDER has build.ninja, and a log beside each object.
BUILD = ROOT / "build" / f"release-{sys.implementation.cache_tag}"
OBJECT = re.compile(r"^build (?P<object>\S+): nvcc ", re.MULTILINE)
ASKED = re.compile(r"-gencode=arch=compute_\w+,code=sm_(?P<arch>\w+)")

ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'")
STACK = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes"
)
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?")
# _ZN9fused_rnn4cuda12forward_stepI...: the name after its length.
KERNEL = re.compile(r"_ZN9fused_rnn4cuda(?P<length>\d+)(?P<rest>\w+)")
ON_TENSOR_CORES = ("cluster_forward", "cluster_backward", "grid_forward", "grid_backward")
# The grid's third template argument is kExact: ...I<cell>fLb1E...
EXACT = re.compile(r"grid_(?:forward|backward)I\w+?fLb1E")
# Compiled from sm_90 on: where there are clusters, more tiles than the warps of a lone block have;
# and what no GPU before has the memory for.
FROM_90 = re.compile(r"cluster_backwardI\w+?Li(?:[3-9]|10)E|grid_backwardI\w+?Lb0ELi5E")
FUNCTION = re.compile(r"^\s*Function : (?P<symbol>\w+)$", re.MULTILINE)
ARCHITECTURE = re.compile(r"^\s*code for sm_(?P<arch>\w+)$", re.MULTILINE)
COMPLAINT = re.compile(r"^ptxas.*\b(?:warning|error|fatal)\b.*$", re.MULTILINE)

HEAD = """# Kernels

What ptxas gives each kernel: the most registers a thread and the most shared memory a block (bytes)
of all its instances (cells and dtypes), for each architecture. No kernel spills, and ptxas warns of
none; `make cuda`, which writes this page, fails otherwise. Times: not yet measured.

[The same of Triton's kernels](kernels/triton.md#registers-and-shared-memory), by launch shape.

"""


class Kernel(NamedTuple):
    symbol: str
    name: str
    arch: str
    registers: int
    shared: int
    spilled: int


def read(log: str) -> list[Kernel]:
    kernels = []
    # What is said of a kernel stands between its name and the next one's.
    parts = ENTRY.split(log)
    for symbol, arch, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        stack, used, name = STACK.search(text), USED.search(text), KERNEL.match(symbol)
        if stack is None or used is None or name is None:
            raise SystemExit(f"check_cuda.py: ptxas says nothing it knows of {symbol}")
        kernels.append(
            Kernel(
                symbol,
                name["rest"][: int(name["length"])],
                arch,
                int(used["registers"]),
                int(used["shared"] or 0),
                int(stack["stores"]) + int(stack["loads"]) + int(stack["stack"]),
            )
        )
    return kernels


def table(kernels: list[Kernel]) -> str:
    archs = sorted(
        {kernel.arch for kernel in kernels}, key=lambda arch: int(re.sub(r"\D", "", arch))
    )
    most: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for kernel in kernels:
        cell = most[kernel.name, kernel.arch]
        cell[0] += 1
        cell[1] = max(cell[1], kernel.registers)
        cell[2] = max(cell[2], kernel.shared)
    lines = [
        "| kernel | instances | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
        "|---|---:|" + "---:|" * len(archs),
    ]
    for name in sorted({kernel.name for kernel in kernels}):
        found = [most[name, arch] for arch in archs]
        cells = " | ".join(f"{registers}, {shared}" for _, registers, shared in found)
        lines.append(f"| `{name}` | {found[0][0]} | {cells} |")
    return "\n".join(lines) + "\n"


def uncovered(kernels: list[Kernel], asked: set[str]) -> Iterator[str]:
    """What was not compiled for just the architectures that were asked for."""
    symbols = {kernel.symbol for kernel in kernels}
    found = defaultdict(set)
    for kernel in kernels:
        found[kernel.arch].add(kernel.symbol)
    for arch in sorted(asked):
        if missing := symbols - found[arch]:
            count = f"{len(missing)} of {len(symbols)} kernels"
            yield f"for sm_{arch} {count} were not compiled: {min(missing)}"
    for arch in sorted(found.keys() - asked):
        yield f"for sm_{arch} kernels were compiled, and nobody asked for it"


def machine_code(cuobjdump: str, folder: Path, name: str) -> dict[tuple[str, str], set[str]]:
    """Of an object's kernels for each architecture, which of the instructions asked after."""
    command = [cuobjdump, "-sass", str(folder / name)]
    shown = subprocess.run(command, capture_output=True, text=True)
    if shown.returncode != 0:
        raise SystemExit(f"check_cuda.py: {' '.join(command)} failed:\n{shown.stderr}")
    found = {}
    archs = ARCHITECTURE.split(shown.stdout)
    for arch, code in zip(archs[1::2], archs[2::2], strict=True):
        functions = FUNCTION.split(code)
        for symbol, text in zip(functions[1::2], functions[2::2], strict=True):
            found[symbol, arch] = {op for op in ("HMMA", "HGMMA", "LDL", "STL") if f" {op}" in text}
    return found


def wrong_code(kernels: list[Kernel], found: dict[tuple[str, str], set[str]]) -> Iterator[str]:
    for kernel in kernels:
        said = f"{kernel.name} for sm_{kernel.arch}"
        code = found.get((kernel.symbol, kernel.arch))
        if code is None:
            yield f"{said} has no machine code: {kernel.symbol}"
            continue
        if local := sorted(code & {"LDL", "STL"}):
            yield f"{said} goes to local memory by {' and '.join(local)}: {kernel.symbol}"
        first = 90 if FROM_90.search(kernel.symbol) else 80
        if kernel.name not in ON_TENSOR_CORES or int(re.sub(r"\D", "", kernel.arch)) < first:
            continue
        exact, multiplies = EXACT.search(kernel.symbol), code & {"HMMA", "HGMMA"}
        if exact and multiplies:
            yield f"{said} multiplies exact float32 on the tensor cores: {kernel.symbol}"
        elif not exact and not multiplies:
            yield f"{said} does not multiply on the tensor cores: {kernel.symbol}"


def main(page: Path | None = None, folder: Path = BUILD) -> None:
    ninja = (folder / "build.ninja").read_text()
    objects = OBJECT.findall(ninja)
    log = "".join((folder / f"{name}.log").read_text() for name in objects)
    kernels, asked = read(log), set(ASKED.findall(ninja))
    wrong = [
        *COMPLAINT.findall(log),
        *(
            f"{kernel.name} for sm_{kernel.arch} keeps {kernel.spilled} bytes in local memory"
            for kernel in kernels
            if kernel.spilled
        ),
        *uncovered(kernels, asked),
    ]
    looked = ""
    if cuobjdump := runpy.run_path(str(ROOT / "setup.py"))["find_cuda_tool"]("cuobjdump"):
        found: dict[tuple[str, str], set[str]] = {}
        with ThreadPoolExecutor() as pool:
            for code in pool.map(lambda name: machine_code(cuobjdump, folder, name), objects):
                found |= code
        wrong += wrong_code(kernels, found)
        looked = f", {sum('HMMA' in code for code in found.values())} on tensor cores"
    else:
        print("check_cuda.py: there is no cuobjdump to show the machine code", file=sys.stderr)
    if wrong or not kernels:
        print(*wrong, sep="\n", file=sys.stderr)
        raise SystemExit(f"check_cuda.py: {len(wrong)} complaints of {len(kernels)} kernels")
    print(f"{len(kernels)} kernels for sm_{', sm_'.join(sorted(asked))}, none spills{looked}")
    if page:
        page.write_text(HEAD + table(kernels))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
