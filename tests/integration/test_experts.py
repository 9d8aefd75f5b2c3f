"""Expert-aware LoRA in real runs: against stock PEFT step by step, with experts that get no tokens, and by load."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, MixtralForCausalLM

from data.prepared.dataset import PreparedDataset, Schedule
from data.schema import IGNORE_INDEX
from tests.integration.conftest import Quickstart, steps, train
from train.config.engine import OptimConfig
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
    schedule = Schedule(len(table), epochs=3, rows_per_step=1, seed=0)
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
    count = 50 if zero == "zero3" else 10
    how = (f"deepspeed={zero}", f"max_steps={count}", "optim.lr=1e-3", f"run_dir={tmp_path}/run")
    train(2, *start, *how, module="tests.integration.disjoint")
    taken = steps(tmp_path / "run")
    assert len(taken) == count
    assert all(step["applied"] and math.isfinite(step["loss"] + step["gradient_norm"]) for step in taken)
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.values())
    moved = json.loads((tmp_path / "run" / "receipt.json").read_text())["experts_moved"]
    assert len(moved) == 4
    for projection in moved:
        assert [norm > 0 for norm in projection["norms"]] == [True] * 4 + [False] * 4


def test_an_expert_that_cannot_learn_ends_the_run_by_its_name(
    quickstart: Quickstart, start: tuple[str, ...], tmp_path: Path
) -> None:
    """Its weights down are zeros, so what goes in changes nothing; on two processes, under ZeRO-3."""
    base = tmp_path / "base"
    shutil.copytree(quickstart.base_run / "model", base)
    weights = load_file(base / "model.safetensors")
    (name,) = (name for name in weights if "layers.1." in name and name.endswith("experts.5.w2.weight"))
    weights[name].zero_()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    one = ("lora.projections=[gate_up_proj]", "max_steps=3", "global_batch=16")
    said = train(2, *start, *one, f"model.path={base}", f"run_dir={tmp_path}/run", expect=1)
    assert "ExpertNotLearningError: layer 1, expert 5: " in said
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_under_zero3_starts_from_an_adapter(
    quickstart: Quickstart, start: tuple[str, ...], tmp_path: Path
) -> None:
    """With all that trains, the routers too; at a rate of almost nothing it stays what it was."""
    options = ("lora.router=trained", "lora.expert_ranks=[8,4,4,4,0,4,4,2]", "max_steps=1", "logging.routing_every=0")
    train(2, *start, *options, f"run_dir={tmp_path}/first")
    first = tmp_path / "first" / "adapter"
    train(2, *start, *options, f"lora.start={first}", "optim.lr=1e-30", f"run_dir={tmp_path}/again")
    stored, again = (load_file(path / "adapter_model.safetensors") for path in (first, tmp_path / "again" / "adapter"))
    assert stored.keys() == again.keys()
    for key, tensor in stored.items():
        torch.testing.assert_close(again[key], tensor, rtol=0, atol=1e-20, msg=key)
    for run, moves in (("first", True), ("again", False)):
        moved = json.loads((tmp_path / run / "receipt.json").read_text())["experts_moved"]
        assert any(norm for projection in moved for norm in projection["norms"]) == moves
    base = load_file(quickstart.base_run / "model" / "model.safetensors")
    for layer in range(2):
        trained = stored[f"base_model.model.model.layers.{layer}.mlp.gate.weight"]
        assert not torch.equal(trained, base[f"model.layers.{layer}.block_sparse_moe.gate.weight"])


def test_profile_then_ranks_by_load(start: tuple[str, ...], tmp_path: Path) -> None:
    for processes in (1, 2):
        train(processes, *start, "task=profile", f"run_dir={tmp_path}/{processes}", "lora.rank=6")
        said = OmegaConf.load(tmp_path / str(processes) / "config.yaml").lora
        assert (said.rank, said.attention) == (6, ["q_proj", "k_proj", "v_proj", "o_proj"])
    alone, measured = (json.loads((tmp_path / name / "expert_load.json").read_text()) for name in "12")
    # The same rows give the same choices; a token between two experts may fall to either side by rounding.
    assert [measured[name] for name in ("rows", "tokens")] == [alone[name] for name in ("rows", "tokens")]
    for of_layer, of_layer_alone in zip(measured["tokens_per_expert"], alone["tokens_per_expert"], strict=True):
        assert sum(of_layer) == sum(of_layer_alone) == 2 * measured["tokens"]
        assert of_layer == pytest.approx(of_layer_alone, abs=measured["tokens"] / 1000)
    assert len(set(measured["tokens_per_expert"][0])) > 1
    assert (tmp_path / "2" / "expert_load.png").read_bytes().startswith(b"\x89PNG")

    by_load = ("lora=by_load", f"lora.load={tmp_path}/2/expert_load.json", "lora.budget=300000", "lora.dropout=0.1")
    more = ("lora.router=trained", "lora.rank_stabilised=true", "max_steps=11")
    said = train(2, *start, *by_load, *more, f"run_dir={tmp_path}/run", "optim.lr=1e-3")
    assert "How far the experts' adapters have moved" in said
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    ranks = {moved["layer"]: moved["ranks"] for moved in receipt["experts_moved"]}
    for layer, of_layer in enumerate(measured["tokens_per_expert"]):
        by_tokens = [rank for _, rank in sorted(zip(of_layer, ranks[layer], strict=True))]
        assert by_tokens == sorted(by_tokens)
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert 0 < sum(map(sum, ranks.values())) * ((128 + 2 * 256) + (256 + 128)) <= 300_000
    for directory in (tmp_path / "run" / "adapter", tmp_path / "run" / "adapter" / "per_expert"):
        held = {path.name for path in directory.iterdir()}
        assert held >= {"README.md", "adapter_model.safetensors", "receipt.json", "tokenizer.json", "tokenizer.model"}
        assert AutoTokenizer.from_pretrained(directory).chat_template
        assert "LoRA rank" in (directory / "README.md").read_text()
        assert str(tmp_path) not in (directory / "adapter_config.json").read_text()
    assert any(key.endswith("mlp.gate.weight") for key in stored)

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    routed = [line for line in lines if "expert_load" in line]
    assert [line["step"] for line in routed] == [1, 10]
    for line in routed:
        assert [sum(of_layer) for of_layer in line["expert_load"]] == pytest.approx([1.0, 1.0], abs=1e-4)
        assert all(0 < entropy < math.log(8) for entropy in line["router_entropy"])
