"""`python -m data`: prepares a dataset, or shows what is in a prepared one."""

from importlib import import_module

from configs.program import entry
from data.config import PrepareConfig

FUNCTIONS = {
    "prepare": ("data.prepare", "prepare"),
    "preview": ("data.prepared.preview", "preview"),
    "report": ("data.prepared.report", "report"),
}
"""The module and the function of each task."""


def main() -> None:
    """The program."""
    entry.run("data", "prepare", PrepareConfig, run)


def run(config: PrepareConfig) -> None:
    """Does the task. Its module, which needs Arrow, is imported after the checks, so that mistakes show at once."""
    config.check()
    module, function = FUNCTIONS[config.task]
    getattr(import_module(module), function)(config)
