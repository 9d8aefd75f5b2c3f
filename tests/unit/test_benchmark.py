"""What scripts/benchmark.py counts as work that must be done, against what torch counts in our step."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.schema import IGNORE_INDEX
from tests.unit.train.test_loss import LENGTHS, losses, nano, packed
from train.loss import MixtralWithLoss

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def needed_flops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks.step import needed_flops

    yield needed_flops
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_a_step_does_what_must_be_done_and_the_adapters_work_and_nothing_else(needed_flops) -> None:
    """So no frozen weight gets a gradient, and the head sees supervised positions alone. Attention's own products are
    left out: its blocks hold a few pairs that no conversation sees."""
    causal_lm = nano("float32").train()
    config = causal_lm.config
    batch = packed(torch.randint(3, 400, (sum(LENGTHS),)))
    with FlopCounterMode(display=False) as counter:
        losses(MixtralWithLoss(causal_lm, with_router_loss=True), batch)[0].backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    matrices = sum(flops for op, flops in counted.items() if op in ("aten.mm", "aten.addmm"))
    assert counted.keys() == {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"}

    hidden, width, inner, rank = config.hidden_size, config.head_dim or 16, config.intermediate_size, 16
    layers, heads, key_heads = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    tokens = batch.ids.numel()  # padding is computed as well
    supervised = int((batch.targets != IGNORE_INDEX).sum())
    needed = needed_flops(config.to_dict(), [tokens], supervised)
    needed -= layers * 3 * 2 * 2 * width * heads * tokens * (tokens + 1) / 2

    # A and B of each adapter: forward, input gradient, and their own gradient
    on_attention = 2 * (hidden + heads * width) + 2 * (hidden + key_heads * width)  # q and o, k and v
    on_experts = config.num_experts_per_tok * ((hidden + 2 * inner) + (inner + hidden))
    adapters = 3 * 2 * tokens * rank * layers * (on_attention + on_experts)
    adapters -= 2 * tokens * rank * 3 * hidden  # the first layer's input is frozen embeddings: q, k and v need no more
    assert matrices == needed + adapters
