"""This machine without measuring: the memory that is free for a process."""

import contextlib
from pathlib import Path

import torch

from configs.program.launch import local_processes, local_rank
from train.config.train import TrainConfig
from train.engine.processes import uses_cuda
from train.planning.given.machine import GB, Machine

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
PROGRAM = 0.75 * GB
"""Bytes of a CPU process that are no tensors: Python, torch, transformers, DeepSpeed. Measured as 0.72 GB."""
CUDA = 0.6 * GB
"""Bytes of a GPU that CUDA takes for itself in a process, and torch doesn't count among what is free."""


def free(on_cuda: bool, processes_here: int) -> float:
    """Bytes that a process may still take on its device: of a CPU's memory, its share."""
    if on_cuda:
        device = min(local_rank(), torch.cuda.device_count() - 1)
        return float(torch.cuda.mem_get_info(device)[0])
    bounds = [_available(MEMINFO)]
    with contextlib.suppress(OSError, ValueError):  # a container may have less than its machine
        bounds.append(int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text()))
    return max(0.0, min(bounds)) / processes_here


def _available(meminfo: Path) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


def found_here(config: TrainConfig, processes: int) -> Machine:
    """This machine as far as memory goes; its rates are not known."""
    on_cuda = uses_cuda(config.hardware)
    here = local_processes() or processes
    return Machine(
        name="this machine",
        on_cuda=on_cuda,
        grouped=False,
        processes=processes,
        nodes=max(1, processes // here),
        memory=free(on_cuda, here),
        host_memory=float("inf"),
        runtime=CUDA if on_cuda else PROGRAM,
        flops=1.0,
        bandwidth=1.0,
        link=0.0,
        network=0.0,
        host_link=1.0,
        disk=1.0,
        price=0.0,
        overhead=0.0,
        is_measured=False,
    )
