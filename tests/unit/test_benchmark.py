"""What scripts/benchmark.py counts as work that must be done, against what torch counts in our step; what it calls
failed."""

import argparse
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
def step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import step

    yield step
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_a_step_does_what_must_be_done_and_the_adapters_work_and_nothing_else(step) -> None:
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
    needed = step.needed_flops(config.to_dict(), [tokens], supervised)
    needed -= layers * 3 * 2 * 2 * width * heads * tokens * (tokens + 1) / 2

    # A and B of each adapter: forward, input gradient, and their own gradient
    on_attention = 2 * (hidden + heads * width) + 2 * (hidden + key_heads * width)  # q and o, k and v
    on_experts = config.num_experts_per_tok * ((hidden + 2 * inner) + (inner + hidden))
    adapters = 3 * 2 * tokens * rank * layers * (on_attention + on_experts)
    adapters -= 2 * tokens * rank * 3 * hidden  # the first layer's input is frozen embeddings: q, k and v need no more
    assert matrices == needed + adapters


@pytest.mark.parametrize(
    ("ours", "theirs", "failed"),
    [(2.0, 2.0, 0), (2.00019, 2.0, 0), (2.00021, 2.0, 1), (1.99, 2.0, 1), (float("nan"), 2.0, 1)],
)
def test_trainers_whose_first_losses_differ_fail(step, ours: float, theirs: float, failed: int) -> None:
    options = argparse.Namespace(row=1024, lora_rank=16, experts=8)
    sentences = step.disagreement({"ours": ours, "trl": theirs}, options)
    assert len(sentences) == failed
    assert all("the first loss is" in sentence and "--row 1024" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("model", "drawn"), [(None, {"experts", "lora_rank", "row"}), (Path("base"), {"lora_rank", "row"})]
)
def test_curves_tell_what_failed_and_leave_a_given_models_sizes(
    step, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path | None, drawn: set[str]
) -> None:
    both = {"ours": 2.0, "trl": 1.0}
    names = ("tokens_per_second", "speedup", "memory_above_model_mib", "memory_ratio", "share_of_peak")
    here = dict.fromkeys(names, both) | {"failed": []}

    def compare(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
        return here | {"failed": ["a sentence"] if options.row == 512 else []}

    monkeypatch.setattr(step, "_compare", compare)
    options = argparse.Namespace(row=1024, lora_rank=16, experts=8, model=model)
    curves = step._curves(options, tmp_path, here)
    assert curves.keys() == drawn
    assert here["failed"] == ["a sentence"]
    step._draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()
