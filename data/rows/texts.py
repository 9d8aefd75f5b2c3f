"""What the value of a field says: a text fit to be encoded, also in parts; whether to train it; who speaks; a
transcript."""

import re
from typing import Any

from data.rows.reading import Unreadable
from data.schema import Role
from data.template import MARKERS

ENDS_OF_MARKERS = ("INST]", "SYS>>")
"""What each of the markers ends with: few texts have that."""


INDEX = re.compile(r"\[\d+\]")
"""The index in a list, as it stands in the name of a field."""


class UnusableError(Exception):
    """Raised while converting one row; becomes its Reject."""

    def __init__(self, reason: str, detail: str, **settings: dict[str, str] | tuple[str, ...]):
        """`settings` are those with which the row could be used: `repair=("drop_last_user",)`."""
        self.reason, self.detail, self.settings = reason, detail, settings


def says_something(content: Any) -> bool:
    """Whether a field holds more than nothing: null, blank, empty, or a record of such."""
    if isinstance(content, str):
        return bool(content) and not content.isspace()
    if isinstance(content, dict):
        return any(map(says_something, content.values()))
    return content is not None and content != []


def readable(value: Any, field: str) -> Any:
    """The value, unless Arrow could not hand it over."""
    if isinstance(value, Unreadable):
        raise UnusableError(value.reason, f"the field {field}: {value.detail}")
    return value


def usable(text: Any, field: str, *, required: bool = True) -> str:
    """A text as it stands, fit to be encoded; empty if it is blank and not required."""
    if not isinstance(text, str):
        text = _as_text(readable(text, field), field)
    if not text or text.isspace():
        if not required:
            return ""
        raise UnusableError("empty_field", f"the field {field} is empty")
    if "\0" in text:
        raise UnusableError("nul_character", f"the field {field} holds a NUL character")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UnusableError("lone_surrogate", f"the field {field} holds half of a surrogate pair") from None
    return text


def _as_text(value: Any, field: str) -> str:
    """The text of text parts, end to end, and the digits of a whole number; empty for null."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for index, part in enumerate(value):
            if part.get("type", "text") != "text" or "text" not in part:
                what = f"{field}[{index}] is a part of type {part.get('type')}, and only text can be trained on"
                raise UnusableError("not_text", what)
        texts = [part["text"] for part in value]  # whole: a blank part may stand between two words
        return "".join(text if isinstance(text, str) else _as_text(readable(text, field), field) for text in texts)
    if isinstance(value, dict) and "replies" in value:
        what = f"the field {field} is a tree of messages (replies); write each path through it as a row of messages"
        raise UnusableError("not_text", what)
    raise UnusableError("not_text", f"the field {field} is {type(value).__name__}, not text")


def beside_text(parts: list[Any], field: str) -> set[str]:
    """What stands in text parts beside their text and says something, as `messages[].content[].citations`."""
    names = {
        name
        for part in parts
        if isinstance(part, dict)
        for name in part
        if name not in ("type", "text") and says_something(part[name])
    }
    where = INDEX.sub("[]", field)
    return {f"{where}[].{name}" for name in names}


def refuse_markers(text: str) -> None:
    """Raises for a text that holds one of the template's own markers."""
    if ENDS_OF_MARKERS[0] in text or ENDS_OF_MARKERS[1] in text:
        for marker in MARKERS:
            if marker in text:
                raise UnusableError("template_marker", f"the text holds the template's own marker {marker}")


def trained(flag: Any, role: Role, where: str) -> bool:
    """What a turn's own flag says: to be trained or not."""
    if not isinstance(flag, int | float) or flag not in (0, 1):
        raise UnusableError(
            "unsupported_weight", f"{where} is {flag!r}, and a whole reply is trained (1, true) or not (0, false)"
        )
    if flag and role != "assistant":
        raise UnusableError("prompt_trained", f"{where} asks to train what is said by {role}; only replies are trained")
    return bool(flag)


# Who speaks

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "bot", "chatbot", "claude"), "assistant"
    ),
}
"""The role of each speaker, in lower case."""

TOOLS = {
    "tool",
    "tools",
    "tool_call",
    "tool_calls",
    "tool_response",
    "tool_result",
    "function",
    "function_call",
    "function-call",
    "function_response",
    "function-response",
    "ipython",
    "observation",
}
"""Speakers, in lower case, for whom the LLaMA-2 template has no place."""

CALLS = ("tool_calls", "function_call")
"""Fields of a turn that calls tools instead of saying something."""


# Transcripts: who speaks stands in the text itself.

TRANSCRIPTS = (
    re.compile(r"###\s*(Human|User|Assistant|System)\s*:"),
    re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):"),
    re.compile(r"\[\|(Human|AI)\|\]"),
)
"""As the Guanaco, HH-RLHF and Baize data have it."""


def is_transcript(value: Any) -> bool:
    """Whether a text holds a prompt and a reply, each after the name of who speaks."""
    return isinstance(value, str) and len(turns_of(value) or ()) >= 2


def turns_of(text: str) -> list[tuple[str, str]] | None:
    """Who says what in a transcript; what stands before the first turn is the system's. None if it is not a transcript.

    An empty turn at the end, which waits for somebody to speak, is left out.
    """
    if text.count(":") + text.count("[|") < 2:
        return None
    for style in TRANSCRIPTS:
        before, *turns = style.split(text)
        if turns:
            said = [("system", before.strip())] if says_something(before) else []
            said += [(speaker, text.strip()) for speaker, text in zip(turns[::2], turns[1::2], strict=True)]
            return said if said[-1][1] else said[:-1]
    return None
