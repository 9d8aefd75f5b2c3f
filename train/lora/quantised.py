"""The frozen base in four bits: attention and experts hold NF4, and dequantise a matrix while it is multiplied with.

Nothing but the packed bytes is kept for the backward, which dequantises again: under ZeRO-3 it gathers bytes, too.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from configs.program.errors import UserError
from data.disk import nf4
from train.config.lora import ATTENTION_TARGETS, EXPERT_TARGETS
from train.lora.factors import expert_modules

ATTENTION = re.compile(rf"\.({'|'.join(ATTENTION_TARGETS)})(\.base_layer)?$")
"""Names of its linear layers, alone or within PEFT's."""


@torch.no_grad()
def quantise(model: nn.Module, named: str) -> None:
    """Quantises attention's and the experts' weights in place, one matrix at a time; from then on they are frozen.

    Router, norms, embeddings and head stay as they are.

    Raises:
        UserError: a matrix is not of whole blocks; the sentence begins with `named`.
    """
    for name, module in model.named_modules():
        if ATTENTION.search(name) and type(module) is nn.Linear:
            module.__class__ = QuantisedLinear
            module.weight = _packed(_quantised(module.weight, name, named))
    for name, experts in expert_modules(model).items():
        for projection in EXPERT_TARGETS:
            weight = getattr(experts, projection)
            content = weight.new_empty(len(weight), nf4.size(weight[0].numel()), dtype=nf4.BYTES)
            for expert, matrix in enumerate(weight):
                content[expert] = _quantised(matrix, f"{name}.{projection}", named)
            setattr(experts, projection, _packed(content))


def _quantised(matrix: torch.Tensor, name: str, named: str) -> torch.Tensor:
    try:
        return nf4.quantised(matrix)
    except ValueError as error:
        raise UserError(f"{named}: {name} can't be held in it, {error}; use model.weights=bf16") from error


def _packed(content: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(content, requires_grad=False)


class QuantisedLinear(nn.Linear):
    """A frozen linear layer without bias, whose weight is uint8 [bytes]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        out: torch.Tensor = _Product.apply(input, self.weight, torch.Size([self.out_features, self.in_features]))
        return out


class _Product(torch.autograd.Function):
    """x Wᵀ."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, content: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(content)
        ctx.shape = shape
        return F.linear(x, nf4.dequantised(content, shape, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (content,) = ctx.saved_tensors
        return (d @ nf4.dequantised(content, ctx.shape, d.dtype) if ctx.needs_input_grad[0] else None), None, None


def matrices(weight: torch.Tensor, experts: int | slice, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The matrices of some experts: [out, in] of one, [E, out, in] of all, dequantised into one buffer.

    Args:
        weight: [E, out, in], or uint8 [E, bytes].
        experts: an index into its first dimension.
        shape: [out, in].
        dtype: of a quantised one.
    """
    chosen = weight[experts]
    if not nf4.is_quantised(weight):
        return chosen
    if chosen.dim() == 1:
        return nf4.dequantised(chosen, shape, dtype)
    buffer = torch.empty(len(chosen), *shape, dtype=dtype, device=weight.device)
    for matrix, content in zip(buffer, chosen, strict=True):
        matrix.copy_(nf4.dequantised(content, shape, dtype))
    return buffer
