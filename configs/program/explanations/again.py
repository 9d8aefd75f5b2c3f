"""The command with which a run goes on: the one that was typed, found in the processes above this one."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from configs.program.secrets import redact

OF_LAUNCHER = "deepspeed.launcher.launch"
"""What DeepSpeed starts on a node, and nobody types."""


def command(program: str, run_dir: Path) -> str | None:
    """What to type, for a shell, to go on in `run_dir`; None if that is not to be found out.

    A launcher hands on its own arguments, so the one that a person started is the topmost of the processes above this
    one whose arguments end alike. Over ssh and under Slurm nothing above says how the run was started.
    """
    own = sys.orig_argv
    if program not in own or "-m" not in own:
        return None
    settings = own[own.index(program) + 1 :]
    typed = own
    for above in _above(os.getppid()) if settings else ():
        if above[-len(settings) :] != settings or "-c" in above[:3]:
            break
        typed = above
    launched = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if OF_LAUNCHER in typed or (typed is own and launched):
        return None
    words = [word for word in _as_typed(typed) if not re.match(r"\+*overwrite=", word)]
    if not any(re.match(r"\+*run_dir=", word) for word in words):
        words.append(f"run_dir={run_dir}")
    return redact(shlex.join(words))


def _above(process: int) -> Iterator[list[str]]:
    """The command lines of a process and of those above it."""
    while process > 1:
        try:
            line = Path(f"/proc/{process}/cmdline").read_bytes()
            status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        yield [os.fsdecode(word) for word in line.split(b"\0")[:-1]]
        process = int(status.rpartition(")")[2].split()[1])


def _as_typed(words: list[str]) -> list[str]:
    """Without the interpreter that the kernel has put before a script, and without the folder if PATH finds it."""
    interpreted = re.fullmatch(r"(?:python[\d.]*|(?:ba)?sh)", Path(words[0]).name) and not words[1].startswith("-")
    if interpreted and (os.access(words[1], os.X_OK) or words[1].endswith(".sh")):
        words = words[1:]
    name = Path(words[0]).name
    return [name if shutil.which(name) == words[0] else words[0], *words[1:]]
