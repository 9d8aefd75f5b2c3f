"""`python -m inference`: configuration → the task's function."""

from importlib import import_module

from configs.program import entry
from inference.config import InferenceConfig

FUNCTIONS = {
    "generate": ("inference.generate", "answer"),
    "chat": ("inference.chat.chat", "chat"),
    "batch": ("inference.batch.batch", "batch"),
    "evaluate": ("inference.evaluation.evaluate", "evaluate"),
    "merge": ("inference.merging.merge", "merge"),
}
"""The module and the function of each task."""


def main() -> None:
    """The program."""
    # To Hydra, `data` is the group of files by which `python -m data` is set.
    entry.run("inference", "inference", InferenceConfig, run, texts=("prompt", "system", "data"))


def run(config: InferenceConfig) -> None:
    """Does the task. Its module, which needs torch, is imported after the checks, so that mistakes are told at once."""
    config.check()
    arguments: list[object] = [config]
    if config.task == "generate":
        from inference.prompt import ask  # here, because numpy comes with it, which no setting needs

        arguments.append(ask(config))
    module, function = FUNCTIONS[config.task]
    getattr(import_module(module), function)(*arguments)
