"""How and on what a figure was made: commit, versions, machine, command; recorded beside figures."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.program.secrets import redacted

CPUINFO = Path("/proc/cpuinfo")


def provenance(packages: Iterable[str]) -> dict[str, Any]:
    """Command, commit and the versions of the installed ones of `packages`."""
    return {"command": redacted(sys.orig_argv), "commit": commit(), "versions": versions(packages)}


def commit() -> str | None:
    """The checkout's commit, with a mark if files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, memory in bytes, Python and system."""
    return {
        "processor": _field(CPUINFO, "model name") or platform.processor(),
        "cpus": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _field(path: Path, name: str) -> str | None:
    """The value of the first line `name: value`."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
