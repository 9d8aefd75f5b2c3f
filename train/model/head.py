"""The head and its cross-entropy, in chunks of positions: logits of a whole row never exist.

torch's F.linear_cross_entropy (2.13) is not used because in every setting it rounds its result to the dtype of the
logits: a sum over a row's tokens would keep three digits of it in bfloat16. Liger's fused linear cross-entropy also
computes gradients with the loss, chunk by chunk, but in Triton kernels, for GPUs alone; this is plain torch, for the
CPU as well.
"""

from typing import Any

import torch
from torch import nn

CHUNK = 256
"""Positions whose logits exist at once: 32 MiB in float32 for 32,000 pieces."""
CHUNK_ON_GPU = 1024
"""The same on a GPU, whose products want more rows."""
UNLIKELY = 1e-30
"""Probabilities below this are near the end of float32, where a logarithm loses its precision and then its value."""


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """Asking it for a number takes no time there."""
    return tensor.device.type == "cpu"


class CrossEntropyHead(nn.Module):
    """The output head as part of the loss.

    It is a module of its own that also holds the head's weight, because under ZeRO-3 a parameter is whole only inside
    the forward of a module that it belongs to.
    """

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats summed over N positions, a float32 scalar (float64 for float64)."""
        # Without autograd nobody asks for gradients, but a weight that trains would still seem to need one.
        weight_VH = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return _ChunkedCrossEntropy.apply(hidden_NH, weight_VH, targets_N)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients with the loss, while a chunk's logits exist, and only those that are needed."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_NH.device)
        d_hidden, d_weight = (
            torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None,
            torch.zeros(weight_VH.shape, dtype=wide, device=hidden_NH.device) if ctx.needs_input_grad[1] else None,
        )
        on_cpu = is_on_cpu(hidden_NH)
        chunk = CHUNK if on_cpu else CHUNK_ON_GPU
        # Tuning for the CPU: of one size in every step, because tensors of ever other sizes break up glibc's heap.
        buffers = [hidden_NH.new_empty(chunk, len(weight_VH), dtype=dtype) for dtype in (hidden_NH.dtype, wide)]
        for start in range(0, len(hidden_NH), chunk):
            hidden, targets = hidden_NH[start : start + chunk], targets_N[start : start + chunk].unsqueeze(1)
            logits = torch.mm(hidden, weight_VH.T, out=buffers[0][: len(hidden)])
            p = buffers[1][: len(hidden)].copy_(logits)
            torch.softmax(p, -1, out=p)
            of_target = p.gather(1, targets)
            if on_cpu:
                logp = of_target.log()
                if bool((unlikely := of_target.squeeze(1) < UNLIKELY).any()):
                    logp[unlikely] = logits[unlikely].log_softmax(-1, dtype=wide).gather(1, targets[unlikely])
            else:  # another pass takes less time than to ask a GPU whether it is needed
                logp = logits.log_softmax(-1, dtype=wide).gather(1, targets)
            loss -= logp.sum()
            if d_hidden is None and d_weight is None:
                continue
            # the gradient of the logits: p, and p - 1 at the target
            d_logits = logits.copy_(p.scatter_(1, targets, of_target - 1))
            if d_hidden is not None:
                torch.mm(d_logits, weight_VH, out=d_hidden[start : start + chunk])
            if d_weight is not None:
                d_weight += d_logits.T @ hidden
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight_VH.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else (d_hidden * d_loss).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * d_loss).to(ctx.dtype),
            None,
        )
