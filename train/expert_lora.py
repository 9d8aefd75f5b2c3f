"""Expert-aware LoRA: low-rank factors for every expert, computed split, saved in PEFT's file format.

For each expert e and each of its two projections W_e, the forward is

    y = W_e x + s · B_e (A_e x),   A_e [r, in], B_e [out, r],   s = alpha / r

over grouped matrix products: the merged weight W + s·BA is never built, forward or backward, and a frozen W gets no
weight gradient. LoRA: Hu et al. 2021, arXiv:2106.09685.

Shapes: E experts, S token-expert pairs (tokens × experts per token), H hidden, I intermediate, r LoRA rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from train.config import EXPERT_TARGETS

IMPLEMENTATION = "split_lora"
"""The name under which transformers' experts interface knows this forward."""


# Forward


def split_lora_forward(
    experts: MixtralExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of `MixtralExperts` with split adapters; the signature is that of transformers' experts interface.

    Args:
        experts: the module that holds the frozen weights and the factors.
        hidden_states: [tokens, H].
        top_k_index: [tokens, k] int64, the experts chosen by the router.
        top_k_weights: [tokens, k], their weights.

    Returns:
        [tokens, H], in the dtype of `hidden_states`. Experts without tokens take no part and get zero gradients.
    """
    tokens, k = top_k_index.shape
    # Sort the token-expert pairs by expert, once for both projections.
    expert_S, order_S = top_k_index.flatten().sort(stable=True)
    ends_E = torch.bincount(expert_S, minlength=experts.num_experts).cumsum(0).to(torch.int32)
    x_SH = hidden_states[order_S // k]

    gate_up_S2I = _adapted(experts, "gate_up_proj", x_SH, ends_E)
    gate_SI, up_SI = gate_up_S2I.chunk(2, dim=-1)
    y_SH = _adapted(experts, "down_proj", experts.act_fn(gate_SI) * up_SI, ends_E)

    # Undo the sort by gathering, and add each token's k results in one order: the same bits on every run, which
    # scattering with atomic additions would not give on CUDA.
    y_SH = y_SH * top_k_weights.flatten()[order_S].unsqueeze(-1)
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    return y_SH[back_S].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _adapted(experts: MixtralExperts, projection: str, x_SI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """One projection of all experts: the frozen product, plus the low-rank one where the projection is targeted."""
    y_SO = grouped_linear(x_SI, getattr(experts, projection), ends_E)
    A_ErI = getattr(experts, f"{projection}_lora_A", None)
    if A_ErI is None:
        return y_SO
    B_EOr = getattr(experts, f"{projection}_lora_B")
    # Scaling the [S, r] middle costs least.
    return y_SO + grouped_linear(grouped_linear(x_SI, A_ErI, ends_E) * experts.lora_scaling, B_EOr, ends_E)


def grouped_linear(x_SI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """`x @ weight[e].T` for each group of rows of x; group e ends at row `ends_E[e]`. Returns [S, O]."""
    item = x_SI.element_size()
    aligned = x_SI.shape[1] * item % 16 == 0 and weight_EOI.shape[1] * item % 16 == 0
    if aligned and x_SI.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return F.grouped_mm(x_SI, weight_EOI.transpose(-2, -1), offs=ends_E)
    # torch's grouped product needs rows of whole 16 bytes and knows no float64: a small odd rank, or a reference.
    groups = x_SI.tensor_split(ends_E[:-1].long().cpu())
    return torch.cat([group @ weight_EOI[e].T for e, group in enumerate(groups)])


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, split_lora_forward)


# Factors


def attach(model: nn.Module, *, lora_rank: int, alpha: float, projections: tuple[str, ...]) -> None:
    """Adds trainable factors for the targeted projections to every `MixtralExperts` of the model.

    A starts uniform in ±1/√in as PEFT's does, B at zero, so the adapted model starts equal to the base. The factors
    take the dtype and device of the experts' weights: mixed dtypes fail under ZeRO-3, which keeps float32 masters.
    """
    unknown = set(projections) - set(EXPERT_TARGETS)
    if unknown:
        raise ValueError(f"there is no expert projection {sorted(unknown)[0]}; choose from {', '.join(EXPERT_TARGETS)}")
    for experts in expert_modules(model).values():
        experts.lora_scaling = alpha / lora_rank
        sizes = {
            "gate_up_proj": (experts.hidden_dim, 2 * experts.intermediate_dim),
            "down_proj": (experts.intermediate_dim, experts.hidden_dim),
        }
        for projection in projections:
            weight = getattr(experts, projection)
            size_in, size_out = sizes[projection]
            A_ErI = weight.new_empty(experts.num_experts, lora_rank, size_in)
            # drawn in float32, so that every dtype starts from the same numbers
            A_ErI.copy_(torch.empty(A_ErI.shape, device=A_ErI.device).uniform_(-1, 1) / math.sqrt(size_in))
            B_EOr = weight.new_zeros(experts.num_experts, size_out, lora_rank)
            experts.register_parameter(f"{projection}_lora_A", nn.Parameter(A_ErI))
            experts.register_parameter(f"{projection}_lora_B", nn.Parameter(B_EOr))


def expert_modules(model: nn.Module) -> dict[str, MixtralExperts]:
    """Every `MixtralExperts` of the model by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtralExperts)}


# PEFT's file format
#
# PEFT wraps one parameter per layer of wrapping: gate_up_proj is the inner wrapper (its keys say base_layer) and
# down_proj the outer, where both are targeted. It stores the factors of all experts in two matrices: A with the expert
# slowest, [E·r, in], and B with the expert fastest, [out, r·E].


def to_peft(name: str, factor: torch.Tensor, projections: tuple[str, ...]) -> tuple[str, torch.Tensor]:
    """PEFT's key and matrix for the factor with our parameter name, as in `….experts.down_proj_lora_B`."""
    module, _, parameter = name.rpartition(".")
    projection, _, letter = parameter.partition("_lora_")
    wrapper = ".base_layer" if projection == "gate_up_proj" and "down_proj" in projections else ""
    key = f"base_model.model.{module}{wrapper}.lora_{letter}.weight"
    matrix = factor.flatten(0, 1) if letter == "A" else factor.permute(1, 2, 0).flatten(1)
    return key, matrix.contiguous()
