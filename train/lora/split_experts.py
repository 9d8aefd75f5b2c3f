"""Expert-aware LoRA: low-rank factors for every expert, computed split, with no work for frozen weights beyond inputs.

For each expert e and each of its two projections W_e, the forward is

    y = W_e x + s_e · B_e (A_e m(x)),   A_e [r_e, in], B_e [out, r_e],   s_e = alpha / r_e, or alpha / √r_e

where m is dropout, drawn for each token-expert pair. The merged weight W + s·BA is never built, forward or backward.
LoRA: Hu et al. 2021, arXiv:2106.09685; alpha / √r: Kalajdzievski 2023, arXiv:2312.03732.

The factors of a block's experts are stored one below the other, A as [Σ r_e, in] and the transposed B as [Σ r_e, out]:
an expert has the rows of its own rank and no more, so a budget of parameters buys what it says.

Shapes: E experts, T tokens, k experts per token, P rows (token-expert pairs sorted by expert), H hidden, I
intermediate, r LoRA rank, R all ranks of a block one after another, Q the largest rank filled up.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from train.config.lora import EXPERT_TARGETS
from train.lora.dispatch import Group, Routed, in_one_product, row_multiple
from train.lora.factors import Adapter

IMPLEMENTATION = "split_lora"
"""The name under which transformers' experts interface knows this forward."""


# Forward and backward


def split_lora_forward(
    experts: MixtralExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of `MixtralExperts` with split adapters; the signature is that of transformers' experts interface.

    Args:
        experts: the module that holds the frozen weights and the factors.
        hidden_states: [T, H].
        top_k_index: [T, k] int64, the experts chosen by the router.
        top_k_weights: [T, k], their weights.

    Returns:
        [T, H], in the dtype of `hidden_states`. Experts without tokens take no part and get zero gradients.
    """
    adapters: dict[str, Adapter] = getattr(experts, "lora", {})
    tensors: list[torch.Tensor | None] = []
    for projection in EXPERT_TARGETS:
        weight = getattr(experts, projection)
        tensors += [weight, None, None, None]
        if adapter := adapters.get(projection):
            tensors[-3:-1] = [getattr(experts, f"{projection}_lora_{letter}") for letter in "AB"]
            if adapter.dropout and experts.training:
                tensors[-1] = draw_keep(top_k_index.numel(), weight.shape[-1], adapter.dropout, weight.device)
    together = in_one_product(hidden_states, (experts.hidden_dim, experts.intermediate_dim))
    routed = Routed.found(top_k_index, experts.num_experts, together, row_multiple(hidden_states))
    return _SplitExperts.apply(hidden_states, top_k_weights, *tensors, routed, adapters)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, split_lora_forward)


def draw_keep(pairs: int, size_in: int, dropout: float, device: torch.device) -> torch.Tensor:
    """The inputs that dropout leaves an adapter: [pairs, in] bool, pairs in the order of tokens and their choices."""
    return torch.empty(pairs, size_in, dtype=torch.bool, device=device).bernoulli_(1 - dropout)


class _Projection:
    """One projection of all experts, forward and backward, group by group."""

    def __init__(self, tensors: Sequence[Any], adapter: "Adapter | None", routed: Routed):
        """`tensors` are W [E, out, in], A [R, in], B [R, out], and what dropout keeps [pairs, in], None for none."""
        self.weight, self.A, self.B, self.keep = tensors
        self.adapter, self.routed = adapter, routed

    def _factors(self, group: Group) -> tuple[Any, torch.Tensor, torch.Tensor] | None:
        """s, A [r, in] and B [r, out] of the group's expert, or s, A [E, Q, in] and B [E, Q, out] of all; None where
        there is no adapter."""
        if self.adapter is None:
            return None
        assert self.A is not None and self.B is not None
        if group.ends_E is None:
            rows = self.adapter.rows[group.expert]
            factors = self.A[rows], self.B[rows]
            return (self.adapter.scales[group.expert], *factors) if len(factors[0]) else None
        A, B = self._filled(self.A), self._filled(self.B)
        # where an expert has no adapter its factors are zeros, whatever they are scaled by
        scales = {scale for scale in self.adapter.scales if scale}
        if len(scales) == 1:
            return scales.pop(), A, B
        expert_P = torch.bucketize(torch.arange(len(self.routed.pair_P), device=A.device), group.ends_E, right=True)
        return _scales(self.adapter.scales, A.device)[expert_P].unsqueeze(-1), A, B

    def _filled(self, factor: torch.Tensor) -> torch.Tensor:
        """[E, Q, …] of [R, …]: each expert's rows, and zeros up to one rank for all, whole 16 bytes of it."""
        assert self.adapter is not None
        whole = 16 // factor.dtype.itemsize
        experts, filled = len(self.adapter.ranks), -(-max(self.adapter.ranks) // whole) * whole
        if len(factor) == experts * filled:
            return factor.view(experts, filled, -1)
        zeros = factor.new_zeros(experts * filled, factor.shape[1])
        places = _places(self.adapter.ranks, filled, factor.device)
        return zeros.index_copy_(0, places, factor).view(experts, filled, -1)

    def unfilled(self, gradient_EQ: torch.Tensor) -> torch.Tensor:
        """The inverse, for a gradient."""
        flat = gradient_EQ.flatten(0, 1)
        assert self.adapter is not None
        if len(flat) == sum(self.adapter.ranks):
            return flat
        return flat.index_select(0, _places(self.adapter.ranks, gradient_EQ.shape[1], flat.device))

    def _dropped(self, group: Group, x: torch.Tensor) -> torch.Tensor:
        """x with dropout's zeros; also what the gradient of such an x goes through."""
        if self.keep is None:
            return x
        assert self.adapter is not None
        return (x * self.keep[self.routed.pair_P[group.rows]]).mul_(1 / (1 - self.adapter.dropout))

    def low_room(self, like: torch.Tensor) -> torch.Tensor | None:
        """Room for s·A m(x) of all rows, at the largest rank."""
        return None if self.adapter is None else self.routed.room(like, max(self.adapter.ranks))

    def forward(
        self, group: Group, x: torch.Tensor, room: torch.Tensor, low_room: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output [rows, out], and s·A m(x) [rows, r], which the backward needs."""
        y = group.times(x, self.weight[group.expert].mT, room)
        factors = self._factors(group)
        if factors is None:
            return y, None
        scale, A, B = factors
        h = group.times(self._dropped(group, x), A.mT, low_room).mul_(scale)  # scaling the [rows, r] middle costs least
        group.add(y, h, B)
        return y, h

    def backward(
        self,
        group: Group,
        dy: torch.Tensor,
        x: torch.Tensor,
        low: torch.Tensor | None,
        into: "_Gradients",
        room: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The gradient of x, [rows, in], where there is room for it; those of what trains go `into` their places.
        `low` is s·A m(x) of all rows."""
        if into.weight is not None:
            into.weight[group.expert] = group.outer(dy, x)
        gradient = None if room is None else group.times(dy, self.weight[group.expert], room)
        factors = self._factors(group)
        if factors is None:
            return gradient
        assert low is not None
        scale, A, B = factors
        h = group.part(low, A.shape[-2])
        dh = group.times(dy, B.mT).mul_(scale)
        into.put(group, self, group.outer(dh, self._dropped(group, x)), group.outer(h, dy))
        if gradient is not None and self.keep is None:
            group.add(gradient, dh, A)
        elif gradient is not None:
            gradient += self._dropped(group, group.times(dh, A))
        return gradient


# Cached, because the way from a Python list to a CUDA device makes the host wait, and both are constants of an adapter.


@functools.cache
def _places(ranks: tuple[int, ...], filled: int, device: torch.device) -> torch.Tensor:
    """[R] int64: where each row of a factor stands once every expert has `filled` rows."""
    places = [expert * filled + row for expert, rank in enumerate(ranks) for row in range(rank)]
    return torch.tensor(places, device=device)


@functools.cache
def _scales(scales: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """[E] float32."""
    return torch.tensor(scales, device=device)


class _Gradients:
    """Places for the gradients of one projection; zeros, because experts without rows write none."""

    def __init__(self, projection: _Projection, needed: tuple[bool, ...]):
        tensors = (projection.weight, projection.A, projection.B)
        self.weight, self.A, self.B = (
            torch.zeros_like(t) if t is not None and need else None for t, need in zip(tensors, needed, strict=True)
        )

    def put(self, group: Group, projection: _Projection, dA: torch.Tensor, dB: torch.Tensor) -> None:
        """The factors' gradients: of one expert, or [E, Q, …] of all."""
        assert self.A is not None and self.B is not None and projection.adapter is not None
        if group.ends_E is None:
            rows = projection.adapter.rows[group.expert]
            self.A[rows], self.B[rows] = dA, dB
        else:
            self.A.copy_(projection.unfilled(dA))
            self.B.copy_(projection.unfilled(dB))


class _SplitExperts(torch.autograd.Function):
    """The experts of one block. Its own backward, so that frozen weights cost their input gradient and nothing else,
    and so that what is kept for it holds no view of a weight: under ZeRO-3 a view would keep the gathered block
    alive. All tensors that the backward uses are saved ones, of shapes that don't follow the routing: where activations
    are computed again, all of them are those of the second forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_Tk: torch.Tensor,
        *rest: Any,
    ) -> torch.Tensor:
        *tensors, routed, adapters = rest
        gate_up, down = _projections(tensors, routed, adapters)
        gate_up_P2I = routed.room(x_TH, gate_up.weight.shape[1])
        y_PH = routed.room(x_TH, x_TH.shape[1])
        lows = gate_up.low_room(x_TH), down.low_room(x_TH)
        for group in routed.groups():
            x = x_TH.index_select(0, routed.token_P[group.rows])
            both, low_gate_up = gate_up.forward(group, x, gate_up_P2I, lows[0])
            gate, up = both.chunk(2, dim=-1)
            y, low_down = down.forward(group, F.silu(gate).mul_(up), y_PH, lows[1])
            if routed.in_one_product:
                gate_up_P2I, y_PH, lows = both, y, (low_gate_up, low_down)
        ctx.save_for_backward(x_TH, weights_Tk, gate_up_P2I, y_PH, *tensors, *lows, *routed.tensors)
        ctx.in_one_product, ctx.adapters = routed.in_one_product, adapters
        weights = weights_Tk.unsqueeze(-1).unbind(1)
        weighted = (y_TH * weight for y_TH, weight in zip(routed.choices(y_PH), weights, strict=True))
        return functools.reduce(torch.add, weighted).to(x_TH.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, weights_Tk, gate_up_P2I, y_PH, *rest = ctx.saved_tensors
        tensors, (low_gate_up, low_down) = rest[:8], rest[8:10]
        routed = Routed.of(rest[10:], ctx.in_one_product)
        gate_up, down = _projections(tensors, routed, ctx.adapters)
        needs = ctx.needs_input_grad
        for_gate_up, for_down = _Gradients(gate_up, needs[2:5]), _Gradients(down, needs[6:9])

        wide = torch.promote_types(x_TH.dtype, torch.float32)
        d_wide_TH = d_TH.to(wide)
        d_weights_Tk = torch.stack([(d_wide_TH * y_TH).sum(dim=-1) for y_TH in routed.choices(y_PH)], dim=1)
        weight_P = weights_Tk.new_zeros(len(routed.pair_P))
        weight_P[routed.row_of_Tk] = weights_Tk
        d_PH = (d_TH.index_select(0, routed.token_P) * weight_P.unsqueeze(-1)).to(x_TH.dtype)
        dx_PH: Any = routed.room(x_TH, x_TH.shape[1]) if needs[0] else None
        d_PI = routed.room(x_TH, down.weight.shape[2])
        for group in routed.groups():
            both = gate_up_P2I[group.rows]
            gate, up = both.chunk(2, dim=-1)
            activated = F.silu(gate)
            d = down.backward(group, d_PH[group.rows], activated * up, low_down, for_down, d_PI)
            assert d is not None
            d_both = torch.empty_like(both)
            d_gate, d_up = d_both.chunk(2, dim=-1)
            torch.mul(d, activated, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d.mul_(up), gate, grad_input=d_gate)
            x = x_TH.index_select(0, routed.token_P[group.rows])
            dx = gate_up.backward(group, d_both, x, low_gate_up, for_gate_up, dx_PH)
            if routed.in_one_product:
                dx_PH = dx
        dx_TH: Any = None
        if needs[0]:
            dx_TH = functools.reduce(torch.add, (dx.to(wide) for dx in routed.choices(dx_PH))).to(x_TH.dtype)
        places = [for_gate_up.weight, for_gate_up.A, for_gate_up.B, None, for_down.weight, for_down.A, for_down.B, None]
        return dx_TH, d_weights_Tk.to(weights_Tk.dtype), *places, None, None


def _projections(tensors: Any, routed: Routed, adapters: dict[str, "Adapter"]) -> tuple[_Projection, _Projection]:
    """Gate-and-up, and down, of the tensors in their order as arguments: weight, A, B, keep of each."""
    gate_up, down = (adapters.get(projection) for projection in EXPERT_TARGETS)
    return _Projection(tensors[:4], gate_up, routed), _Projection(tensors[4:], down, routed)
