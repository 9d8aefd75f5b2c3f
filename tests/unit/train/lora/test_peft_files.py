"""Adapters on disk with every option: in stock PEFT, as per-expert files, and back again."""

import copy
import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralForCausalLM

from configs.program.errors import UserError
from tests.support.nano import nano_config, save, trained_nano
from train.config.lora import LoraConfig
from train.lora import attach, factors
from train.lora.files import peft_files
from train.lora.proof import movements
from train.saving.starting_point import movements_of, start_from

OPTIONS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"rank_stabilised": True},
    "a-subset": {"experts": [1, 3]},
    "a-rank-for-each": {"expert_ranks": [1, 6, 0, 3]},
    "a-rank-for-each-rank-stabilised": {"expert_ranks": [1, 6, 0, 3], "rank_stabilised": True, "rank": 2},
    "router": {"router": "trained"},
    "one-projection": {"projections": ["down_proj"], "experts": [0]},
    "projections-the-other-way": {"projections": ["down_proj", "gate_up_proj"]},
}


def ids() -> torch.Tensor:
    return torch.randint(3, 500, (2, 25), generator=torch.Generator().manual_seed(1))


def started(base: MixtralForCausalLM, lora: LoraConfig) -> None:
    """Adds adapters to a base and starts them from `lora.start`, as a run does."""
    attach.add_adapters(base, lora)
    start_from(base, lora)


def by_load(tmp_path: Path) -> dict[str, Any]:
    """A layer with one adapted expert and a layer with none."""
    (tmp_path / "load.json").write_text(json.dumps({"tokens_per_expert": [[9, 1, 1, 1], [3, 3, 3, 3]]}))
    budget = 4 * (32 + 2 * 48 + 48 + 32)
    return {"experts": "by_load", "by_load": "experts", "load": str(tmp_path / "load.json"), "budget": budget}


@pytest.fixture(params=[*OPTIONS, "by-load"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, MixtralForCausalLM, MixtralForCausalLM, Path]:
    lora = OPTIONS.get(request.param) or by_load(tmp_path)
    config = nano_config(**lora)
    config.lora.check()
    base, adapted = trained_nano(config)
    (tmp_path / "adapter").mkdir()
    save(tmp_path / "adapter", config, adapted)
    return config, base, adapted, tmp_path / "adapter"


def test_stock_peft_gives_the_same_logits(trained: Any) -> None:
    _, base, adapted, directory = trained
    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(directory), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        ours, theirs, without = adapted(ids()).logits, stock(ids()).logits, base(ids()).logits
    # folded scales are stored in float32, beside float64 factors here
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert (ours - without).abs().max() > 0.01
    stored = set(load_file(directory / "adapter_model.safetensors"))
    named = {
        name.replace(".default", "").replace(".modules_to_save", "")
        for name, _ in stock.named_parameters()
        if ".lora_" in name or ".modules_to_save." in name
    }
    assert stored == named


def test_the_order_of_target_modules_does_not_vary(trained: Any) -> None:
    """Two runs of the same numbers have the same files."""
    _, _, _, directory = trained
    stored = json.loads((directory / "adapter_config.json").read_text())["target_modules"]
    assert len(stored) == 4
    assert stored == sorted(stored)


def test_what_can_not_be_written_is_an_error_of_the_system(trained: Any) -> None:
    """So that the run can say what to do; safetensors' own function raises one of its own."""
    config, _, adapted, directory = trained
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(directory, config, adapted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_can_start_from_what_was_written(trained: Any) -> None:
    config, base, adapted, directory = trained
    config.lora.start = str(directory)
    again = copy.deepcopy(base)
    started(again, config.lora)
    for (name, a), (_, b) in zip(attach.trainable(adapted), attach.trainable(again), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_the_per_expert_export_is_the_same_adapter_on_unfused_experts(trained: Any, tmp_path: Path) -> None:
    config, base, adapted, _ = trained
    tensors = {name: factor.detach() for name, factor in attach.trainable(adapted)}
    out = tmp_path / "per_expert"
    out.mkdir()
    peft_files.write_per_expert(out, config.model, config.lora, tensors, factors.adapters(adapted))
    stock = PeftModel.from_pretrained(unfused(base), str(out), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids()).logits, stock(ids()).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # of its own translation
def test_stock_peft_translates_the_per_expert_export_to_fused_experts(tmp_path: Path) -> None:
    config = nano_config()
    base, adapted = trained_nano(config)
    tensors = {name: factor.detach() for name, factor in attach.trainable(adapted)}
    peft_files.write_per_expert(tmp_path, config.model, config.lora, tensors, factors.adapters(adapted))
    stock = PeftModel.from_pretrained(base, str(tmp_path), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids()).logits, stock(ids()).logits, rtol=1e-10, atol=1e-10)


class Unfused(nn.Module):
    """Mixtral's MoE block as its files name it: a module for each expert, a linear layer for each weight."""

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.gate = fused.gate
        self.experts = nn.ModuleList()
        gates_ups = fused.experts.gate_up_proj.detach()
        for gate_up, down in zip(gates_ups, fused.experts.down_proj.detach(), strict=True):
            expert = nn.Module()
            for name, weight in zip(("w1", "w3", "w2"), (*gate_up.chunk(2), down), strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
                linear.weight.data.copy_(weight)
                expert.add_module(name, linear)
            self.experts.append(expert)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, -2)
        _, weights, index = self.gate(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            weight = (weights * (index == number)).sum(-1, keepdim=True)
            out = out + weight * expert.w2(nn.functional.silu(expert.w1(flat)) * expert.w3(flat))
        return out.view_as(hidden)


def unfused(base: MixtralForCausalLM) -> MixtralForCausalLM:
    changed = copy.deepcopy(base)
    changed.config.model_type = "unfused"  # for a Mixtral, PEFT would translate the names to fused experts'
    for layer in changed.model.layers:
        layer.block_sparse_moe = Unfused(layer.mlp)
        layer.mlp = _Last(layer)
    return changed


class _Last(nn.Module):
    """Calls the layer's unfused block, which PEFT may have changed, without owning it twice."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer.block_sparse_moe(hidden)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t, k: t.pop(k), r"its tensor {key} is missing; "),
        (lambda t, k: t.update({k + "s": t.pop(k)}), r"its tensor {key} is missing, and {key}s is unknown; "),
        (lambda t, k: t.update({"more": t[k].clone()}), r"its tensor more is unknown; "),
        (lambda t, k: t.update({k: t[k][:-1].contiguous()}), r"its tensor {key} is \[15, 32\], not \[16, 32\]; "),
    ],
    ids=["missing", "renamed", "unknown", "shape"],
)
def test_every_key_and_shape_is_compared(tmp_path: Path, edit: Any, told: str) -> None:
    config = nano_config()
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    edit(tensors, key)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config.lora.start = str(tmp_path)
    with pytest.raises(UserError, match=f"lora.start={tmp_path}: {told.format(key=key.replace('.', '[.]'))}"):
        started(base, config.lora)


def test_another_rank_or_scale_is_refused(tmp_path: Path) -> None:
    config = nano_config()
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    config.lora.start, config.lora.alpha = str(tmp_path), 9
    with pytest.raises(UserError, match="its lora_alpha is 8, the settings ask for 9"):
        started(base, config.lora)


def test_a_scale_by_pattern_is_refused(tmp_path: Path) -> None:
    """It changes what the numbers mean, and shows in no key and no shape."""
    config = nano_config()
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"alpha_pattern": {"q_proj": 16}}))
    config.lora.start = str(tmp_path)
    with pytest.raises(UserError, match=rf"lora\.start={tmp_path}: its alpha_pattern is .*'q_proj': 16.*; give an"):
        started(base, config.lora)


def test_a_rank_by_pattern_shows_in_the_shapes(tmp_path: Path) -> None:
    config = nano_config()
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    settings = PeftConfig.from_pretrained(str(tmp_path))
    settings.rank_pattern = {"q_proj": 2}
    get_peft_model(copy.deepcopy(base), settings).save_pretrained(str(tmp_path))
    config.lora.start = str(tmp_path)
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight is \[2, 32\], not \[4, 32\]"):
        started(base, config.lora)


@pytest.mark.parametrize("damage", ["nothing", "empty", "no settings", "no weights", "cut weights", "pickled weights"])
def test_what_is_no_adapter_is_refused(tmp_path: Path, damage: str) -> None:
    config = nano_config()
    base, adapted = trained_nano(config)
    directory = tmp_path / "adapter"
    if damage != "nothing":
        directory.mkdir()
    if damage not in ("nothing", "empty"):
        save(directory, config, adapted)
    weights = directory / "adapter_model.safetensors"
    if damage == "no settings":
        (directory / "adapter_config.json").write_text("[]")
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "pickled weights":
        torch.save(load_file(weights), directory / "adapter_model.bin")
    if damage in ("no weights", "pickled weights"):
        weights.unlink()
    config.lora.start = str(directory)
    with pytest.raises(UserError, match=rf"lora\.start={directory}: its adapter_(config|model)\.\w+ .+; give the "):
        started(base, config.lora)


@pytest.mark.parametrize(
    ("written", "asked", "told"),
    [
        ({}, {"experts": [0, 2]}, "has rank 4 for expert 1, the settings ask for 0"),
        ({"experts": [0, 2]}, {}, "has rank 0 for expert 1, the settings ask for 4"),
        (
            {"expert_ranks": [4, 2, 0, 1]},
            {"expert_ranks": [4, 1, 0, 2]},
            "has rank 2 for expert 1, the settings ask for 1",
        ),
    ],
    ids=["fewer-experts", "more-experts", "other-ranks"],
)
def test_experts_and_ranks_are_compared(
    tmp_path: Path, written: dict[str, Any], asked: dict[str, Any], told: str
) -> None:
    """The keys and shapes are the same: zeros stand where an expert has no adapter."""
    config = nano_config(**written)
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    other = nano_config(**asked, start=str(tmp_path))
    with pytest.raises(UserError, match=rf"lora\.start={tmp_path}: its tensor .*layers\.0\.mlp\.experts.* {told}"):
        started(base, other.lora)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lora_alpha": None}, "says lora_alpha=null, and PEFT needs a number"),
        ({"init_lora_weights": "pissa"}, "says init_lora_weights=pissa, which is not known here"),
        ({"alora_invocation_tokens": [1]}, r"says alora_invocation_tokens=\[1\], which is not known here"),
        ("nan", "lora_A.weight holds numbers that are not finite"),
    ],
    ids=["alpha", "base", "kind", "nan"],
)
def test_a_start_that_says_something_else_than_its_numbers_is_refused(tmp_path: Path, change: Any, told: str) -> None:
    """Keys and shapes are the same, and training would begin from something else than the adapter was."""
    config = nano_config()
    base, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    if change == "nan":
        stored = load_file(tmp_path / "adapter_model.safetensors")
        stored[next(key for key in stored if "lora_A" in key)][0, 0] = math.nan
        save_file(stored, tmp_path / "adapter_model.safetensors")
    else:
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    config.lora.start = str(tmp_path)
    with pytest.raises(UserError, match=rf"lora\.start={tmp_path}: .*{told}"):
        started(base, config.lora)


def test_movement_is_the_norm_of_what_an_adapter_adds() -> None:
    config = nano_config(expert_ranks=[1, 6, 0, 3], rank_stabilised=True)
    _, adapted = trained_nano(config)
    for moved in movements(adapted, {name: factor.detach() for name, factor in attach.trainable(adapted)}):
        experts = adapted.model.layers[moved.layer].mlp.experts
        A, B = (getattr(experts, f"{moved.projection}_lora_{letter}") for letter in "AB")
        for expert, (above, rank) in {0: (0, 1), 1: (1, 6), 3: (7, 3)}.items():
            added = 8 / math.sqrt(rank) * B[above : above + rank].T @ A[above : above + rank]
            assert moved.norms_E[expert] == pytest.approx(float(added.detach().norm()), rel=1e-3)
        assert moved.norms_E[2] == 0


def test_movement_is_measured_from_the_adapter_that_was_started_from() -> None:
    """Also after a step so small that both products are the same in float32 to all but a few bits."""
    config = nano_config(expert_ranks=[1, 6, 0, 3])
    _, adapted = trained_nano(config)
    start = {name: factor.detach().clone() for name, factor in attach.trainable(adapted)}
    assert all(norm == 0 for moved in movements(adapted, start, start) for norm in moved.norms_E)
    for size in (1.0, 1e-5):
        now = {name: factor + size * torch.randn_like(factor) for name, factor in start.items()}
        for moved in movements(adapted, now, start):
            prefix = f"model.layers.{moved.layer}.mlp.experts.{moved.projection}_lora_"
            (A, B), (A0, B0) = ([given[prefix + letter].double() for letter in "AB"] for given in (now, start))
            for expert, (above, rank) in {0: (0, 1), 1: (1, 6), 3: (7, 3)}.items():
                rows = slice(above, above + rank)
                distance = float((8 / rank * (B[rows].T @ A[rows] - B0[rows].T @ A0[rows])).norm())
                assert moved.norms_E[expert] == pytest.approx(distance, rel=1e-3)
            assert moved.norms_E[2] == 0


def test_a_start_that_is_gone_costs_the_movements_and_not_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = nano_config()
    _, adapted = trained_nano(config)
    save(tmp_path, config, adapted)
    config.lora.start = str(tmp_path)
    tensors = {name: factor.detach().clone() for name, factor in attach.trainable(adapted)}
    moved = movements_of(config, adapted, tensors)
    assert len(moved) == 4
    assert not any(norm for of_projection in moved for norm in of_projection.norms_E)
    assert capsys.readouterr().err == ""
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)  # a RecursionError
    assert movements_of(config, adapted, tensors) == []
    (tmp_path / "adapter_model.safetensors").unlink()
    assert movements_of(config, adapted, tensors) == []
    assert capsys.readouterr().err.count("How far the experts' adapters have moved is not known.") == 2
