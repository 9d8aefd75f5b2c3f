"""A real run's plan: the check that it will find its memory, and what its receipt holds beside what was measured."""

import copy
from dataclasses import replace

import torch

from configs.program.errors import UserError
from data.disk.weights import local_directory
from train.config.catalogue import cluster_of
from train.config.train import TrainConfig
from train.planning.given.here import found_here
from train.planning.given.machine import GB, Machine, of_catalogue
from train.planning.given.rows import Rows
from train.planning.given.sizes import sizes_of
from train.planning.memory import memory
from train.planning.speed import speed

Expected = dict[str, float | str]
"""By the names of metrics.jsonl: a figure, or why there is none."""
UNKNOWN = "not planned: its rates aren't known (task=plan measures them)"
"""Said of a machine that is not in the catalogue."""


def check_room(config: TrainConfig, rows: Rows, processes: int) -> Expected:
    """Plans a run before anything is loaded, and compares its peak with the memory that is free.

    Args:
        config: of the run; a hub's base has been fetched.
        rows: of its dataset.
        processes: of the run.

    Returns:
        Peak memory of a process in GiB as it is measured (a GPU's tensors alone), seconds of a step and tokens a
        second; nothing for another task than training.

    Raises:
        UserError: a process would need more than is free, and `plan.check` is on.
    """
    if config.task != "train":
        return {}
    config = copy.deepcopy(config)
    if config.model.path is not None:
        named = f"model.path={config.model.path}"
        config.model.path = str(local_directory(config.model.path, config.model.revision, named))
    sizes, machine = sizes_of(config), found_here(config, processes)
    planned = memory(config, sizes, rows.length * config.micro_batch, processes, machine)
    if config.plan.check and planned.peak > machine.memory:
        what = "the GPU" if machine.on_cuda else "this machine"
        raise UserError(
            f"micro_batch={config.micro_batch}: by the plan each process needs {planned.peak / GB:.1f} GB at its peak "
            f"({planned.where}), and {machine.memory / GB:.1f} GB of {what} are free for it; task=plan shows what "
            f"would fit, and plan.check=false tries it anyway"
        )
    tensors = planned.peak - machine.runtime * machine.on_cuda
    expected: Expected = {"memory_gib": tensors / 2**30, "seconds": UNKNOWN, "tokens_per_second": UNKNOWN}
    if (known := _in_catalogue(config, machine)) is not None:
        step = speed(config, sizes, rows, config.batch(processes), known)
        expected |= {"seconds": step.step, "tokens_per_second": step.tokens_per_second}
    return expected


def _in_catalogue(config: TrainConfig, machine: Machine) -> Machine | None:
    """The machine with the rates of its GPU's data sheet; None without one."""
    cluster = cluster_of(torch.cuda.get_device_name()) if machine.on_cuda else None
    if cluster is None:
        return None
    of_node = machine.processes // machine.nodes
    return of_catalogue(replace(cluster, gpus=of_node, nodes=machine.nodes), config.model.dtype)
