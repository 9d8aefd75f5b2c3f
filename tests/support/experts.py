"""Blocks of experts with adapters, and a reference that shares no code with the split forward."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from train.config.lora import EXPERT_TARGETS
from train.lora import factors, products, split_experts


def make_experts(
    *,
    experts: int,
    hidden: int,
    intermediate: int,
    lora_rank: int | tuple[int, ...],
    dtype: torch.dtype,
    targets: tuple[str, ...],
    dropout: float = 0.0,
) -> nn.Module:
    """The `MixtralExperts` of a block, frozen, with adapters of scale 3 / r that are not zero."""
    config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
    config._experts_implementation = split_experts.IMPLEMENTATION
    holder = nn.ModuleDict({"experts": MixtralExperts(config)}).to(dtype)
    for weight in holder.parameters():
        nn.init.normal_(weight, std=0.3)
        weight.requires_grad_(False)
    ranks = [[lora_rank] * experts if isinstance(lora_rank, int) else list(lora_rank)]
    factors.attach(holder, ranks=ranks, projections=targets, scaling=factors.Scaling(3), dropout=dropout)
    for name, factor in holder.named_parameters():
        if name.endswith("_lora_B"):
            nn.init.normal_(factor, std=0.3)
    return holder["experts"]


def routed(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts for each token, and their weights."""
    return torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)]), torch.rand(tokens, 2)


def reference(
    experts: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    keep: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Each token through each of its experts by plain matrix-vector products; shares no code with the split forward.

    `keep` is what dropout leaves of the adapters' inputs, [token-expert pairs, in] for each projection.
    """

    def project(name: str, expert: int, vector: torch.Tensor, pair: int) -> torch.Tensor:
        out = getattr(experts, name)[expert] @ vector
        if name in experts.lora and (rank := experts.lora[name].ranks[expert]):
            if keep is not None:
                vector = torch.where(keep[name][pair], vector / (1 - experts.lora[name].dropout), 0.0)
            above = sum(experts.lora[name].ranks[:expert])
            A, B = (getattr(experts, f"{name}_lora_{letter}")[above : above + rank] for letter in "AB")
            out = out + 3 / rank * (B.T @ (A @ vector))
        return out

    rows = []
    for token in range(x.shape[0]):
        total = torch.zeros_like(x[token])
        for slot in range(index.shape[1]):
            expert = int(index[token, slot])
            pair = token * index.shape[1] + slot
            gate, up = project("gate_up_proj", expert, x[token], pair).chunk(2)
            total = total + weights[token, slot] * project("down_proj", expert, nn.functional.silu(gate) * up, pair)
        rows.append(total)
    return torch.stack(rows)


def masks(experts: nn.Module, pairs: int, device: str = "cpu") -> dict[str, torch.Tensor] | None:
    """What dropout keeps, drawn in the order and on the device of the forward; on the CPU."""
    if not any(adapter.dropout for adapter in experts.lora.values()):
        return None
    drawn = {}
    for name, adapter in sorted(experts.lora.items(), key=lambda item: EXPERT_TARGETS.index(item[0])):
        size_in = getattr(experts, name).shape[-1]
        drawn[name] = split_experts.draw_keep(pairs, size_in, adapter.dropout, torch.device(device)).cpu()
    return drawn


def forward_and_gradients(
    run: Callable[..., torch.Tensor], experts: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> list[torch.Tensor]:
    """The output, and the gradients of x, the weights and all that trains; zeros if there is none."""
    x = x.clone().requires_grad_()
    weights = weights.clone().requires_grad_()
    out = run(experts, x, index, weights)
    factors = [factor for factor in experts.parameters() if factor.requires_grad]
    mixture = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    gradients = torch.autograd.grad((out * mixture).sum(), [x, weights, *factors], allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, [x, weights, *factors], strict=True)]
    return [out.detach(), *filled]


@contextlib.contextmanager
def all_in_one_product() -> Iterator[None]:
    """The way of GPUs with a kernel for it, through torch's grouped product, which is there on the CPU as well."""
    blocks = 0

    def way(x: torch.Tensor, sizes: Sequence[int]) -> type[products.Group]:
        nonlocal blocks
        blocks += 1
        return products.AllExperts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "way", way)
        yield
    assert blocks, "no block went this way"
