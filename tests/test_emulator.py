"""The CUDA primitives, in the emulator and under nvcc: right use is right, wrong use is caught."""

import functools
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import numerics
import pytest
from emulator import build

CASES = build.HERE / "cases"
SEEDS = 200 if numerics.FULL else 20

if build.compiler() is None:
    pytest.skip(f"there is no C++ compiler ({build.CXX[0]} was not found)", allow_module_level=True)


@functools.cache
def driver(name: str, thread_sanitizer: bool = False) -> Path:
    return build.build(CASES / f"{name}.cpp", thread_sanitizer)


def cases(name: str) -> list[str]:
    return re.findall(r'\{"(\w+)", ', (CASES / f"{name}.cpp").read_text())


KERNELS = ("cluster_forward", "cluster_backward", "grid_forward", "grid_backward")
DRIVERS = ("block", "cluster", "matrix", *KERNELS)
RIGHT = [(name, case) for name in DRIVERS for case in cases(name)]

# What each wrong kernel is caught by: here under some schedule, below under every one.
SOME_SCHEDULE = {
    "missing_barrier": "wrong result",
    "missing_second_barrier": "wrong result",
    "missing_sync_warp": "wrong result",
    "early_flag": "wrong result",
    "relaxed_flag": "wrong result",
    "missing_fence": "wrong result",
    "missing_cluster_sync": "wrong result",
    "missing_copy_wait": "wrong result",
    "missing_mbarrier_wait": "wrong result|a peer that has ended",
    "too_few_bytes": "wrong result|a peer that has ended",
    "peer_ended": "in store_async: a peer that has ended: byte .* of dynamic shared memory",
}
AT = r"kernel touch, block \(0, 0, 0\), thread \(5, 0, 0\), in "
EVERY_SCHEDULE = {
    "store_past_end": AT + "store: out of range: 4 bytes at 0 bytes past the end of out",
    "load_before_start": AT + "load: out of range: 4 bytes at 4 bytes before out",
    "dynamic_shared_past_end": AT + "store: out of range: .* past the end of dynamic shared",
    "static_shared_past_end": AT + "store: out of range: .* past the end of fixed of block 0",
    "misaligned_vector": AT + "load_vector: misaligned: 16 bytes .* got byte 4 of out",
    "vector_past_end": AT + "load_vector: out of range: 16 bytes",
    "atomic_past_end": AT + "atomic_add: out of range: 4 bytes",
    "null_pointer": AT + "store: out of range: .* in no memory of this launch",
    "misaligned_copy": AT + "copy_async: misaligned: 16 bytes .* got byte 8 of dynamic shared",
    "read_only_shared": AT + "load_read_only: wants global memory, got byte 0 of dynamic shared",
    "copy_from_shared": AT + "copy_async: wants global memory, got byte 16 of dynamic shared",
    "bypass_global": "guard zone overwritten.*: 4 bytes past the end of out",
    "bypass_shared": "guard zone overwritten.*: 4 bytes past the end of dynamic shared memory",
    "too_many_bytes": "block .1, 0, 0., thread 0-7: waits in mbarrier_wait .* 4 bytes are missing",
    "no_mbarrier_init": "the mbarrier is not initialised: byte 0 of full",
    "two_barriers": "thread 0-31: waits in sync_threads for 32 of 64 threads at barrier 1",
    "poll_each_other": "waits in poll_acquire for a change of byte 0 of word .* holds 0x0",
    "spin": "nothing changes any more",
    "lane_elsewhere": "thread 0: waits in shuffle for the lanes 0x00000002 of warp 0",
    "mixed_lanes": "other lanes of the same mask are in",
    "lane_not_in_mask": "in shuffle: the mask does not name the calling lane",
    "mbarrier_never": "thread 0: waits in mbarrier_wait .* 1 of 1 arrivals",
    "too_many_arrivals": "more than 1 arrivals in a phase of byte 0 of full",
    "wait_without_arrival": "in cluster_wait: no cluster_arrive before it",
}
RACES = [
    "missing_barrier",
    "missing_second_barrier",
    "missing_sync_warp",
    "early_flag",
    "relaxed_flag",
    "missing_acquire",
    "missing_fence",
    "missing_cluster_sync",
    "missing_mbarrier_wait",
]


@pytest.mark.parametrize(("name", "case"), RIGHT)
def test_primitive_equals_plain_arithmetic_under_every_schedule(name: str, case: str) -> None:
    said = build.run(driver(name), case, SEEDS)
    assert said == dict.fromkeys(range(SEEDS), "ok")


def test_each_wrong_kernel_has_its_expectation() -> None:
    assert set(cases("wrong")) == {*SOME_SCHEDULE, *EVERY_SCHEDULE, *RACES}


@pytest.mark.parametrize("case", SOME_SCHEDULE)
def test_missing_order_is_caught_under_some_schedule(case: str) -> None:
    said = build.run(driver("wrong"), case, SEEDS)
    caught = [seed for seed, text in said.items() if re.search(SOME_SCHEDULE[case], text)]
    assert caught, said


@pytest.mark.parametrize("case", EVERY_SCHEDULE)
def test_wrong_use_is_reported_with_its_place(case: str) -> None:
    said = build.run(driver("wrong"), case, 5)
    for seed, text in said.items():
        assert re.search(EVERY_SCHEDULE[case], text), f"seed {seed}: {text}"


@functools.cache
def thread_sanitizer_is_missing() -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        probe = f"{folder}/probe"
        command = [*build.CXX, "-fsanitize=thread", "-x", "c++", "-", "-o", probe]
        source = "int main() {}"
        linked = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        if linked.returncode != 0:
            return f"{build.CXX[0]} has no ThreadSanitizer"
        started = subprocess.run(["setarch", "-R", probe], capture_output=True, check=False)
    return None if started.returncode == 0 else "ThreadSanitizer does not start on this kernel"


@pytest.fixture
def _thread_sanitizer() -> None:
    if shutil.which("setarch") is None:
        pytest.skip("ThreadSanitizer wants setarch, which was not found")
    if missing := thread_sanitizer_is_missing():
        pytest.skip(missing)


@pytest.mark.usefixtures("_thread_sanitizer")
@pytest.mark.parametrize(("name", "case"), RIGHT)
def test_thread_sanitizer_is_silent_on_right_kernels(name: str, case: str) -> None:
    said = build.run(driver(name, True), case, 2)
    assert said == dict.fromkeys(range(2), "ok")


@pytest.mark.usefixtures("_thread_sanitizer")
@pytest.mark.parametrize("case", RACES)
def test_thread_sanitizer_finds_races(case: str) -> None:
    said = build.run(driver("wrong", True), case, 3)
    found = [text for text in said.values() if re.search(r"block .*, thread .* data race on", text)]
    assert found, said


def declared(folder: Path) -> set[str]:
    """The names that the primitives of a folder declare, without those in namespace detail."""
    names: set[str] = set()
    for file in [*folder.glob("primitives*.cuh"), *folder.glob("half.h")]:
        text = re.sub(
            r"namespace detail \{.*?\}  // namespace detail", "", file.read_text(), flags=re.S
        )
        text = re.sub(r"^#undef.*|^ *//.*", "", text, flags=re.M)
        names |= set(
            re.findall(r"^(?:FUSED_RNN_DEVICE|inline) (?:[\w<>, ]+[ *&])?(\w+)\(", text, re.M)
        )
        names |= set(re.findall(r"^#define (FUSED_RNN_\w+)", text, re.M))
        names |= set(
            re.findall(r"^(?:struct|using|constexpr unsigned) (?:alignas\(.*\) )?(\w+)", text, re.M)
        )
    return names


# Of one side only: how it traps, or writes one text for several types.
PRIVATE = {"unsupported", "FUSED_RNN_WORD", "FUSED_RNN_MMA"}


def test_stand_in_declares_the_same_names_and_one_kernel_uses_them_all() -> None:
    real = declared(build.ROOT / "csrc" / "cuda") - PRIVATE
    stand_in = declared(build.HERE / "cuda") - PRIVATE
    assert {"load", "mma", "store_async", "Mbarrier", "FUSED_RNN_SHARED"} <= real
    assert real == stand_in
    everything = set(re.findall(r"\w+", (CASES / "everything.cuh").read_text()))
    assert real - everything == set()


def test_everything_compiles_against_the_stand_in(tmp_path: Path) -> None:
    source = tmp_path / "everything.cpp"
    source.write_text('#include "cases/everything.cuh"\n')
    command = [
        *build.CXX,
        *build.FLAGS,
        "-std=c++17",
        *build.INCLUDES,
        "-fsyntax-only",
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "target",
    [
        "arch=compute_75,code=sm_75",
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=[sm_90,compute_90]",
    ],
)
def test_everything_compiles_with_nvcc(target: str, tmp_path: Path) -> None:
    nvcc = build.nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc, CUDA's compiler: pip install cuda-toolkit[cccl,cudart,nvcc]")
    source = tmp_path / "everything.cu"
    source.write_text('#include "cases/everything.cuh"\n')
    command = [nvcc, "-std=c++17", *build.INCLUDES[::-1], "-gencode", target]
    command += ["-Werror", "all-warnings", "-c", str(source), "-o", str(tmp_path / "everything.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    assert "warning" not in done.stderr


def test_only_the_primitives_use_intrinsics_and_ptx() -> None:
    intrinsic = re.compile(
        r"\basm\b|\b__(?!global__|host__|device__|restrict__|launch_bounds__|CUDA|tsan)\w+\("
        r"|\b(?:thread|block)Idx\b|(?<!\.)\b(?:block|grid)Dim\b|\batomic[A-Z]\w+\(|__shared__"
    )
    files = [*(build.ROOT / "csrc").rglob("*.cu*"), *CASES.iterdir()]
    checked = [file for file in files if not file.name.startswith("primitives")]
    assert CASES / "everything.cuh" in checked
    for file in checked:
        found = intrinsic.search(file.read_text())
        assert found is None, f"{file}: {found}"


# Kernels wrong on purpose: the file, what stands there, what instead, and whether it takes
# ThreadSanitizer to see it.
WRONG_FORWARD = {
    "no-wait": ("mbarrier_wait(arrived + step % 2, int((step - 1) / 2 % 2));", ";", False),
    "too-few-bytes": (
        "((layer.H + kChunk - 1) / kChunk) * 16)",
        "(layer.H / kChunk) * 16)",
        False,
    ),
    "one-buffer": ("(step & 1) * kColumns", "0 * kColumns", False),
    "no-zeros": ("if (part == 0) store(staging + i, from_float<T>(0));", ";", False),
    "sends-to-the-end": ("if (step + 1 < warp.layer.count) {", "{", False),
    "no-meeting-of-parts": ("sync_threads(1 + group, 32 * a.cut.parts);", ";", False),
    "sends-too-early": ("sync_warp();\n    for (int i = lane()", "for (int i = lane()", True),
    "stages-over-what-is-sent": ("    }\n    sync_warp();\n  }", "    }\n  }", True),
    "writes-too-early": (
        "stage_outputs(saved);\n      sync_warp();",
        "stage_outputs(saved);",
        True,
    ),
    "swapped-rows": ("staged_row % 4 * 2 + staged_row / 4 % 2", "staged_row % 8", False),
    "starts-too-early": ("      cluster_sync();", "      ;", False),
    "one-direction": ("cluster_index() % args.directions", "0", False),
    "rows-of-another": ("cluster_index() / a.directions", "cluster_index()", False),
}
WRONG_BACKWARD = {
    "no-wait": ("mbarrier_wait(arrived + (turn - 1) % 2, int((turn - 1) / 2 % 2));", ";", False),
    "too-few-bytes": ("- 8 * t + 1) / 2", "- 8 * t) / 2", False),
    "one-buffer-of-sums": ("(int(turn & 1) * a.cut.team", "(0 * a.cut.team", False),
    "one-operand": ("(turn & 1) * kShape", "0 * kShape", True),
    "no-zeros": ("store(operands + i, from_float<T>(0));", ";", False),
    "no-meeting": ("    sync_block();\n    warp.multiply", "    warp.multiply", False),
    "swapped-units": ("{sum[j], sum[2 + j]}", "{sum[2 * j], sum[2 * j + 1]}", False),
    "starts-too-early": ("      cluster_sync();", "      ;", False),
    "one-direction": ("cluster_index() % args.directions", "0", False),
    "rows-of-another": ("cluster_index() / a.directions", "cluster_index()", False),
}
WRONG_GRID = {
    "no-wait": ("if (!is_there(value))", "if (false)", False),
    "one-slot": (
        "((turn & 1) * team.cut.groups + group()) * team.cut.line",
        "group() * team.cut.line",
        False,
    ),
    "words-swapped": ("values[1] << 48;", "values[2] << 48;", False),
    "no-number": ("value | number(turn));", "value | number(0));", False),
    "too-many-rows": ("return row + column < team.N;", "return true;", False),
}
WRONG_GRID_FORWARD = {
    "no-meeting-of-parts": ("multiply();\n      sync_block();", "multiply();", False),
    "multiplies-too-early": ("sync_block();\n      block.multiply", "block.multiply", False),
}
WRONG_GRID_BACKWARD = WRONG_GRID_FORWARD | {
    "no-meeting-of-sums": (
        "exchange_sums(turn);\n        sync_block();",
        "exchange_sums(turn);",
        False,
    ),
    "no-zeros": ("this->store_operand(0, i, A(0));", ";", False),
}
WRONG_LINE = {
    "no-wait-for-sums": ("found >> 32 == uint32_t(turn + 1)", "found >> 32 > 0", False),
    "sums-of-one": ("const int other = of - (of > part);", "const int other = 0;", False),
}
WRONG = {
    f"{name}-{mistake}": (f"{name}.cpp", f"{file}.cuh", *change)
    for name, file, changes in (
        ("cluster_forward", "cluster_forward", WRONG_FORWARD),
        ("cluster_backward", "cluster_backward", WRONG_BACKWARD),
        ("grid_forward", "grid", WRONG_GRID),
        ("grid_forward", "grid_forward", WRONG_GRID_FORWARD),
        ("grid_backward", "grid_backward", WRONG_GRID_BACKWARD),
        ("grid_backward", "grid", WRONG_LINE),
    )
    for mistake, change in changes.items()
}
TOLD = (
    "cluster_forward-no-wait",
    "cluster_forward-one-direction",
    "cluster_backward-one-buffer-of-sums",
    "grid_forward-no-wait",
    "grid_backward-multiplies-too-early",
    "grid_backward-no-wait-for-sums",
)


@pytest.mark.parametrize("name", WRONG if numerics.FULL else TOLD)
def test_kernels_wrong_on_purpose_are_caught(name, tmp_path):
    driver_name, file, right, wrong, by_thread_sanitizer = WRONG[name]
    changed = tmp_path / name
    shutil.copytree(
        build.ROOT / "csrc", changed, ignore=shutil.ignore_patterns("primitives*", "cpu")
    )
    kernel = changed / "cuda" / file
    source = kernel.read_text()
    assert source.count(right) == 1, f"the kernel no longer has {right!r} once"
    kernel.write_text(source.replace(right, wrong))
    program = build.build(CASES / driver_name, by_thread_sanitizer, changed)
    seeds = 5 if by_thread_sanitizer else 20
    said = (build.run(program, case, seeds) for case in reversed(cases(Path(driver_name).stem)))
    assert any(set(of_case.values()) != {"ok"} for of_case in said)
