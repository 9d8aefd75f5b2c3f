import contextlib
import os
import sys

from train.failures import signals

signals.follow_launcher()

from train.run import main  # noqa: E402 - it takes seconds

code = 1
with contextlib.suppress(OSError):  # nobody may be reading any more
    try:
        main()
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
        else:
            code = stop.code or 0
    except Exception:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
# Nothing is left to do. Python's own end takes torch and DeepSpeed apart while threads of theirs still run, which now
# and then aborted a process that had done its work and saved, or made an error look like a lost process.
os._exit(code)
