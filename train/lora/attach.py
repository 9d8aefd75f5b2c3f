"""Which parameters train: PEFT adapters on attention, split ones on experts, routers."""

from collections.abc import Iterator

from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from train.config.lora import LoraConfig
from train.lora import factors, split_experts
from train.lora.allocation import expert_ranks


def add_adapters(model: MixtralForCausalLM, config: LoraConfig) -> None:
    """Freezes the base and adds adapters: PEFT's own on attention, the split ones on experts.

    Raises:
        UserError: the model has no such experts.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    model.requires_grad_(False)
    if config.attention:
        of_attention = PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            use_rslora=config.rank_stabilised,
            lora_dropout=config.dropout,
            target_modules=list(config.attention),
        )
        inject_adapter_in_model(of_attention, model, low_cpu_mem_usage=on_meta(model))
    model.set_experts_implementation(split_experts.IMPLEMENTATION)
    factors.attach(
        model,
        ranks=ranks_of_experts(config, model.config),
        projections=tuple(config.projections),
        scaling=factors.Scaling(config.alpha, config.rank_stabilised),
        dropout=config.dropout,
    )
    if config.router == "trained":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.endswith(".mlp.gate.weight"))
    for _, parameter in trainable(model):
        parameter.data = parameter.data.to(model.dtype)


def ranks_of_experts(config: LoraConfig, sizes: MixtralConfig) -> list[list[int]]:
    """The LoRA rank of each expert of each layer of a model of these sizes.

    Raises:
        UserError: the model has no such experts, or the load is another model's.
    """
    costs = {
        "gate_up_proj": sizes.hidden_size + 2 * sizes.intermediate_size,
        "down_proj": sizes.intermediate_size + sizes.hidden_size,
    }
    parameters_per_rank = sum(costs[projection] for projection in config.projections)
    return expert_ranks(config, sizes.num_hidden_layers, sizes.num_local_experts, parameters_per_rank)


def on_meta(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "meta"


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that train, with their names."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def kind(name: str) -> str:
    """What a trained parameter adapts: `attention`, `experts`, `router`, or `other`."""
    for part, what in ((".self_attn.", "attention"), (".experts.", "experts"), (".mlp.gate.", "router")):
        if part in name:
            return what
    return "other"
