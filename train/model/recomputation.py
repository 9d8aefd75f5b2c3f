"""Which activations are computed again in the backward instead of being kept for it.

The halves of a layer differ: attention costs a tenth of the products, the experts nine tenths, and most of what is kept
is theirs. If only attention is computed again, the routers choose once.
"""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer


def enable(model: MixtralForCausalLM, what: str, *, dropout: float) -> None:
    """Makes every layer compute again what the setting `activation_checkpointing` says.

    Args:
        model: its layers are changed in place.
        what: `none`, `attention` (a layer up to its experts) or `full` (all of a layer).
        dropout: of the adapters.
    """
    if what == "none":
        return
    config = model.config
    # Non-reentrant: the reentrant form runs the first forward without a graph, and the router logits recorded in it
    # would lose their gradient.
    how: dict[str, Any] = {"use_reentrant": False}
    # The generators' states come from the device, for which the host waits: only if something is drawn.
    how["preserve_rng_state"] = bool(dropout or config.attention_dropout or config.router_jitter_noise)
    if what == "full":
        model.activation_checkpointing_enable(how)
        return
    for layer in model.model.layers:
        layer.forward = functools.partial(_forward, layer, how)


def _forward(layer: MixtralDecoderLayer, how: dict[str, Any], x: torch.Tensor, **others: Any) -> torch.Tensor:
    """The layer's forward; everything before the experts is computed again in the backward."""
    if layer.training and torch.is_grad_enabled():
        residual, normed = checkpoint(_up_to_the_experts, layer, x, **others, **how)
    else:
        residual, normed = _up_to_the_experts(layer, x, **others)
    out: torch.Tensor = residual + layer.mlp(normed)
    return out


def _up_to_the_experts(layer: MixtralDecoderLayer, x: torch.Tensor, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream after attention, and its norm, which the router and the experts see."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **others)
    residual = x + attended
    return residual, layer.post_attention_layernorm(residual)
