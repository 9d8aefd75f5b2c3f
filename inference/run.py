"""`python -m inference`: configuration → model → answer on stdout."""

import sys

from configs import entry
from inference.config import InferenceConfig


def main() -> None:
    """The program."""
    entry.run("inference", "inference", InferenceConfig, run, texts=("prompt", "system"))


def run(config: InferenceConfig) -> None:
    """Streams the answer to `prompt`."""
    config.check()
    from inference.generate import generate
    from inference.load import load

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    generate(load(config), config, write)
    write("\n")
