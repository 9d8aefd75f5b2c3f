"""What the launcher says about this process."""

import os

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
