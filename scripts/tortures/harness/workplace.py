"""A directory with a nano base, the prepared sample, and small runs on them."""

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .forked import ENVIRONMENT, ROOT
from .launch import Launch
from .outcome import last_step
from .processes import kill
from .trials import FailedError, require

STEPS = 24
SETTINGS = {
    "hardware": "cpu",
    "hardware.threads": "1",
    "logging": "quiet",
    "max_steps": str(STEPS),
    "global_batch": "2",
    "save_every": "2",
    "eval_every": "8",
    "lora.rank": "4",
    "lora.dropout": "0.1",
    "optim.lr": "1e-3",
    "logging.routing_every": "4",
}
"""Settings of every run that is not given others. With dropout, because the random numbers too must be those of the run
that was not interrupted."""

Settings = dict[str, str]


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator["Workplace"]:
    """A place for runs; it is removed unless something failed there, or the user named it."""
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="torture-"))
    scratch.mkdir(parents=True, exist_ok=True)
    workplace = Workplace(scratch.resolve(), typed=not options.forked)
    workplace.prepare()
    try:
        yield workplace
    finally:
        workplace.end_all()
        if workplace.keep or options.scratch:
            print(f"The runs are in {scratch}")
        else:
            shutil.rmtree(scratch)


@dataclass
class Workplace:
    """A directory with a nano base, the prepared sample, and runs on them.

    Base, sample and the runs to compare with may be links: several places then share them.
    """

    scratch: Path
    keep: bool = False
    """Whether the directory is worth looking at."""
    typed: bool = True
    """Whether the runs to compare with are made by the command that a user types, or forked too."""
    launches: list["Launch"] = field(default_factory=list)

    @property
    def base(self) -> Path:
        """A random nano Mixtral."""
        return (self.scratch / "base").resolve()

    @property
    def rows(self) -> Path:
        """The sample, prepared."""
        return (self.scratch / "rows").resolve()

    @property
    def wholes(self) -> Path:
        """The runs that nothing happens to."""
        return (self.scratch / "wholes").resolve()

    def prepare(self) -> None:
        """Makes base and rows, and room for the runs to compare with."""
        self.wholes.mkdir(exist_ok=True)
        if not self.base.exists():
            program = (
                "import sys, torch; from train.config.model import *; from train.model import mixtral;"
                "torch.manual_seed(0);"
                "sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, "
                "num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.08);"
                "made = mixtral.random_base(ModelConfig(architecture=ArchitectureConfig(**sizes)));"
                "made.save_pretrained(sys.argv[1])"
            )
            _typed(sys.executable, "-c", program, str(self.base))
        if not self.rows.exists():
            self.prepare_rows("data=sample", self.rows)

    def prepare_rows(self, source: str, output: Path) -> None:
        """Prepares a dataset of a source, a setting of `python -m data`."""
        _typed(sys.executable, "-m", "data", source, "seq_len=128", "eval_fraction=0.02", f"output={output}")

    def settings(self, run: Path, **changed: str) -> Settings:
        """The settings of a launch in the directory `run`; a point in a name is written as two underscores."""
        where = {"dataset": str(self.rows), "model.path": str(self.base), "run_dir": str(run)}
        return SETTINGS | where | {name.replace("__", "."): value for name, value in changed.items()}

    def launch(
        self,
        run: Path,
        processes: int,
        *,
        forked: bool = True,
        by_script: bool = False,
        nodes: int = 1,
        namespaces: tuple[str, ...] = (),
        **changed: str,
    ) -> "Launch":
        """Starts a run, or goes on with one; see `Launch`."""
        settings = self.settings(run, **changed)
        arguments = [f"{name}={value}" for name, value in settings.items()]
        where = {"nodes": nodes, "namespaces": namespaces}
        made = Launch(run, arguments, processes, forked=forked, by_script=by_script, **where)
        self.launches.append(made)
        return made

    def finish(
        self,
        run: Path,
        processes: int,
        *,
        forked: bool = True,
        nodes: int = 1,
        namespaces: tuple[str, ...] = (),
        **changed: str,
    ) -> "Launch":
        """A launch that nothing is done to, to its end.

        Raises:
            FailedError: it does not end well.
        """
        launch = self.launch(run, processes, forked=forked, nodes=nodes, namespaces=namespaces, **changed)
        codes = launch.wait()
        if any(codes):
            raise FailedError(f"a launch that nothing was done to ended with {codes}:\n{launch.said()}")
        return launch

    def reference(self, processes: int, *, nodes: int = 1, **changed: str) -> Path:
        """A run that nothing happens to; made once for the same settings, whoever else wants it meanwhile."""
        on = f"{processes}" if nodes == 1 else f"{processes}on{nodes}"
        name = "-".join(["whole", on, *(f"{key}={value}" for key, value in sorted(changed.items()))])
        run = self.wholes / re.sub(r"[^\w.-]", "_", name)
        with run.with_name(f"{run.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (run / "receipt.json").exists():
                self.finish(run, processes, forked=nodes > 1 or not self.typed, nodes=nodes, **changed)
        return run

    def interrupted(self, name: str, step: int, processes: int = 1, **changed: str) -> Path:
        """A run that was asked to stop after a step, with its checkpoints; made once for each name."""
        run = self.scratch / name
        if not run.exists():
            launch = self.launch(run, processes, **changed)
            launch.until(lambda: launch.has_begun and last_step(run) >= step)
            for pid in launch.ranks().values():
                kill(pid, signal.SIGTERM)
            codes = launch.wait()
            require(set(codes) == {75}, f"a run that was asked to stop ended with {codes}:\n{launch.said()}")
        return run

    def copy(self, run: Path, name: str) -> Path:
        """A copy of a run, to be damaged."""
        return Path(shutil.copytree(run, self.scratch / name))

    def end_all(self) -> None:
        """Ends all processes that are left."""
        for launch in self.launches:
            launch.end()


def _typed(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
