"""What the routers do, as their logits show it: expert load, entropy, load-balancing loss, unused experts.

Shapes: L layers, E experts, T tokens, k experts per token.
"""

from dataclasses import dataclass
from typing import Any

import torch

from data.schema import IGNORE_INDEX
from train.model.attention import beginnings


@dataclass(frozen=True, slots=True)
class Routing:
    """Sums over the tokens of a step; those of several processes or micro-batches can be added."""

    tokens: torch.Tensor
    """Scalar float64: tokens that are not padding."""
    load_LE: torch.Tensor
    """float64: the tokens that chose each expert."""
    probability_LE: torch.Tensor
    """float64: their summed probabilities."""
    entropy_L: torch.Tensor
    """float64: their summed entropies in nats."""
    reaching_LE: torch.Tensor
    """float64: tokens of each expert that the loss depends on. A token whose conversation has nothing supervised after
    it has no gradient, and in the last layer only supervised positions have one."""

    @classmethod
    def of(
        cls,
        router_logits: tuple[torch.Tensor, ...],
        k: int,
        positions_T: torch.Tensor,
        targets_T: torch.Tensor,
        is_token_T: torch.Tensor,
    ) -> "Routing":
        """Of one micro-batch: `router_logits` are [T, E] for each layer."""
        logits_LTE = torch.stack(router_logits).detach().float()
        logp_LTE = logits_LTE.log_softmax(-1)
        p_LTE = logp_LTE.exp()
        chosen_LTE = torch.zeros_like(p_LTE).scatter_(-1, logits_LTE.topk(k, dim=-1).indices, 1.0)
        weight_T = is_token_T.float()
        reaching_T = _reaches_the_loss(positions_T, targets_T).float()
        supervised_T = (targets_T != IGNORE_INDEX).float()
        reaching_LT = torch.stack([reaching_T] * (len(router_logits) - 1) + [supervised_T])
        sums = (
            weight_T.sum(),
            torch.einsum("lte,t->le", chosen_LTE, weight_T),
            torch.einsum("lte,t->le", p_LTE, weight_T),
            -torch.einsum("lte,lte,t->l", p_LTE, logp_LTE, weight_T),
            torch.einsum("lte,lt->le", chosen_LTE, reaching_LT),
        )
        return cls(*(value.double().cpu() for value in sums))

    @classmethod
    def none(cls, shape: torch.Size) -> "Routing":
        """Of no tokens."""
        layers, experts = shape
        return cls.from_list([0.0] * (1 + 3 * layers * experts + layers), shape)

    def __add__(self, other: "Routing") -> "Routing":
        return Routing.from_list(
            [a + b for a, b in zip(self.to_list(), other.to_list(), strict=True)], self.load_LE.shape
        )

    def to_list(self) -> list[float]:
        """All numbers, one after another, for a sum over processes."""
        fields = (self.tokens, self.load_LE, self.probability_LE, self.entropy_L, self.reaching_LE)
        return torch.cat([field.flatten() for field in fields]).tolist()

    @classmethod
    def from_list(cls, numbers: list[float], shape: torch.Size) -> "Routing":
        """The inverse of `to_list`, for L and E in `shape`."""
        layers, experts = shape
        parts = torch.tensor(numbers, dtype=torch.float64).split(
            [1, layers * experts, layers * experts, layers, layers * experts]
        )
        return cls(parts[0][0], parts[1].view(shape), parts[2].view(shape), parts[3], parts[4].view(shape))

    def record(self) -> dict[str, Any]:
        """The fields of metrics.jsonl; lists by layer.

        `expert_load`: each expert's share of the token-expert pairs. `router_entropy`: nats per token, at most ln E.
        `load_balancing_loss_by_layer`: E · Σ_e (share of tokens that chose e) · (mean probability of e), as in the
        Switch Transformer (Fedus et al. 2021, arXiv:2101.03961): k at perfect balance. `unused_experts`: [layer,
        expert].
        """
        tokens = self.tokens.clamp(min=1)
        balance_L = self.load_LE.shape[1] * (self.load_LE / tokens * (self.probability_LE / tokens)).sum(-1)
        share_LE = self.load_LE / self.load_LE.sum(-1, keepdim=True).clamp(min=1)
        return {
            "expert_load": [[round(share, 6) for share in of_layer] for of_layer in share_LE.tolist()],
            "router_entropy": (self.entropy_L / tokens).tolist(),
            "load_balancing_loss_by_layer": balance_L.tolist(),
            "unused_experts": (self.load_LE == 0).nonzero().tolist(),
        }


def _reaches_the_loss(positions_T: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """bool [T]: whether a position at or after this one in its conversation is supervised."""
    conversation_T = beginnings(positions_T).cumsum(0) - 1
    index_T = torch.arange(len(positions_T), device=positions_T.device)
    supervised_T = torch.where(targets_T != IGNORE_INDEX, index_T, -1)
    last = torch.full_like(index_T, -1).scatter_reduce_(0, conversation_T, supervised_T, "amax")
    return index_T <= last[conversation_T]
