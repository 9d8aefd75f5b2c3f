"""Expert-aware LoRA in real runs: against stock PEFT step by step, with experts that get no tokens, and by load."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import MixtralForCausalLM

from data.dataset import PreparedDataset, Schedule
from data.schema import IGNORE_INDEX
from tests.integration.conftest import Quickstart, launch, program, steps, train
from train.config import OptimConfig
from train.loop import learning_rate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(quickstart: Quickstart) -> tuple[str, ...]:
    """The settings of a run on the quickstart's base and sample."""
    return ("recipe=quickstart", f"model.path={quickstart.base_run}/model", f"dataset={quickstart.sample}")


def test_thirty_steps_follow_those_of_stock_peft(
    quickstart: Quickstart, start: tuple[str, ...], tmp_path: Path
) -> None:
    """From the same factors, on the same rows: PEFT's merged weights against ours split, in float32."""
    same = ("model.dtype=float32", "deepspeed=none", "router_aux_loss=0", "global_batch=1", "optim.lr=2e-3")
    train(1, *start, *same, "max_steps=1", f"run_dir={tmp_path}/first")
    factors = tmp_path / "first" / "adapter"
    train(1, *start, *same, "max_steps=30", f"lora.start={factors}", f"run_dir={tmp_path}/ours")

    base = MixtralForCausalLM.from_pretrained(quickstart.base_run / "model", dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(factors), is_trainable=True).train()
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    table = PreparedDataset(quickstart.sample).train
    schedule = Schedule(len(table), epochs=12, rows_per_step=1, seed=0)
    config = OptimConfig(lr=2e-3, warmup_fraction=0.1)
    expected = []
    for step in range(30):
        index = schedule.rows_of(step)[0]
        assert index is not None
        row, begin, loss = table[index], 0, torch.zeros(())
        for length in row.lengths:
            ids = torch.tensor(row.ids[begin : begin + length])
            labels = torch.tensor(row.labels[begin : begin + length])
            logits = peft(ids[None], use_cache=False).logits[0]
            loss = loss + F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
            begin += length
        loss = loss / sum(label != IGNORE_INDEX for label in row.labels)
        expected.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step + 1, 30, config)
        optimizer.step()
    ours = [step["loss"] for step in steps(tmp_path / "ours")]
    assert ours == pytest.approx(expected, rel=1e-4)
    assert abs(ours[-1] - ours[0]) > 0.05  # it did train


@pytest.mark.parametrize("zero", ["zero3", "zero2"])
def test_experts_without_tokens_on_one_process_or_on_all_neither_hang_nor_give_nan(
    quickstart: Quickstart, start: tuple[str, ...], tmp_path: Path, zero: str
) -> None:
    count = 200 if zero == "zero3" else 20
    how = (f"deepspeed={zero}", f"max_steps={count}", "optim.lr=1e-3", f"run_dir={tmp_path}/run")
    launch(2, "tests.integration.disjoint", *start, *how, "hardware=cpu", "logging=quiet")
    taken = steps(tmp_path / "run")
    assert len(taken) == count
    assert all(step["applied"] and math.isfinite(step["loss"] + step["gradient_norm"]) for step in taken)
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.values())
    moved = json.loads((tmp_path / "run" / "receipt.json").read_text())["experts_moved"]
    assert len(moved) == 4
    for projection in moved:
        assert [norm > 0 for norm in projection["norms"]] == [True] * 4 + [False] * 4


def test_profile_then_ranks_by_load(start: tuple[str, ...], tmp_path: Path) -> None:
    program("train", *start, "task=profile", "hardware=cpu", "logging=quiet", f"run_dir={tmp_path}/profile")
    measured = json.loads((tmp_path / "profile" / "expert_load.json").read_text())
    for of_layer in measured["tokens_per_expert"]:
        assert sum(of_layer) == 2 * measured["tokens"]
    assert (tmp_path / "profile" / "expert_load.png").read_bytes().startswith(b"\x89PNG")

    load = tmp_path / "profile" / "expert_load.json"
    by_load = ("lora.experts=by_load", f"lora.load={load}", "lora.budget=300000", "lora.dropout=0.1")
    more = ("lora.router=trained", "lora.rank_stabilised=true", "lora.export_per_expert=true", "max_steps=11")
    done = train(2, *start, *by_load, *more, f"run_dir={tmp_path}/run", "optim.lr=1e-3")
    assert "How far the experts have moved" in done.stderr
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    ranks = {moved["layer"]: moved["ranks"] for moved in receipt["experts_moved"]}
    for layer, of_layer in enumerate(measured["tokens_per_expert"]):
        by_tokens = [rank for _, rank in sorted(zip(of_layer, ranks[layer], strict=True))]
        assert by_tokens == sorted(by_tokens)
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    per_rank = sum(sum(tensor.shape) for key, tensor in stored.items() if "layers.0.mlp.experts" in key)
    assert per_rank > 0
    assert (tmp_path / "run" / "adapter" / "per_expert" / "adapter_model.safetensors").is_file()
    assert any(key.endswith("mlp.gate.weight") for key in stored)

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    routed = [line for line in lines if "expert_load" in line]
    assert [line["step"] for line in routed] == [1, 10]
    for line in routed:
        assert [sum(of_layer) for of_layer in line["expert_load"]] == pytest.approx([1.0, 1.0], abs=1e-4)
        assert all(0 < entropy < math.log(8) for entropy in line["router_entropy"])
