"""What the launcher and the machine leave to this process: its number, and how many cores it may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")

OWN_LOCAL_RANK = "OPENHERMES_LOCAL_RANK"
"""Holds this process's number on its machine if LOCAL_RANK, by which DeepSpeed finds the device, is another."""


def local_rank() -> int:
    """This process's number among those of its machine, from 0."""
    text = os.environ.get(OWN_LOCAL_RANK) or os.environ.get("LOCAL_RANK") or "0"
    return int(text) if text.isdecimal() else 0  # other texts are refused before processes meet


def local_processes() -> int | None:
    """How many processes this machine has; None if no launcher says."""
    text = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "0"
    return (int(text) or None) if text.isdecimal() else None


def on_several_machines() -> bool:
    """Whether the launch has processes on other machines than this one, as far as the launcher says."""
    text = os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else ""
    return text.isdecimal() and int(text) > (local_processes() or 1)


def cores() -> int:
    """The CPU cores that this process may use: those that it is bound to, or fewer if its container has a quota."""
    return max(1, int(min(len(os.sched_getaffinity(0)), _quota(CGROUPS, OWN_CGROUPS))))


def threads() -> int:
    """How many threads this process should compute with: OMP_NUM_THREADS, or its share of the machine's cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # nested levels are separated by commas
    return int(asked) if asked.isdecimal() and int(asked) else max(1, cores() // (local_processes() or 1))


def _quota(mounted: Path, own: Path) -> float:
    """The least quota, in cores, of a process's control groups, of version 1 or 2; infinite if none has one."""
    least = math.inf
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return least
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for tree in (mounted / controllers, mounted / "cpu", mounted / "unified", mounted):
            for folder in (tree / group.lstrip("/"), *(tree / group.lstrip("/")).parents):
                if folder.is_relative_to(tree):  # within a container the group's own path may not be mounted
                    least = min([least, *_quotas_in(folder)])
    return least


def _quotas_in(folder: Path) -> Iterator[float]:
    """`cpu.max` of version 2 is "quota period" or "max period"; version 1 has a file for each, and -1 for no quota."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = map(float, " ".join((folder / name).read_text() for name in names).split())
        except (OSError, ValueError):  # there is none, or it says max
            continue
        if quota > 0 < period:
            yield quota / period
