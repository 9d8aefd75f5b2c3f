"""The processes of a launch: joining and leaving them, and what they agree on."""

import contextlib
import datetime
import io
import os
import socket
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from configs.program import gpus
from configs.program.errors import UserError, say
from configs.program.launch import local_processes, local_rank, threads
from train.config.engine import HardwareConfig
from train.config.train import TrainConfig
from train.engine.cpu import alone, compile_apart, forget_shared_memory, keep_freed_memory

LONGEST_WAIT = datetime.timedelta(days=20)
"""How long a collective waits: practically for ever (torch counts it in milliseconds), because it is the guard that
ends a run whose processes make no progress."""
OPERATOR = "deepspeed_shm_comm"
"""The name of DeepSpeed's compiled collective over the memory that CPU processes of a machine share."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run."""

    rank: int
    """The process rank, from 0; not a LoRA rank."""
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


def join_processes(config: HardwareConfig) -> Processes:
    """Joins the processes of the launch (or makes a group of one), chooses the device and divides the cores.

    Raises:
        UserError: CUDA is asked for and there is none, or two processes use the same GPU.
    """
    check_launch()
    check_device(config)
    on_cuda = uses_cuda(config)
    if config.device == "auto" and local_rank() == 0 and (why := gpus.unusable()):
        say("train", f"hardware.device=auto: on the CPU, because {why}")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    if not on_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
        # The processes of a machine share its cores; left alone, each would start a thread for every one of them.
        torch.set_num_threads(config.threads or threads())
        keep_freed_memory()
    else:
        torch.cuda.set_device(gpus.take_device())  # before deepspeed is imported, which may touch the current device
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has deprecated, at every gather.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    with contextlib.redirect_stdout(io.StringIO()):  # every process would print that an op was built
        if not on_cuda:
            with alone() as lock:
                if deepspeed.ops.__compatible_ops__.get(OPERATOR):
                    code = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
                    compile_apart(OPERATOR, code, lock)
                build_shm_op()  # init_distributed would do it too, and wait for ever for a build that was killed
        try:
            backend = "nccl" if on_cuda else "gloo"
            deepspeed.init_distributed(dist_backend=backend, timeout=LONGEST_WAIT, verbose=False)
        except torch.distributed.DistBackendError as error:
            if "Duplicate GPU" not in str(error):
                raise
            raise UserError(
                f"LOCAL_RANK={local_rank()}: another process uses the same GPU; start as many processes as there "
                f"are GPUs, or have the scheduler bind another to each"
            ) from error
    if not on_cuda:
        forget_shared_memory()
        # Without it DeepSpeed starts numactl in each backward, to count what it takes for this machine's devices. With
        # it one process alone would have been given 66 MiB of shared memory above, which DeepSpeed leaves behind.
        if here := local_processes() or (1 if torch.distributed.get_world_size() == 1 else None):
            os.environ["LOCAL_SIZE"] = str(here)
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def check_launch() -> tuple[int, int]:
    """The number of this process and how many were launched, as the launcher says.

    Raises:
        UserError: a variable of the launch is missing, or has a value by which no process can be found.
    """
    if "RANK" not in os.environ:
        return 0, 1
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"{name}: the launcher set RANK without it; launch with deepspeed or torchrun, or set it")
    for name, least, most in (
        ("WORLD_SIZE", 1, 2**31),
        ("RANK", 0, int(os.environ["WORLD_SIZE"]) - 1 if os.environ["WORLD_SIZE"].isdecimal() else 2**31),
        ("LOCAL_RANK", 0, 2**31),
        ("LOCAL_WORLD_SIZE", 1, 2**31),
        ("LOCAL_SIZE", 1, 2**31),
        ("MASTER_PORT", 1, 2**16 - 1),
    ):
        text = os.environ.get(name)
        if text and not (text.isdecimal() and least <= int(text) <= most):
            raise UserError(
                f"{name}={text}: it must be a whole number from {least} to {most}; correct the variable, or leave it "
                f"to the launcher"
            )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def check_device(config: HardwareConfig) -> None:
    """Raises `UserError` if CUDA is asked for and torch can't use it."""
    gpus.check(config.device, "hardware.device")


def uses_cuda(config: HardwareConfig) -> bool:
    """Whether the run uses CUDA; a plan for another machine says so by `hardware.device`."""
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def node_sizes(config: TrainConfig) -> dict[str, Any]:
    """The variables that must be the same on all nodes."""
    return {"LOCAL_WORLD_SIZE": local_processes()} if config.deepspeed.node_copy else {}


def free_port() -> str:
    """A port of this machine at which nobody listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def leave_processes() -> None:
    """Leaves the group, once the guard knows that every process has done its work."""
    torch.distributed.destroy_process_group()


def seed(*numbers: int) -> None:
    """Starts torch's random numbers, on every device, from a sequence of numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def agree(value: Any) -> Any:
    """The main process's value, on every process."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank, on each of them; collective."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def check_same(values: dict[str, Any]) -> None:
    """Compares values, by name, across the processes; collective.

    Raises:
        UserError: a process has another value than process 0. The sentence names the first that differs.
    """
    everywhere = gathered(values)
    for rank, theirs in enumerate(everywhere):
        for name in sorted(values.keys() | theirs.keys()):
            if theirs.get(name) != everywhere[0].get(name):
                raise UserError(
                    f"{name}={theirs.get(name)}: that is what process {rank} was given, and process 0 has "
                    f"{everywhere[0].get(name)}; give all processes the same"
                )
