"""`make gpu-check` without a GPU: the orchestrator on pieces and tools that are not the real ones,
and the programs that it compiles."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numerics
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_check
import gpu_pieces
import gpu_run
import gpu_sanitize
import gpu_stacks
import results
from emulator import build
from gpu_run import Check, Finished, Outcome

from fused_rnn.backends import triton
from fused_rnn.bench import rows
from fused_rnn.cells import CELLS
from fused_rnn.plan import KNOWN_DEVICES

ROOT = Path(__file__).resolve().parents[1]
GPU = {"device": "Some GPU", "capability": [9, 0], "torch": "2.11.0", "cuda": "13.0"}
NVCC = gpu_pieces.find_tool("nvcc")
ARCHITECTURES = ("75", "80", "90", "100", "120") if numerics.FULL else ("90",)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc, CUDA's compiler")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["sync_latency", "planted_errors"])
def test_the_microbenchmarks_compile(name, arch, tmp_path):
    command = gpu_pieces.compile_command(NVCC, name, arch, tmp_path / name)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr


def test_tools_are_found_as_setup_finds_nvcc_and_beside_it(tmp_path, monkeypatch):
    """pip's: nvidia/cu13/bin in site-packages, neither on PATH nor in CUDA_HOME."""
    for name in ("NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    folder = tmp_path / "nvidia" / "cu99" / "bin"
    folder.mkdir(parents=True)
    tools = [str(script(folder / name, "")) for name in ("nvcc", "compute-sanitizer")]
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: SimpleNamespace(submodule_search_locations=[tmp_path / name]),
    )
    assert [gpu_pieces.find_tool(Path(tool).name) for tool in tools] == tools
    home = tmp_path / "home" / "bin"
    home.mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(home.parent))
    tools = [str(script(home / name, "")) for name in ("nvcc", "compute-sanitizer")]
    assert [gpu_pieces.find_tool(Path(tool).name) for tool in tools] == tools
    monkeypatch.setenv("NVCC", "/named/nvcc")
    assert gpu_pieces.find_tool("nvcc") == "/named/nvcc"


def check(folder, *, commit="0123456789ab", argv=(), device=GPU):
    return Check(folder / "some-gpu", device, commit, gpu_check.parse([*argv]))


def go(folder, pieces, *argv, limit=60.0):
    arguments = ["--out", str(folder), *argv]
    return gpu_check.main(arguments, pieces=pieces, device=GPU, limit=limit)


def state(folder):
    return json.loads((folder / "some-gpu" / "gpu-check.json").read_text())


def script(path, text):
    """An executable file: a tool that is not the real one."""
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def passing(check):
    assert check.command(sys.executable, "-c", "print('heard')").output == "heard\n"
    return Outcome("passed", "it ran")


def failing(check):
    return Outcome("failed", check.command(sys.executable, "-c", "raise SystemExit(7)").how)


def test_all_pieces_run_in_order_and_one_failure_fails_all(tmp_path, capsys):
    assert go(tmp_path, {"build": passing, "test": failing, "bench": passing}) == 1
    found = state(tmp_path)
    assert [*found] == ["build", "test", "bench"]
    assert [found[name]["status"] for name in found] == ["passed", "failed", "passed"]
    assert found["test"]["sentence"] == "exit status 7"
    assert "2 of 3 pieces passed" in capsys.readouterr().out
    summary = (tmp_path / "some-gpu" / "summary.md").read_text()
    date = found["test"]["date"]
    assert f"| test | failed | exit status 7 | {date} | {found['test']['commit']} |" in summary
    assert "heard" in (tmp_path / "some-gpu" / "gpu-check.log").read_text()
    assert go(tmp_path, {"build": passing, "bench": passing}) == 0


def test_without_git_the_commit_is_unknown_unless_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    for named in ("", "fedcba987654"):
        monkeypatch.setenv("FUSED_RNN_COMMIT", named)
        assert go(tmp_path, {"build": passing}) == 0
        assert state(tmp_path)["build"]["commit"].startswith(named or "unknown")
        assert rows.git_commit() == (named or "unknown")


def test_one_piece_by_name_leaves_the_others_as_they_were(tmp_path, capsys):
    pieces = {"build": passing, "test": failing}
    assert go(tmp_path, pieces) == 1
    assert go(tmp_path, pieces, "--piece", "build") == 0
    assert state(tmp_path)["test"]["status"] == "failed"
    assert go(tmp_path, pieces, "--piece", "biuld") == 2
    assert "no piece 'biuld': expected one of build, test" in capsys.readouterr().out


@pytest.fixture
def stubborn(tmp_path, monkeypatch):
    """A program that will not be interrupted, and the file that its child goes on writing to."""
    monkeypatch.setattr(gpu_run, "GRACE_S", 0.5)
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('x'); time.sleep(0.02)"
    program = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('begun', flush=True);"
        "time.sleep(600)"
    )
    return program, beat


def stands_still(beat):
    size = beat.stat().st_size
    time.sleep(0.3)
    return beat.stat().st_size == size > 0


@pytest.mark.alone
def test_the_time_limit_ends_a_piece_with_its_children_and_the_next_one_runs(tmp_path, stubborn):
    program, beat = stubborn

    def slow(check):
        ended = check.command(sys.executable, "-c", program)
        assert "begun" in ended.output
        return Outcome("cut" if ended.status is None else "passed", ended.how)

    start = time.monotonic()
    assert go(tmp_path, {"test": slow, "bench": passing}, limit=2.0) == 1
    assert time.monotonic() - start < 20
    found = state(tmp_path)
    assert found["test"]["status"] == "cut"
    assert found["test"]["sentence"] == "cut by the time limit"
    assert found["bench"]["status"] == "passed"
    assert stands_still(beat)


@pytest.mark.alone
def test_an_interrupt_ends_what_runs_and_what_was_found_is_kept(tmp_path, stubborn):
    program, beat = stubborn

    def interrupted(check):
        check.found["files"] = {"test_a.py": {"status": "passed"}}
        check.save()
        check.command(sys.executable, "-c", program)
        raise AssertionError("the interrupt did not come")

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path, {"test": interrupted})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert stands_still(beat)
    assert state(tmp_path)["test"]["status"] == "cut"
    assert state(tmp_path)["test"]["found"]["files"]["test_a.py"]["status"] == "passed"


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A checkout with a file of each kind that counts or does not."""
    root = tmp_path / "house"
    for name in (
        *("setup.py", "csrc/cuda/a.cuh", "csrc/__pycache__/a.pyc", "fused_rnn/a.py"),
        *("fused_rnn/a.so", "fused_rnn/backends/tuning.csv", "fused_rnn/bench/timing.py"),
        "tests/test_a.py",
        *("benchmarks/gpu_sanitize.py", "benchmarks/micro/planted_errors.cu"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("1")
    monkeypatch.setattr(rows, "PACKAGE", root / "fused_rnn")
    return root


def counting(check):
    check.found["runs"] = check.found.get("runs", 0) + 1
    return Outcome("passed", "counted")


def runs(folder, piece, commit="a"):
    now = check(folder, commit=commit)
    if (now.folder / "gpu-check.json").exists():
        now.state = state(folder)
    assert now.run(piece, counting)
    assert state(folder)[piece]["commit"] == commit
    return state(folder)[piece]["found"]["runs"]


def test_a_piece_goes_on_with_what_it_found_also_when_results_were_committed(house, tmp_path):
    (house / "benchmarks" / "results").mkdir()
    for count, commit in enumerate(("a", "a", "b"), 1):
        (house / "benchmarks" / "results" / "grid.csv").write_text(commit)
        (house / "fused_rnn" / "a.so").write_text(commit)
        (house / "csrc" / "__pycache__" / "a.pyc").write_text(commit)
        for piece in ("build", "test"):
            assert runs(tmp_path, piece, commit) == count


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("setup.py", {"build", "test", "sanitize"}),
        ("csrc/cuda/a.cuh", {"build", "test", "sanitize"}),
        ("fused_rnn/a.py", {"build", "test", "sanitize"}),
        ("fused_rnn/bench/timing.py", set()),
        ("fused_rnn/backends/tuning.csv", {"test"}),
        ("tests/test_a.py", {"test"}),
        ("benchmarks/gpu_sanitize.py", {"sanitize"}),
        ("benchmarks/micro/planted_errors.cu", {"sanitize"}),
    ],
)
def test_a_piece_begins_anew_when_what_it_hangs_on_has_changed(changed, again, house, tmp_path):
    pieces = ("build", "test", "sanitize")
    assert [runs(tmp_path, piece) for piece in pieces] == [1, 1, 1]
    (house / changed).write_text("2")
    assert {piece for piece in pieces if runs(tmp_path, piece) == 1} == again


def test_a_piece_that_raises_has_failed(tmp_path):
    def raising(check):
        raise OSError("no space left")

    assert go(tmp_path, {"micro": raising, "bench": passing}) == 1
    assert state(tmp_path)["micro"]["sentence"] == "OSError: no space left"
    assert state(tmp_path)["bench"]["status"] == "passed"


def test_a_command_that_is_not_there_ends_as_in_a_shell(tmp_path):
    now = check(tmp_path)
    now.deadline = time.monotonic() + 10
    assert now.command("no-such-tool").status == 127


def test_results_of_an_earlier_run_are_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    go(tmp_path / "kept", {"build": passing})
    go(tmp_path / "new", {"bench": passing})
    assert [*state(tmp_path / "new")] == ["build", "bench"]


def test_without_a_gpu_it_says_so(capsys):
    assert (
        gpu_check.main(
            [], pieces={"build": passing}, device={"device": None, "torch": "2.13.0+cpu"}
        )
        == 2
    )
    asked = gpu_check.ask_device()
    assert asked["torch"] == torch.__version__
    assert (asked["device"] is None) == (not torch.cuda.is_available())


def test_the_make_target_passes_its_variables_on_and_needs_no_environment(monkeypatch):
    for name in ("MAKEFLAGS", "MAKELEVEL", "CPU_BUILT", "PYTEST"):  # as under another make
        monkeypatch.delenv(name, raising=False)
    command = ["make", "-n", "gpu-check", "PIECE=test", "OUT=a b", "PYTHON=other"]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert recipe.startswith('other benchmarks/gpu_check.py --piece test --out "a b"')
    assert ".venv" not in recipe


class Answers(Check):
    """Answers commands instead of running them: the first answer whose words are all in it."""

    def __init__(self, folder, *answers):
        super().__init__(folder, GPU, "0123456789ab", gpu_check.parse([]))
        self.answers = answers
        self.deadline = time.monotonic() + 1000
        self.asked = []
        folder.mkdir(exist_ok=True)

    def command(self, *command, limit=None, env=None):
        text = " ".join(map(str, command))
        self.asked.append((text, env))
        return next(Finished(*answer) for word, *answer in self.answers if word in text)


AVAILABLE = ("-m fused_rnn", 0, "backend cpu    available\nbackend cuda   available\n")


def test_build_says_whether_a_cpu_built_library_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pieces, "ROOT", tmp_path)
    now = Answers(tmp_path, ("setup.py", 0, ""), AVAILABLE)
    assert gpu_pieces.build(now).status == "passed"
    assert now.found["cpu_built"].startswith("none was given")
    library = tmp_path / "build" / "cuda" / "fused_rnn" / "libfused_rnn_cuda.so"
    library.parent.mkdir(parents=True)
    library.touch()
    for status, said, expected in (
        (0, "loaded with torch 2", "passed"),
        (1, "OSError: x", "failed"),
    ):
        loads = ("gpu_load.py", status, f"noise\n{said}\n")
        now = Answers(tmp_path, ("setup.py", 0, ""), AVAILABLE, loads)
        assert gpu_pieces.build(now).status == expected
        assert now.found["cpu_built"] == f"libfused_rnn_cuda.so: {said}"
        assert str(library) in now.asked[-1][0]


@numerics.needs_native
def test_a_library_from_elsewhere_takes_the_place_of_the_packages_own(tmp_path):
    library = tmp_path / "libfused_rnn_cpu.so"
    command = [sys.executable, ROOT / "benchmarks" / "gpu_load.py", library, "--backend", "cpu"]
    shutil.copy(ROOT / "fused_rnn" / library.name, library)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "its LSTM agrees with the reference" in result.stdout
    library.write_text("no library")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"{library.name} does not load with torch" in result.stderr


def test_build_fails_without_the_cuda_backend(tmp_path):
    absent = (
        "-m fused_rnn",
        0,
        "backend cuda   libfused_rnn_cuda.so is not in this installation\n",
    )
    found = gpu_pieces.build(Answers(tmp_path, ("setup.py", 0, ""), absent))
    assert found.status == "failed"
    assert gpu_pieces.build(Answers(tmp_path, ("setup.py", 1, ""))).status == "failed"


def test_tests_run_by_file_cuda_first_and_what_passed_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pieces, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_cuda.py").write_text("def test_a(): pass\n")
    (folder / "test_broken.py").write_text("def test_a(): assert 0\ndef test_b(): pass\n")
    (folder / "test_crash.py").write_text("import os\ndef test_a(): os._exit(11)\n")
    skipping = "import pytest\ndef test_a(): pytest.skip('no moon')\n"
    (folder / "test_skip.py").write_text(skipping)
    now = check(tmp_path)
    assert not now.run("test", gpu_pieces.test)
    found = now.state["test"]["found"]["files"]
    assert [*found] == ["test_cuda.py", "test_broken.py", "test_crash.py", "test_skip.py"]
    assert [f["status"] for f in found.values()] == ["passed", "failed", "failed", "passed"]
    counts = {"tests": 2, "failures": 1, "errors": 0, "skipped": 0}
    assert found["test_broken.py"] == {"status": "failed", "how": "exit status 1", **counts}
    assert "failed: test_broken.py, test_crash.py" in now.state["test"]["sentence"]

    for name in ("broken", "crash"):
        (folder / f"test_{name}.py").write_text("def test_a(): pass\n")
    (folder / "test_cuda.py").write_text("raise SystemExit('it was run again')\n")
    assert now.run("test", gpu_pieces.test)
    assert now.state["test"]["sentence"] == "4 tests in 4 of 4 files, 1 skipped"


def test_gpu_tests_run_first_and_those_of_the_cpu_and_the_tooling_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pieces, "ROOT", tmp_path)
    expected = ["gpu", "gpu_memory", "cuda_stepwise", "describe", "cuda", "modules", "any_size"]
    expected += ["another"]
    (tmp_path / "tests").mkdir()
    for name in (*expected, "emulator", "threads", "gpu_check"):
        (tmp_path / "tests" / f"test_{name}.py").touch()
    now = Answers(tmp_path / "some-gpu", ("pytest", 5, ""))
    now.options.pytest = "-k mine"
    outcome = gpu_pieces.test(now)
    asked = [text.split(" tests/test_") for text, _ in now.asked]
    assert [name for _, name in asked] == [f"{name}.py" for name in expected]
    assert all(text.endswith("-k mine") for text, _ in asked)
    assert ["-k gpu" in text for text, _ in asked] == [name == "cuda_stepwise" for name in expected]
    assert "8 of 8 files" in outcome.sentence
    assert outcome.sentence.endswith("3 files about the CPU or the tooling alone are left to CI")
    now.state = {"test": {"found": now.found}}
    now.save()
    text = (tmp_path / "some-gpu" / "summary.md").read_text()
    assert "CI runs test_emulator.py, test_gpu_check.py, test_threads.py." in text


def test_every_file_of_tests_has_its_place_on_a_machine_with_a_gpu():
    there = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert there <= gpu_pieces.TESTS.keys() | gpu_pieces.LEFT_TO_CI
    assert gpu_pieces.TESTS.keys().isdisjoint(gpu_pieces.LEFT_TO_CI)
    assert there >= gpu_pieces.LEFT_TO_CI


@pytest.mark.alone
def test_tests_that_are_cut_are_counted_and_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pieces, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_pieces, "LEAST_S", 1.0)
    folder = tmp_path / "tests"
    folder.mkdir()
    slow = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n"
    (folder / "test_cuda.py").write_text(slow)
    (folder / "test_other.py").write_text("def test_a(): pass\n")
    # As in a shell's background job.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # How long pytest takes to start is up to the machine.
        for limit in (12.0, 24.0, 48.0):
            now = check(tmp_path / f"{limit}")
            assert not now.run("test", gpu_pieces.test, limit=limit)
            found = now.state["test"]["found"]["files"]
            if "tests" in found["test_cuda.py"]:
                break
    finally:
        signal.signal(signal.SIGINT, before)
    assert found["test_cuda.py"]["status"] == "cut"
    assert found["test_cuda.py"]["tests"] >= 1
    assert now.state["test"]["status"] == "cut"
    (folder / "test_cuda.py").write_text("def test_a(): pass\n")
    assert now.run("test", gpu_pieces.test)
    assert [*now.state["test"]["found"]["files"]] == ["test_cuda.py", "test_other.py"]


FINDS = ("planted_errors", 9, "ERROR SUMMARY: 1 error\n")
CLEAN = ("gpu_sanitize.py", 0, "168 calls made, forward\n========= ERROR SUMMARY: 0 errors\n")
NVCC_RUNS = ("planted_errors.cu", 0, "")


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.setattr(gpu_pieces, "find_tool", lambda name: f"/tools/{name}")
    monkeypatch.delenv("NVCC", raising=False)


def test_sanitize_passes_where_every_tool_finds_the_planted_error_and_no_other(tools, tmp_path):
    now = Answers(tmp_path, NVCC_RUNS, FINDS, CLEAN)
    assert gpu_pieces.sanitize(now).status == "passed"
    assert [*now.found["tools"]] == ["memcheck", "racecheck", "synccheck"]
    said = "168 calls made, forward; ERROR SUMMARY: 0 errors"
    assert now.found["tools"]["racecheck"] == {
        "status": "passed",
        "planted": "found",
        "said": said,
    }
    watched = [env for text, env in now.asked if "gpu_sanitize.py" in text]
    assert watched == [{"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}] * 3
    before = len(now.asked)
    assert gpu_pieces.sanitize(now).status == "passed"
    assert len(now.asked) == before + 1  # nvcc alone


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ((FINDS, ("gpu_sanitize.py", 9, "168 calls made\nERROR SUMMARY: 3 errors\n")), "3 errors"),
        ((FINDS, ("gpu_sanitize.py", 1, "Traceback\n")), "exit status 1"),
        ((FINDS, ("gpu_sanitize.py", 0, "ERROR SUMMARY: 0 errors\n")), "0 errors"),
    ],
)
def test_sanitize_fails_on_errors(answers, said, tools, tmp_path):
    now = Answers(tmp_path, NVCC_RUNS, *answers)
    assert gpu_pieces.sanitize(now).status == "failed"
    assert said in now.found["tools"]["memcheck"]["said"]


@pytest.mark.parametrize("control", [(0, ""), (None, "")])
@pytest.mark.parametrize(
    ("ops", "said"),
    [
        (CLEAN, "168 calls made, forward; ERROR SUMMARY: 0 errors"),
        (("gpu_sanitize.py", 9, "ERROR SUMMARY: 3 errors\n"), "ERROR SUMMARY: 3 errors"),
        (("gpu_sanitize.py", None, ""), "cut by the time limit"),
    ],
)
def test_sanitize_fails_where_a_tool_sees_no_planted_error_and_runs_the_ops_all_the_same(
    control, ops, said, tools, tmp_path
):
    options = f"synccheck --kernel-name {gpu_pieces.KERNELS} --error-exitcode 9"
    blind, ops = (
        (f"{options} {gpu_pieces.BUILT}", *control),
        (f"{options} {sys.executable}", *ops[1:]),
    )
    now = Answers(tmp_path, NVCC_RUNS, ops, blind, FINDS, CLEAN)
    found = gpu_pieces.sanitize(now)
    assert found.status == "failed"
    assert "synccheck failed (did not find the planted error)" in found.sentence
    assert "memcheck passed, racecheck passed" in found.sentence
    synccheck = now.found["tools"]["synccheck"]
    assert synccheck["said"] == said
    assert synccheck["planted"] == f"not found ({Finished(*control).how})"
    now.state = {"sanitize": {"found": now.found}}
    now.save()
    assert f"| synccheck | failed | {said} | not found" in (tmp_path / "summary.md").read_text()


@pytest.mark.skipif(NVCC is None, reason="needs nvcc, CUDA's compiler")
def test_who_is_not_at_the_planted_barrier_lives_on(tmp_path):
    """In the PTX: every way to the kernel's end leads over the barrier or over a wait."""
    command = [*gpu_pieces.compile_command(NVCC, "planted_errors", "90", tmp_path / "ptx"), "-ptx"]
    subprocess.run(command, check=True)
    kernel = re.split(r"^\.visible \.entry ", (tmp_path / "ptx").read_text(), flags=re.MULTILINE)
    (body,) = [text for text in kernel if "half_a_block" in text[:80]]
    lines = [line.strip() for line in body[body.index("{") :].splitlines()]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    ways, seen, over = [0], set(), set()
    while ways:
        at = ways.pop()
        if at in seen:
            continue
        seen.add(at)
        line = lines[at]
        assert not re.match(r"ret|exit|}", line), "the end is reached with neither"
        if line.startswith(("bar.sync", "barrier.sync", "nanosleep")):
            over.add(line.split(".")[0])
            continue
        jump = re.match(r"(@\S+\s+)?bra(?:\.uni)?\s+(\S+);", line)
        if jump:
            ways.append(labels[jump[2]])
        if not jump or jump[1]:
            ways.append(at + 1)
    assert len(over) == 2


def test_missing_tools_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pieces, "find_tool", lambda name: None)
    monkeypatch.delenv("NVCC", raising=False)
    now = Answers(tmp_path)
    for piece, tool in ((gpu_pieces.sanitize, "compute-sanitizer"), (gpu_pieces.micro, "nvcc")):
        found = piece(now)
        assert found.status == "failed"
        assert found.sentence.startswith(f"{tool} was not found")


HEAD = "test,ctas,cluster,threads,payload_bytes,ns_per_step,cycles_per_step,note"


@pytest.mark.parametrize(("status", "expected"), [(0, "passed"), (1, "failed")])
def test_micro_keeps_rows_with_device_date_and_commit(status, expected, tmp_path, monkeypatch):
    """A compiler that is none writes a program that prints rows."""
    program = (
        f"print({HEAD!r}); print('grid_sync,2,0,256,0,700.0,1200.0,'); raise SystemExit({status})"
    )
    text = f"import sys, pathlib\npath = pathlib.Path(sys.argv[-1])\npath.write_text({program!r})\n"
    text = (
        text.replace("write_text(", f"write_text('#!{sys.executable}\\n' + ")
        + "path.chmod(0o755)\n"
    )
    monkeypatch.setenv("NVCC", str(script(tmp_path / "nvcc", text)))
    monkeypatch.setattr(gpu_pieces, "BUILT", tmp_path / "built")
    now = check(tmp_path)
    assert now.run("micro", gpu_pieces.micro) == (expected == "passed")
    with (now.folder / "sync-latency.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["test"], row["ns_per_step"]) == ("grid_sync", "700.0")
    assert (row["device"], row["commit"], row["date"][:2]) == ("Some GPU", "0123456789ab", "20")


@pytest.mark.parametrize(
    ("status", "expected"), [(0, "passed"), (1, "failed"), (3, "failed"), (None, "cut")]
)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_bench_tells_how_many_points_are_measured(backend, status, expected, tmp_path):
    said = "7 of 3400 points measured, 7 of them now; 0 rows wrong or failed"
    now = Answers(tmp_path / "some-gpu", ("gpu_grid.py", status, f"noise\n{said}\n"))
    piece = {"cuda": "bench", "triton": "bench_triton"}[backend]
    found = gpu_pieces.PIECES[piece](now)
    assert found.status == expected
    assert said in found.sentence
    assert f"--backends {backend} --out {tmp_path} --seconds 450" in now.asked[0][0]


@pytest.mark.parametrize(("status", "expected"), [(0, "passed"), (1, "failed"), (None, "failed")])
def test_stacks_tells_how_many_rows_are_right(status, expected, tmp_path):
    said = "48 rows, 0 wrong"
    now = Answers(tmp_path / "some-gpu", ("gpu_stacks.py", status, f"noise\n{said}\n"))
    found = gpu_pieces.stacks(now)
    assert (found.status, found.sentence.startswith(said)) == (expected, True)
    assert f"--out {tmp_path}" in now.asked[0][0]


def test_the_rows_of_stacks(tmp_path, capsys, monkeypatch):
    assert gpu_stacks.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "6 rows, 0 wrong"
    (path,) = tmp_path.glob("*/stacks.csv")
    found = rows.lines(path)
    ways = ("one by one", "side by side", "torch.nn")
    assert [(row["kind"], row["provider"]) for row in found] == [
        (kind, way) for kind in ("forward", "train") for way in ways
    ]
    assert all(float(row["p50_ms"]) > 0 and float(row["difference"]) < 1e-4 for row in found)
    assert found[0]["ratio"] == "1"
    # What differs is told.
    monkeypatch.setattr(gpu_stacks, "difference", lambda *_: float("nan"))
    assert gpu_stacks.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 1


def test_the_sanitized_calls_run_every_op_in_every_form(capsys):
    assert gpu_sanitize.main(["--device", "cpu"]) == 0
    cells, dtypes, shapes, forms = 4, 4, 2, 5  # four forms and a step; the LSTM has one more
    count = dtypes * shapes * (cells * forms + 1)
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith(f"{count} calls made, forward and backward")
    assert told[0].startswith("Triton's ops are left out: ")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_tritons_ops_are_sanitized_where_they_run():
    """Here, in Triton's interpreter, on one small shape."""
    code = "import gpu_sanitize; gpu_sanitize.SHAPES = ((2, 2, 5),); gpu_sanitize.main(%s)"
    command = [sys.executable, "-c", code % ["--device", "cpu"]]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ended = subprocess.run(
        command, cwd=ROOT / "benchmarks", env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    native, cells, dtypes, forms = 4 * (4 * 5 + 1), 2, 2, 2
    ours = cells * dtypes * (forms * len(triton.ALGORITHMS) + 1)
    assert ended.stdout.startswith(f"{native + ours} calls made")


def test_on_a_gpu_every_algorithm_is_sanitized_that_can_run(monkeypatch):
    monkeypatch.setattr(gpu_sanitize, "describe", lambda _: KNOWN_DEVICES["H100 SXM"])
    small, projected = ((3, 5, 33), "plain", "cuda"), ((3, 5, 33), "projection", "cuda")
    assert gpu_sanitize.algorithms("lstm", torch.bfloat16, *small) == [1, 2, 3]
    assert gpu_sanitize.algorithms("lstm", torch.float32, *small) == [1, 3]
    assert gpu_sanitize.algorithms("lstm", torch.float64, *small) == [1]
    assert gpu_sanitize.algorithms("lstm", torch.bfloat16, *projected) == [1]


@pytest.mark.skipif(build.compiler() is None, reason="the emulator needs a C++ compiler")
def test_stacks_are_sanitized_where_they_run():
    """Here, on the emulator."""
    for dtype in (torch.float64, torch.bfloat16):
        gpu_sanitize.stack(CELLS["gru"], dtype, (2, 3, 33), "cpu", 1, build.ops())


def test_a_sanitized_call_whose_result_is_not_finite_fails():
    x = torch.zeros(3, requires_grad=True)
    gpu_sanitize.finish((x + 1,), [x])
    with pytest.raises(SystemExit, match="not finite"):
        gpu_sanitize.finish((x / 0,), [x])
