"""A process of its own for each try, with bounds on time and memory; forked, as imports take longer than a try."""

import contextlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.program.errors import UserError, VerificationError, shown

SECONDS, PROCESSOR_SECONDS = 120, 40
"""After which a try counts as one that hangs: by the clock, as a pipe that never ends takes no time of a processor, and
of a processor. What is bounded in the programs themselves ends far below."""
MEMORY = 6 << 30
"""Bytes that a try may have beside what its libraries map."""
REFUSED, CRASHED = 2, 70


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a try ended."""

    kind: str
    """`accepted`, `refused`, `traceback`, `hang` or `signal`."""
    said: str
    """What it wrote to stderr, at most its end."""
    result: Any = None
    """What it computed, if it was accepted."""
    seconds: float = 0.0
    """Seconds of processor time that it took."""


class Child:
    """A try that runs."""

    def __init__(self, action: Callable[[], Any], directory: Path):
        """Forks; the action's working directory is `directory`, which keeps what it says and returns beside it."""
        self._log, self._result = (
            directory.with_name(f"{directory.name}.log"),
            directory.with_name(f"{directory.name}.result"),
        )
        self._deadline = time.monotonic() + SECONDS
        self._pid = os.fork()
        if self._pid == 0:
            _run(action, directory, self._log, self._result)

    def poll(self) -> Outcome | None:
        """How it ended; None while it runs."""
        pid, status, used = os.wait4(self._pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() < self._deadline:
                return None
            os.killpg(self._pid, signal.SIGKILL)
            os.wait4(self._pid, 0)
            return Outcome("hang", f"after {SECONDS} s: {self._said()}")
        seconds = used.ru_utime + used.ru_stime
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)  # what it started
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            hangs = number == signal.SIGXCPU
            return Outcome(
                "hang" if hangs else "signal", f"{signal.Signals(number).name}: {self._said()}", None, seconds
            )
        said, code = self._said(), os.WEXITSTATUS(status)
        if code == 0:
            return Outcome("accepted", said, json.loads(self._result.read_text()), seconds)
        if code in (1, REFUSED) and said.count("\n") == 1:  # the sentence, and nothing before it
            return Outcome("refused", said, None, seconds)
        return Outcome("traceback", f"exit code {code}: {said}", None, seconds)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""


def _run(action: Callable[[], Any], directory: Path, log: Path, result: Path) -> None:
    """The child: like a program's `main`, without Hydra; never returns."""
    code = CRASHED
    try:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 2)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        with directory.with_name(f"{directory.name}.out").open("wb") as file:
            os.dup2(file.fileno(), 1)
        os.chdir(directory)
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 5))
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        import torch

        torch.set_num_threads(1)
        value = action()
        sys.stdout.flush()
        result.write_text(json.dumps(value, default=str))
        code = 0
    except UserError as error:
        os.write(2, f"{shown(str(error))}\n".encode())
        code = REFUSED
    except VerificationError as error:
        os.write(2, f"{shown(str(error))}\n".encode())
        code = 1
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else CRASHED if leaving.code else 0
        result.write_text("null")
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)
