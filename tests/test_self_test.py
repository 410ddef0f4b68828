"""`python -m fused_rnn`: what it tells, and that its self-test finds a backend that is wrong."""

import re

import pytest
import torch

from fused_rnn import __main__ as command
from fused_rnn.backends import BACKENDS, reference

LAYER = reference.layer


def told(capsys):
    return dict(re.findall(r"^(.*?)  +(.*)$", capsys.readouterr().out, re.MULTILINE))


def test_every_available_backend_is_tested(capsys):
    assert command.main() == 0
    lines = told(capsys)
    for name, backend in BACKENDS.items():
        assert lines[f"backend {name}"] == (backend.available() or "available")
        if backend.available() is None and not torch.cuda.is_available():
            assert re.match(r"cpu: \d\d tensors, worst error \d+%", lines[f"test {name}"])
        else:
            assert (f"test {name}" in lines) == (backend.available() is None)
    assert {"fused_rnn", "python", "torch", "triton", "oneDNN", "CUDA"} <= lines.keys()


def wrong(*arguments, **options):
    h, *others = LAYER(*arguments, **options)
    return h + 1e-4, *others


def broken(*arguments, **options):
    raise ValueError("no such luck")


@pytest.mark.parametrize(
    ("layer", "sentence"), [(wrong, "error 1.*e-04 ABOVE"), (broken, "cpu: failed: no such luck")]
)
def test_a_backend_that_is_wrong_is_found(layer, sentence, capsys, monkeypatch):
    monkeypatch.setattr(reference, "layer", layer)
    assert command.main() == 1
    lines = told(capsys)
    assert re.search(sentence, lines["test reference"])
    assert "ABOVE" not in lines["test torch"]
