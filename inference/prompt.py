"""What the user says → a conversation that ends with it, or one sentence that says why not."""

import sys
from pathlib import Path

from configs.program.errors import UserError
from data.schema import Conversation, Message
from data.template import MARKERS
from inference.config import InferenceConfig, check_utf8

STDIN = "-"


def ask(config: InferenceConfig) -> Conversation:
    """The conversation of `system` and of `prompt`, `prompt_file` or stdin.

    Raises:
        UserError: there is nothing to answer, or it is no text, or it holds markers that `markers` rejects.
    """
    name, text = "prompt", config.prompt
    try:
        if config.prompt_file is not None:
            name = "prompt_file"
            text = Path(config.prompt_file).read_text(encoding="utf-8-sig")
        elif text == STDIN:
            text = sys.stdin.buffer.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}={config.prompt_file or STDIN}: it is not UTF-8 text ({error}); give a text") from error
    if not text.strip():
        raise UserError(f"{name}: there is nothing to answer; it is empty")
    messages = [] if not (config.system or "").strip() else [Message("system", config.system or "")]
    conversation = Conversation((*messages, Message("user", text)))
    check(conversation, config.markers)
    return conversation


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
