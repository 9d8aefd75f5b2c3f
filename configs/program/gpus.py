"""NVIDIA GPUs as a process meets them: why torch can't use them, and which one is this process's."""

import contextlib
import os
import re
from pathlib import Path

import torch

from configs.program.errors import UserError, one_line
from configs.program.launch import OWN_LOCAL_RANK, local_rank

DEVICES = Path("/dev")
DRIVER = Path("/proc/driver/nvidia/version")


def check(device: str, setting: str) -> None:
    """Raises `UserError` if `device`, the value of the setting of that name, is CUDA and torch can't use it."""
    if device == "cuda" and not torch.cuda.is_available():
        why = unusable() or "torch finds no CUDA GPU here"
        raise UserError(f"{setting}=cuda: {why}; use {setting}=cpu to do without")


def unusable(devices: Path = DEVICES, driver: Path = DRIVER) -> str | None:
    """Why torch can't use an NVIDIA GPU that this process may use, and what helps; None if there is none, or it can."""
    if torch.cuda.is_available() or not _may_use_one(devices):
        return None
    said = "nothing"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = one_line(error)
    version = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text()) if driver.is_file() else None
    found = f"an NVIDIA GPU with driver {version[0] if version else 'unknown'} is here"
    if torch.version.cuda is None:
        return f"{found}, and torch {torch.__version__} was built without CUDA; install a build of torch with it"
    return (
        f"{found}, and torch {torch.__version__}, built for CUDA {torch.version.cuda}, can't use it (it says: {said}); "
        f"install a newer driver, or a build of torch for the CUDA that this driver knows (nvidia-smi names it)"
    )


def _may_use_one(devices: Path) -> bool:
    """Whether there is a GPU that nothing hides: neither the launcher's choice nor, in a job, its control group."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        return False
    for device in devices.glob("nvidia[0-9]*"):
        with contextlib.suppress(OSError):
            os.close(os.open(device, os.O_RDWR))
            return True
    return False


def take_device() -> int:
    """The CUDA device of this process; from now on LOCAL_RANK names it, because DeepSpeed reads it from there.

    It has the process's number on its machine. If a scheduler has bound one GPU to each task, that is all that the
    task sees, and it has the number 0.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    number, seen, shown = local_rank(), torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    bound = seen == 1 and shown != "" and "," not in shown
    if number >= seen and not bound:
        raise UserError(
            f"LOCAL_RANK={number}: this process sees {seen} GPUs, and each process needs one of its own; start as many "
            f"processes as there are GPUs, or let each see all of them (under Slurm srun --gpu-bind=none)"
        )
    device = 0 if bound else number
    if device != number:
        os.environ |= {OWN_LOCAL_RANK: str(number), "LOCAL_RANK": str(device)}
    return device
