"""What GPUs can do at most, by their data sheets: a step's speed is reported as a share of it."""

import torch

from train.config.catalogue import cluster_of


def peak_flops(device: torch.device, dtype: str, count: int) -> float | None:
    """Of that many such devices, for a model of that dtype; None if it is not known: CPUs, other GPUs, float32."""
    if device.type != "cuda" or dtype not in ("bfloat16", "float16"):
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return None if peak is None else count * peak


def peak_of(name: str) -> float | None:
    """By the name that torch gives a GPU: operations per second of dense products in bfloat16 and float16."""
    cluster = cluster_of(name)
    return None if cluster is None else cluster.peak * 1e12
