"""Linear layers that hold NF4 and dequantise it while they multiply; and a Mixtral made to consist of them.

Nothing but the packed bytes is kept for the backward, which dequantises again: under ZeRO-3 it gathers bytes, too.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from configs.program.errors import UserError
from data.disk import nf4

LINEAR = re.compile(r"\.self_attn\.[qkvo]_proj(\.base_layer)?$")
"""Names of attention's layers, alone or within PEFT's."""
EXPERTS = re.compile(r"\.mlp\.experts\.(gate_up|down)_proj$")
"""Names of the experts' parameters."""


@torch.no_grad()
def quantise(model: nn.Module, named: str) -> None:
    """Quantises attention's and the experts' weights in place, one matrix at a time; from then on they are frozen.

    Router, norms, embeddings and head stay as they are. On the meta device there are no numbers, and the layers are
    changed alone.

    Raises:
        UserError: a matrix is not of whole blocks; the sentence begins with `named`.
    """
    for name, module in model.named_modules():
        if LINEAR.search(name) and type(module) is nn.Linear:
            module.__class__ = QuantisedLinear
            module.weight = _packed(_quantised(module.weight, name, named))
    for name, weight in list(model.named_parameters()):
        if EXPERTS.search(name):
            content = weight.new_empty(len(weight), nf4.size(weight[0].numel()), dtype=nf4.BYTES)
            for expert, matrix in enumerate(weight):
                content[expert] = _quantised(matrix, name, named)
            block, _, projection = name.rpartition(".")
            setattr(model.get_submodule(block), projection, _packed(content))


def _quantised(matrix: torch.Tensor, name: str, named: str) -> torch.Tensor:
    try:
        return nf4.quantised(matrix)
    except ValueError as error:
        raise UserError(f"{named}: {name} can't be held in nf4 ({error}); use bf16") from error


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
