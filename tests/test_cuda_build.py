"""The CUDA library compiles and links where there is nvcc and a torch without CUDA."""

import ctypes
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numerics
import pytest
from emulator import build
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[1]
CHECK = ROOT / "csrc" / "check_cuda.py"
# Where setup.py's build with this Python leaves what it compiles.
OBJECTS = ROOT / "build" / f"release-{sys.implementation.cache_tag}"

# One process builds the library for all tests of it.
pytestmark = pytest.mark.xdist_group("cuda_build")
needs_nvcc = pytest.mark.skipif(
    build.nvcc() is None,
    reason="needs nvcc, CUDA's compiler: pip install cuda-toolkit[cccl,cudart,nvcc]",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Built as `make cuda` builds it; for one architecture, or with --full for all."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = os.environ | {"FORCE_CUDA": "1"}
    if not numerics.FULL:
        environment["TORCH_CUDA_ARCH_LIST"] = "9.0"
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "fused_rnn" / "libfused_rnn_cuda.so"


def cuobjdump():
    return runpy.run_path(str(ROOT / "setup.py"))["find_cuda_tool"]("cuobjdump")


def lines(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@needs_nvcc
def test_no_kernel_spills(library):
    result = subprocess.run([sys.executable, CHECK], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.match(r"\d{3,} kernels for (sm_\d+, )*sm_\d+, none spills", result.stdout)
    if cuobjdump() is None:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    assert re.search(r", \d{3,} on tensor cores$", result.stdout)


@needs_nvcc
def test_it_finds_torchs_cuda_libraries_through_libtorch_and_brings_its_own_runtime(library):
    needed = [line for line in lines("readelf", "-d", library) if "NEEDED" in line]
    names = {re.search(r"\[(.+)\]", line)[1] for line in needed}
    assert "libtorch.so" in names
    assert not [name for name in names if re.match(r"lib(cuda|cublas|cudnn|torch_cuda)", name)]


@needs_nvcc
def test_it_shows_one_function_of_its_own_the_description_of_a_gpu(library):
    defined = lines("nm", "-D", "--defined-only", "--format=posix", library)
    functions = {line.split()[0] for line in defined if line.split()[1] == "T"}
    assert {name for name in functions if not name.startswith("_")} == {"fused_rnn_describe"}


@needs_nvcc
def test_cudas_own_run_time_says_in_words_that_there_is_no_such_gpu(library, tmp_path):
    # The part that a torch without CUDA can load.
    described = tmp_path / "described.so"
    objects = OBJECTS / "cuda.describe.o"
    runtime = Path(build.nvcc()).parent.parent / "lib"
    torch_libraries = [f"-L{path}" for path in library_paths()]
    command = [build.nvcc(), "-shared", "-cudart", "static", objects, "-o", described]
    lines(*command, *torch_libraries, "-ltorch_cpu", f"-L{runtime}")
    reason = ctypes.create_string_buffer(1024)
    index = ctypes.c_int(1000)
    assert ctypes.CDLL(str(described)).fused_rnn_describe(index, None, reason, len(reason)) == 1
    assert re.match(r"CUDA does not describe device 1000: [\w ]+$", reason.value.decode())


@needs_nvcc
def test_every_torch_symbol_it_needs_is_in_torch_2_10(library):
    undefined = lines("nm", "-D", "--undefined-only", "--format=posix", library)
    needed = {line.split()[0] for line in undefined}
    assert not [name for name in needed if re.match(r"_?cu(da|blas)", name)]
    needed = {name for name in needed if "torch" in name or "c10" in name}
    assert {"aoti_torch_get_current_cuda_stream", "torch_get_current_cuda_blas_handle"} <= needed
    shims = "#define USE_CUDA\n#include <torch/csrc/stable/c/shim.h>\n"
    shims += "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n"
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    command = ["g++", "-std=c++17", "-E", "-P", "-x", "c++", target]
    command += [*(f"-I{path}" for path in include_paths()), "-"]
    declared = subprocess.run(command, input=shims, capture_output=True, text=True, check=True)
    assert needed <= set(re.findall(r"\w+", declared.stdout))


FILL = "_ZN9fused_rnn4cuda4fillIfEEvPT_"
SAID = """ptxas info    : Compiling entry function '{symbol}' for 'sm_{arch}'
ptxas info    : Function properties for {symbol}
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 0 barriers, 48 bytes smem
"""


def said(symbol=FILL, arch=90, stack=0, stores=0, loads=0, registers=10):
    return SAID.format_map(locals())


def machine_code(*kernels):
    """As cuobjdump shows it: (symbol, architecture, instructions) of each."""
    return "".join(
        f"\tcode for sm_{arch}\n\t\tFunction : {symbol}\n"
        + "".join(f"        /*0000*/   {op} R1 ;\n" for op in instructions)
        for symbol, arch, instructions in kernels
    )


def check(folder, *logs, archs=(80, 90), code=None):
    """Runs check_cuda.py on a build for these architectures whose compilers said that, and whose
    machine code is this; without it, an EXIT each."""
    flags = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
    ninja = f"rule nvcc\n  command = nvcc {flags} -gencode=arch=compute_90,code=compute_90 $in\n"
    for i, log in enumerate(logs):
        ninja += f"build cuda.{i}.o: nvcc {i}.cu\n"
        (folder / f"cuda.{i}.o.log").write_text(log)
        entries = re.findall(r"function '(\w+)' for 'sm_(\d+)'", log)
        text = code or machine_code(*((*entry, ["EXIT"]) for entry in entries))
        (folder / f"cuda.{i}.o").write_text(text)
    (folder / "build.ninja").write_text(f"{ninja}build ops.o: compile ops.cpp\n")
    tool = folder / "cuobjdump"
    tool.write_text('#!/bin/sh\ntest "$1" = -sass && cat "$2"\n')
    tool.chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "CUDA_HOME": ""}
    command = [sys.executable, CHECK, folder / "page.md", folder]
    return subprocess.run(command, env=os.environ | path, capture_output=True, text=True)


def test_kernels_without_spills_for_every_architecture_pass_and_are_listed(tmp_path):
    other = FILL.replace("4fillIf", "4fillId")
    first = said(arch=80) + said(arch=90, registers=12)
    second = said(other, arch=80, registers=14) + said(other, arch=90)
    result = check(tmp_path, first, second)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "4 kernels for sm_80, sm_90, none spills, 0 on tensor cores\n"
    page = (tmp_path / "page.md").read_text()
    assert "| `fill` | 2 | 14, 48 | 12, 48 |" in page
    head = page[: page.index("| kernel")]
    assert (ROOT / "docs" / "kernels.md").read_text().startswith(head)
    ((target, heading),) = re.findall(r"\]\((\S+)#(\S+)\)", head)
    titles = re.findall(r"^#+ (.*)$", (ROOT / "docs" / target).read_text(), re.MULTILINE)
    assert heading in {title.lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        (said(arch=80) + said(stack=8), "fill for sm_90 keeps 8 bytes"),
        (said(arch=80, stores=4) + said(), "fill for sm_80 keeps 4 bytes"),
        (said(arch=80) + said(loads=4), "fill for sm_90 keeps 4 bytes"),
        (said(), f"for sm_80 1 of 1 kernels were not compiled: {FILL}"),
        (
            said(arch=80) + said(FILL.replace("If", "Id")),
            f"for sm_90 1 of 2 kernels were not compiled: {FILL}",
        ),
        (
            said(arch=80) + said() + said(arch=75),
            "for sm_75 kernels were compiled, and nobody asked",
        ),
        (
            f"ptxas warning : Value of threads per SM for entry {FILL} is out of range. "
            ".minnctapersm will be ignored\n" + said(arch=80) + said(),
            ".minnctapersm will be ignored",
        ),
        ("nvcc warning : nothing to do\n", "0 complaints of 0 kernels"),
        (said(symbol="_Z5otherv"), "ptxas says nothing it knows of _Z5otherv"),
    ],
    ids=lambda value: value if value.isprintable() else "",
)
def test_what_is_wrong_in_the_log_fails_the_check(log, complaint, tmp_path):
    result = check(tmp_path, log)
    assert result.returncode != 0
    assert complaint in result.stderr
    assert not (tmp_path / "page.md").exists()


CLUSTER = "_ZN9fused_rnn4cuda15cluster_forwardINS_4LstmEfLi1ELi1EEEvNS0_14ClusterForwardIT0_EE"
GRID = "_ZN9fused_rnn4cuda13grid_backwardINS_3GruEfLb0ELi2ELi1EEEvNS0_12GridBackwardIT0_EE"
EXACT = GRID.replace("Lb0", "Lb1")


@pytest.mark.parametrize("symbol", [CLUSTER, GRID])
def test_what_keeps_weights_on_the_chip_is_on_tensor_cores_from_sm_80_on(symbol, tmp_path):
    log = said(symbol, arch=75) + said(symbol)
    code = machine_code((symbol, 75, ["EXIT"]), (symbol, 90, ["HMMA.1688.F32.TF32"]))
    result = check(tmp_path, log, archs=(75, 90), code=code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "2 kernels for sm_75, sm_90, none spills, 1 on tensor cores\n"


def test_kernels_for_clusters_alone_need_tensor_cores_from_sm_90_on(tmp_path):
    symbol = CLUSTER.replace("15cluster_forward", "16cluster_backward").replace("Li1E", "Li4E", 1)
    log = said(symbol, arch=80) + said(symbol)
    code = machine_code((symbol, 80, ["EXIT"]), (symbol, 90, ["EXIT"]))
    result = check(tmp_path, log, code=code)
    assert result.stderr.count("does not multiply on the tensor cores") == 1
    assert f"for sm_90 does not multiply on the tensor cores: {symbol}" in result.stderr


@pytest.mark.parametrize(
    ("symbol", "instructions", "complaint"),
    [
        (CLUSTER, ["FFMA"], "does not multiply on the tensor cores"),
        (GRID, ["FFMA"], "does not multiply on the tensor cores"),
        (EXACT, ["HMMA.1688.F32.TF32"], "multiplies exact float32 on the tensor cores"),
        (GRID, ["HMMA.16816.F32", "STL.64", "LDL"], "goes to local memory by LDL and STL"),
        (FILL, ["@P0 STL"], "goes to local memory by STL"),
    ],
)
def test_what_is_wrong_in_the_machine_code_fails_the_check(
    symbol, instructions, complaint, tmp_path
):
    code = machine_code((symbol, 90, instructions))
    result = check(tmp_path, said(symbol), archs=(90,), code=code)
    assert result.returncode != 0
    assert f"for sm_90 {complaint}: {symbol}" in result.stderr


def test_a_kernel_that_is_not_in_the_machine_code_fails_the_check(tmp_path):
    code = machine_code((FILL, 80, ["EXIT"]))
    result = check(tmp_path, said(arch=80) + said(), code=code)
    assert f"fill for sm_90 has no machine code: {FILL}" in result.stderr


# ptxas holds a kernel to the bounds that it has, and to none where it has none.
def test_every_kernel_has_launch_bounds():
    kernel = r"(?<!#define )FUSED_RNN_KERNEL\b.*|(?<!FUSED_RNN_KERNEL )__global__ void\b.*"
    sources = (ROOT / "csrc" / "cuda").glob("*.cu*")
    kernels = [line for path in sources for line in re.findall(kernel, path.read_text())]
    assert len(kernels) > 10
    assert [line for line in kernels if not re.search(r"launch_bounds(__)?\(", line, re.I)] == []
