"""A decoder layer in its two halves, and which activations are computed again in the backward instead of being kept.

The halves differ: attention costs a tenth of the products, the experts nine tenths, and most of what is kept is theirs.
If only attention is computed again, the routers choose once.
"""

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
    config = model.config
    # Non-reentrant: the reentrant form runs the first forward without a graph, and the router logits recorded in it
    # would lose their gradient.
    how: dict[str, Any] = {"use_reentrant": False}
    # The generators' states come from the device, for which the host waits: only if something is drawn.
    how["preserve_rng_state"] = bool(dropout or config.attention_dropout or config.router_jitter_noise)
    for layer in model.model.layers:
        layer.__class__ = Layer
        layer.recomputes_attention = how if what == "attention" else None
    if what == "full":
        model.activation_checkpointing_enable(how)


class Layer(MixtralDecoderLayer):
    """transformers' layer, of which the first half may be computed again alone."""

    recomputes_attention: dict[str, Any] | None
    """How, as `torch.utils.checkpoint` is told; None if it is kept."""

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        """[rows, row length, H]."""
        if self.recomputes_attention and self.training and torch.is_grad_enabled():
            residual, normed = checkpoint(self._up_to_the_experts, hidden_states, **others, **self.recomputes_attention)
        else:
            residual, normed = self._up_to_the_experts(hidden_states, **others)
        out: torch.Tensor = residual + self.mlp(normed)
        return out

    def _up_to_the_experts(self, x: torch.Tensor, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after attention, and its norm, which the router and the experts see."""
        # not by name: ZeRO-3 sees only tensors without one, and releases weights when their gradient is there
        attended, _ = self.self_attn(self.input_layernorm(x), **others)
        residual = x + attended
        return residual, self.post_attention_layernorm(residual)
