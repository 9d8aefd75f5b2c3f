"""Attention over packed rows: each conversation sees itself alone, and what no query can see is not computed.

transformers knows it as `packed`, through its attention interface. On CUDA in half precision it is torch's own
variable-length flash attention. Elsewhere queries are taken in blocks, each with the keys from the start of its first
conversation on. There is no [T, T] mask anywhere, and memory grows linearly with T: the mask and the probabilities of a
block exist only while it is computed, and the backward computes them again.

    keys       | a a a a a a b b b b c c |
    queries 0-3| # # # #                 |
    queries 4-7| # # # # # # # #         |    the block's own small mask keeps b from a
    queries 8-…|             # # # # # # |

On the CPU that is faster than torch's scaled_dot_product_attention, with a [T, T] mask or called once for each
conversation.

Shapes: T tokens, N heads, K key-value heads, G = N / K queries to a key, D width of a head, Q and S the queries and
keys of a block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "packed"
"""The name under which transformers' attention interface knows this; it makes no mask for a name that it doesn't
know."""

QUERIES = 128
"""Queries of a block: with fewer, less is computed that is masked; with more, products are larger."""
KEYS = 64
"""Tuning for the CPU: blocks' keys start at multiples of this, so that shapes repeat and oneDNN finds the code that it
generated for them."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some queries of a row, and the keys that contain all they may see."""

    queries: slice
    keys: slice
    begin_Q: torch.Tensor
    """int32: the first token of each query's conversation."""

    def bias(self) -> torch.Tensor:
        """[Q, S] float32: -inf if the key is of another conversation or later than the query, else 0."""
        position_S = torch.arange(self.keys.start, self.keys.stop, dtype=torch.int32, device=self.begin_Q.device)
        position_Q = position_S[self.queries.start - self.keys.start :]
        hidden_QS = (position_S < self.begin_Q[:, None]) | (position_S > position_Q[:, None])
        return torch.where(hidden_QS, -torch.inf, 0.0)


def beginnings(positions_T: torch.Tensor) -> torch.Tensor:
    """bool [T]: whether a conversation begins there. Positions count up by one within each and start again with the
    next."""
    begins_T = torch.ones_like(positions_T, dtype=torch.bool)
    begins_T[1:] = positions_T[1:] != positions_T[:-1] + 1
    return begins_T


class Conversations:
    """The bounds of a micro-batch's conversations: found once, used by every layer."""

    def __init__(self, positions_T: torch.Tensor, device: torch.device | None = None):
        """Finds them in positions, as `beginnings` does, for attention on that device.

        Positions on the CPU are found without asking a GPU, for whose answer the host would wait.
        """
        self._tokens = len(positions_T)
        starts = beginnings(positions_T).nonzero().flatten()
        bounds = torch.nn.functional.pad(starts, (0, 1), value=self._tokens).to(torch.int32)
        self.longest = int(bounds.diff().max())
        self.bounds = bounds.to(device or positions_T.device, non_blocking=True)
        """[conversations + 1]: the first token of each, and the number of tokens."""
        self._blocks: list[Block] | None = None

    def blocks(self) -> list[Block]:
        """The blocks of the row."""
        if self._blocks is None:
            begin_T = self.bounds[:-1].repeat_interleave(self.bounds.diff(), output_size=self._tokens)
            starts = begin_T[::QUERIES].tolist()
            self._blocks = []
            for number, start in enumerate(starts):
                queries = slice(number * QUERIES, min((number + 1) * QUERIES, self._tokens))
                keys = slice(start // KEYS * KEYS, queries.stop)
                self._blocks.append(Block(queries, keys, begin_T[queries]))
        return self._blocks


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    conversations: Conversations | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The signature is that of transformers' attention interface.

    Args:
        module: the attention layer; unused, as are others.
        query: [rows, N, row length, D]; rows are taken as one of T tokens.
        key: [rows, K, row length, D].
        value: [rows, K, row length, D].
        attention_mask: None; the conversations say what may be seen.
        scaling: of the scores.
        dropout: 0; Mixtral has none.
        position_ids: [rows or 1, row length]; needed if the conversations are not given.
        conversations: the bounds of all rows' conversations.

    Returns:
        [rows, row length, N, D], and no weights.

    Raises:
        ValueError: there is a mask, dropout, or a cache of keys.
    """
    rows, _, length, _ = query.shape
    if key.shape[2] != length or attention_mask is not None or dropout:
        raise ValueError("attention 'packed' knows no mask, no dropout and no cache of keys; use sdpa for those")
    if conversations is None:
        assert position_ids is not None
        conversations = Conversations(position_ids.expand(rows, length).flatten())
    q_NTD, k_KTD, v_KTD = (t.transpose(0, 1).flatten(1, 2) for t in (query, key, value))
    out_TND = _attend(q_NTD, k_KTD, v_KTD, conversations, scaling)
    return out_TND.view(rows, length, *out_TND.shape[1:]), None


def _attend(
    q_NTD: torch.Tensor, k_KTD: torch.Tensor, v_KTD: torch.Tensor, conversations: Conversations, scaling: float
) -> torch.Tensor:
    if not _in_flash_attention(q_NTD):
        out_TND: Any = _Blockwise.apply(q_NTD, k_KTD, v_KTD, conversations.blocks(), scaling)
        return out_TND
    q_TND, k_TKD, v_TKD = (tensor.transpose(0, 1).contiguous() for tensor in (q_NTD, k_KTD, v_KTD))
    bounds, longest = conversations.bounds, conversations.longest
    causal: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": True, "scale": scaling}
    out_TND = varlen_attn(q_TND, k_TKD, v_TKD, bounds, bounds, longest, longest, **causal)
    return out_TND


def _in_flash_attention(q_NTD: torch.Tensor) -> bool:
    """It needs half precision, Ampere or later, and widths that its kernels are made for."""
    width, device = q_NTD.shape[-1], q_NTD.device
    if device.type != "cuda" or q_NTD.dtype.itemsize != 2 or width % 8 or width > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, packed_attention)


class _Blockwise(torch.autograd.Function):
    """softmax(scaling · q kᵀ) v, block by block."""

    @staticmethod
    def forward(
        ctx: Any, q_NTD: torch.Tensor, k_KTD: torch.Tensor, v_KTD: torch.Tensor, blocks: list[Block], scaling: float
    ) -> torch.Tensor:
        (heads, tokens, width), key_heads = q_NTD.shape, len(k_KTD)
        q_KGTD = q_NTD.view(key_heads, heads // key_heads, tokens, width)
        k_KTD, v_KTD = k_KTD.contiguous(), v_KTD.contiguous()
        out_TND = q_NTD.new_empty(tokens, heads, width)
        for block in blocks:
            p_KGQS = _probabilities(q_KGTD[:, :, block.queries], k_KTD[:, block.keys], block, scaling)
            out = torch.bmm(p_KGQS.flatten(1, 2), v_KTD[:, block.keys])  # the queries of a key's group as one matrix
            out_TND[block.queries] = out.view(heads, -1, width).transpose(0, 1)
        ctx.save_for_backward(q_KGTD, k_KTD, v_KTD)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out_TND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_TND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_KGTD, k_KTD, v_KTD = ctx.saved_tensors
        d_KGTD = d_TND.transpose(0, 1).view(q_KGTD.shape)
        dq_KGTD = torch.empty_like(q_KGTD)
        # Keys get their gradient from several blocks: sums in the precision of sums.
        dk_KTD, dv_KTD = (torch.zeros(k_KTD.shape, dtype=_wide(k_KTD), device=k_KTD.device) for _ in range(2))
        for block in ctx.blocks:
            q, k, v = q_KGTD[:, :, block.queries], k_KTD[:, block.keys], v_KTD[:, block.keys]
            d = d_KGTD[:, :, block.queries].flatten(1, 2)
            p_KGQS = _probabilities(q, k, block, ctx.scaling)
            p = p_KGQS.flatten(1, 2)
            dv_KTD[:, block.keys] += torch.bmm(p.transpose(1, 2), d)
            ds = torch._softmax_backward_data(torch.bmm(d, v.transpose(1, 2)), p, -1, p.dtype).mul_(ctx.scaling)
            dq_KGTD[:, :, block.queries] = torch.bmm(ds, k).view(q.shape)
            dk_KTD[:, block.keys] += torch.bmm(ds.transpose(1, 2), q.flatten(1, 2))
        return dq_KGTD.flatten(0, 1), dk_KTD.to(k_KTD.dtype), dv_KTD.to(v_KTD.dtype), None, None


def _probabilities(q_KGQD: torch.Tensor, k_KSD: torch.Tensor, block: Block, scaling: float) -> torch.Tensor:
    """[K, G, Q, S] in the dtype of the queries; scores and softmax are wider."""
    wide = _wide(q_KGQD)
    key_heads, group, queries, _ = q_KGQD.shape
    bias = block.bias().to(wide).expand(key_heads, group, queries, -1).flatten(1, 2)
    scores = torch.baddbmm(bias, q_KGQD.flatten(1, 2).to(wide), k_KSD.mT.to(wide), alpha=scaling)
    return scores.softmax(-1).to(q_KGQD.dtype).view(key_heads, group, queries, -1)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
