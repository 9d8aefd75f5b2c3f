"""The way in of `python -m train`: what settings tell alone is told before torch is imported, which takes seconds."""

from configs.program import entry
from configs.program.jobs import Job
from train.config.train import TrainConfig


def main() -> None:
    """The program."""
    entry.run("train", "train", TrainConfig, run, sweep=sweep)


def run(config: TrainConfig) -> None:
    """Trains, or does another task, with settings that fit each other."""
    config.check()
    from train import run as heavy

    heavy.run(config)


def sweep(jobs: list[Job[TrainConfig]]) -> int:
    """Runs the jobs of `--multirun` and gives the exit code."""
    from train import sweep as several

    return several.sweep(jobs)
