"""What this machine reaches: products, passes over memory, a collective between the launch's processes, its disk.

Every process of the launch measures at the same time, as they will compute; it takes less than a minute.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from configs.program.launch import local_processes, threads
from train.config.train import TrainConfig
from train.engine.processes import agree, join_processes, leave_processes
from train.model.mixtral import DTYPES
from train.planning.given.beside import seconds_beside
from train.planning.given.here import found_here
from train.planning.given.layer import seconds_of_layer
from train.planning.given.machine import Machine
from train.planning.given.rows import Rows
from train.planning.given.sizes import Sizes

COPIED = 1 << 28
"""Bytes of the copy that is timed: more than caches hold."""
SENT = 1 << 25
"""Bytes of the collective that is timed, of all processes together."""
READ = 1 << 28
"""Bytes that are read from the disk at most."""


def measured_here(config: TrainConfig, sizes: Sizes, rows: Rows, seconds: float = 6.0) -> Machine:
    """This machine. Collective if the launch has several processes.

    Args:
        config: of the run.
        sizes: whose products are measured.
        rows: whose micro-batches they are of.
        seconds: for the products; all else takes a few more.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    joined = join_processes(config.hardware)
    processes = launched if launched > 1 else config.hardware.processes
    machine = found_here(config, processes)
    device = joined.device
    before = torch.get_num_threads()
    if not machine.on_cuda:
        torch.set_num_threads(config.hardware.threads or max(1, threads() // (1 if local_processes() else processes)))
    dtype = DTYPES[config.model.dtype]
    found = replace(
        machine,
        name=f"this machine ({torch.cuda.get_device_name() if machine.on_cuda else 'CPU'})",
        flops=_products(sizes, rows.length * config.micro_batch, dtype, device, seconds),
        bandwidth=_copies(device),
        link=_collective(device) if launched > 1 else 0.0,
        network=config.cluster.network * 1e9,
        host_link=config.cluster.host_link * 1e9,
        disk=_disk(config) or config.cluster.disk * 1e9,
        price=config.cluster.price,
        memory=config.cluster.memory * 1e9 or machine.memory,
        host_memory=config.cluster.host_memory * 1e9 or machine.host_memory,
        overhead=_launches(device),
        is_measured=True,
        layer=_layer(config, sizes, rows, device, machine.memory),
        beside=seconds_beside(config, sizes, joined),
    )
    torch.set_num_threads(before)
    found = agree(found)
    leave_processes()
    return found


def _layer(config: TrainConfig, sizes: Sizes, rows: Rows, device: torch.device, memory: float) -> dict[str, float]:
    """Seconds of a layer and the head; none if even one layer needs more than half of what is free."""
    of_layer = sum(tensor.bytes for unit in sizes.units if unit.layer in (None, 0) for tensor in unit.tensors)
    in_full = of_layer * (4 if sizes.quantised else 1)  # while it is quantised
    return seconds_of_layer(config, sizes, rows, device) if in_full < memory / 2 else {}


def _timed(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds that a call takes: the least of those that fit in the time, the first left out; two at least."""
    run()
    until, best = time.perf_counter() + seconds, float("inf")
    while best == float("inf") or time.perf_counter() < until:
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _products(sizes: Sizes, tokens: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Operations per second of the products of an expert and of attention, weighted as a layer has them."""
    config = sizes.config
    H, I, E, k = config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok  # noqa: E741
    rows = max(1, tokens * k // E)
    kinds = [(rows, H, 2 * I, E), (rows, I, H, E), (tokens, H, H, 2), (min(tokens, 256), H, config.vocab_size, 1)]
    operations, took = 0.0, 0.0
    for count, size_in, size_out, times in kinds:
        x = torch.randn(count, size_in, device=device).to(dtype)
        weight = torch.randn(size_out, size_in, device=device).to(dtype)
        out = torch.empty(count, size_out, device=device, dtype=dtype)
        back = torch.empty(count, size_in, device=device, dtype=dtype)

        def forward(x: torch.Tensor = x, weight: torch.Tensor = weight, out: torch.Tensor = out) -> None:
            torch.mm(x, weight.mT, out=out)

        def backward(out: torch.Tensor = out, weight: torch.Tensor = weight, back: torch.Tensor = back) -> None:
            torch.mm(out, weight, out=back)

        for run in (forward, backward):
            took += times * _timed(run, device, seconds / (2 * len(kinds)))
            operations += times * 2.0 * count * size_in * size_out
    return operations / took


def _copies(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / _timed(lambda: target.copy_(source), device, 0.5)


def _launches(device: torch.device) -> float:
    """Seconds that an operation on a few numbers takes."""
    few = torch.ones(16, device=device)

    def run() -> None:
        for _ in range(100):
            few.add_(1)

    return _timed(run, device, 0.1) / 100


def _collective(device: torch.device) -> float:
    """Bytes per second that a process receives when all gather each other's parts."""
    count = torch.distributed.get_world_size()
    part = torch.ones(SENT // count // 4, device=device)
    whole = torch.empty(part.numel() * count, device=device)
    took = []
    for _ in range(6):  # the same number on every process
        _wait(device)
        started = time.perf_counter()
        torch.distributed.all_gather_into_tensor(whole, part)
        _wait(device)
        took.append(time.perf_counter() - started)
    return SENT * (count - 1) / count / min(took[1:])


def _disk(config: TrainConfig) -> float | None:
    """Bytes per second at which the base is read, past the kernel's cache; None if it isn't in a directory here."""
    directory = Path(config.model.path or "")
    files = sorted(directory.glob("*.safetensors")) if config.model.path and directory.is_dir() else []
    if not files:
        return None
    with contextlib.suppress(OSError), files[0].open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read, started = 0, time.perf_counter()
        while read < READ and (content := file.read(1 << 22)):
            read += len(content)
        return read / max(time.perf_counter() - started, 1e-6)
    return None
