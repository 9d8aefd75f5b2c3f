"""The planned memory, compared with what autograd and the allocator hold of the real code."""

import copy
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.conftest import Live
from train.config.engine import DeepSpeedConfig
from train.config.lora import LoraConfig
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import TrainConfig
from train.engine import cpu
from train.model import mixtral
from train.model.loss import MixtralWithLoss
from train.planning import memory
from train.planning.given.here import found_here
from train.planning.given.sizes import sizes_of
from train.planning.memory import activations

TOKENS = 256


def config_of(checkpointing: str, dtype: str) -> TrainConfig:
    architecture = ArchitectureConfig(
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return TrainConfig(
        model=ModelConfig(architecture=architecture, dtype=dtype),
        lora=LoraConfig(rank=8),
        activation_checkpointing=checkpointing,
    )


def kept(config: TrainConfig) -> int:
    """Bytes that are saved for the backward by all layers of the model, without its parameters."""
    model = mixtral.build(config).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(3, 30_000, (1, TOKENS))
    positions = torch.arange(TOKENS)[None]
    module = MixtralWithLoss(model, with_router_loss=False)
    module.differentiates_input = True
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(ids, positions, ids, torch.ones_like(ids, dtype=torch.bool))
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_what_a_layer_keeps_is_what_autograd_saves(checkpointing: str, dtype: str) -> None:
    """Of two layers less one, so that embedding, last norm and head drop out."""
    one = config_of(checkpointing, dtype)
    two = copy.deepcopy(one)
    two.model.architecture.num_hidden_layers = 2
    measured = kept(two) - kept(one)
    planned = activations(sizes_of(one), TOKENS, checkpointing, found_here(one, 1)).kept
    assert planned == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_the_peak_is_what_the_tensors_of_a_step_take(
    checkpointing: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the optimizer, and without what a CPU's allocator takes beside tensors."""
    for name in ("GAPS", "GAPS_IN_HALF", "CODE_IN_HALF"):
        monkeypatch.setattr(memory, name, 0.0)
    config = config_of(checkpointing, dtype)
    config.model.architecture.hidden_size, config.model.architecture.num_hidden_layers = 256, 2
    config.deepspeed = DeepSpeedConfig(stage=0)
    tokens = 1024
    model = mixtral.build(config).train()
    ids = torch.randint(3, 30_000, (1, tokens))
    positions = (torch.arange(tokens) % 256)[None]
    module = MixtralWithLoss(model, with_router_loss=True)
    with Live() as live:
        cross_entropy, balance = module(ids, positions, ids, torch.ones_like(ids, dtype=torch.bool))
        (cross_entropy / tokens + 0.02 * balance).backward()
    planned = memory.memory(config, sizes_of(config), tokens, 1, found_here(config, 1))
    assert planned.where == "head"  # its logits are the largest part of a model with so little else
    beside = sum(planned.parts.get(name, 0.0) for name in ("masters", "moments", "gradients", "runtime"))
    assert planned.peak - beside == pytest.approx(live.peak, rel=0.04)


def test_the_plan_and_the_run_leave_the_same_tensors_to_the_kernel() -> None:
    assert memory.LEFT_TO_THE_KERNEL == cpu.LEFT_TO_THE_KERNEL


def test_a_matrix_that_leaves_holes_in_the_heap_is_one_that_the_kernel_does_not_take_back() -> None:
    beside = []
    for intermediate in (448, 32_768):
        config = config_of("none", "bfloat16")
        config.model.architecture.intermediate_size, config.model.weights = intermediate, "nf4"
        nf4 = memory.memory(config, sizes_of(config), TOKENS, 1, found_here(config, 1)).parts
        config.model.weights = "bf16"
        bf16 = memory.memory(config, sizes_of(config), TOKENS, 1, found_here(config, 1)).parts
        beside.append(nf4["gaps of the heap"] - bf16["gaps of the heap"])
    assert beside == [pytest.approx(memory.GAPS_OF_MATRICES * 2 * 448 * 128 * 2), 0.0]
