"""Nano Mixtrals, adapted ones and their files, and packed rows for them."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MixtralForCausalLM

from data.prepared.dataset import Batch
from data.schema import IGNORE_INDEX
from train.config.lora import LoraConfig
from train.config.model import ArchitectureConfig, ModelConfig
from train.config.train import TrainConfig
from train.lora import attach, factors
from train.lora.files import peft_files
from train.model import mixtral
from train.model.loss import MixtralWithLoss

NANO: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
LARGER = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "initializer_range": 0.1,
}
LENGTHS = [70, 37, 21]


def nano_config(*, dtype: str = "float32", architecture: dict[str, Any] | None = None, **lora: Any) -> TrainConfig:
    """Of two layers; `architecture` and the other arguments change `NANO` and the settings of `lora`."""
    sizes = ArchitectureConfig(**(NANO | (architecture or {})))
    settings = LoraConfig(**({"rank": 4, "alpha": 8} | lora))
    return TrainConfig(model=ModelConfig(architecture=sizes, dtype=dtype), lora=settings)


def nano(dtype: str) -> MixtralForCausalLM:
    """A larger one, for losses, with adapters that are not zero."""
    built = mixtral.build(nano_config(dtype=dtype, architecture=LARGER))
    for _, factor in attach.trainable(built):
        nn.init.normal_(factor, std=0.1)
    return built


def trained_nano(config: TrainConfig) -> tuple[MixtralForCausalLM, MixtralForCausalLM]:
    """A float64 base, and the same with adapters that are not zero."""
    torch.manual_seed(0)
    base = mixtral.random_base(config.model).double().eval()
    base.set_experts_implementation("eager")  # torch's grouped product knows no float64
    adapted = copy.deepcopy(base)
    attach.add_adapters(adapted, config.lora)
    for _, factor in attach.trainable(adapted):
        nn.init.normal_(factor, std=0.2)
    return base, adapted


def save(directory: Path, config: TrainConfig, adapted: MixtralForCausalLM) -> None:
    """Writes the adapter."""
    tensors = {name: factor.detach() for name, factor in attach.trainable(adapted)}
    peft_files.write(directory, config.model, config.lora, tensors, factors.adapters(adapted))


def packed(ids: torch.Tensor) -> Batch:
    """One row of LENGTHS with every second token trained, and 10 slots of padding."""
    padded = F.pad(ids, (0, 10))[None]
    positions = torch.cat([torch.arange(length) for length in [*LENGTHS, 10]])[None]
    labels = padded.clone()
    labels[:, ::2] = IGNORE_INDEX
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()[:-1]]
    labels[:, starts] = IGNORE_INDEX
    labels[:, sum(LENGTHS) :] = IGNORE_INDEX
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    is_token = torch.arange(padded.shape[1])[None] < sum(LENGTHS)
    return Batch(ids=padded, positions=positions, targets=targets, is_token=is_token)


def losses(module: MixtralWithLoss, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and load balancing."""
    return module(batch.ids, batch.positions, batch.targets, batch.is_token)
