"""How many floating-point operations a step must do: its arithmetic, whatever computes it and however often."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

EMBEDDING = "embed_tokens"
FIRST_INPUTS = re.compile(r"\.layers\.0\.self_attn\.[qkv]_proj\.lora_A\.")
"""Factors whose input is the embedding, which needs no gradient if it is frozen."""


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations; a product of a [m, k] and a [k, n] matrix has 2·m·k·n.

    Counted: attention's projections, scores and sums over the past of each token in its own conversation, the router,
    the chosen experts, the head on supervised tokens. Not counted: padding, norms, rotary embedding, softmax, the
    optimizer, and what activation checkpointing computes again.
    """

    per_token: float
    per_pair: float
    """Operations of a token and one that it attends to: those before it in its conversation, and itself."""
    per_supervised_token: float

    def flops(self, tokens: float, pairs: float, supervised_tokens: float) -> float:
        """Those of that many tokens."""
        return self.per_token * tokens + self.per_pair * pairs + self.per_supervised_token * supervised_tokens


def of_frozen(sizes: Mapping[str, Any]) -> Work:
    """Forward, and backward for inputs, of a base of which nothing trains, with the sizes of its config.json.

    The input gradient of the first layer's projections, which nobody needs, is not counted.
    """
    hidden, layers, heads = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"]
    width = sizes.get("head_dim") or hidden // heads
    in_attention = 2 * hidden * width * (heads + 2 * sizes["num_key_value_heads"])
    out_attention = 2 * hidden * width * heads
    experts = sizes["num_experts_per_tok"] * 3 * 2 * hidden * sizes["intermediate_size"]
    router = 2 * hidden * sizes["num_local_experts"]
    return Work(
        per_token=layers * 2 * (in_attention + out_attention + experts + router) - in_attention,
        per_pair=layers * 3 * 2 * 2 * width * heads,  # q·k, and the sum of v; the backward has four such products
        per_supervised_token=2 * 2 * hidden * sizes["vocab_size"],
    )


def of_training(sizes: Mapping[str, Any], trained: Mapping[str, tuple[int, ...]]) -> Work:
    """`of_frozen`, with what trains: adapters, forward and backward, and the gradients of trained weights.

    All experts count as chosen equally often, which matters if their ranks differ. The backward is counted down to the
    first layer, even if nothing in the first layers trains.

    Args:
        sizes: those of config.json.
        trained: the whole shape of each trained parameter, by its name.
    """
    base = of_frozen(sizes)
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    per_token, per_supervised = base.per_token, base.per_supervised_token
    input_trains = any(EMBEDDING in name for name in trained)
    if input_trains:
        width = sizes.get("head_dim") or hidden // heads
        per_token += 2 * hidden * width * (heads + 2 * sizes["num_key_value_heads"])
    for name, shape in trained.items():
        if len(shape) == 1 or EMBEDDING in name:  # a norm; and an embedding is looked up
            continue
        products = 1  # for the gradient of a weight, whose other two are the base's
        if "lora_" in name:
            products = 2 if FIRST_INPUTS.search(name) and not input_trains else 3
        share = sizes["num_experts_per_tok"] / sizes["num_local_experts"] if ".experts." in name else 1
        flops = 2 * products * share * prod(shape)
        if "lm_head" in name:
            per_supervised += flops
        else:
            per_token += flops
    return Work(per_token, base.per_pair, per_supervised)
