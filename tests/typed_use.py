"""What a user may write under mypy --strict: `make lint` checks it, nothing runs it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn import plan
from fused_rnn.profile import main as profile


class Tagger(nn.Module):
    def __init__(self, words: int, tags: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 16)
        self.rnn: fused_rnn.LSTM = fused_rnn.LSTM(
            16, 32, num_layers=2, bidirectional=True, zoneout=(0.1, 0.2), backend="auto"
        )
        self.cell: fused_rnn.GRUCell = fused_rnn.GRUCell(64, 64)
        self.head = nn.Linear(64, tags)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        output, (h, c) = self.rnn(self.embedding(tokens), lengths=lengths)
        tags: Tensor = self.head(self.cell(output[0], h[0]) + c[0])
        return tags


def stream(gru: fused_rnn.GRU, frames: Tensor) -> Tensor:
    state = None
    for frame in frames:
        y, state = gru.step(frame, state)
    return y


def use(model: nn.Module, x: Tensor) -> str:
    converted: nn.Module = fused_rnn.convert(model)
    with fused_rnn.use_backend("reference"), torch.no_grad():
        converted(x)
    fused_rnn.revert(converted)
    backend: str = fused_rnn.explain(fused_rnn.RNN(8, 8), x).backend
    device: plan.Device = next(iter(plan.KNOWN_DEVICES.values()))
    planned: plan.Plan = plan.plan("lstm", torch.bfloat16, 10, 8, 256, device=device)
    return f"{backend} {planned} {profile(['--workload', 'rnnoise'])}"
