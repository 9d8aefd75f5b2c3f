"""What the main process and its device do in a few steps, as torch's profiler sees it; Perfetto opens it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import profile, record_function

from configs.program.console import console
from configs.program.errors import one_line
from train.run_files import TRACE


class Trace:
    """Watches the steps from the first to the last of two, and writes trace.json.gz into the run directory."""

    def __init__(self, directory: Path, steps: list[int]):
        """`steps` are the first and the last; empty for none."""
        self._directory = directory
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._profiler: profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step; after the last one that is wanted the trace is written."""
        if number not in self._steps:
            yield
            return
        if self._profiler is None:
            self._begin()
        with record_function(f"step {number}"):
            yield
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Writes what was seen, if the run ends before the last step that is wanted."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        path = self._directory / TRACE
        try:
            profiler.stop()
            profiler.export_chrome_trace(str(path))
        except Exception as error:  # of the profiler's own kinds; no step depends on it
            self._failed(error)
        else:
            console.print(f"Wrote {path}; https://ui.perfetto.dev opens it", soft_wrap=True)

    def _begin(self) -> None:
        try:
            profiler = profile()  # all kinds of activity that this torch knows on this machine
            profiler.start()
        except Exception as error:
            self._steps = range(0)
            self._failed(error)
        else:
            self._profiler = profiler

    def _failed(self, error: Exception) -> None:
        console.print(f"{TRACE} can't be written ({one_line(error)}); training goes on", soft_wrap=True)
