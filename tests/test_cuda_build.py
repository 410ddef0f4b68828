"""The CUDA library compiles and links where there is nvcc and a torch without CUDA."""

import ctypes
import os
import re
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


def lines(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@needs_nvcc
def test_no_kernel_spills(library):
    result = subprocess.run([sys.executable, CHECK], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.match(r"\d{3,} kernels, none spills", result.stdout)


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


SAID = """ptxas info    : Compiling entry function '_ZN9fused_rnn4cuda4fillIfEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN9fused_rnn4cuda4fillIfEEvPT_
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 48 bytes smem
"""


@pytest.mark.parametrize("spill", [{}, {"stack": 8}, {"stores": 4}, {"loads": 4}], ids=str)
def test_a_spill_fails_the_check(spill, tmp_path):
    log, page = tmp_path / "log", tmp_path / "page.md"
    log.write_text(SAID.format(**{"stack": 0, "stores": 0, "loads": 0} | spill))
    result = subprocess.run([sys.executable, CHECK, page, log], capture_output=True, text=True)
    assert (result.returncode == 0) == (not spill), result.stderr
    assert page.exists() == (not spill)
    if spill:
        assert "fill for sm_90" in result.stderr
    else:
        assert "| `fill` | 1 | 10, 48 |" in page.read_text()


def test_a_log_without_kernels_fails_the_check(tmp_path):
    (tmp_path / "log").write_text("nvcc warning : nothing to do\n")
    command = [sys.executable, CHECK, tmp_path / "page.md", tmp_path / "log"]
    assert subprocess.run(command, capture_output=True).returncode != 0
