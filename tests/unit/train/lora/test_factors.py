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


def test_shares_are_the_scale_where_an_expert_owns_the_row_and_zero_elsewhere() -> None:
    adapter = factors.Adapter(ranks=(3, 0, 2), scales=(2.0, 0.0, 0.5), dropout=0.0)
    shares = adapter.shares(torch.device("cpu"))
    assert shares.tolist() == [[2.0, 2.0, 2.0, 0, 0], [0] * 5, [0, 0, 0, 0.5, 0.5]]
    assert adapter.shares(torch.device("cpu")) is shares  # the host waits for it once
