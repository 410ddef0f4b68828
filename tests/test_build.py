"""The build keeps its promises: instruction sets apart, torch 2.10's ABI, clear refusals."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import fresh_install
import numerics
import pytest
import torch
from torch.utils.cpp_extension import include_paths

from fused_rnn import native

ROOT = Path(__file__).resolve().parents[1]
CHECK_SYMBOLS = ROOT / "csrc" / "check_symbols.py"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm"
)
needs_library = pytest.mark.skipif(
    native.UNAVAILABLE is not None or not sys.platform.startswith("linux"),
    reason="needs the native library, on Linux",
)


def check_symbols(folder: Path, source: str) -> subprocess.CompletedProcess:
    objects = []
    for isa in ("baseline", "avx2"):
        objects.append(folder / f"kernels.{isa}.float.o")
        command = ["g++", "-O0", "-fPIC", f"-DISA={isa}", "-x", "c++", "-", "-c", "-o", objects[-1]]
        subprocess.run(command, input=source, text=True, check=True)
    command = [sys.executable, CHECK_SYMBOLS, folder / "symbols", *objects]
    return subprocess.run(command, capture_output=True, text=True)


@needs_compiler
def test_an_inline_function_shared_by_instruction_sets_fails_the_build(tmp_path):
    source = (
        "inline int twice(int x) { return 2 * x; }\nnamespace ISA { int f() { return twice(1); } }"
    )
    result = check_symbols(tmp_path, source)
    assert result.returncode != 0
    assert "_Z5twicei" in result.stderr
    assert not (tmp_path / "symbols").exists()


@needs_compiler
def test_what_stands_in_the_namespace_of_its_instruction_set_passes(tmp_path):
    source = (
        "namespace ISA { inline int twice(int x) { return 2 * x; }\nint f() { return twice(1); } }"
    )
    result = check_symbols(tmp_path, source)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "symbols").exists()


@needs_library
@needs_compiler
def test_every_torch_symbol_it_needs_is_in_torch_2_10():
    library = Path(native._LIBRARY)
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", "--format=posix", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    needed = {line.split()[0] for line in undefined.splitlines()}
    needed = {name for name in needed if "torch" in name or "c10" in name}
    assert "torch_call_dispatcher" in needed
    shims = "#include <torch/csrc/stable/c/shim.h>\n"
    shims += "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n"
    includes = [f"-I{path}" for path in include_paths()]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    declared = subprocess.run(
        ["g++", "-std=c++17", "-E", "-P", "-x", "c++", target, *includes, "-"],
        input=shims,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", declared))
    assert "torch_exception_get_what" not in declared  # torch 2.13's: the filter filters
    assert needed <= declared


@needs_library
def test_the_library_finds_torch_by_name_alone():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    dynamic = subprocess.run(
        [readelf, "-d", native._LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    assert "[libtorch_cpu.so]" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert "libpython" not in dynamic


def build_ext(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_without_a_compiler_a_sentence_names_the_package(tmp_path):
    result = build_ext(tmp_path, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "no-such-compiler was not found" in result.stderr
    assert "apt install g++" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (
            "ninja",
            "building needs the Python package ninja: run `pip install torch ninja pybind11`",
        ),
        ("Python.h", "the headers of Python are missing"),
        (
            "torch 2.10",
            "the torch it is built against must be 2.10 or newer, and this one is 2.9.1",
        ),
    ],
)
def test_what_building_needs_is_named(missing, sentence, tmp_path):
    """What is hidden is hidden from setup.py alone."""
    hide = {
        "ninja": "importlib.util.find_spec = lambda n, f=importlib.util.find_spec: "
        "None if n == 'ninja' else f(n)",
        "Python.h": "sysconfig.get_path = lambda name: 'nowhere'",
        "torch 2.10": "importlib.metadata.version = lambda name: '2.9.1+cpu'",
    }[missing]
    code = f"""import importlib.metadata, importlib.util, runpy, sys, sysconfig
import setuptools.command.build_ext
{hide}
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", {str(tmp_path)!r}]
runpy.run_path("setup.py", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_compiler_that_fails_is_said_to_have_failed(tmp_path):
    """Its own message stands above the sentence. DEBUG, to leave the release's objects alone."""
    result = build_ext(tmp_path, CXX="false", DEBUG="1")
    assert result.returncode != 0
    assert "the C++ build failed; the compiler's own message stands above" in result.stderr
    assert "Traceback" not in result.stderr


def test_pure_python_builds_nothing(tmp_path):
    result = build_ext(tmp_path, CXX="no-such-compiler", FUSED_RNN_PURE_PYTHON="1")
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []


@needs_library
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_fused_rnn_isa_asks_for_a_lesser_instruction_set(isa):
    from fused_rnn import _C

    if isa not in _C.build_info()["instruction_sets"]:
        pytest.skip(f"{isa} is not compiled in")
    features = {"baseline": (), "avx2": ("avx2", "fma"), "avx512": ("avx512f", "avx512vl")}
    if not all(_C.cpu_features()[feature] for feature in features[isa]):
        pytest.skip(f"this processor lacks {isa}")
    report = subprocess.run(
        [sys.executable, "-m", "fused_rnn"],
        env=os.environ | {"FUSED_RNN_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"the {isa} kernels" in report
    assert torch.__version__ in report


def executable(path: Path, prints: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {prints}\n")
    path.chmod(0o755)
    return path


def ask_setup(function: str, folder: Path, **environment: str) -> str:
    """What a function of setup.py answers, with packages from folder/site and PATH folder/bin."""
    code = f"import runpy; print(runpy.run_path('setup.py')['{function}']())"
    environment = {"PATH": str(folder / "bin"), "PYTHONPATH": str(folder / "site")} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return (done.stdout if done.returncode == 0 else done.stderr).strip()


def test_nvcc_is_named_or_in_cuda_home_or_on_path_or_in_nvidias_packages(tmp_path):
    home = {"CUDA_HOME": str(tmp_path / "home")}
    named = {"NVCC": "/somewhere/nvcc"} | home
    executable(tmp_path / "site" / "nvidia" / "cu12" / "bin" / "nvcc")
    packaged = executable(tmp_path / "site" / "nvidia" / "cu99" / "bin" / "nvcc")
    assert ask_setup("find_nvcc", tmp_path, **home) == str(packaged)
    on_path = executable(tmp_path / "bin" / "nvcc")
    assert ask_setup("find_nvcc", tmp_path, **home) == str(on_path)
    in_home = executable(tmp_path / "home" / "bin" / "nvcc")
    assert ask_setup("find_nvcc", tmp_path) == str(on_path)
    assert ask_setup("find_nvcc", tmp_path, **home) == str(in_home)
    assert ask_setup("find_nvcc", tmp_path, **named) == "/somewhere/nvcc"


@pytest.mark.parametrize("version", ["cuda: Optional[str] = '13.0'", "cuda: Optional[str] = None"])
def test_cuda_is_built_where_torch_has_it_and_for_nvidias_packages_where_a_gpu_is(
    version, tmp_path
):
    torch_folder = tmp_path / "site" / "torch"
    torch_folder.mkdir(parents=True)
    (torch_folder / "__init__.py").touch()
    (torch_folder / "version.py").write_text(f"{version}\n")
    has_cuda = "None" not in version
    hidden = tmp_path / "site" / "nvidia.py"  # hides what this environment has of the packages
    hidden.touch()
    assert ("nvcc was not found" if has_cuda else "torch has no CUDA") in ask_setup(
        "why_no_cuda", tmp_path
    )
    hidden.unlink()
    executable(tmp_path / "site" / "nvidia" / "cu99" / "bin" / "nvcc")
    assert ("no GPU here" if has_cuda else "torch has no CUDA") in ask_setup(
        "why_no_cuda", tmp_path
    )
    assert ask_setup("why_no_cuda", tmp_path, FORCE_CUDA="1") == "None"
    gpu = executable(tmp_path / "bin" / "nvidia-smi", prints="9.0")
    assert (ask_setup("why_no_cuda", tmp_path) == "None") == has_cuda
    assert ask_setup("why_no_cuda", tmp_path, FORCE_CUDA="0") == "FORCE_CUDA=0"
    assert "code=sm_90" in ask_setup("cuda_architectures", tmp_path)
    gpu.unlink()
    executable(tmp_path / "bin" / "nvcc")
    assert (ask_setup("why_no_cuda", tmp_path) == "None") == has_cuda


def test_cuda_that_is_forced_needs_a_compiler_and_the_sentence_says_where_from(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    # Hides what this environment has of the packages.
    (site / "nvidia.py").touch()
    said = ask_setup("why_no_cuda", tmp_path, FORCE_CUDA="1")
    assert "nvcc was not found" in said
    assert "pip install cuda-toolkit[cccl,cudart,nvcc]" in said


def distribution(kind: str, folder: Path) -> Path:
    # From a copy: setuptools writes beside its sources.
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("this is no git checkout, which knows what belongs to the project")
    for name in tracked.stdout.splitlines():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "-o", folder / "dist"]
    subprocess.run([*command, folder / "source"], check=True, capture_output=True)
    (file,) = (folder / "dist").iterdir()
    return file


def test_an_sdist_has_every_source(tmp_path):
    with tarfile.open(distribution("sdist", tmp_path)) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    source = tmp_path / "source"
    wanted = {
        str(path.relative_to(source))
        for folder in ("csrc", "fused_rnn")
        for path in (source / folder).rglob("*")
        if path.is_file() and "fused_rnn.egg-info" not in path.parts
    }
    assert wanted - packed == set()
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= packed


@pytest.mark.skipif(not numerics.FULL, reason="compiles everything anew: --full, or `make dist`")
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_a_distribution_installs_into_a_fresh_environment_and_runs(kind, tmp_path):
    fresh_install.attempt(distribution(kind, tmp_path), tmp_path / "environment")
