"""Attention's projections and their adapters, in as few passes as the products allow.

PEFT adds an adapter in passes of its own: scaled, added to the base's product, and in the backward the input gets a
gradient from each adapter and each projection, which autograd sums one by one. Here an adapter is added within its last
product, projections of one input share the product with their first factors, and the input's gradients are summed
within the products. The modules and parameters are PEFT's own, with their names; what is computed is

    y = W x + s · B (A m(x)),   A [r, in], B [out, r]

with dropout m drawn for each projection, by PEFT's module.

Shapes: T tokens, r LoRA rank. Sizes without a letter are those of a projection.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, eager_attention_forward

from data.disk import nf4
from train.model.rotary import rotate

ADAPTER = "default"
"""PEFT's name of the only adapter."""


def replace(model: MixtralForCausalLM) -> None:
    """The attention of every layer becomes one of these; its modules, parameters and all names stay."""
    for layer in model.model.layers:
        layer.self_attn.__class__ = Attention


class Attention(MixtralAttention):
    """transformers' attention, with projections and rotary embedding computed as described above.

    Its own modules are not called: under ZeRO-3 it is one unit, whose weights are gathered together.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[rows, row length, H], and what the attention interface gives of its weights."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (y.view(heads) for y in project(hidden_states, (self.q_proj, self.k_proj, self.v_proj)))
        q, k, v = (tensor.transpose(1, 2) for tensor in (*rotate(q, k, *position_embeddings), v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self.config, "sliding_window", None),
            **others,
        )
        (projected,) = project(out.flatten(-2), (self.o_proj,))
        return projected, weights


class Tensors(NamedTuple):
    """What a projection is computed from, or the gradients of that; None for what there is not."""

    weight: Any
    """[out, in], or uint8 [bytes] if the base is quantised."""
    A: Any = None
    """[r, in]."""
    B: Any = None
    """[out, r]."""
    dropped: Any = None
    """m(x), [T, in], if something is dropped."""


def project(x: torch.Tensor, linears: Sequence[Any]) -> list[torch.Tensor]:
    """[…, in] → […, out] for each of these layers, `nn.Linear` without bias or PEFT's around one."""
    x_TI = x.flatten(0, -2)
    shapes, scales = [], []
    flat: list[Any] = []
    for linear in linears:
        base = getattr(linear, "base_layer", linear)
        shapes.append((base.out_features, base.in_features))
        tensors = Tensors(base.weight)
        if base is not linear:
            dropout = linear.lora_dropout[ADAPTER]
            dropped = dropout(x_TI) if linear.training and isinstance(dropout, nn.Dropout) else None
            tensors = Tensors(base.weight, linear.lora_A[ADAPTER].weight, linear.lora_B[ADAPTER].weight, dropped)
        scales.append(0.0 if base is linear else linear.scaling[ADAPTER])
        flat.extend(tensors)
    return [y.view(*x.shape[:-1], -1) for y in _Projections.apply(shapes, scales, x_TI, *flat)]


class _Lows(NamedTuple):
    """Adapters that share their input, and with it one product."""

    source: torch.Tensor
    """Their input, [T, in]."""
    members: list[int]
    """Their projections."""

    def A(self, tensors: Sequence[Tensors]) -> torch.Tensor:  # noqa: N802
        """Their first factors, one below the other."""
        all_A = [tensors[member].A for member in self.members]
        return all_A[0] if len(all_A) == 1 else torch.cat(all_A)

    def parts(self, tensors: Sequence[Tensors]) -> list[slice]:
        """The part of each in what they share."""
        ends = list(itertools.accumulate(len(tensors[member].A) for member in self.members))
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _groups(x_TI: torch.Tensor, tensors: Sequence[Tensors]) -> list[_Lows]:
    adapted = [number for number, of in enumerate(tensors) if of.A is not None]
    shared = [number for number in adapted if tensors[number].dropped is None]
    alone = [_Lows(tensors[number].dropped, [number]) for number in adapted if number not in shared]
    return ([_Lows(x_TI, shared)] if shared else []) + alone


class _Projections(torch.autograd.Function):
    """All projections of an input. Nothing but inputs and parameters is kept: under ZeRO-3 a copy or a view of a
    parameter would keep the gathered weights alive."""

    @staticmethod
    def forward(
        ctx: Any,
        shapes: list[tuple[int, int]],
        scales: list[float],
        x_TI: torch.Tensor,
        *flat: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        tensors = _from_flat(flat)
        out = [F.linear(x_TI, _matrix(of, shape, x_TI)) for of, shape in zip(tensors, shapes, strict=True)]
        lows = []
        for group in _groups(x_TI, tensors):
            low = group.source @ group.A(tensors).T
            for member, part in zip(group.members, group.parts(tensors), strict=True):
                out[member].addmm_(low[:, part], tensors[member].B.T, alpha=scales[member])
            lows.append(low)
        ctx.save_for_backward(x_TI, *flat, *lows)
        ctx.shapes, ctx.scales = shapes, scales
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, *rest = ctx.saved_tensors
        size = len(ctx.shapes) * len(Tensors._fields)
        tensors, lows = _from_flat(rest[:size]), rest[size:]
        _, _, x_needed, *flat_needed = ctx.needs_input_grad
        needed = _from_flat(flat_needed)
        dx = None
        if x_needed:
            for of, shape, dy in zip(tensors, ctx.shapes, d, strict=True):
                matrix = _matrix(of, shape, dy)
                dx = dy @ matrix if dx is None else dx.addmm_(dy, matrix)
        gradients = [[dy.T @ x_TI if of.weight else None, None, None, None] for of, dy in zip(needed, d, strict=True)]
        for group, low in zip(_groups(x_TI, tensors), lows, strict=True):
            d_low = torch.empty_like(low)
            parts = group.parts(tensors)
            for member, part in zip(group.members, parts, strict=True):
                d_low[:, part].addmm_(d[member], tensors[member].B, beta=0, alpha=ctx.scales[member])
                gradients[member][2] = torch.mm(d[member].T, low[:, part]).mul_(ctx.scales[member])
            of_A = d_low.T @ group.source
            for member, part in zip(group.members, parts, strict=True):
                gradients[member][1] = of_A[part]
            if group.source is x_TI:
                dx = dx if dx is None else dx.addmm_(d_low, group.A(tensors))
            else:
                (member,) = group.members
                gradients[member][3] = d_low @ group.A(tensors) if needed[member].dropped else None
        return None, None, dx, *(gradient for of_one in gradients for gradient in of_one)


def _from_flat(flat: Sequence[Any]) -> list[Tensors]:
    size = len(Tensors._fields)
    return [Tensors(*flat[start : start + size]) for start in range(0, len(flat), size)]


def _matrix(of: Tensors, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """W, dequantised if it has to be."""
    if not nf4.is_quantised(of.weight):
        return of.weight
    return nf4.dequantised(of.weight, torch.Size(shape), like.dtype)
