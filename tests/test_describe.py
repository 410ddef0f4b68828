"""The description of a GPU: what CUDA says, in the planner's terms and units."""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from fused_rnn import native
from fused_rnn.plan import Device, describe, plan

ROOT = Path(__file__).resolve().parents[1]
FAKE = ROOT / "tests" / "fake_cuda"
CXX = shlex.split(os.environ.get("CXX", "g++"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """csrc/cuda/describe.cu over a CUDA run time that is made up: see tests/fake_cuda."""
    path = tmp_path_factory.mktemp("fake_cuda") / "libfused_rnn_cuda.so"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    source = ROOT / "csrc" / "cuda" / "describe.cu"
    command = [*CXX, *flags, f"-I{FAKE}", f"-I{ROOT / 'csrc'}", "-x", "c++", source, "-o", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def fake(library, monkeypatch):
    monkeypatch.setattr(native, "_CUDA_LIBRARY", library)
    monkeypatch.setattr(native, "CUDA_UNAVAILABLE", None)
    return ctypes.CDLL(str(library))


HOPPER = Device(
    name="Hopper",
    capability=90,
    sms=66,
    shared_per_sm=233472,
    shared_per_block=232448,
    registers_per_sm=65536,
    registers_per_block=65535,
    threads_per_block=1024,
    l2_bytes=50 * 2**20,
    clock_ghz=1.98,
    dram_gb_s=pytest.approx(2 * 2.619 * 5120 / 8),  # twice a clock, 5120 bits, in GB/s
    clusters=(66, 33, 15, 6, 3),  # three parts of 22
)


def test_every_field_arrives_in_its_unit(fake):
    assert describe(1) == HOPPER
    assert plan("lstm", torch.bfloat16, T=8, N=16, H=256, device=describe(1), proven_only=False)


def test_before_sm_90_there_are_no_clusters(fake):
    assert describe(0).capability == 86
    assert describe(0).clusters == (21, 0, 0, 0, 0)


def test_what_a_device_refuses_counts_as_none_and_leaves_no_error(fake):
    small = describe(2)
    assert small.clusters == (20, 10, 4, 2, 0)
    assert fake.fake_last_error() == 0


def test_a_clock_that_the_driver_does_not_tell_is_refused_by_the_plan(fake):
    assert describe(2).dram_gb_s == 0
    with pytest.raises(ValueError, match="a clock and a memory bandwidth"):
        plan("gru", torch.float32, T=8, N=16, H=256, device=describe(2))


def test_a_device_is_asked_once_and_the_current_one_stays(fake):
    describe(1)
    asked = fake.fake_described()
    assert describe(1) == HOPPER
    assert fake.fake_described() == asked
    assert fake.fake_device() == 0


def test_what_cuda_answers_is_the_error(fake):
    for index in (-1, 3):
        with pytest.raises(RuntimeError, match=rf"device {index}: invalid device ordinal"):
            describe(index)
    assert fake.fake_last_error() == 0
    assert describe(1) == HOPPER


def test_without_the_cuda_library_the_reason_is_the_error(monkeypatch):
    monkeypatch.setattr(native, "CUDA_UNAVAILABLE", "there is no moon tonight")
    with pytest.raises(RuntimeError, match="no moon"):
        describe(0)


@pytest.mark.skipif(
    native.CUDA_UNAVAILABLE is not None or not torch.cuda.is_available(),
    reason=f"needs a GPU and the CUDA library: {native.CUDA_UNAVAILABLE or 'there is no GPU'}",
)
def test_it_agrees_with_torch_on_the_gpus_of_this_machine():
    before = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        described, found = describe(index), torch.cuda.get_device_properties(index)
        assert described.name == found.name
        assert described.capability == 10 * found.major + found.minor
        assert described.sms == found.multi_processor_count
        assert described.shared_per_sm == found.shared_memory_per_multiprocessor
        assert described.shared_per_block == found.shared_memory_per_block_optin
        assert described.registers_per_sm == found.regs_per_multiprocessor
        assert described.l2_bytes == found.L2_cache_size
        assert 0.5 < described.clock_ghz < 5
        assert described.clusters[0] == described.sms
        for size, count in zip((2, 4, 8, 16), described.clusters[1:], strict=True):
            assert 0 <= count * size <= (described.sms if described.capability >= 90 else 0)
    assert torch.cuda.current_device() == before
