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
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from train.config import EXPERT_TARGETS

IMPLEMENTATION = "split_lora"
"""The name under which transformers' experts interface knows this forward."""

ROW_MULTIPLE = 32
"""What an expert's rows are filled up to on the CPU in half precision.

oneDNN generates code for every new matrix height, which takes longer than a small product, and routing gives every
expert another height in every step. Filled up, heights repeat and the code comes from its cache; the price is at most
31 idle rows per expert.
"""


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
    routed = _Routed.found(top_k_index, experts.num_experts, together, row_multiple(hidden_states))
    return _SplitExperts.apply(hidden_states, top_k_weights, *tensors, routed, adapters)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, split_lora_forward)


def draw_keep(pairs: int, size_in: int, dropout: float, device: torch.device) -> torch.Tensor:
    """The inputs that dropout leaves an adapter: [pairs, in] bool, pairs in the order of tokens and their choices."""
    return torch.empty(pairs, size_in, dtype=torch.bool, device=device).bernoulli_(1 - dropout)


def in_one_product(x: torch.Tensor, sizes: Sequence[int]) -> bool:
    """Whether all experts go through torch's grouped product together, else one after another; the product needs rows
    of whole 16 bytes."""
    capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
    return has_grouped_kernel(x.dtype, capability) and all(size * x.dtype.itemsize % 16 == 0 for size in sizes)


def has_grouped_kernel(dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether torch has a kernel for the grouped product; `capability` is that of a CUDA device, None for another.

    It has one for bfloat16 on Hopper and on data-centre Blackwell. Elsewhere `F.grouped_mm` asks the device for the
    groups' ends and loops over them in every call; our own loop asks once in a forward and once in a backward.
    """
    return dtype == torch.bfloat16 and capability is not None and capability[0] in (9, 10)


def row_multiple(x: torch.Tensor) -> int:
    """What the number of an expert's rows is filled up to."""
    return ROW_MULTIPLE if x.device.type == "cpu" and x.dtype.itemsize == 2 else 1


@dataclass(frozen=True, slots=True)
class _Routed:
    """Where each token-expert pair stands when the pairs are sorted by expert: found once per block.

    top_k_index   | 1 0 | 0 2 |             tokens 0 and 1 of E = 3 experts; here filled up to multiples of 2 rows
    pair_P        | 1 2 | 0 - | 3 - |       the pair of each row, expert by expert; - is filling
    token_P       | 0 1 | 0 - | 1 - |       its token
    row_of_Tk     | 2 0 | 1 4 |

    The shapes are those of any routing of so many tokens. Where activations are computed again, a token that stands
    between two experts may fall to another one than before; the backward must then see that routing and no other, so
    what it needs comes from `tensors`, saved with the activations that belong to it.
    """

    row_of_Tk: torch.Tensor
    pair_P: torch.Tensor
    """With room for as many filling rows as there can be."""
    ends_E: torch.Tensor
    """Where the rows of each expert end, filling included."""
    in_one_product: bool
    token_P: torch.Tensor

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], in_one_product: bool) -> "_Routed":
        """Of what `tensors` gave."""
        row_of_Tk, pair_P, ends_E = tensors
        return cls(row_of_Tk, pair_P, ends_E, in_one_product, pair_P // row_of_Tk.shape[1])

    @classmethod
    def found(cls, top_k_index: torch.Tensor, experts: int, in_one_product: bool, multiple: int) -> "_Routed":
        """Of the routers' choices, each expert's rows filled up to a multiple."""
        device = top_k_index.device
        expert_S, order_S = top_k_index.flatten().sort(stable=True)
        # not bincount, which makes a CUDA device tell the host the largest expert first
        stops_E = torch.searchsorted(expert_S, torch.arange(experts, device=device), right=True)
        counts_E = stops_E.diff(prepend=stops_E.new_zeros(1))
        room_E = (counts_E + multiple - 1) // multiple * multiple
        spare_E = room_E - counts_E
        row_S = torch.arange(len(order_S), device=device) + (spare_E.cumsum(0) - spare_E)[expert_S]
        row_of_Tk = torch.empty_like(order_S)
        row_of_Tk[order_S] = row_S
        # Filling rows repeat the first pair: numbers like any other, which nothing reads and whose gradient is 0.
        pair_P = order_S.new_zeros(len(order_S) + experts * (multiple - 1))
        pair_P[row_S] = order_S
        return cls.of((row_of_Tk.view(top_k_index.shape), pair_P, room_E.cumsum(0)), in_one_product)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that the backward needs to know of the routing."""
        return self.row_of_Tk, self.pair_P, self.ends_E

    def groups(self) -> Iterator["_Group"]:
        """All rows as one group, or those of each expert that has any."""
        if self.in_one_product:
            unused_E11 = (self.ends_E.diff(prepend=self.ends_E.new_zeros(1)) == 0).view(-1, 1, 1)
            yield _Group(slice(None), slice(None), self.ends_E.to(torch.int32), unused_E11)
            return
        start = 0
        for expert, end in enumerate(self.ends_E.tolist()):
            if end > start:
                yield _Group(slice(start, end), expert)
            start = end

    def room(self, like: torch.Tensor, size: int) -> torch.Tensor:
        """Uninitialised rows of that size, as many as any routing of so many tokens fills: tensors of other sizes in
        every step would break glibc's heap into pieces."""
        return like.new_empty(0 if self.in_one_product else len(self.pair_P), size)

    def choices(self, y_PH: torch.Tensor) -> Iterator[torch.Tensor]:
        """[T, H], the rows of the tokens' first choices, then of the second, …: they are added in this order, so
        every run gives the same bits; scattering with atomic additions would not on CUDA."""
        # index_select copies whole rows, where y[rows] goes element by element, slower on the CPU
        return (y_PH.index_select(0, row_T) for row_T in self.row_of_Tk.unbind(1))


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that one matrix product serves: those of one expert, or of all through torch's grouped product."""

    rows: slice
    expert: Any
    """An index into [E, …]: one expert, or all."""
    ends_E: torch.Tensor | None = None
    """Of all experts: int32, where the rows of each end."""
    unused_E11: torch.Tensor | None = None
    """Of all experts: those without rows."""

    def times(self, x: torch.Tensor, weight: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
        """x W, [rows, out]. `weight` is [in, out] of the expert, or [E, in, out]; one expert's product is written into
        its part of `room`, where that is given."""
        if self.ends_E is not None:
            return F.grouped_mm(x, weight, offs=self.ends_E)
        return x @ weight if room is None else torch.mm(x, weight, out=self.part(room, weight.shape[-1]))

    def part(self, room: torch.Tensor, width: int) -> torch.Tensor:
        """[rows, width], contiguous, of a room for the rows of all experts that is at least as wide."""
        rows = room[self.rows]
        return rows if rows.shape[1] == width else rows.flatten()[: len(rows) * width].view(-1, width)

    def outer(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """yᵀ x, [out, in] or [E, out, in]: the gradient of a weight, zeros for experts without rows.

        On some GPUs torch's grouped product leaves arbitrary numbers for a group without rows (pytorch issue 172439).
        """
        if self.ends_E is None:
            return y.T @ x
        assert self.unused_E11 is not None
        return F.grouped_mm(y.T, x, offs=self.ends_E).masked_fill_(self.unused_E11, 0)

    def add(self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """total += x W, in place; on one expert in one pass over the total."""
        if self.ends_E is None:
            torch.addmm(total, x, weight, out=total)
        else:
            total += F.grouped_mm(x, weight, offs=self.ends_E)


class _Projection:
    """One projection of all experts, forward and backward, group by group."""

    def __init__(self, tensors: Sequence[Any], adapter: "Adapter | None", routed: _Routed):
        """`tensors` are W [E, out, in], A [R, in], B [R, out], and what dropout keeps [pairs, in], None for none."""
        self.weight, self.A, self.B, self.keep = tensors
        self.adapter, self.routed = adapter, routed

    def _factors(self, group: _Group) -> tuple[Any, torch.Tensor, torch.Tensor] | None:
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

    def _dropped(self, group: _Group, x: torch.Tensor) -> torch.Tensor:
        """x with dropout's zeros; also what the gradient of such an x goes through."""
        if self.keep is None:
            return x
        assert self.adapter is not None
        return (x * self.keep[self.routed.pair_P[group.rows]]).mul_(1 / (1 - self.adapter.dropout))

    def low_room(self, like: torch.Tensor) -> torch.Tensor | None:
        """Room for s·A m(x) of all rows, at the largest rank."""
        return None if self.adapter is None else self.routed.room(like, max(self.adapter.ranks))

    def forward(
        self, group: _Group, x: torch.Tensor, room: torch.Tensor, low_room: torch.Tensor | None
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
        group: _Group,
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

    def put(self, group: _Group, projection: _Projection, dA: torch.Tensor, dB: torch.Tensor) -> None:
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
        routed = _Routed.of(rest[10:], ctx.in_one_product)
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


def _projections(tensors: Any, routed: _Routed, adapters: dict[str, "Adapter"]) -> tuple[_Projection, _Projection]:
    """Gate-and-up, and down, of the tensors in their order as arguments: weight, A, B, keep of each."""
    gate_up, down = (adapters.get(projection) for projection in EXPERT_TARGETS)
    return _Projection(tensors[:4], gate_up, routed), _Projection(tensors[4:], down, routed)


# Factors


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of one projection of one block; its factors are parameters of the `MixtralExperts`."""

    ranks: tuple[int, ...]
    """r_e of each expert; 0 where it has no adapter."""
    scales: tuple[float, ...]
    """s_e of each expert."""
    dropout: float
    """The probability with which an input is dropped."""

    @property
    def rows(self) -> tuple[slice, ...]:
        """Those of each expert in A and B, none for one without."""
        return _rows(self.ranks)


@functools.cache
def _rows(ranks: tuple[int, ...]) -> tuple[slice, ...]:
    ends = itertools.accumulate(ranks)
    return tuple(slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True))


def attach(
    model: nn.Module, *, ranks: list[list[int]], projections: tuple[str, ...], scaling: "Scaling", dropout: float = 0.0
) -> None:
    """Adds trainable factors for the targeted projections to the `MixtralExperts` of the model.

    A starts uniform in ±1/√in as PEFT's does, B at zero, so the adapted model starts equal to the base. The factors
    take the dtype and device of the experts' weights: mixed dtypes fail under ZeRO-3, which keeps float32 masters.

    Args:
        model: holds the blocks.
        ranks: the LoRA rank of each expert of each block; 0 for none.
        projections: those with an adapter.
        scaling: s of a rank.
        dropout: on the adapters' inputs, for each token-expert pair.
    """
    unknown = set(projections) - set(EXPERT_TARGETS)
    if unknown:
        raise ValueError(f"there is no expert projection {sorted(unknown)[0]}; choose from {', '.join(EXPERT_TARGETS)}")
    for of_block, experts in zip(ranks, expert_modules(model).values(), strict=True):
        experts.lora = {}
        if not any(of_block):
            continue
        sizes = {
            "gate_up_proj": (experts.hidden_dim, 2 * experts.intermediate_dim),
            "down_proj": (experts.intermediate_dim, experts.hidden_dim),
        }
        adapter = Adapter(tuple(of_block), tuple(scaling(rank) if rank else 0.0 for rank in of_block), dropout)
        for projection in projections:
            weight = getattr(experts, projection)
            size_in, size_out = sizes[projection]
            A_RI = weight.new_empty(sum(of_block), size_in)
            if not A_RI.is_meta:
                # drawn in float32 and on the CPU, so that every dtype and device starts from the same numbers
                A_RI.copy_(torch.empty(A_RI.shape, device="cpu").uniform_(-1, 1) / math.sqrt(size_in))
            experts.register_parameter(f"{projection}_lora_A", nn.Parameter(A_RI))
            experts.register_parameter(f"{projection}_lora_B", nn.Parameter(weight.new_zeros(sum(of_block), size_out)))
            experts.lora[projection] = adapter


@dataclass(frozen=True, slots=True)
class Scaling:
    """s of a rank: alpha / r, or rank-stabilised alpha / √r."""

    alpha: float
    rank_stabilised: bool = False

    def __call__(self, lora_rank: int) -> float:
        return self.alpha / (math.sqrt(lora_rank) if self.rank_stabilised else lora_rank)


def expert_modules(model: nn.Module) -> dict[str, MixtralExperts]:
    """Every `MixtralExperts` of the model by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtralExperts)}


def adapters(model: nn.Module) -> dict[str, dict[str, Adapter]]:
    """The adapters of each block, none for some: by the name of its `MixtralExperts`, then by projection."""
    return {name: getattr(experts, "lora", {}) for name, experts in expert_modules(model).items()}
