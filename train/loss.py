"""The loss of a micro-batch: cross-entropy summed over supervised tokens, and the router's load-balancing loss."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from data.schema import IGNORE_INDEX


class MixtralWithLoss(nn.Module):
    """Mixtral from token ids to losses, in one forward.

    One forward, because under ZeRO-3 a parameter is whole only inside the forward of its own module: the loss belongs
    inside the model that the engine calls.
    """

    def __init__(self, causal_lm: MixtralForCausalLM, *, with_router_loss: bool):
        super().__init__()
        self.causal_lm = causal_lm
        self.with_router_loss = with_router_loss

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, is_token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of a micro-batch; the arguments are the fields of `data.dataset.Batch`, [B, T].

        Returns:
            The cross-entropy in nats, summed over the supervised tokens, and the load-balancing loss averaged over the
            tokens (1 at perfect balance times the experts per token), each a float32 scalar; the second is 0 where it
            is left out.
        """
        # No attention mask: transformers reads from the restarting positions where conversations begin.
        outputs = self.causal_lm.model(
            input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=self.with_router_loss
        )
        # The head is the largest product of all, and unsupervised positions do not need it.
        hidden_NH = outputs.last_hidden_state[targets != IGNORE_INDEX]
        logits_NV = self.causal_lm.lm_head(hidden_NH)
        cross_entropy = F.cross_entropy(logits_NV.float(), targets[targets != IGNORE_INDEX], reduction="sum")
        if not self.with_router_loss:
            return cross_entropy, cross_entropy.new_zeros(())
        # A blank micro-batch has no mean; its weight in the step is 0, so any finite number serves.
        mask = is_token if bool(is_token.any()) else None
        config = self.causal_lm.config
        balance = load_balancing_loss_func(
            tuple(outputs.router_logits), config.num_local_experts, config.num_experts_per_tok, mask
        )
        return cross_entropy, balance
