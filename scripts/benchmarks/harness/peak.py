"""The machine's own matrix product: the peak of which the figures are a share."""

import time

import torch

SIZES = {"cpu": (2048, 4096), "cuda": (8192,)}
"""Sizes of the square matrices."""
PRODUCTS = {"cpu": 1, "cuda": 10}
"""Products timed together: on CUDA, a single one would be timed with its launch and the wait for it."""


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a product of square matrices, of the best size; `device` is `cpu` or `cuda`."""
    return max(_flops(size, device, dtype) for size in SIZES[device])


def _flops(size: int, device: str, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    a @ b
    wait(device)
    started = time.perf_counter()
    for _ in range(PRODUCTS[device]):
        a @ b
    wait(device)
    return PRODUCTS[device] * 2 * size**3 / (time.perf_counter() - started)


def wait(device: str) -> None:
    """Waits until the device has finished its work; a CPU always has."""
    if device == "cuda":
        torch.cuda.synchronize()
