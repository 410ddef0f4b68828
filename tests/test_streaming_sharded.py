"""``step`` under FSDP2: the weights are gathered for it as for a forward."""

import pytest
import torch
from torch import distributed
from torch.testing import assert_close

import fused_rnn

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)


def rank(at: int, ranks: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=at, world_size=ranks)
    torch.manual_seed(0)
    whole = fused_rnn.LSTM(5, 6, 2)
    torch.manual_seed(0)
    sharded = fully_shard(fused_rnn.LSTM(5, 6, 2), mesh=init_device_mesh("cpu", (ranks,)))
    register_fsdp_forward_method(sharded, "step")
    x, state, expected_state = torch.randn(4, 3, 5), None, None
    loss = expected_loss = 0.0
    for x_t in x:
        y, state = sharded.step(x_t, state)
        expected, expected_state = whole.step(x_t, expected_state)
        assert_close(y, expected)
        loss, expected_loss = loss + y.square().sum(), expected_loss + expected.square().sum()
    loss.backward()
    expected_loss.backward()
    for parameter, other in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert_close(parameter.grad.full_tensor(), other.grad)
    distributed.destroy_process_group()


def test_steps_of_two_processes_are_those_of_one(tmp_path):
    torch.multiprocessing.spawn(rank, args=(2, str(tmp_path / "store")), nprocs=2)
