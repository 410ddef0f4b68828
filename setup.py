"""Builds `fused_rnn/libfused_rnn_cpu.so` (the ops, no Python in it), `fused_rnn/_C` and, where
there is CUDA, `fused_rnn/libfused_rnn_cuda.so` with ninja.

The CPU kernels are one source, compiled once per instruction set and dtype; the library holds all
of them and chooses when it runs. setuptools has no notion of that, so this file writes the ninja
build itself and leaves to setuptools what it is good at: packaging, in-place and editable installs.

Environment:
    CXX                      the C++ compiler (default: g++, on macOS clang++)
    MAX_JOBS                 compile jobs at a time (default: ninja's own choice)
    DEBUG=1                  -O0 -g
    FUSED_RNN_SANITIZE       e.g. address,undefined: build with these sanitizers
    FUSED_RNN_PURE_PYTHON=1  build nothing: the triton, reference and torch backends only
    FORCE_CUDA=1             build the CUDA library though torch is not a CUDA build; 0: never
    NVCC                     the CUDA compiler (default: the one in CUDA_HOME/bin, on PATH, or in
                             pip's cuda-toolkit[cccl,cudart,nvcc])
    TORCH_CUDA_ARCH_LIST     e.g. 8.0;9.0+PTX (default: the GPU at hand, with FORCE_CUDA=1 all)
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MACOS = sys.platform == "darwin"
X86 = platform.machine().lower() in ("x86_64", "amd64")
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
SANITIZE = os.environ.get("FUSED_RNN_SANITIZE", "")
CXX = os.environ.get("CXX") or ("clang++" if MACOS else "g++")

LIBRARY, MODULE = "fused_rnn.libfused_rnn_cpu", "fused_rnn._C"
CUDA_LIBRARY = "fused_rnn.libfused_rnn_cuda"
# Code for these, and PTX of the one that a later architecture can still translate.
CUDA_ARCHITECTURES = "7.5;8.0;9.0+PTX;10.0;12.0"

SCALARS = ("float", "double", "bfloat16", "half")
INSTRUCTION_SETS = {"baseline": ""}
if X86 and not MACOS:
    if not SANITIZE:  # one source: the sanitizers see it at its widest, or where that is not there
        INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    )


# Nothing newer than torch 2.10's part of the stable ABI is visible to the sources.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def refuse(sentence: str) -> NoReturn:
    raise SystemExit(f"fused_rnn: {sentence}")


def package_folder(name: str) -> Path:
    """The folder of an installed package, without the seconds that importing torch takes."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        refuse(
            f"building needs the Python package {name}: run `pip install torch ninja pybind11`, or "
            "install without --no-build-isolation."
        )
    return Path(spec.origin).parent


def check_tools() -> None:
    if shutil.which(shlex.split(CXX)[0]) is None:
        refuse(
            f"there is no C++ compiler ({CXX} was not found): install one (Debian and Ubuntu: "
            "apt install g++), name another with CXX=, or set FUSED_RNN_PURE_PYTHON=1 to install "
            "the triton, reference and torch backends only."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        refuse(
            "the headers of Python are missing (Python.h was not found in "
            f"{sysconfig.get_path('include')}): install them (Debian and Ubuntu: "
            "apt install python3-dev)."
        )
    for name in ("torch", "ninja", "pybind11"):
        package_folder(name)
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        refuse(f"the torch it is built against must be 2.10 or newer, and this one is {version}.")


def packaged_tool(name: str) -> str | None:
    """A program of pip's nvidia-cuda packages, the newest: nvidia/cu13/bin in site-packages."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = [tool for folder in folders or () for tool in Path(folder).glob(f"*/bin/{name}")]
    return str(max(found, key=lambda tool: tool.parts[-3])) if found else None


def find_cuda_tool(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME")
    in_home = shutil.which(name, path=str(Path(home, "bin"))) if home else None
    return in_home or shutil.which(name) or packaged_tool(name)


def find_nvcc() -> str | None:
    return os.environ.get("NVCC") or find_cuda_tool("nvcc")


def gpus_at_hand() -> list[str]:
    """The compute capabilities of this machine's GPUs."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return sorted(set(answer.stdout.split())) if answer.returncode == 0 else []


def why_no_cuda() -> str | None:
    """Why the CUDA library is not built, or None: it is where torch could use it and nvcc is."""
    forced, nvcc = os.environ.get("FORCE_CUDA", ""), find_nvcc()
    where_from = (
        "install CUDA, name it with NVCC=, or run `pip install cuda-toolkit[cccl,cudart,nvcc]`"
    )
    if forced == "0":
        return "FORCE_CUDA=0"
    if forced and nvcc is None:
        refuse(f"FORCE_CUDA is set and nvcc was not found: {where_from}.")
    if forced:
        return None
    if importlib.util.find_spec("torch") is None:
        return "there is no torch"  # nor a build: an sdist needs none
    # Written there when torch was built: importing torch takes seconds.
    version = (package_folder("torch") / "version.py").read_text()
    if not re.search(r"^cuda\b.*= '", version, re.MULTILINE):
        return "torch has no CUDA; FORCE_CUDA=1 builds it nevertheless"
    if nvcc is None:
        return f"nvcc was not found: {where_from}; until then the triton backend runs on GPUs"
    # pip's nvcc is in every development environment, also where compiling for all GPUs, which
    # takes minutes, would be for none.
    if nvcc == packaged_tool("nvcc") and not gpus_at_hand():
        return "there is no GPU here to compile for; FORCE_CUDA=1 compiles for all"
    return None


def cuda_architectures() -> list[str]:
    """nvcc's flags for the architectures to build for."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted and os.environ.get("FORCE_CUDA", "") in ("", "0"):
        wanted = ";".join(gpus_at_hand())
    flags = []
    for name in re.split(r"[;, ]+", (wanted or CUDA_ARCHITECTURES).strip()):
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d{2,3}[af]?", number):
            refuse(f"TORCH_CUDA_ARCH_LIST names {name!r}: expected numbers such as 8.0 or 9.0+PTX.")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_flags() -> list[str]:
    flags = [
        "-std=c++17",
        *(["-O0", "-g"] if DEBUG else ["-O1", "-g1"] if SANITIZE else ["-O3"]),
        # One setting for every instruction set and compiler: a*b+c is one rounding where the
        # machine has it. Never -ffast-math: NaN and infinity pass through as torch passes them.
        "-ffp-contract=fast",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        TARGET_VERSION,
        *(f"-DFUSED_RNN_HAS_{name.upper()}" for name in INSTRUCTION_SETS if name != "baseline"),
    ]
    if SANITIZE:
        # At -O3 a sanitized file of kernels takes minutes to compile, at -O1 half a minute.
        flags += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    return flags


def write_ninja(path: Path) -> None:
    from ninja.ninja_syntax import Writer

    torch = package_folder("torch")
    flags = compile_flags()
    shared = "-dynamiclib" if MACOS else "-shared"
    # torch is loaded before the library and known by its name: no run path is needed.
    library_flags = [shared, "-L" + shlex.quote(str(torch / "lib")), "-ltorch_cpu"]
    module_flags = ["-bundle -undefined dynamic_lookup" if MACOS else "-shared"]
    if SANITIZE:
        library_flags.append(f"-fsanitize={SANITIZE}")
        module_flags.append(f"-fsanitize={SANITIZE}")
    elif not MACOS:
        library_flags.append("-Wl,--no-undefined")

    with path.open("w") as file:
        n = Writer(file)
        n.rule(
            "compile",
            command=f"{CXX} {' '.join(flags)} $includes $extra -MD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $out",
        )
        n.rule(
            "check",
            command=f"{shlex.quote(sys.executable)} $script $out $objects",
            description="check that no instruction set's code can be called by another",
        )
        n.rule("link", command=f"{CXX} -o $out $in $flags", description="link $out")

        torch_headers = "-isystem " + shlex.quote(str(torch / "include"))
        python_headers = " ".join(
            "-isystem " + shlex.quote(str(folder))
            for folder in (package_folder("pybind11") / "include", sysconfig.get_path("include"))
        )

        def compile_source(
            source: str, output: str, includes: str = torch_headers, extra: str = ""
        ) -> str:
            variables = {"includes": includes, "extra": extra}
            return n.build(output, "compile", str(ROOT / "csrc" / source), variables=variables)[0]

        kernels = [
            compile_source(
                "cpu/kernels.cpp",
                f"kernels.{name}.{scalar}.o",
                extra=f"-DFUSED_RNN_ISA={name} -DFUSED_RNN_SCALAR={scalar} {isa_flags}",
            )
            for name, isa_flags in INSTRUCTION_SETS.items()
            for scalar in SCALARS
        ]
        others = [
            compile_source(f"{name}.cpp", f"{Path(name).name}.o")
            for name in ("ops", "prepare", "norm_ops", "cpu/register")
        ]
        check = []
        if len(INSTRUCTION_SETS) > 1:
            script = str(ROOT / "csrc" / "check_symbols.py")
            variables = {"script": script, "objects": " ".join(kernels)}
            check = n.build("symbols", "check", implicit=[script, *kernels], variables=variables)
        n.build(
            "libfused_rnn_cpu.so",
            "link",
            [*others, *kernels],
            order_only=check,
            variables={"flags": " ".join(library_flags)},
        )
        built_with = shlex.quote(f'-DFUSED_RNN_FLAGS="{" ".join(flags)}"')
        # torch's headers include a pybind11. A module made of two versions of it links, and then
        # loses exceptions: every source that uses it takes the same folders in the same order.
        headers = f"{torch_headers} {python_headers}"
        module = [
            compile_source("python.cpp", "python.o", headers, built_with),
            compile_source("small_step.cpp", "small_step.o", headers),
            compile_source("plan_binding.cpp", "plan_binding.o", headers),
            compile_source("plan.cpp", "plan.o", ""),
        ]
        n.build("_C.so", "link", module, variables={"flags": " ".join(module_flags)})
        if why_no_cuda() is None:
            write_cuda(n, torch, others[:2])


def write_cuda(n: Any, torch: Path, ops: list[str]) -> None:
    """The CUDA library. Its stream and cuBLAS handle come from torch's CUDA libraries, which a
    torch without CUDA lacks: it links there all the same, and loads where they are."""
    host_flags = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
    flags = [
        "-std=c++17",
        *(["-O0", "-g", "-G"] if DEBUG else ["-O3"]),
        f"-Xcompiler={','.join(host_flags)}",
        "-Xptxas=-v",  # registers, shared memory and spills of each kernel
        f"--threads={os.environ.get('MAX_JOBS', '0')}",
        TARGET_VERSION,
        "-DUSE_CUDA",  # the shims that exist in torch's CUDA builds
        *cuda_architectures(),
    ]
    # nvcc takes the name of a compiler, not a launcher such as ccache before it.
    path = find_nvcc() or "nvcc"
    nvcc = f"{shlex.quote(path)} -ccbin {shlex.quote(shlex.split(CXX)[-1])}"
    headers = f"-I{shlex.quote(str(ROOT / 'csrc'))} -isystem {shlex.quote(str(torch / 'include'))}"
    n.rule(
        "nvcc",
        command=f"{nvcc} {' '.join(flags)} {headers} $define -MD -MF $out.d -c $in -o $out "
        "> $out.log 2>&1 || { cat $out.log; exit 1; }",
        depfile="$out.d",
        deps="gcc",
        description="compile $out",
    )
    # A linker that drops libraries which it thinks unused would drop libtorch, and with it the way
    # to libtorch_cuda.
    torch_libraries = f"-L{shlex.quote(str(torch / 'lib'))} -Xlinker --no-as-needed -ltorch"
    # pip's nvcc 13.0 looks for its static run time in lib64; the packages have lib.
    runtime = "-L" + shlex.quote(str(Path(path).parent.parent / "lib"))
    n.rule(
        "link_cuda",
        command=f"{nvcc} -shared -cudart static $in -o $out {torch_libraries} {runtime}",
        description="link $out",
    )
    sources = {"describe": ("describe", ""), "register": ("register", "")}
    for scalar in ("float", "bf16", "fp16"):
        define = f"-DFUSED_RNN_SCALAR={scalar}"
        sources[f"cluster.{scalar}"] = ("cluster", define)
        exact = " -DFUSED_RNN_EXACT" if scalar == "float" else ""
        sources[f"grid.{scalar}"] = ("grid", define + exact)
    objects = [
        n.build(
            f"cuda.{name}.o",
            "nvcc",
            str(ROOT / "csrc" / "cuda" / f"{source}.cu"),
            variables={"define": define},
        )[0]
        for name, (source, define) in sources.items()
    ]
    n.build("libfused_rnn_cuda.so", "link_cuda", [*objects, *ops, "plan.o"])


class NinjaBuild(build_ext):
    """`build_ext` whose extensions come from one ninja build in a folder of its own.

    The folder depends on what is built, not on who asks, so that `pip install -e .`, `setup.py
    build_ext --inplace` and `make` share their objects.
    """

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] in (
            LIBRARY.rpartition(".")[2],
            CUDA_LIBRARY.rpartition(".")[2],
        ):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        check_tools()
        kind = "sanitize" if SANITIZE else "debug" if DEBUG else "release"
        folder = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        write_ninja(folder / "build.ninja")
        reason = why_no_cuda()
        cuda = "and the CUDA library" if reason is None else f"without CUDA: {reason}"
        print(
            f"fused_rnn: building the CPU library ({', '.join(INSTRUCTION_SETS)}) {cuda}.",
            flush=True,
        )
        command = [sys.executable, "-m", "ninja", "-C", str(folder)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode:
            refuse("the C++ build failed; the compiler's own message stands above.")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(folder / (extension.name.rpartition(".")[2] + ".so")), str(target))


# The tests read this file for the functions above.
if __name__ == "__main__":
    if sys.platform == "win32":
        refuse("Windows is not supported; Linux and macOS are (WSL is Linux).")
    extensions = []
    if os.environ.get("FUSED_RNN_PURE_PYTHON", "0") in ("", "0"):
        extensions = [Extension(LIBRARY, ["csrc/ops.cpp"]), Extension(MODULE, ["csrc/python.cpp"])]
        if why_no_cuda() is None:
            extensions.append(Extension(CUDA_LIBRARY, ["csrc/cuda/register.cu"]))
    setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
