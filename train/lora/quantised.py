"""The experts' matrices of a base in four bits, dequantised while they are multiplied with."""

import torch

from data.disk import nf4


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
