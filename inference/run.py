"""`python -m inference`: configuration → model → what the task makes of it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from configs.program import entry
from inference.config import InferenceConfig

EXIT_BROKEN_PIPE = 141
"""What a shell reports of a program that SIGPIPE ends."""


def main() -> None:
    """The program."""
    entry.run("inference", "inference", InferenceConfig, run, texts=("prompt", "system"))


def run(config: InferenceConfig) -> None:
    """Does the task. What needs torch is imported after the checks, so that mistakes are told at once."""
    config.check()
    {"generate": generate, "chat": chat, "batch": batch, "merge": merge}[config.task](config)


def generate(config: InferenceConfig) -> None:
    """Streams the answer to `prompt`."""
    from inference.prompt import ask

    conversation = ask(config)
    from inference.generate import generate
    from inference.load import load

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    loaded = load(config)
    with reader_may_leave():
        generate(loaded, config, conversation, write)
        write("\n")


def chat(config: InferenceConfig) -> None:
    """Holds a conversation in the terminal."""
    from inference.chat import chat
    from inference.load import load

    loaded = load(config)
    with reader_may_leave():
        chat(loaded, config)


def batch(config: InferenceConfig) -> None:
    """Answers the rows of `input` to `output`."""
    from inference.batch.batch import batch

    batch(config)


def merge(config: InferenceConfig) -> None:
    """Writes base and adapter as one checkpoint to `output`."""
    from inference.merging.merge import merge

    merge(config)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Ends quietly where stdout is a pipe that no one reads any more, as in `… | head`."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write goes there
        sys.exit(EXIT_BROKEN_PIPE)
