"""This machine without measuring: the memory that is free for a process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from configs.program.launch import CGROUPS, OWN_CGROUPS, local_processes, local_rank
from train.config.train import TrainConfig
from train.engine.processes import uses_cuda
from train.lora.products import has_grouped_kernel
from train.model.mixtral import DTYPES
from train.planning.given.machine import GB, Machine

MEMINFO = Path("/proc/meminfo")
PROGRAM = 0.55 * GB
"""Bytes of a CPU process that are not tensors: Python, torch, transformers, DeepSpeed. Fitted to 28 runs, less
the 0.07 GB of torch's compiler, which these still imported."""
SHARED_BUFFER = 8 * 2**20
"""Bytes that are touched of the buffer of 66 MiB that each CPU process of DeepSpeed has for its collectives, and that
all of them map. Fitted as well."""
CUDA = 0.6 * GB
"""Bytes of a GPU that libraries are assumed to take for themselves once a process uses it, beside what torch gives to
tensors."""


def free(on_cuda: bool, processes_here: int) -> float:
    """Bytes that a process may still take on its device: of a CPU's memory, its share."""
    if on_cuda:
        device = min(local_rank(), torch.cuda.device_count() - 1)
        return float(torch.cuda.mem_get_info(device)[0])
    return max(0.0, min([_available(MEMINFO), *_left_in_groups(CGROUPS, OWN_CGROUPS)])) / processes_here


def _available(meminfo: Path) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


def _left_in_groups(mounted: Path, own: Path) -> Iterator[float]:
    """What is left of the bound of each of this process's control groups: a container or a job may have less than its
    machine. What the kernel keeps of files doesn't count as taken: it gives that back."""
    with contextlib.suppress(OSError, ValueError):
        lines = own.read_text(encoding="utf-8").splitlines()
        group = next((line[3:] for line in lines if line.startswith("0::")), "/")
        for folder in (mounted / group.lstrip("/"), *(mounted / group.lstrip("/")).parents):
            if folder.is_relative_to(mounted):
                yield from _left_in(folder)


def _left_in(folder: Path) -> Iterator[float]:
    with contextlib.suppress(OSError, ValueError):  # there is no bound, or it is "max"
        bound, taken = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        of_kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield float(bound - taken + int(of_kinds["active_file"]) + int(of_kinds["inactive_file"]))


def found_here(config: TrainConfig, processes: int) -> Machine:
    """This machine as far as memory goes; its rates are not known."""
    on_cuda = uses_cuda(config.hardware)
    here = local_processes() or processes
    capability = torch.cuda.get_device_capability() if on_cuda else None
    return Machine(
        name="this machine",
        on_cuda=on_cuda,
        grouped=has_grouped_kernel(DTYPES[config.model.dtype], capability),
        processes=processes,
        nodes=max(1, processes // here),
        memory=free(on_cuda, here),
        host_memory=free(on_cuda=False, processes_here=1),
        runtime=CUDA if on_cuda else PROGRAM + (SHARED_BUFFER * here if here > 1 else 0),
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
