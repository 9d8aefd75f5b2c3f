import os
import sys

from train import signals

signals.follow_launcher()

from train.run import main  # noqa: E402 - it takes seconds

code = 0
try:
    main()
except SystemExit as stop:
    if not isinstance(stop.code, int | None):
        raise
    code = stop.code or 0
sys.stdout.flush()
sys.stderr.flush()
# Nothing is left to do. Python's own end takes torch and DeepSpeed apart while threads of theirs still run, which now
# and then aborted a process that had done its work and saved.
os._exit(code)
