"""`python -m data`: prepares a dataset, or shows what is in a prepared one."""

from configs.program import entry
from data.config import PrepareConfig
from data.prepare import prepare
from data.prepared.preview import preview
from data.prepared.report import report

TASKS = {"prepare": prepare, "preview": preview, "report": report}


def main() -> None:
    """The program."""
    entry.run("data", "prepare", PrepareConfig, run)


def run(config: PrepareConfig) -> None:
    """Does the task."""
    config.check()
    TASKS[config.task](config)
