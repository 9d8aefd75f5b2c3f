"""Small Mixtrals and adapters on them, made and saved by stock PEFT."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from data.disk import nf4
from data.disk.loading.layers import EXPERTS as QUANTISED_EXPERTS
from data.disk.loading.layers import LINEAR
from inference.config import InferenceConfig

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "experts-only": {"target_modules": [], "target_parameters": EXPERTS},
    "gate-up-only": {"target_modules": [], "target_parameters": EXPERTS[:1]},
    "down-only": {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]},
    "attention-only": {"target_modules": ATTENTION},
    "attention-by-pattern": {"target_modules": r".*layers\.1\.self_attn\.[qv]_proj"},
    "rank-stabilised": {"target_modules": ATTENTION, "target_parameters": EXPERTS, "use_rslora": True},
    "ranks-by-pattern": {
        "target_modules": ATTENTION,
        "target_parameters": EXPERTS,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 40},
    },
    "low-rank-router": {"target_modules": ATTENTION, "target_parameters": ["mlp.gate.weight", *EXPERTS]},
    "trained-router": {"target_modules": ATTENTION, "modules_to_save": ["gate"]},
    "trained-head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
}


def architecture(**sizes: int) -> MixtralConfig:
    """Of a Mixtral of two layers; `sizes` change it."""
    wanted = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    return MixtralConfig(**wanted | sizes)


def make_base(dtype: torch.dtype = torch.float32, **sizes: int) -> MixtralForCausalLM:
    """A random one, always the same."""
    torch.manual_seed(0)
    base = MixtralForCausalLM(architecture(**sizes)).to(dtype).eval()
    base.set_experts_implementation("eager")
    return base


@torch.no_grad()
def dequantised(base: MixtralForCausalLM) -> MixtralForCausalLM:
    """A base whose attention and experts are what four bits leave of them; changed in place."""
    for name, parameter in base.named_parameters():
        if QUANTISED_EXPERTS.search(name) or LINEAR.search(name.removesuffix(".weight")):
            for matrix in parameter if parameter.dim() == 3 else (parameter,):
                matrix.copy_(nf4.dequantised(nf4.quantised(matrix), matrix.shape, matrix.dtype))
    return base


def make_adapter(directory: Path, base: MixtralForCausalLM, **kind: Any) -> PeftModel:
    """Stock PEFT's own adapter with factors that are not zero, saved by stock PEFT; the model that it belongs to."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, **kind})
    adapted = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(directory))
    return adapted.eval()


def make(top: Path, dtype: torch.dtype = torch.bfloat16, *, kind: str = "all", **saving: Any) -> InferenceConfig:
    """Settings that merge an adapter of that kind into a base, which is saved with `saving`."""
    base = make_base(dtype, vocab_size=32_000)
    base.save_pretrained(top / "base", **saving)
    make_adapter(top / "adapter", base, **KINDS[kind])
    return InferenceConfig(
        task="merge", base=str(top / "base"), adapter=str(top / "adapter"), output=str(top / "out"), device="cpu"
    )
