"""Weights in four bits: NF4 in blocks of 64, by bitsandbytes' kernels (Dettmers et al. 2023, arXiv:2305.14314).

A matrix becomes one row of bytes, two weights in each, and after them the float32 scale of every block: 4.5 bits a
weight. Bytes and scales are one tensor, so that ZeRO shards and gathers them in one piece, as it does any other tensor.
Scales that are quantised themselves would take 4.13 bits a weight, and a second kernel at every use of the matrix.

It stands here because training and inference share it.
"""

from importlib.util import find_spec

import torch

from configs.program.errors import UserError, one_line

FORM = "nf4"
"""What settings and receipts call it."""
UNQUANTISED = "bf16"
"""What they call weights that are held as they come; records from before there was a choice don't say it."""
BLOCK = 64
"""Weights that share a scale."""
BYTES = torch.uint8
SCALE = torch.float32


def check_available(setting: str) -> None:
    """Raises `UserError` if bitsandbytes is not installed; the sentence begins with `setting`. Imports nothing."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f'{setting}: it takes bitsandbytes, which is not installed; pip install -e ".[nf4]"')


def check_kernels(setting: str, device: torch.device) -> None:
    """Raises `UserError` if bitsandbytes has no kernels for that device; the sentence begins with `setting`."""
    check_available(setting)
    try:
        dequantised(quantised(torch.ones(1, BLOCK, device=device)), torch.Size([1, BLOCK]), torch.bfloat16)
    except (ImportError, NotImplementedError, RuntimeError, OSError, AttributeError) as error:
        raise UserError(
            f"{setting}: bitsandbytes has no kernels that work on this {device.type} ({one_line(error)}); use bf16"
        ) from error


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a weight is held in four bits; no other weight is stored as bytes."""
    return tensor.dtype == BYTES


def size(weights: int) -> int:
    """Bytes of that many weights, a multiple of 64."""
    return weights // 2 + weights // BLOCK * SCALE.itemsize


def quantised(matrix: torch.Tensor) -> torch.Tensor:
    """The bytes of a floating-point tensor, uint8 [size]; blocks follow each other along its last dimension.

    Raises:
        ValueError: the number of its weights is not a multiple of 64.
    """
    if matrix.numel() % BLOCK:
        raise ValueError(f"{list(matrix.shape)} are not whole blocks of {BLOCK}")
    if matrix.is_meta:
        return matrix.new_empty(size(matrix.numel()), dtype=BYTES)
    import bitsandbytes  # noqa: F401 - its operators are torch's then

    packed, scales = torch.ops.bitsandbytes.quantize_4bit(matrix.contiguous(), BLOCK, FORM, BYTES)
    return torch.cat([packed.flatten(), scales.view(BYTES)])


def dequantised(content: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantised` but for what four bits lose: a tensor of that shape and dtype.

    bfloat16 is what the float32 result would be rounded to.
    """
    packed, scales = content.split([shape.numel() // 2, shape.numel() // BLOCK * SCALE.itemsize])
    if scales.storage_offset() % SCALE.itemsize:  # in a buffer of what was gathered
        scales = scales.clone()
    # In rows of one block: the CPU's kernel (0.50.2) takes the wrong scales if a row is not of whole blocks.
    arguments = (packed.unsqueeze(1), scales.view(SCALE), BLOCK, FORM, (shape.numel() // BLOCK, BLOCK))
    rows: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(*arguments, dtype)
    return rows.view(shape)
