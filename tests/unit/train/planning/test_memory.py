"""The planned memory, compared with what autograd and the allocator hold of the real code."""

import copy
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from train.config.lora import LoraConfig
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import TrainConfig
from train.model import mixtral
from train.model.loss import MixtralWithLoss
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
