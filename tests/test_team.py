"""Threads that take each step together, on their own: with the thread sanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BUILD = ("-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """How to compile what ends in a run: the compiler and its sanitizer must be there."""
    compiler = os.environ.get("CXX") or "g++"
    folder = tmp_path_factory.mktemp("team")
    (folder / "empty.cpp").write_text("int main() {}")
    try:
        command = [compiler, *BUILD, "empty.cpp", "-o", "empty"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        subprocess.run(["./empty"], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        # Compilers come without it, and some kernels map memory where it cannot be: then the loops'
        # bits on several threads (test_threads.py) are the check that is left.
        pytest.skip(f"no programs with the thread sanitizer here: {error}")
    return compiler, folder


def outcome(compiler, name: str, old: str = "", new: str = "") -> subprocess.CompletedProcess[str]:
    """Of the program with ``old`` replaced in team.h."""
    cxx, folder = compiler
    cpu = folder / name / "csrc" / "cpu"
    cpu.mkdir(parents=True)
    for header in (HERE.parent / "csrc").rglob("*.h"):
        text = header.read_text()
        if header.name == "team.h" and old:
            assert text.count(old) == 1
            text = text.replace(old, new)
        target = folder / name / "csrc" / header.relative_to(HERE.parent / "csrc")
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
    (folder / name / "tests").mkdir()
    (folder / name / "tests" / "team.cpp").write_text((HERE / "team.cpp").read_text())
    program = folder / name / "team"
    command = [cxx, *BUILD, "-Wall", "-Wextra", "-Werror", "tests/team.cpp", "-o", program]
    subprocess.run(command, cwd=folder / name, check=True)
    return subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)


def test_a_team(compiler):
    done = outcome(compiler, "right")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


WRONG = {
    "no-release": ("&round_, round + 1, __ATOMIC_RELEASE", "&round_, round + 1, __ATOMIC_RELAXED"),
    "no-meeting": ("    if (size > 1) team->meet(size);\n", ""),
    "joins-late": ("      if (seen & kClosed) return -1;\n", ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_team_is_found(compiler, name):
    done = outcome(compiler, name, *WRONG[name])
    assert done.returncode != 0
