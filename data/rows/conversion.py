"""Raw rows → `Conversation`, or a `Reject` that says why not. One method for each kind of schema."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from data.rows.columns import Names, harmless
from data.rows.reading import RawRow, Reject, Unreadable
from data.schema import FLAGS, KEY_FIELDS, REPLIES, SYSTEMS, TURN_FIELDS, Conversation, Message, Role
from data.template import MARKERS

SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
"""What the schemas call the three roles. Others (function_call, observation, tool) are not in the LLaMA-2 template."""

PARTS = "train_detail"
"""In axolotl's rows, which parts of a turn are trained: read to be rejected."""


class UnusableError(Exception):
    """Raised while converting one row; becomes its Reject."""

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail


def detect_schema(value: Any, columns: dict[str, str]) -> str | None:
    """The schema that a row's fields speak for, None if they fit none; one whose field `columns` names comes first."""
    if not isinstance(value, dict):
        return None
    for schema in sorted(KEY_FIELDS, key=lambda schema: KEY_FIELDS[schema] not in columns):
        name = Names.of(schema, columns).row.get(KEY_FIELDS[schema])
        if name is not None and value.get(name) is not None:
            return schema
    return None


def to_conversation(
    row: RawRow,
    schema: str,
    *,
    columns: dict[str, str] | None = None,
    keep_markers: bool = False,
    reply_needed: bool = True,
) -> Conversation | Reject:
    """The conversation of a single row; see `Converter`."""
    names = Names.of(schema, columns or {})
    return Converter(names, keep_markers=keep_markers, reply_needed=reply_needed).convert(row)


class Converter:
    """Converts the rows of a source, all of one schema, and counts the fields that it doesn't read."""

    def __init__(
        self, names: Names, *, keep_markers: bool = False, reply_needed: bool = True, refuse_unread: bool = False
    ):
        """Without `reply_needed` a row may be a prompt, and what it says about training has no say.

        With `refuse_unread` a row is rejected if it has a field that is not read and does more than describe it.
        """
        self.unread: Counter[str] = Counter()
        """Fields that are not read though they say something, and in how many rows; those of turns as
        `messages[].tool_calls`."""
        self.unseen = names.renamed
        """Names in `columns` that no row so far has."""
        self._names, self._keep_markers = names, keep_markers
        self._reply_needed, self._refuse_unread = reply_needed, refuse_unread
        self._read_of_row = frozenset(names.row.values())
        self._flags = frozenset(names.turn[flag] for flag in FLAGS if flag in names.turn)
        self._said = frozenset(names.turn.values()) - self._flags
        self._systems = [names.row[field] for field in SYSTEMS if field in names.row]
        self._not_read: set[str] = set()  # of the row at hand

    def convert(self, row: RawRow) -> Conversation | Reject:
        """The conversation of a row; ends with a reply, or may be a prompt if none is needed."""
        value = row.value
        try:
            if not isinstance(value, dict):
                raise UnusableError("not_an_object", f"expected an object, found {type(value).__name__}")
            if self.unseen:
                self.unseen -= value.keys()
            self._not_read = set()
            for name, content in value.items():
                if name not in self._read_of_row and _says_something(content):
                    self._not_read.add(name)
            try:
                messages = SCHEMAS[self._names.schema](self, value)
            finally:
                if self._not_read:
                    self.unread.update(self._not_read)
            if not self._keep_markers:
                _refuse_markers(messages)
            conversation = _in_order(messages, self._reply_needed)
            if self._refuse_unread and (lost := self._not_read - harmless(self._not_read)):
                raise UnusableError("unread_field", f"the field {min(lost)} is not read")
            return conversation
        except UnusableError as unusable:
            return Reject.of(row, unusable.reason, unusable.detail)

    # Schemas

    def _from_instruction(self, value: dict[str, Any]) -> list[Message]:
        """instruction, input, output: one turn, after those of history. `response` stands for `output` as well."""
        names = self._names.row
        instruction = self._text(value, "instruction")
        context = self._text(value, "input", required=False)
        replies = [field for field in REPLIES if field in names and value.get(names[field]) is not None]
        reply = self._text(value, replies[0] if replies else REPLIES[0], required=self._reply_needed)
        self._not_read |= {names[field] for field in replies[1:] if _says_something(value[names[field]])}
        # A blank line between the two: ours, as the datasets do not say how they belong together.
        user = f"{instruction.rstrip()}\n\n{context.strip()}" if context else instruction
        turns = [*self._history(value), Message("user", user), *([Message("assistant", reply)] if reply else [])]
        return self._with_system(value, turns)

    def _history(self, value: dict[str, Any]) -> list[Message]:
        """Earlier turns, pairs of a question and its reply. They are context: what the row trains is its output."""
        name = self._names.row.get("history", "")
        pairs = _readable(value.get(name), name)
        if not _says_something(pairs):
            return []
        if not isinstance(pairs, list):
            raise UnusableError("not_a_list", f"the field {name} is {type(pairs).__name__}, not a list")
        messages = []
        for index, pair in enumerate(pairs):
            if not isinstance(pair, list) or len(pair) != 2:
                raise UnusableError("not_a_pair", f"{name}[{index}] is not a list of two, a question and its reply")
            question, reply = (_usable(text, f"{name}[{index}][{part}]") for part, text in enumerate(pair))
            messages += [Message("user", question), Message("assistant", reply, masked=True)]
        return messages

    def _from_turns(self, value: dict[str, Any]) -> list[Message]:
        """conversations of sharegpt, messages: a list of turns."""
        names = self._names
        key, (speaker, text) = KEY_FIELDS[names.schema], TURN_FIELDS[names.schema][:2]
        field, speaker_name, text_name = names.row.get(key, ""), names.turn.get(speaker, ""), names.turn.get(text, "")
        turns = _readable(value.get(field), field)
        if turns is None:
            raise UnusableError("missing_field", f"there is no field {names.called(key)}")
        if not isinstance(turns, list):
            raise UnusableError("not_a_list", f"the field {field} is {type(turns).__name__}, not a list")
        messages = []
        for index, turn in enumerate(turns):
            if not isinstance(turn, dict):
                raise UnusableError("not_an_object", f"{field}[{index}] is {type(turn).__name__}, not an object")
            if self.unseen:
                self.unseen -= turn.keys()
            said_by = turn.get(speaker_name)
            if said_by is None:
                raise UnusableError("missing_field", f"{field}[{index}] has no field {names.called(speaker)}")
            role = SPEAKERS.get(said_by) if isinstance(said_by, str) else None
            if role is None:
                raise UnusableError("unknown_role", f"{field}[{index}] is said by {said_by!r}, whom the template lacks")
            masked = len(turn) > 2 and self._beside(turn, role, f"{field}[{index}]")
            if (content := turn.get(text_name)) is None and role != "system":
                raise UnusableError("missing_field", f"there is no field {field}[{index}].{names.called(text)}")
            # An empty system message is none.
            if content := _usable(content, f"{field}[{index}].{text_name}", required=role != "system"):
                messages.append(Message(role, content, masked))
        return self._with_system(value, messages)

    # Fields

    def _with_system(self, value: dict[str, Any], turns: list[Message]) -> list[Message]:
        """The turns after the system message that stands beside them, unless they have one; it is read, or counted."""
        beside = [name for name in self._systems if name in value and _says_something(value[name])]
        if not beside:
            return turns
        system = next((message for message in turns if message.role == "system"), None)
        if system is None:
            system = Message("system", _usable(value[beside[0]], beside[0]))
            turns = [system, *turns]
        self._not_read |= {name for name in beside if value[name] != system.content}
        return turns

    def _beside(self, turn: dict[str, Any], role: Role, where: str) -> bool:
        """Whether a turn's own flags keep it from being trained; counts what else stands in it and is not read."""
        told: dict[str, bool] = {}
        for name, content in turn.items():
            if name in self._said or content is None:
                continue
            if name not in self._flags and name != PARTS:
                if _says_something(content):
                    self._not_read.add(f"{where.rpartition('[')[0]}[].{name}")
            elif self._reply_needed and (name != PARTS or content):
                told[name] = _trained(content, role, f"{where}.{name}")
        if role != "assistant" or not told:
            return False
        if len(set(told.values())) > 1:
            raise UnusableError("unsupported_weight", f"{where}: {' and '.join(told)} contradict each other")
        return False in told.values()

    def _text(self, value: dict[str, Any], field: str, *, required: bool = True) -> str:
        """The text of a field of the row, as `_usable` takes it."""
        name = self._names.row.get(field, "")
        text = value.get(name)
        if text is None and required:
            raise UnusableError("missing_field", f"there is no field {self._names.called(field)}")
        return _usable(text, name, required=required)


SCHEMAS: dict[str, Callable[[Converter, dict[str, Any]], list[Message]]] = {
    "instruction": Converter._from_instruction,
    "sharegpt": Converter._from_turns,
    "messages": Converter._from_turns,
}
"""The schemas by the names that the setting `schema` takes."""


# Checks


def _in_order(messages: list[Message], reply_needed: bool) -> Conversation:
    """The messages as a conversation, without the edges that the template takes off: what is rendered alike is equal.

    Those of a system message stay, and so does the beginning of the text after it.
    """
    for index, message in enumerate(messages):
        if message.role != "system":
            after_system = index > 0 and messages[index - 1].role == "system"
            text = message.content.rstrip() if after_system else message.content.strip()
            if text != message.content:
                messages[index] = Message(message.role, text, message.masked)
    try:
        conversation = Conversation(tuple(messages))
    except ValueError as error:
        raise UnusableError("turns_out_of_order", str(error)) from error
    if not reply_needed:
        return conversation
    if conversation.is_prompt:
        raise UnusableError("no_reply", "the last message is the user's, and nothing answers it")
    if messages[-1].masked and all(message.masked for message in conversation.turns[1::2]):
        raise UnusableError("nothing_trained", "the row itself says that none of its replies is trained")
    return conversation


def _trained(flag: Any, role: Role, where: str) -> bool:
    """What a turn's own flag says: to be trained or not."""
    if not isinstance(flag, int | float) or flag not in (0, 1):
        raise UnusableError(
            "unsupported_weight", f"{where} is {flag!r}, and a whole reply is trained (1, true) or not (0, false)"
        )
    if flag and role != "assistant":
        raise UnusableError("prompt_trained", f"{where} asks to train what is said by {role}; only replies are trained")
    return bool(flag)


def _refuse_markers(messages: list[Message]) -> None:
    for message in messages:
        for marker in MARKERS:
            if marker in message.content:
                raise UnusableError("template_marker", f"the text holds the template's own marker {marker}")


def _says_something(content: Any) -> bool:
    """Whether a field holds more than nothing: null, blank, empty, or a record of such."""
    if isinstance(content, str):
        return bool(content) and not content.isspace()
    if isinstance(content, dict):
        return any(map(_says_something, content.values()))
    return content is not None and content != []


def _readable(value: Any, field: str) -> Any:
    if isinstance(value, Unreadable):
        raise UnusableError(value.reason, f"the field {field}: {value.detail}")
    return value


def _usable(text: Any, field: str, *, required: bool = True) -> str:
    """A text as it stands, fit to be encoded; empty if it is blank and not required."""
    text = _readable(text, field)
    if text is None or (isinstance(text, str) and not text.strip()):
        if not required:
            return ""
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
