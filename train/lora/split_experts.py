"""Expert-aware LoRA: low-rank factors for every expert, computed split, with no work for frozen weights beyond inputs.

For each expert e and each of its two projections W_e, the forward is

    y = W_e x + s_e · B_e (A_e m(x)),   A_e [r_e, in], B_e [out, r_e],   s_e = alpha / r_e, or alpha / √r_e

where m is dropout, drawn for each token-expert pair. The merged weight W + s·BA is never built, forward or backward.
LoRA: Hu et al. 2021, arXiv:2106.09685; alpha / √r: Kalajdzievski 2023, arXiv:2312.03732.

The factors of a block's experts are stored one below the other, A as [Σ r_e, in] and the transposed B as [Σ r_e, out]:
an expert has the rows of its own rank and no more, so a budget of parameters buys what it says.

Shapes: E experts, T tokens, k experts per token, P rows (token-expert pairs sorted by expert, and filling), H hidden, I
intermediate, r LoRA rank, R all ranks of a block one after another. Sizes without a letter are those of a group.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from train.config.lora import EXPERT_TARGETS
from train.lora import elementwise, products
from train.lora.dispatch import Routed
from train.lora.factors import Adapter
from train.lora.products import Buffer, Group
from train.lora.quantised import matrices

IMPLEMENTATION = "split_lora"
"""The name under which transformers' experts interface knows this forward."""


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
    tensors = [_tensors(experts, name, adapters.get(name), top_k_index.numel()) for name in EXPERT_TARGETS]
    way = products.way(hidden_states, (experts.hidden_dim, experts.intermediate_dim))
    routed = Routed.from_choices(top_k_index, experts.num_experts, way.row_multiple(hidden_states))
    return _SplitExperts.apply(adapters, _shapes(experts), way, routed, hidden_states, top_k_weights, *_flat(tensors))


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, split_lora_forward)


class Tensors(NamedTuple):
    """What the products of one projection of all experts are made of, or the gradients of that; None for what there is
    not."""

    weight: Any
    """[E, out, in], or uint8 [E, bytes] if the base is quantised."""
    A: Any
    """[R, in]."""
    B: Any
    """[R, out]."""
    keep: Any
    """[pairs, in] bool: the inputs that dropout leaves the adapter."""


def _flat(tensors: Sequence[Tensors]) -> tuple[torch.Tensor | None, ...]:
    """One tensor after another, as autograd wants its arguments."""
    return tuple(itertools.chain.from_iterable(tensors))


def _from_flat(flat: Sequence[Any]) -> list[Tensors]:
    """The inverse of `_flat`, for anything in the order of its result."""
    size = len(Tensors._fields)
    return [Tensors(*flat[start : start + size]) for start in range(0, len(flat), size)]


def _shapes(experts: MixtralExperts) -> dict[str, torch.Size]:
    """[out, in] of each projection, which the shape of a quantised weight doesn't show."""
    hidden, intermediate = experts.hidden_dim, experts.intermediate_dim
    sizes = ((2 * intermediate, hidden), (hidden, intermediate))
    return dict(zip(EXPERT_TARGETS, map(torch.Size, sizes), strict=True))


def _tensors(experts: MixtralExperts, name: str, adapter: Adapter | None, pairs: int) -> Tensors:
    """Those of the projection of that name; draws dropout."""
    weight = getattr(experts, name)
    if adapter is None:
        return Tensors(weight, None, None, None)
    keep = None
    if adapter.dropout and experts.training:
        keep = draw_keep(pairs, _shapes(experts)[name][1], adapter.dropout, weight.device)
    return Tensors(weight, getattr(experts, f"{name}_lora_A"), getattr(experts, f"{name}_lora_B"), keep)


def draw_keep(pairs: int, size_in: int, dropout: float, device: torch.device) -> torch.Tensor:
    """The inputs that dropout leaves an adapter: [pairs, in] bool, pairs in the order of tokens and their choices."""
    return torch.empty(pairs, size_in, dtype=torch.bool, device=device).bernoulli_(1 - dropout)


class Results(NamedTuple):
    """What the forward of one projection computes for all rows."""

    y: Buffer
    """[P, out]."""
    low: Buffer | None
    """s·A m(x), as wide as the largest rank; None without an adapter."""

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tensors, once they are computed."""
        return self.y.tensor, None if self.low is None else self.low.tensor


class _Projection:
    """One projection of all experts, forward and backward, group by group."""

    def __init__(self, tensors: Tensors, adapter: Adapter | None, shape: torch.Size, routed: Routed):
        self.weight, self.A, self.B, self.keep = tensors
        self.adapter, self.shape, self.routed = adapter, shape, routed

    def results(self, way: type[Group], like: torch.Tensor) -> Results:
        """Buffers for those of all groups."""
        low = None if self.adapter is None else way.buffer(self.routed, like, max(self.adapter.ranks))
        return Results(way.buffer(self.routed, like, self.shape[0]), low)

    def forward(self, group: Group, x: torch.Tensor, results: Results) -> torch.Tensor:
        """The output, [rows, out], which then is among the results as well."""
        y = group.times(x, self._matrices(group, x.dtype).mT, results.y)
        if (adapter := self._adapter_of(group)) is not None:
            A, B = self._factors(group)
            assert results.low is not None
            low = group.scale(adapter, group.times(self._dropped(group, x), A.mT, results.low))
            torch.addmm(y, low, B, out=y)  # in one pass over y
        return y

    def gradients(self, needed: Tensors) -> Tensors:
        """For what `needed` says, [E, …] and [R, …]; zeros, because experts without rows write none."""
        return Tensors(
            torch.zeros_like(self.weight) if needed.weight else None,
            torch.zeros_like(self.A) if needed.A else None,
            torch.zeros_like(self.B) if needed.B else None,
            None,
        )

    def backward_of_input(
        self, group: Group, dy: torch.Tensor, dx: Buffer | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """From the gradient of the outputs, [rows, out].

        Returns:
            The gradient of the inputs, [rows, in], which then is in `dx` as well, or None without `dx`; and that of
            A m(x), [rows, r], for `backward_of_weights`, or None without an adapter.
        """
        gradient = None if dx is None else group.times(dy, self._matrices(group, dy.dtype), dx)
        if (adapter := self._adapter_of(group)) is None:
            return gradient, None
        A, B = self._factors(group)
        d_low = group.scale(adapter, dy @ B.mT)
        if gradient is not None and self.keep is None:
            torch.addmm(gradient, d_low, A, out=gradient)
        elif gradient is not None:
            gradient += self._dropped(group, d_low @ A)
        return gradient, d_low

    def backward_of_weights(
        self,
        group: Group,
        dy: torch.Tensor,
        x: torch.Tensor,
        low: torch.Tensor | None,
        d_low: torch.Tensor | None,
        gradients: Tensors,
    ) -> None:
        """Writes the group's part of the gradients of weights and factors.

        Args:
            group: the rows.
            dy: [rows, out], the gradient of their outputs.
            x: [rows, in], their inputs.
            low: s·A m(x) of all rows.
            d_low: the gradient of A m(x), of `backward_of_input`.
            gradients: what is written to.
        """
        if gradients.weight is not None:
            gradients.weight[group.experts] = group.outer(dy, x)
        if (adapter := self._adapter_of(group)) is not None:
            rows = group.rows_of_factors(adapter)
            assert low is not None
            assert d_low is not None
            torch.mm(d_low.mT, self._dropped(group, x), out=gradients.A[rows])
            torch.mm(group.part(low, d_low.shape[1]).mT, dy, out=gradients.B[rows])

    def _matrices(self, group: Group, dtype: torch.dtype) -> torch.Tensor:
        """W of the group's experts: [out, in], or [E, out, in]."""
        return matrices(self.weight, group.experts, self.shape, dtype)

    def _adapter_of(self, group: Group) -> Adapter | None:
        """The adapter, if the group's experts have one."""
        if self.adapter is None:
            return None
        rows = group.rows_of_factors(self.adapter)
        return self.adapter if rows.stop > rows.start else None

    def _factors(self, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, the rows that the group is multiplied with."""
        assert self.adapter is not None
        rows = group.rows_of_factors(self.adapter)
        return self.A[rows], self.B[rows]

    def _dropped(self, group: Group, x: torch.Tensor) -> torch.Tensor:
        """m(x); also what a gradient of m(x) goes through."""
        if self.keep is None:
            return x
        assert self.adapter is not None
        return (x * self.keep[self.routed.pair_P[group.rows]]).mul_(1 / (1 - self.adapter.dropout))


class _SplitExperts(torch.autograd.Function):
    """The experts of one block.

    It has its own backward, so that frozen weights cost their input gradient and nothing else, and so that what is kept
    for it holds no view of a weight: under ZeRO-3 a view would keep the gathered block alive. All tensors that the
    backward uses are saved ones, and their shapes don't follow the routing: when activations are computed again, all of
    them are those of the second forward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        adapters: dict[str, Adapter],
        shapes: dict[str, torch.Size],
        way: type[Group],
        routed: Routed,
        x_TH: torch.Tensor,
        weights_Tk: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        gate_up, down = _projections(tensors, adapters, shapes, routed)
        for_gate_up, for_down = gate_up.results(way, x_TH), down.results(way, x_TH)
        for group in way.of(routed):
            x = x_TH.index_select(0, routed.token_P[group.rows])
            down.forward(group, elementwise.swiglu(gate_up.forward(group, x, for_gate_up)), for_down)
        y_PH = for_down.y.tensor
        ctx.save_for_backward(x_TH, weights_Tk, *for_gate_up.tensors, *for_down.tensors, *routed.tensors, *tensors)
        ctx.adapters, ctx.shapes, ctx.way = adapters, shapes, way
        out_TH: torch.Tensor = elementwise.weighted_sum(y_PH, routed.row_of_Tk, weights_Tk)
        return out_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, weights_Tk, gate_up_P2I, low_gate_up, y_PH, low_down, *rest = ctx.saved_tensors
        way: type[Group] = ctx.way
        routed, tensors = Routed.from_tensors(*rest[:3]), rest[3:]
        gate_up, down = _projections(tensors, ctx.adapters, ctx.shapes, routed)
        _, _, _, _, x_needed, _, *needed = ctx.needs_input_grad
        of_gate_up, of_down = (p.gradients(n) for p, n in zip((gate_up, down), _from_flat(needed), strict=True))

        d_PH, d_weights_Tk = elementwise.weighted_sum_backward(d_TH, y_PH, routed.row_of_Tk, routed.token_P, weights_Tk)
        dx_PH = way.buffer(routed, x_TH, x_TH.shape[1]) if x_needed else None
        d_PI = way.buffer(routed, x_TH, down.shape[1])
        for group in way.of(routed):
            both, dy = gate_up_P2I[group.rows], d_PH[group.rows]
            d, d_low = down.backward_of_input(group, dy, d_PI)
            assert d is not None
            d_both = elementwise.swiglu_backward(both, d)
            activated = d  # what `swiglu_backward` leaves there
            down.backward_of_weights(group, dy, activated, low_down, d_low, of_down)
            _, d_low = gate_up.backward_of_input(group, d_both, dx_PH)
            x = x_TH.index_select(0, routed.token_P[group.rows])
            gate_up.backward_of_weights(group, d_both, x, low_gate_up, d_low, of_gate_up)
        dx_TH = None if dx_PH is None else elementwise.weighted_sum(dx_PH.tensor, routed.row_of_Tk, None)
        return None, None, None, None, dx_TH, d_weights_Tk, *_flat([of_gate_up, of_down])


def _projections(
    tensors: Sequence[torch.Tensor | None],
    adapters: dict[str, Adapter],
    shapes: dict[str, torch.Size],
    routed: Routed,
) -> tuple[_Projection, _Projection]:
    """Gate-and-up, and down."""
    gate_up, down = (
        _Projection(of_one, adapters.get(name), shapes[name], routed)
        for name, of_one in zip(EXPERT_TARGETS, _from_flat(tensors), strict=True)
    )
    return gate_up, down
