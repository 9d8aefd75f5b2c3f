"""Lines in, answers out: typed in a terminal, or from a pipe.

Answers go to stdout and everything else to stderr, so that `… | python -m inference task=chat | …` hands on answers
alone.
"""

import sys
from collections.abc import Iterator

from configs.program.console import console
from configs.program.errors import UserError
from inference.chat.commands import FILES, Commands
from inference.chat.talk import Talk
from inference.chat.terminal import Output, typed_lines
from inference.config import InferenceConfig
from inference.generate import reader_may_leave
from inference.load import load


def chat(config: InferenceConfig) -> None:
    """Answers what is typed, or each line of a pipe, until it ends.

    A mistake that is typed is reported, and changes nothing. One in a pipe ends the program, since what follows it was
    written for a conversation that has not been held.

    Raises:
        UserError: the model can't be loaded, or a line of a pipe can't be used.
    """
    typed = sys.stdin.isatty()
    talk = Talk(load(config), config, Output(sys.stdout), may_be_stopped=typed)
    commands = Commands(talk)
    with reader_may_leave():
        if typed:
            _converse(commands, config)
        else:
            for number, line in enumerate(piped_lines(), 1):
                try:
                    if not commands.take(line):
                        break
                except UserError as error:
                    raise UserError(f"line {number}: {error}") from error


def _converse(commands: Commands, config: InferenceConfig) -> None:
    console.print("Say something. /help lists the commands, Ctrl-D ends.", style="dim")
    for line in typed_lines(commands.names, FILES, keep_history=config.history):
        try:
            if not commands.take(line):
                break
        except UserError as error:
            console.print(str(error), style="red", soft_wrap=not console.is_terminal)


def piped_lines() -> Iterator[str]:
    """Lines of stdin in UTF-8, without their ends and without a byte order mark before the first.

    Bytes that are not UTF-8 become lone surrogates, which are refused with the message that they stand in.
    """
    for number, line in enumerate(sys.stdin.buffer):
        text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
        yield text.removeprefix("\ufeff") if number == 0 else text
