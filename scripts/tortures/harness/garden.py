"""A garden: copies of a run, a base, rows and an adapter, in which code is planted, and a canary that tells whether any
was executed."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .forked import ENVIRONMENT, ROOT
from .launch import PATIENCE
from .trials import require
from .workplace import Workplace

PICKLES = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "model.pt",
    "optimizer.pt",
    "scheduler.pt",
    "random_states_0.pkl",
    "training_args.bin",
    "latest",
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt",
)
"""Names that torch, transformers, PEFT, accelerate and DeepSpeed give to pickles."""
YAML = ("config.yaml", "train_config.yaml", "hydra.yaml")
MODULE = "planted_module"
"""A module that could be imported: its directory is on the path."""


class _Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self._command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self._command,)


@dataclass
class Garden:
    """The directories of one trial: copies of run, base, rows and adapter, and a canary of its own."""

    workplace: Workplace
    top: Path

    def __post_init__(self) -> None:
        shutil.rmtree(self.top, ignore_errors=True)

    @property
    def canary(self) -> Path:
        """What is there if anything was executed."""
        return self.top / "canary"

    @property
    def command(self) -> str:
        """What makes it."""
        return f"touch {self.canary}"

    def copy(self, source: Path, name: str) -> Path:
        """A copy of a directory to plant in."""
        return Path(shutil.copytree(source, self.top / name))

    def base(self) -> Path:
        """A copy of the base."""
        return self.copy(self.workplace.base, "base")

    def rows(self) -> Path:
        """A copy of the prepared dataset."""
        return self.copy(self.workplace.rows, "rows")

    def run(self) -> Path:
        """A copy of a run that was stopped and has two checkpoints."""
        return self.copy(self.workplace.interrupted("stopped-for-plants", 7, max_steps="10"), "run")

    def adapter(self) -> Path:
        """A copy of an adapter."""
        return self.copy(self.workplace.reference(1, max_steps="10") / "adapter", "adapter")

    def pickle(self, path: Path, *, torch_format: bool = False) -> None:
        """Plants a pickle, plain or in torch's file format."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if torch_format:
            torch.save(_Evil(self.command), path)
        else:
            path.write_bytes(pickle.dumps(_Evil(self.command)))

    def tag(self) -> str:
        """YAML that calls a function if tags are obeyed."""
        return f"planted: !!python/object/apply:os.system ['{self.command}']\n"

    def target(self) -> dict[str, Any]:
        """What Hydra instantiates if it is asked to."""
        module = self.top / "called.py"
        self.module(module)
        return {"_target_": "runpy.run_path", "path_name": str(module)}

    def module(self, path: Path) -> None:
        """Plants Python."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"import os\nos.system({self.command!r})\n")

    def beside(self, directory: Path) -> None:
        """Plants all kinds beside what is there."""
        for number, name in enumerate(PICKLES):
            if not (directory / name).exists():
                self.pickle(directory / name, torch_format=bool(number % 2))
        for name in YAML:
            if not (directory / name).exists():
                target = "\n".join(f"  {key}: {value}" for key, value in self.target().items())
                (directory / name).write_text(f"{self.tag()}model:\n{target}\n")
        for name in ("modeling_mixtral", "configuration_mixtral", "tokenization_planted", directory.name, "__init__"):
            self.module(directory / f"{name}.py")

    def edit(self, path: Path, **values: Any) -> None:
        """Adds to a JSON file."""
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def type(self, program: str, *arguments: str, expect: int) -> dict[str, Any]:
        """Runs a program as a user does, with `planted_module` on the path; what it said at last."""
        modules = self.top / "modules"
        self.module(modules / f"{MODULE}.py")
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(modules)}
        done = subprocess.run(
            [sys.executable, "-m", program, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        require(not self.canary.exists(), f"it was executed: {program} {' '.join(arguments)}\n{done.stderr}")
        message = f"{program} {' '.join(arguments)} ended with {done.returncode}, not {expect}:\n{done.stderr}"
        require(done.returncode == expect, message)
        said = [line for line in said if line.startswith(f"{program}: ")] or said
        return {"exit_code": done.returncode, "said": said[-1].replace(str(self.top), "…") if said else ""}

    def train(
        self,
        run: Path,
        *more: str,
        expect: int,
        base: Path | None = None,
        rows: Path | None = None,
        options: tuple[str, ...] = (),
    ) -> Any:
        """`python -m train` in a run directory; Hydra takes `options` before settings alone."""
        settings = self.workplace.settings(run, max_steps="10")
        settings |= {"model.path": str(base or self.workplace.base), "dataset": str(rows or self.workplace.rows)}
        given = [f"{name}={value}" for name, value in settings.items()]
        return self.type("train", *options, *given, *more, expect=expect)

    def ask(self, *arguments: str, expect: int) -> dict[str, Any]:
        """`python -m inference`."""
        return self.type("inference", "prompt=Hello", "max_new_tokens=2", "device=cpu", *arguments, expect=expect)
