"""The machine's own matrix product, which a share of peak is a share of."""

import time

import torch

SIZES = {"cpu": (2048, 4096), "cuda": (8192,)}
"""Of the square matrices."""
PRODUCTS = {"cpu": 1, "cuda": 10}
"""Timed together: on CUDA one alone would be timed with its launch and the wait for it."""


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
    """Until the device has done what it was given; a CPU has already."""
    if device == "cuda":
        torch.cuda.synchronize()
