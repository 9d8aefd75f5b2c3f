"""The entry point of `python -m train`. Settings that are wrong are refused before torch is imported, which takes
seconds."""

import contextlib

from configs.program import entry
from configs.program.errors import UserError
from configs.program.jobs import Job
from configs.program.launch import on_several_machines
from train.config.train import TrainConfig


def main() -> None:
    """The program."""
    try:
        entry.run("train", "train", TrainConfig, run, sweep=sweep)
    except SystemExit as stop:
        if stop.code == entry.EXIT_USER_ERROR and on_several_machines():
            from train.engine.processes import check_launch
            from train.failures.meeting import tell_mistake

            with contextlib.suppress(UserError):  # the launcher's variables are wrong: nobody can be reached
                tell_mistake(str(stop.__context__), *check_launch())
        raise


def run(config: TrainConfig) -> None:
    """Trains, or does another task, with settings that fit each other."""
    config.check()
    from train import run as heavy

    heavy.run(config)


def sweep(jobs: list[Job[TrainConfig]]) -> int:
    """Runs the jobs of `--multirun` and gives the exit code."""
    from train import sweep as several

    return several.sweep(jobs)
