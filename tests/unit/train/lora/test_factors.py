"""The factors of a block's experts as parameters."""

import pytest
import torch
from torch import nn

from tests.support.counting import Calls
from tests.support.nano import nano_config
from train.config.lora import EXPERT_TARGETS
from train.lora import factors
from train.model import mixtral


def test_an_unknown_projection_is_refused() -> None:
    with pytest.raises(ValueError, match="w1"):
        factors.attach(nn.Module(), ranks=[], projections=("w1",), scaling=factors.Scaling(8))


def test_a_seed_gives_the_same_start_whatever_the_device() -> None:
    """The numbers are drawn on the CPU; on the meta device, where a plan is made, there are none."""
    how = {"ranks": [[4] * 4] * 2, "projections": EXPERT_TARGETS, "scaling": factors.Scaling(8)}
    with torch.device("meta"):
        planned = mixtral.random_base(nano_config().model)
        with Calls() as calls:
            factors.attach(planned, **how)
    assert calls.of["uniform_"] == 0
    assert planned.model.layers[0].mlp.experts.gate_up_proj_lora_A.is_meta
    starts = []
    for dtype in ("float32", "bfloat16"):
        config = nano_config()
        config.model.dtype = dtype
        base = mixtral.random_base(config.model)
        torch.manual_seed(3)
        factors.attach(base, **how)
        starts.append(base.model.layers[1].mlp.experts.down_proj_lora_A.detach())
    assert torch.equal(starts[0].bfloat16(), starts[1])


@pytest.mark.parametrize(("dtype", "filled"), [(torch.float32, 8), (torch.bfloat16, 8), (torch.float64, 6)])
def test_every_expert_gets_the_rows_of_one_rank_and_gradients_go_back(dtype: torch.dtype, filled: int) -> None:
    """The largest rank, up to whole 16 bytes."""
    adapter = factors.Adapter(ranks=(3, 0, 5), scales=(2.0, 0.0, 1.0), dropout=0.0)
    factor = torch.arange(1, 33, dtype=dtype).view(8, 4)
    of_each = adapter.filled(factor)
    assert of_each.shape == (3, filled, 4)
    for rank, rows, expert in zip(adapter.ranks, adapter.rows, of_each, strict=True):
        assert torch.equal(expert[:rank], factor[rows])
        assert not expert[rank:].any()
    assert torch.equal(adapter.unfilled(of_each), factor)


def test_equal_ranks_of_whole_16_bytes_are_not_copied() -> None:
    adapter = factors.Adapter(ranks=(8, 8), scales=(2.0, 2.0), dropout=0.0)
    factor = torch.randn(16, 4)
    assert adapter.filled(factor).data_ptr() == factor.data_ptr()
    assert adapter.unfilled(adapter.filled(factor)).data_ptr() == factor.data_ptr()
