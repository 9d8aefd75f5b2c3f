"""What GPUs can do at most, by their data sheets: a step's speed is told as a share of it."""

import re

import torch

PEAKS = {
    r"\bMIG\b": None,  # a part of a GPU
    r"\bB200\b": 2250e12,
    r"\bH200 NVL\b": 835e12,
    r"\b(G?H200|H800)\b": 989e12,
    r"\bH100 NVL\b": 835e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH100\b": 989e12,
    r"\bA[18]00\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bMI300X\b": 1307e12,
}
"""Operations per second of dense products in bfloat16 and float16, by a pattern in the name that torch knows a GPU by;
the first that matches counts. From the makers' data sheets, half of what they give with sparsity."""


def peak_flops(device: torch.device, dtype: str, count: int) -> float | None:
    """Of so many such devices, for a model of that dtype; None if it is not known: CPUs, other GPUs, float32."""
    if device.type != "cuda" or dtype not in ("bfloat16", "float16"):
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return None if peak is None else count * peak


def peak_of(name: str) -> float | None:
    """By the name that torch gives a GPU."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), None)
