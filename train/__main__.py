"""`python -m train`."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from configs.program.explanations.environment import needed


def exit_with(program: Callable[[], None]) -> NoReturn:
    """Runs the program and ends the process, with the exit code that Python would end with.

    Python's own shutdown takes torch and DeepSpeed apart while their threads still run. Now and then that aborted a
    process that had done its work and saved, or made an error look like a lost process.
    """
    code: int = 1
    with contextlib.suppress(OSError):  # nobody may be reading any more
        try:
            program()
            code = 0
            if finished := os.environ.get("LAUNCH_FINISHED"):  # scripts/launch: a launcher's own code may be wrong
                Path(finished, os.environ.get("RANK", "0")).touch()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                sys.stderr.write(f"{stop.code}\n")
            else:
                code = stop.code or 0
        except Exception:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


with needed("train"):
    from train.failures import signals

    signals.follow_launcher()

    from train.program import main

exit_with(main)
