"""RMSNorm in one pass forward and one backward on CUDA, by torch's own kernels; it keeps its input and a number a row.

transformers' takes five passes forward, in float32, and twice as many backward, and keeps two copies in float32. The
values are the same but for rounding: torch's kernel rounds once, after the weight.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from train.lora.elementwise import operator, wide


def replace(model: nn.Module) -> None:
    """Every norm of the model becomes one of these; its weight, and all names, stay."""
    for module in model.modules():
        if type(module) is MixtralRMSNorm:
            module.__class__ = RMSNorm


class RMSNorm(MixtralRMSNorm):
    """x / √(mean of x² + ε) · weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[…, H]."""
        out: torch.Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
        y, inverse = rms_norm(x, weight_H, epsilon)
        ctx.save_for_backward(x, weight_H, inverse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_H, inverse = ctx.saved_tensors
        of_weight = ctx.needs_input_grad[1]
        dx, d_weight_H = rms_norm_backward(d, x, weight_H, inverse, of_weight)
        return dx, d_weight_H if of_weight else None, None


def _per_row(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=wide(x.dtype))


@operator(
    "(Tensor x, Tensor weight_H, float epsilon) -> (Tensor, Tensor)",
    shapes=lambda x, weight_H, epsilon: (torch.empty_like(x), _per_row(x)),
    on_cuda=lambda x, weight_H, epsilon: torch.ops.aten._fused_rms_norm(x, weight_H.shape, weight_H, epsilon),
)
def rms_norm(x: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and the inverse of each row's root mean square, […, 1], which its backward needs."""
    wide_x = x.to(wide(x.dtype))
    inverse = wide_x.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return weight_H * (wide_x * inverse).to(x.dtype), inverse


def _backward_on_cuda(
    d: torch.Tensor, x: torch.Tensor, weight_H: torch.Tensor, inverse: torch.Tensor, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (d.contiguous(), x.contiguous(), weight_H.shape, inverse, weight_H)
    dx, d_weight_H = torch.ops.aten._fused_rms_norm_backward(*arguments, [True, of_weight])
    return dx, d_weight_H if of_weight else weight_H.new_empty(0)


@operator(
    "(Tensor d, Tensor x, Tensor weight_H, Tensor inverse, bool of_weight) -> (Tensor, Tensor)",
    shapes=lambda d, x, weight_H, inverse, of_weight: (
        torch.empty_like(x),
        weight_H.new_empty(len(weight_H) if of_weight else 0),
    ),
    on_cuda=_backward_on_cuda,
)
def rms_norm_backward(
    d: torch.Tensor, x: torch.Tensor, weight_H: torch.Tensor, inverse: torch.Tensor, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x, and of the weight or an empty tensor, for the gradient of the norm."""
    normed = x.to(inverse.dtype) * inverse
    d_normed = (d * weight_H).to(inverse.dtype)
    along = (d_normed * normed).mean(-1, keepdim=True)
    d_weight_H = (d * normed).flatten(0, -2).sum(0).to(weight_H.dtype) if of_weight else weight_H.new_empty(0)
    return d_normed.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), d_weight_H
