"""Does a CUDA library that was built beside a torch without CUDA run with one that has it?

``python benchmarks/gpu_load.py path/to/libfused_rnn_cuda.so``, in a process that has loaded no
other: loads it with the CPU's library beside it, or else this checkout's, and has both answer.
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1] / "fused_rnn"


def main(library: Path) -> None:
    beside = library.with_name("libfused_rnn_cpu.so")
    torch.ops.load_library(str(beside if beside.exists() else HERE / beside.name))
    torch.ops.load_library(str(library))
    torch.manual_seed(0)
    T, N, I, H = 4, 3, 5, 6  # noqa: E741
    lstm, gates = 2, 4 * H
    operands = [
        torch.randn(size) for size in ((T, N, I), (gates, I), (gates,), (gates, H), (gates,))
    ]
    answers = []
    for device in ("cpu", "cuda"):
        there = [x.to(device) for x in operands]
        options = (None, None, False, False, None, None, None, None, None)
        answers.append(torch.ops.fused_rnn.layer(lstm, *there, *options)[0].cpu())
    torch.testing.assert_close(*answers)
    print(f"loaded with torch {torch.__version__}; its LSTM agrees with the CPU's")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
