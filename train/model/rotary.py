"""Rotary embedding of queries and keys, in one pass forward and one backward on CUDA; it keeps nothing of a layer.

In plain torch, as transformers has it, each of them is read and written five times: two products, a negation, the
halves put together, a sum. Here their halves are turned in one pass. The backward is the same turn the other way.

Shapes: N heads of the queries, K heads of the keys, D width of a head.
"""

from typing import Any

import torch

from train.lora.elementwise import operator


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, turned by the angles of their positions.

    Args:
        q: [rows, row length, N, D].
        k: [rows, row length, K, D].
        cos: [rows or 1, row length, D], of which both halves are equal, as transformers makes them.
        sin: the same.
    """
    rotated: tuple[torch.Tensor, torch.Tensor] = _Rotation.apply(q, k, cos, sin)
    return rotated


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        out: tuple[torch.Tensor, torch.Tensor] = rotary(q.contiguous(), k.contiguous(), cos, sin, False)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *rotary(dq.contiguous(), dk.contiguous(), cos, sin, True), None, None


@operator(
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)",
    shapes=lambda q, k, cos, sin, back: (torch.empty_like(q), torch.empty_like(k)),
)
def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous queries and keys turned, or turned back."""
    half = cos.shape[-1] // 2
    cos, sin = (angles[..., :half].unsqueeze(-2) for angles in (cos, sin))
    sin = -sin if back else sin
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    (one, other), (of_one, of_other) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(one, cos, out=of_one).addcmul_(other, sin, value=-1)
    torch.mul(other, cos, out=of_other).addcmul_(one, sin)
    return out
