"""`python -m inference`: configuration → the task's function."""

import sys
from importlib import import_module

from configs.program import entry
from configs.program.errors import VerificationError, say
from inference.config import InferenceConfig

EXIT_FAULT = 1
"""What is wrong is ours to mend: what was written is not what was asked for, and was taken away again."""

FUNCTIONS = {
    "generate": ("inference.generate", "answer"),
    "chat": ("inference.chat.chat", "chat"),
    "batch": ("inference.batch.batch", "batch"),
    "evaluate": ("inference.evaluation.evaluate", "evaluate"),
    "card": ("inference.card.card", "card"),
    "merge": ("inference.merging.merge", "merge"),
}
"""The module and the function of each task."""


def main() -> None:
    """The program."""
    # To Hydra, `data` is the group of files with settings of `python -m data`.
    entry.run("inference", "inference", InferenceConfig, run, texts=("prompt", "system", "data"))


def run(config: InferenceConfig) -> None:
    """Does the task. Its module, which needs torch, is imported after the checks, so that mistakes show at once."""
    config.check()
    arguments: list[object] = [config]
    if config.task == "generate":
        from inference.prompt import ask  # here, because numpy comes with it, which no setting needs

        arguments.append(ask(config))
    module, function = FUNCTIONS[config.task]
    try:
        getattr(import_module(module), function)(*arguments)
    except VerificationError as error:
        say("inference", str(error))
        sys.exit(EXIT_FAULT)
