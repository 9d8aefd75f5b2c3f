"""The losses of a micro-batch: cross-entropy summed over supervised tokens, and the routers' load-balancing loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from data.schema import IGNORE_INDEX
from train.model import attention
from train.model.attention import Conversations
from train.model.head import CrossEntropyHead
from train.model.routing import Routing


@dataclass(frozen=True, slots=True)
class Extents:
    """What is where in a micro-batch. Found in tensors on the host, so that no GPU has to be waited for."""

    conversations: Conversations
    supervised_N: torch.Tensor
    """int64: the positions that are trained, among all of the micro-batch."""
    has_tokens: bool
    """Whether there is anything but padding."""

    @classmethod
    def of(
        cls,
        positions: torch.Tensor,
        targets: torch.Tensor,
        is_token: torch.Tensor,
        device: torch.device | None = None,
    ) -> "Extents":
        """From the fields of a batch, for a forward on that device."""
        supervised_N = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        return cls(
            Conversations(positions.flatten(), device),
            supervised_N.to(device or targets.device, non_blocking=True),
            bool(is_token.any()),
        )


class MixtralWithLoss(nn.Module):
    """Mixtral from token ids to losses, in one forward.

    Under ZeRO-3 a parameter is whole only inside the forward of its own module, so the losses belong inside the model
    that the engine calls.
    """

    def __init__(self, causal_lm: MixtralForCausalLM, *, with_router_loss: bool):
        super().__init__()
        self.causal_lm = causal_lm
        self.head = CrossEntropyHead(causal_lm.lm_head)
        self.with_router_loss = with_router_loss
        self.differentiates_input = False
        """Whether the embedding's output gets a gradient, although nothing below it trains.

        ZeRO-3 releases a module's weights once the gradient of its input is there. If no input needs one, as in blocks
        before the first adapter on attention, it would release them before their backward (DeepSpeed issue 5524)."""
        self.watches_routing = False
        """Whether forwards add to `routing`."""
        self.routing: Routing | None = None
        """What the routers did since this was last reset."""

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        is_token: torch.Tensor,
        extents: Extents | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of a micro-batch; the arguments are the fields of `data.prepared.dataset.Batch`, [B, T].

        `extents` are found in them if they are not given.

        Returns:
            The cross-entropy in nats, summed over the supervised tokens, and the load-balancing loss averaged over the
            tokens (1 at perfect balance times the experts per token), each a float32 scalar; the second is 0 if it is
            left out, and in evaluation.
        """
        # There is no attention mask: attention sees from the restarting positions where conversations begin. So several
        # rows can be one long row, as transformers' flash attention wants them; its other implementations make a mask
        # for each row.
        extents = extents or Extents.of(positions, targets, is_token)
        more: dict[str, Any] = {}
        row_ids, row_positions = ids, positions
        if self.causal_lm.config._attn_implementation in (attention.IMPLEMENTATION, "flash_attention_2"):
            row_ids, row_positions = ids.view(1, -1), positions.view(1, -1)
        if self.causal_lm.config._attn_implementation == attention.IMPLEMENTATION:
            more["conversations"] = extents.conversations
        embedded = self.causal_lm.model.embed_tokens(row_ids)
        if self.differentiates_input and torch.is_grad_enabled():
            # Marked after the embedding: marked earlier, its weights would be gathered once more in the backward.
            embedded.requires_grad_()
        with_router_loss = self.with_router_loss and self.training
        with_routers = with_router_loss or self.watches_routing
        outputs = self.causal_lm.model(
            inputs_embeds=embedded,
            position_ids=row_positions,
            use_cache=False,
            output_router_logits=with_routers,
            **more,
        )
        # The head is the largest product of all, and unsupervised positions don't need it.
        supervised_N = extents.supervised_N
        cross_entropy = self.head(
            outputs.last_hidden_state.flatten(0, 1)[supervised_N], targets.flatten()[supervised_N]
        )
        config = self.causal_lm.config
        if self.watches_routing:
            flat = (tensor.flatten() for tensor in (positions, targets, is_token))
            routing = Routing.of(tuple(outputs.router_logits), config.num_experts_per_tok, *flat)
            self.routing = routing if self.routing is None else self.routing + routing
        if not with_router_loss:
            return cross_entropy, cross_entropy.new_zeros(())
        # A blank micro-batch has no mean; its weight in the step is 0, so any finite number serves.
        mask = is_token if extents.has_tokens else None
        balance = load_balancing_loss_func(
            tuple(outputs.router_logits), config.num_local_experts, config.num_experts_per_tok, mask
        )
        return cross_entropy, balance
