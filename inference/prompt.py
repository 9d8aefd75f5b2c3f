"""What the user says → a conversation that ends with it, or one sentence that says why not."""

import sys
import unicodedata
from pathlib import Path
from typing import BinaryIO

from configs.program.errors import UserError
from data.disk.formats.regular import read_at_most
from data.schema import Conversation, Message
from data.template import MARKERS
from inference.config import InferenceConfig, check_utf8

STDIN = "-"

LONGEST = 16 << 20
"""Bytes of the longest prompt; a context of a million tokens has four."""


def ask(config: InferenceConfig) -> Conversation:
    """The conversation of `system` and of `prompt`, `prompt_file` or stdin.

    Raises:
        UserError: there is nothing to answer, or it is not text, or it holds markers that `markers` rejects.
    """
    name, text = "prompt", config.prompt
    try:
        if config.prompt_file is not None:
            name = "prompt_file"
            with Path(config.prompt_file).open("rb") as file:  # a pipe is fine
                text = _text(file)
        elif text == STDIN:
            text = _text(sys.stdin.buffer)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}={config.prompt_file or STDIN}: it is not UTF-8 text ({error}); give a text") from error
    if is_blank(text):
        raise UserError(f"{name}: there is nothing to answer; it is empty")
    messages = [] if not (config.system or "").strip() else [Message("system", config.system or "")]
    conversation = Conversation((*messages, Message("user", text)))
    check(conversation, config.markers)
    return conversation


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, and what only formats, such as a zero-width space."""
    return all(character.isspace() or unicodedata.category(character) == "Cf" for character in text)


def _text(file: BinaryIO) -> str:
    content = read_at_most(file, LONGEST + 1)
    if len(content) > LONGEST:
        raise ValueError(f"it goes on after {LONGEST >> 20} MiB")
    return content.decode("utf-8-sig")


def check(conversation: Conversation, markers: str) -> None:
    """Raises `UserError` for text that can't be encoded, or that holds markers if they are rejected."""
    for message in conversation.messages:
        name = "prompt" if message.role == "user" else message.role
        check_utf8(name, message.content)
        if "\0" in message.content:
            raise UserError(f"{name}: it holds a NUL character, which no text has; take it out")
        found = [marker for marker in MARKERS if marker in message.content]
        if found and markers == "reject":
            raise UserError(
                f"{name}: it holds the template's own marker {found[0]}, with which it could fake a turn; "
                f"take it out, or give markers=keep to send it as plain text"
            )
