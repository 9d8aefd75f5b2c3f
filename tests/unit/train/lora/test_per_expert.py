"""Adapters that name each expert's w1, w2 and w3 as the start of a run: what we export, and what others write."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralForCausalLM

from configs.program.errors import UserError
from inference.unfused import by_its_names, unfuse
from tests.support.nano import nano_config, trained_nano
from train.lora import attach, factors
from train.lora.files import peft_files
from train.saving.starting_point import movements_of, start_from

EXPERTS = ["w1", "w2", "w3"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
WEIGHTS = "adapter_model.safetensors"


def ids() -> torch.Tensor:
    return torch.randint(3, 500, (2, 25), generator=torch.Generator().manual_seed(1))


def started(base: MixtralForCausalLM, directory: Path, **lora: Any) -> MixtralForCausalLM:
    """A base whose adapters a run has started from a directory."""
    model, config = copy.deepcopy(base), nano_config(**lora, start=str(directory))
    config.lora.check()
    attach.add_adapters(model, config.lora)
    start_from(model, config.lora)
    return model


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"rank_stabilised": True, "expert_ranks": [1, 6, 0, 3]},
        {"experts": [1, 3], "router": "trained"},
        {"projections": ["down_proj"], "attention": ["v_proj"]},
        {"projections": ["gate_up_proj"], "attention": []},
    ],
    ids=["all", "a-rank-for-each", "a-subset-and-routers", "down", "gate-up"],
)
def test_a_run_can_start_from_our_own_export(tmp_path: Path, lora: dict[str, Any]) -> None:
    config = nano_config(**lora)
    base, adapted = trained_nano(config)
    tensors = {name: factor.detach() for name, factor in attach.trainable(adapted)}
    peft_files.write_per_expert(tmp_path, config.model, config.lora, tensors, factors.adapters(adapted))
    again = started(base, tmp_path, **lora)
    assert_same(again, adapted)
    for (name, a), (_, b) in zip(attach.trainable(adapted), attach.trainable(again), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def stock(directory: Path, base: MixtralForCausalLM, **settings: Any) -> nn.Module:
    """Stock PEFT's own adapter on separate experts, of rank 4 and alpha 8, and the model that it belongs to."""
    model = copy.deepcopy(base)
    unfuse(model)
    with by_its_names(model):
        adapted = get_peft_model(model, PeftConfig(r=4, lora_alpha=8, **settings), autocast_adapter_dtype=False).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(str(directory))
    return adapted


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all": ({"target_modules": [*ATTENTION, *EXPERTS]}, {}),
    "low-rank-routers": ({"target_modules": [*ATTENTION, *EXPERTS, "gate"]}, {"router": "trained"}),
    "routers-in-full": (
        {"target_modules": [*ATTENTION, *EXPERTS], "modules_to_save": ["gate"]},
        {"router": "trained"},
    ),
    "no-attention": ({"target_modules": EXPERTS}, {"attention": []}),
    "w3-alone": ({"target_modules": ["w3", "v_proj"]}, {"attention": ["v_proj"], "projections": ["gate_up_proj"]}),
    "some-experts": ({"target_modules": r".*\.experts\.[02]\.w[12]"}, {"attention": []}),
    "rank-stabilised": (
        {"target_modules": [*ATTENTION, *EXPERTS], "use_rslora": True},
        {"rank_stabilised": True},
    ),
    "ranks-by-pattern": (
        {"target_modules": [*ATTENTION, *EXPERTS], "rank_pattern": {"w1": 2, "experts.3.w2": 6}},
        {},
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_can_start_from_an_adapter_of_others(tmp_path: Path, kind: str) -> None:
    settings, lora = OTHERS[kind]
    base, _ = trained_nano(nano_config())
    theirs = stock(tmp_path, base, **settings)
    again = started(base, tmp_path, expert_ranks=[8, 8, 8, 8], **lora)
    assert_same(again, theirs)
    for name, parameter in attach.trainable(again):
        if ".experts." in name and "_lora_A" in name:
            assert bool((parameter != 0).any(1).all()), name  # else some of a rank would never move


def test_the_movement_from_such_a_start_is_nothing_at_first(tmp_path: Path) -> None:
    base, _ = trained_nano(nano_config())
    stock(tmp_path, base, target_modules=[*ATTENTION, *EXPERTS])
    lora = {"expert_ranks": [9, 8, 8, 12]}
    model = started(base, tmp_path, **lora)
    tensors = {name: parameter.detach() for name, parameter in attach.trainable(model)}
    moved = movements_of(nano_config(**lora, start=str(tmp_path)), model, tensors)
    assert len(moved) == 4
    assert all(norm == pytest.approx(0, abs=1e-6) for of_projection in moved for norm in of_projection.norms_E)


@pytest.mark.parametrize(
    ("change", "lora", "told"),
    [
        ({}, {}, r"expert 0 needs, since w1 .* rank 8 in .*gate_up_proj, .* give 4; .*expert_ranks=\[8,8,8,8\]'"),
        ({}, {"expert_ranks": [8, 8, 0, 8]}, r"expert 2 needs, .* rank 8 .* give 0; .*expert_ranks=\[8,8,8,8\]'"),
        ({}, {"expert_ranks": [8] * 4, "alpha": 9}, "its lora_alpha is 8, the settings ask for 9"),
        ({}, {"expert_ranks": [8] * 4, "rank": 2}, r"q_proj\.lora_A\.weight is \[4, 32\], not \[2, 32\]"),
        ({}, {"expert_ranks": [8] * 4, "projections": ["down_proj"]}, r"experts\.0\.w1\.lora_A\.weight is unknown"),
        ({"gate": (4, 32)}, {"expert_ranks": [8] * 4}, "low-rank factor of a router.*give lora.router=trained"),
        ({"experts.1.w2": (32, 47)}, {"expert_ranks": [8] * 4}, r"w2\.lora_A\.weight is \[4, 47\], not \[4, 48\]"),
        ({"experts.1.w2": (31, 48)}, {"expert_ranks": [8] * 4}, r"w2\.lora_B\.weight is \[31, 4\], not \[32, 4\]"),
        ({"experts.4.w2": (32, 48)}, {"expert_ranks": [8] * 4}, r"experts\.4\.w2\.lora_A\.weight is unknown"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, tuple[int, int]], lora: Any, told: str) -> None:
    base, _ = trained_nano(nano_config())
    stock(tmp_path, base, target_modules=[*ATTENTION, *EXPERTS])
    stored = load_file(tmp_path / WEIGHTS)
    for name, (size_out, size_in) in change.items():
        key = f"base_model.model.model.layers.1.block_sparse_moe.{name}.lora_"
        stored |= {f"{key}A.weight": torch.ones(4, size_in), f"{key}B.weight": torch.ones(size_out, 4)}
    save_file(stored, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=rf"^lora\.start={tmp_path}: .*{told}"):
        started(base, tmp_path, **lora)
