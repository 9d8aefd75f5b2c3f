"""The low-rank factors of a block's experts, as parameters of its `MixtralExperts`.

Shapes: E experts, r LoRA rank, R all ranks of a block one after another.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from train.config.lora import EXPERT_TARGETS


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of one projection of one block; its factors are parameters of the `MixtralExperts`.

    They are stored with the experts' rows one below the other, A as [R, in] and the transposed B as [R, out].
    """

    ranks: tuple[int, ...]
    """r_e of each expert; 0 for one without an adapter."""
    scales: tuple[float, ...]
    """s_e of each expert; 0 for one without an adapter."""
    dropout: float
    """The probability with which an input is dropped."""

    @property
    def rows(self) -> tuple[slice, ...]:
        """The rows of each expert in A and B; none for one without an adapter."""
        return _rows(self.ranks)

    def shares(self, device: torch.device) -> torch.Tensor:
        """[E, R] float32: s_e where the expert owns the row of the factors, else 0."""
        return _shares(self.ranks, self.scales, device)


@functools.cache
def _rows(ranks: tuple[int, ...]) -> tuple[slice, ...]:
    ends = itertools.accumulate(ranks)
    return tuple(slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True))


@functools.cache  # the way from a Python list to a CUDA device makes the host wait, and it is a constant of an adapter
def _shares(ranks: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> torch.Tensor:
    rows = [[scale] * rank for rank, scale in zip(ranks, scales, strict=True)]
    return torch.block_diag(*(torch.tensor([row]) for row in rows)).to(device)


def attach(
    model: nn.Module, *, ranks: list[list[int]], projections: tuple[str, ...], scaling: "Scaling", dropout: float = 0.0
) -> None:
    """Adds trainable factors for the targeted projections to the `MixtralExperts` of the model.

    A starts uniform in ±1/√in as PEFT's does, B at zero, so the adapted model starts equal to the base. The factors
    take the model's dtype, and the device of the experts' weights: mixed dtypes fail under ZeRO-3, which keeps float32
    masters.

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
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
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
            A_RI = weight.new_empty(sum(of_block), size_in, dtype=dtype)
            if not A_RI.is_meta:
                # drawn in float32 and on the CPU, so that every dtype and device starts from the same numbers
                A_RI.copy_(torch.empty(A_RI.shape, device="cpu").uniform_(-1, 1) / math.sqrt(size_in))
            B_RO = weight.new_zeros(sum(of_block), size_out, dtype=dtype)
            experts.register_parameter(f"{projection}_lora_A", nn.Parameter(A_RI))
            experts.register_parameter(f"{projection}_lora_B", nn.Parameter(B_RO))
            experts.lora[projection] = adapter


@dataclass(frozen=True, slots=True)
class Scaling:
    """The scale s of a rank: alpha / r, or alpha / √r if rank-stabilised."""

    alpha: float
    rank_stabilised: bool = False

    def __call__(self, lora_rank: int) -> float:
        return self.alpha / (math.sqrt(lora_rank) if self.rank_stabilised else lora_rank)


def expert_modules(model: nn.Module) -> dict[str, MixtralExperts]:
    """Every `MixtralExperts` of the model by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtralExperts)}


def adapters(model: nn.Module) -> dict[str, dict[str, Adapter]]:
    """The adapters of each block, by the name of its `MixtralExperts`, then by projection; a block may have none."""
    return {name: getattr(experts, "lora", {}) for name, experts in expert_modules(model).items()}
