"""Mixtral with a module for each expert, as transformers 4 held it: what adapters of that time name.

There, a layer's block of experts is `block_sparse_moe`, and w1, w2, w3 of each expert and the router's `gate` are
linear layers. The numbers are those of the model that transformers holds today: its weights are taken, not copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import MixtralForCausalLM
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralSparseMoeBlock

BLOCK = "block_sparse_moe"
"""What a layer calls its block of experts."""


def unfuse(model: MixtralForCausalLM) -> None:
    """Gives each layer a block of separate experts in place of its own, which holds views of the same weights."""
    for layer in model.model.layers:
        layer.block_sparse_moe = Block(layer.mlp, model.config.hidden_act)
        del layer.mlp
        layer.__class__ = Layer


@contextmanager
def by_its_names(model: MixtralForCausalLM) -> Iterator[None]:
    """Within it, PEFT takes the names of an adapter as they are; for a Mixtral it would translate them to fused
    experts', which have one rank and one scale."""
    kind, model.config.model_type = model.config.model_type, "unfused_mixtral"
    try:
        yield
    finally:
        model.config.model_type = kind


class Layer(MixtralDecoderLayer):
    """A layer whose block goes by its old name."""

    @property
    def mlp(self) -> nn.Module:
        """What the layer's forward calls; PEFT may have wrapped it."""
        return self.get_submodule(BLOCK)


class Block(nn.Module):
    """Router and experts of a layer."""

    def __init__(self, fused: MixtralSparseMoeBlock, activation: str):
        """Takes the weights of `fused`."""
        super().__init__()
        self.chosen = fused.top_k
        self.gate = _linear(fused.gate.weight)
        weights = zip(fused.experts.gate_up_proj, fused.experts.down_proj, strict=True)
        self.experts = nn.ModuleList(Expert(gate_up, down, activation) for gate_up, down in weights)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[…, H] → […, H]: the chosen experts' outputs, weighted by the router."""
        flat_TH = hidden.flatten(0, -2)
        weights_TK, experts_TK = self.gate(flat_TH).float().softmax(-1).topk(self.chosen)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        out_TH = torch.zeros_like(flat_TH)
        for number in experts_TK.unique().tolist():
            tokens, choices = (experts_TK == number).nonzero(as_tuple=True)
            weighted = self.experts[number](flat_TH[tokens]) * weights_TK[tokens, choices, None]
            out_TH.index_add_(0, tokens, weighted.to(out_TH.dtype))
        return out_TH.view_as(hidden)


class Expert(nn.Module):
    """One expert."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, activation: str):
        """Takes w1 above w3 [2I, H], and w2 [H, I]."""
        super().__init__()
        self.w1, self.w3 = map(_linear, gate_up.chunk(2))
        self.w2 = _linear(down)
        self.activation = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, H]."""
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer
