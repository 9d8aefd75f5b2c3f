"""A model on a base in four bits, and one on a base that holds the same numbers in 16 bits or more."""

import torch
from torch import nn
from transformers import MixtralForCausalLM

from data.disk import nf4
from data.disk.loading.layers import QuantisedLinear
from tests.support.nano import LARGER, nano_config
from train.config.lora import EXPERT_TARGETS
from train.lora import attach
from train.lora.factors import expert_modules
from train.lora.quantised import matrices
from train.model import mixtral


def pair(dtype: str, checkpointing: str = "none", **lora: float) -> tuple[MixtralForCausalLM, MixtralForCausalLM]:
    """A nano Mixtral with adapters that are not zero, in four bits; and one that holds the same weights in `dtype`."""
    config = nano_config(dtype=dtype, architecture=LARGER, **lora)
    config.activation_checkpointing = checkpointing
    whole = mixtral.build(config)
    for _, factor in attach.trainable(whole):
        nn.init.normal_(factor, std=0.1)
    config.model.weights = "nf4"
    quantised = mixtral.build(config)
    quantised.load_state_dict(dict(attach.trainable(whole)), strict=False)
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, QuantisedLinear):
                weight = whole.get_submodule(name).weight
                weight.copy_(nf4.dequantised(module.weight, weight.shape, weight.dtype))
        for name, experts in expert_modules(quantised).items():
            for projection in EXPERT_TARGETS:
                weight = whole.get_parameter(f"{name}.{projection}")
                weight.copy_(
                    matrices(getattr(experts, projection), slice(None), torch.Size(weight.shape[1:]), weight.dtype)
                )
    return quantised, whole
