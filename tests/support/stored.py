"""A base of random numbers in files, with sizes that are no powers of two."""

from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

CONFIG = MixtralConfig(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=23,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=3,
)


def saved(directory: Path, dtype: torch.dtype, **how: object) -> MixtralForCausalLM:
    """A random model of these sizes, and its files; `how` is what `save_pretrained` is told."""
    torch.manual_seed(0)
    model = MixtralForCausalLM._from_config(CONFIG, dtype=dtype)
    model.save_pretrained(directory, **how)
    return model
