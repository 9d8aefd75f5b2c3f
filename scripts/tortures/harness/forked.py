"""Programs in processes that are forked from a server: starting Python with torch and DeepSpeed takes longer than what
they are started for.

The server, `multiprocessing`'s, has imported what they need (server.py). Each process is one of its own, with its own
memory, threads and guard, that runs the program's `main` and dies of real signals.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

from .wire import enter

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "400", "WANDB_MODE": "disabled"}
"""The environment of every process here, the server included."""


def fork(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    output: Path,
    errors: Path,
    namespace: str | None = None,
) -> BaseProcess:
    """Starts `python -m MODULE ARGUMENTS` in the checkout, and in a network namespace; what it prints is appended to
    the two files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.tortures.harness.server"])
    made = context.Process(target=_run, args=(module, arguments, environment, str(output), str(errors), namespace))
    # The server starts with the first process: it imports this checkout, wherever it is started.
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    with patch.dict(os.environ, ENVIRONMENT, PYTHONPATH=path):
        made.start()
    return made


def _run(
    module: str, arguments: list[str], environment: dict[str, str], output: str, errors: str, namespace: str | None
) -> None:
    for path, descriptor in ((output, 1), (errors, 2)):
        with Path(path).open("ab", buffering=0) as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.update(environment)
    if namespace is not None:
        enter(namespace)
    os.chdir(ROOT)
    sys.argv = [f"python -m {module}", *arguments]
    import train

    assert train.__file__ is not None and Path(train.__file__).is_relative_to(ROOT), train.__file__
    runpy.run_module(module, run_name="__main__", alter_sys=True)
