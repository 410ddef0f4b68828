"""Every instruction set that is compiled in and runs here is held to the rule, not only the best.

The choice is made once a process, so the tests of the ops run again in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numerics import FULL, MOST, needs_native

pytestmark = needs_native

HERE = Path(__file__).resolve().parent
TESTS = {
    "test_layer.py": ("outputs_and_gradients", "rounded_once", "saturate", "nan_and_infinity"),
    "test_norm.py": ("outputs_and_gradients", "nan_and_infinity"),
    "test_step.py": ("as_good_as_torchs", "at_any_size", "nan_and_infinity"),
}


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_results_are_as_good_on_every_instruction_set(isa, request):
    _C = pytest.importorskip("fused_rnn._C", reason="needs the extension module")
    if isa not in _C.build_info()["instruction_sets"]:
        pytest.skip(f"{isa} is not compiled in")
    path = os.pathsep.join(filter(None, sys.path))
    settings = os.environ | {"FUSED_RNN_ISA": isa, "PYTHONPATH": path}
    report = [sys.executable, "-c", "from fused_rnn import _C; print(_C.instruction_set())"]
    found = subprocess.run(report, env=settings, capture_output=True, text=True, check=True)
    if found.stdout.strip() != isa:
        pytest.skip(f"this processor lacks {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--seed", str(request.config.getoption("seed")), "--most", str(MOST)]
    command += ["--full"] if FULL else []
    command += ["-k", " or ".join(name for names in TESTS.values() for name in names)]
    command += [HERE / file for file in TESTS]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"with the {isa} kernels:\n{done.stdout}{done.stderr}"
