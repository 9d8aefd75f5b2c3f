"""Raw rows → `Conversation`, or a `Reject` that says why not. One function for each schema that chat data comes in."""

from collections.abc import Callable
from typing import Any

from data.config import FIELDS, TURN_FIELDS
from data.reading import RawRow, Reject, Unreadable
from data.schema import Conversation, Message, Role
from data.template import MARKERS

REPLY_FIELDS = ("output", "response")
"""The names under which instruction rows carry their reply, the first that is there."""

SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
"""What the schemas call the three roles. Others (function_call, observation, tool) are not in the LLaMA-2 template."""


class UnusableError(Exception):
    """Raised while converting one row; becomes its Reject."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail


def to_conversation(
    row: RawRow,
    schema: str,
    *,
    columns: dict[str, str] | None = None,
    keep_markers: bool = False,
    reply_needed: bool = True,
) -> Conversation | Reject:
    """The conversation of a row in one of `SCHEMAS`; ends with a reply, or may be a prompt where none is needed.

    `columns` gives the names in the row for fields of the schema that are called differently there.
    """
    try:
        if not isinstance(row.value, dict):
            raise UnusableError("not_an_object", f"expected an object, found {type(row.value).__name__}")
        messages = SCHEMAS[schema](_renamed(row.value, columns or {}), reply_needed)
        if not keep_markers:
            _refuse_markers(messages)
        return _in_order(messages, reply_needed)
    except UnusableError as unusable:
        return Reject.of(row, unusable.reason, unusable.detail)


def _renamed(value: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    if not columns:
        return value
    of_turns = {field: column for field, column in columns.items() if field in TURN_FIELDS}
    renamed = {**value, **{field: value.get(column) for field, column in columns.items() if field in FIELDS}}
    for name in ("conversations", "messages"):
        if of_turns and isinstance(turns := renamed.get(name), list):
            renamed[name] = [
                {**turn, **{field: turn.get(column) for field, column in of_turns.items()}}
                if isinstance(turn, dict)
                else turn
                for turn in turns
            ]
    return renamed


def detect_schema(value: Any, columns: dict[str, str]) -> str | None:
    """The schema that a row's fields speak for, None where they fit none."""
    if not isinstance(value, dict):
        return None
    value = _renamed(value, columns)
    for schema, field in (("messages", "messages"), ("sharegpt", "conversations"), ("instruction", "instruction")):
        if value.get(field) is not None:
            return schema
    return None


# Schemas


def _from_instruction(value: dict[str, Any], reply_needed: bool) -> list[Message]:
    """instruction, input, output: one turn. `response` stands for `output` as well."""
    instruction = _text(value, "instruction")
    context = _text(value, "input", required=False)
    reply_field = next((name for name in REPLY_FIELDS if value.get(name) is not None), REPLY_FIELDS[0])
    reply = _text(value, reply_field, required=reply_needed)
    # A blank line between the two: ours, as the datasets do not say how they belong together.
    user = f"{instruction.strip()}\n\n{context.strip()}" if context else instruction.strip()
    return [Message("user", user), *([Message("assistant", reply.strip())] if reply else [])]


def _from_sharegpt(value: dict[str, Any], _: bool) -> list[Message]:
    """conversations: from, value. OpenHermes 2.5 has a column system_prompt beside them."""
    messages = _from_turns(value, "conversations", speaker="from", text="value")
    system = _text(value, "system_prompt", required=False)
    if system and not any(message.role == "system" for message in messages):
        messages.insert(0, Message("system", system))
    return messages


def _from_messages(value: dict[str, Any], _: bool) -> list[Message]:
    """messages: role, content."""
    return _from_turns(value, "messages", speaker="role", text="content")


def _from_turns(value: dict[str, Any], field: str, *, speaker: str, text: str) -> list[Message]:
    turns = _readable(value.get(field), field)
    if turns is None:
        raise UnusableError("missing_field", f"there is no field {field}")
    if not isinstance(turns, list):
        raise UnusableError("not_a_list", f"the field {field} is {type(turns).__name__}, not a list")
    messages = []
    for place, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise UnusableError("not_an_object", f"{field}[{place}] is {type(turn).__name__}, not an object")
        said_by = turn.get(speaker)
        if said_by is None:
            raise UnusableError("missing_field", f"{field}[{place}] has no field {speaker}")
        role = SPEAKERS.get(said_by) if isinstance(said_by, str) else None
        if role is None:
            raise UnusableError("unknown_role", f"{field}[{place}] is said by {said_by!r}, whom the template lacks")
        # An empty system message is none.
        content = _text(turn, text, required=role != "system", where=f"{field}[{place}]")
        if content:
            messages.append(Message(role, content))
    return messages


SCHEMAS: dict[str, Callable[[dict[str, Any], bool], list[Message]]] = {
    "instruction": _from_instruction,
    "sharegpt": _from_sharegpt,
    "messages": _from_messages,
}
"""The schemas by the names that the setting `schema` takes."""


# Checks


def _in_order(messages: list[Message], reply_needed: bool) -> Conversation:
    try:
        conversation = Conversation(tuple(map(_stripped, messages, (None, *messages))))
    except ValueError as error:
        raise UnusableError("turns_out_of_order", str(error)) from error
    if reply_needed and conversation.is_prompt:
        raise UnusableError("no_reply", "the last message is the user's, and nothing answers it")
    return conversation


def _stripped(message: Message, before: Message | None) -> Message:
    """The message without the edges that the template takes off, so that what is rendered alike is equal.

    Those of a system message stay, and so does the beginning of the text after it.
    """
    if message.role == "system":
        return message
    text = message.content
    after_system = before is not None and before.role == "system"
    return Message(message.role, text.rstrip() if after_system else text.strip())


def _refuse_markers(messages: list[Message]) -> None:
    for message in messages:
        for marker in MARKERS:
            if marker in message.content:
                raise UnusableError("template_marker", f"the text holds the template's own marker {marker}")


def _readable(value: Any, field: str) -> Any:
    if isinstance(value, Unreadable):
        raise UnusableError(value.reason, f"the field {field}: {value.detail}")
    return value


def _text(value: dict[str, Any], name: str, *, required: bool = True, where: str = "") -> str:
    """The text of a field as it stands, fit to be encoded; empty if it is blank and not required."""
    field = f"{where}.{name}" if where else name
    text = _readable(value.get(name), field)
    if text is None or (isinstance(text, str) and not text.strip()):
        if not required:
            return ""
        if text is None:
            raise UnusableError("missing_field", f"there is no field {field}")
        raise UnusableError("empty_field", f"the field {field} is empty")
    if not isinstance(text, str):
        raise UnusableError("not_text", f"the field {field} is {type(text).__name__}, not text")
    if "\0" in text:
        raise UnusableError("nul_character", f"the field {field} holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableError("lone_surrogate", f"the field {field} holds half of a surrogate pair") from None
    return text
