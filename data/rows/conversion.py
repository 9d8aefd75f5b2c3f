"""Raw rows → `Conversation`, or a `Reject` that says why not. One method for each kind of schema."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from data.rows.columns import (
    CHOSEN,
    Names,
    fields_there,
    harmless,
    is_conversation,
    is_turn,
    names_of,
    no_row,
    pair_of,
    proposed,
)
from data.rows.order import Said, in_order
from data.rows.reading import RawRow, Reject
from data.rows.texts import (
    CALLS,
    ROLES,
    TOOLS,
    UnusableError,
    beside_text,
    readable,
    refuse_markers,
    says_something,
    trained,
    turns_of,
    usable,
)
from data.schema import FLAGS, KEY_FIELDS, REPAIRS, REPLIES, SYSTEMS, TURN_FIELDS, Conversation, Role

LONGEST_SETTING = 300
"""Characters of a setting that is proposed; names of fields may be of any length."""

PARTS = "train_detail"
"""In axolotl's rows, which parts of a turn are trained: read to be rejected."""


def to_conversation(
    row: RawRow,
    schema: str,
    *,
    columns: dict[str, str] | None = None,
    keep_markers: bool = False,
    reply_needed: bool = True,
) -> Conversation | Reject:
    """The conversation of a single row, whose fields have the schema's names or those of `columns`."""
    names = Names.of(schema, columns or {})
    return Converter(names, keep_markers=keep_markers, reply_needed=reply_needed).convert(row)


class Converter:
    """Converts the rows of a source, all of one schema, and counts the fields that it doesn't read."""

    def __init__(
        self,
        names: Names,
        *,
        roles: Mapping[str, str] | None = None,
        repair: tuple[str, ...] = (),
        keep_markers: bool = False,
        reply_needed: bool = True,
        refuse_unread: bool = False,
    ):
        """`roles` gives the roles of further speakers, and `repair` says what may be done to turns out of order.

        Without `reply_needed` a row may be a prompt, and what it says about training is ignored. With `refuse_unread` a
        row is rejected if it has a field that is not read and does more than describe it.
        """
        self.unread: Counter[str] = Counter()
        """Fields that are not read though they say something, and in how many rows; those of turns as
        `messages[].tool_calls`."""
        self.unseen = set(names.given)
        """Names in `columns` that no row so far has."""
        self.repaired: tuple[str, ...] = ()
        """What was repaired in the row that was converted last."""
        self._names, self._keep_markers = names, keep_markers
        self._reply_needed, self._refuse_unread = reply_needed, refuse_unread
        self._roles: dict[str, Any] = ROLES | {speaker.lower(): role for speaker, role in (roles or {}).items()}
        self._repair = tuple(name for name in REPAIRS if name in repair)  # in their own order
        self._read_of_row = frozenset(names.row.values())
        self._flags = frozenset(names.turn[flag] for flag in FLAGS if flag in names.turn)
        self._said = frozenset(names.turn.values()) - self._flags
        self._systems = [names.row[field] for field in SYSTEMS if field in names.row]
        self._key = KEY_FIELDS[names.schema]
        self._asked, self._context = names.row.get("instruction", ""), names.row.get("input", "")
        self._replies = [names.row[field] for field in REPLIES if field in names.row]
        self._of_turn = (TURN_FIELDS[names.schema] or TURN_FIELDS["messages"])[:2]
        self._speaker, self._text_of_turn = (names.turn.get(field, "") for field in self._of_turn)
        self._convert = CONVERSIONS[names.schema]
        self._not_read: set[str] = set()  # of the row at hand

    def convert(self, row: RawRow) -> Conversation | Reject:
        """The conversation of a row; ends with a reply, or may be a prompt if none is needed."""
        value = row.value
        self.repaired = ()
        try:
            if not isinstance(value, dict):
                if self._names.schema == "instruction" or not is_conversation(value, unnamed=False):
                    raise UnusableError("not_an_object", f"expected an object, found {type(value).__name__}")
                value = {self._names.row.get(self._key, ""): value}
            if self.unseen:
                self.unseen.difference_update(value)
            self._not_read = set()
            for name, content in value.items():
                if name not in self._read_of_row and says_something(content):
                    self._not_read.add(name)
            try:
                said = self._convert(self, value)
            finally:
                if self._not_read:
                    self.unread.update(self._not_read)
            if not self._keep_markers:
                for _, text, _ in said:
                    refuse_markers(text)
            conversation, self.repaired = in_order(said, self._repair, reply_needed=self._reply_needed)
            if self._refuse_unread and (lost := self._not_read - harmless(self._not_read)):
                raise UnusableError("unread_field", f"the field {min(lost)} is not read")
            return conversation
        except UnusableError as unusable:
            return Reject.of(row, unusable.reason, unusable.detail, self._settings(value, unusable))

    def _settings(self, value: Any, unusable: UnusableError) -> dict[str, Any]:
        """The settings with which the row could be used, as far as it is known."""
        settings = dict(unusable.settings)
        if unusable.reason == "no_reply" and CHOSEN in value:
            settings = {"columns": proposed(value, self._names, "output")}
        return {name: given for name, given in settings.items() if given and len(str(given)) <= LONGEST_SETTING}

    # Schemas

    def _from_instruction(self, value: dict[str, Any]) -> list[Said]:
        """instruction, input, output: one turn, after those of history. `response` stands for `output` as well."""
        names = self._names.row
        asked = value.get(self._asked)
        if isinstance(asked, list) and is_conversation(asked, unnamed=False):
            said = self._turns(asked, self._asked)
        else:
            said = [("user", self._prompt(value, asked), False)]
        answers = [name for name in self._replies if value.get(name) is not None]
        reply = value[answers[0]] if answers else None
        if not isinstance(reply, str) and is_turn(reply[0] if isinstance(reply, list) and reply else reply):
            said += self._turns(reply if isinstance(reply, list) else [reply], answers[0])
        elif reply is None and self._reply_needed:
            raise self._missing(value, REPLIES[0])
        elif text := self._text(reply, answers[0] if answers else "", required=self._reply_needed):
            said.append(("assistant", text, False))
        if len(answers) > 1:
            self._not_read |= {name for name in answers[1:] if says_something(value[name])}
        history = value.get(names["history"]) if "history" in names else None
        return self._with_system(value, [*self._history(history), *said] if history else said)

    def _prompt(self, value: dict[str, Any], asked: Any) -> str:
        """The question, and what it is about below it; if one of the two is empty, the other."""
        context = self._text(value.get(self._context), self._context, required=False)
        if asked is None and (self._asked not in value or not context):
            raise self._missing(value, "instruction")
        instruction = self._text(asked, self._asked, required=not context)
        # A blank line between the two: ours, as the datasets do not say how they belong together.
        return f"{instruction.rstrip()}\n\n{context.strip()}" if instruction and context else instruction or context

    def _history(self, pairs: Any) -> list[Said]:
        """Earlier turns, pairs of a question and its reply. They are context: what the row trains is its output."""
        name = self._names.row["history"]
        if not says_something(readable(pairs, name)):
            return []
        if not isinstance(pairs, list):
            raise UnusableError("not_a_list", f"the field {name} is {type(pairs).__name__}, not a list")
        if all(map(is_turn, pairs)):
            return [(role, text, role == "assistant") for role, text, _ in self._turns(pairs, name)]
        said: list[Said] = []
        for index, item in enumerate(pairs):
            where = f"{name}[{index}]"
            if isinstance(item, dict) and (fields := pair_of(item)):
                said += [(role, text, role == "assistant") for role, text, _ in self._pair(item, fields, where)]
            elif isinstance(item, list) and len(item) == 2:
                question, reply = (self._text(text, f"{where}[{part}]") for part, text in enumerate(item))
                said += [("user", question, False), ("assistant", reply, True)]
            else:
                raise UnusableError("not_a_pair", f"{where} is not a list of two, a question and its reply")
        return said

    def _from_turns(self, value: dict[str, Any]) -> list[Said]:
        """conversations of sharegpt, messages: a list of turns."""
        field = self._names.row.get(self._key, "")
        turns = readable(value.get(field), field)
        if turns is None:
            raise self._missing(value, self._key)
        if isinstance(turns, str):
            turns = self._written_out(turns, field)
        if not isinstance(turns, list):
            raise UnusableError("not_a_list", f"the field {field} is {type(turns).__name__}, not a list")
        return self._with_system(value, self._turns(turns, field))

    def _written_out(self, text: str, field: str) -> Any:
        """The turns of a transcript, or of a list that is JSON in a text."""
        if text.lstrip().startswith("["):
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(text)
        if (said := turns_of(text)) is not None:
            return [{self._speaker: speaker, self._text_of_turn: words} for speaker, words in said]
        raise UnusableError("not_a_list", f"the field {field} is a text, not a list")

    def _turns(self, turns: list[Any], field: str) -> list[Said]:
        """What is said in a list of turns: objects with a speaker and a text, pairs, or texts in turn."""
        said: list[Said] = []
        roles, speaker_name, text_name, unseen = self._roles, self._speaker, self._text_of_turn, self.unseen
        for index, turn in enumerate(turns):
            if not isinstance(turn, dict):
                if index == 0:
                    return self._unnamed(turns, field)
                raise UnusableError("not_an_object", f"{field}[{index}] is {type(turn).__name__}, not an object")
            if unseen:
                unseen.difference_update(turn)
            speaker = turn.get(speaker_name)
            role = roles.get(speaker) if isinstance(speaker, str) else None
            if role is None:
                if speaker is None and speaker_name not in turn and (fields := pair_of(turn)):
                    said += self._pair(turn, fields, f"{field}[{index}]")
                    continue
                role = self._role(turns, index, field)
            masked = len(turn) > 2 and self._beside(turn, role, f"{field}[{index}]")
            content = turn.get(text_name)
            if not content and role != "system":
                self._refuse_silence(turn, f"{field}[{index}]")
            # An empty system message is none.
            if content := self._text(content, f"{field}[{index}].{text_name}", required=role != "system"):
                said.append((role, content, masked))
        return said

    def _unnamed(self, turns: list[Any], field: str) -> list[Said]:
        """A list of texts, said in turn, the user's first; or of pairs of a prompt and its reply."""
        if all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            turns = [text for pair in turns for text in pair]
        said: list[Said] = []
        for index, text in enumerate(turns):
            if not isinstance(text, str):
                wanted = "a text as those before it" if index else "an object"
                raise UnusableError("not_an_object", f"{field}[{index}] is {type(text).__name__}, not {wanted}")
            said.append(("assistant" if index % 2 else "user", self._text(text, f"{field}[{index}]"), False))
        if len(said) == 1:
            raise UnusableError("not_an_object", f"{field}[0] is str, not an object")
        return said

    def _pair(self, item: dict[str, Any], fields: tuple[str, str], where: str) -> list[Said]:
        """An item of a list that holds both a prompt and its reply."""
        said: list[Said] = []
        if system := self._text(item.get("system"), f"{where}.system", required=False):
            said.append(("system", system, False))
        for role, name in zip(("user", "assistant"), fields, strict=True):
            said.append((role, self._text(item[name], f"{where}.{name}"), False))  # type: ignore[arg-type]
        unread = (name for name in item if name not in (*fields, "system") and says_something(item[name]))
        self._not_read |= {f"{where.rpartition('[')[0]}[].{name}" for name in unread}
        return said

    # Fields

    def _text(self, value: Any, field: str, *, required: bool = True) -> str:
        """The text of a field; counts what stands in text parts beside their text and is not read."""
        if isinstance(value, list):
            self._not_read |= beside_text(value, field)
        return usable(value, field, required=required)

    def _role(self, turns: list[Any], index: int, field: str) -> Role:
        """The role of a speaker who isn't called by one of the usual names in lower case."""
        turn = turns[index]
        speaker = turn.get(self._speaker)
        if speaker is None:
            listed = fields_there(turn, self._names)
            what = f"{field}[{index}] has no field {self._names.called(self._of_turn[0])}{listed}"
            if self._speaker in turn:
                what = f"{field}[{index}].{self._speaker} is null"
            raise UnusableError("missing_field", what)
        name = str(speaker).strip().lower()
        if isinstance(speaker, str) and (role := self._roles.get(name)):
            return role
        if not isinstance(speaker, str) or name in TOOLS:
            why = "a tool, for which the LLaMA-2 template has no place" if name in TOOLS else "whom the template lacks"
            raise UnusableError("unknown_role", f"{field}[{index}] is said by {speaker!r}, {why}")
        others = [turn.get(self._speaker) for turn in turns if isinstance(turn, dict)]
        names = dict.fromkeys(other.strip().lower() for other in others if isinstance(other, str))
        known = {self._roles[name] for name in names if name in self._roles}
        free = iter([role for role in ("user", "assistant") if role not in known])
        strangers = {name: next(free, "assistant") for name in names if name not in self._roles.keys() | TOOLS}
        raise UnusableError(
            "unknown_role", f"{field}[{index}] is said by {speaker!r}, for whom no role is known", roles=strangers
        )

    def _refuse_silence(self, turn: dict[str, Any], where: str) -> None:
        """Raises for a turn that says nothing, unless it is an empty text or list."""
        if calls := [name for name in CALLS if turn.get(name)]:
            raise UnusableError(
                "tool_call", f"{where} calls a tool ({calls[0]}) and says nothing; the LLaMA-2 template has no tools"
            )
        if turn.get(self._text_of_turn) is not None:
            return
        name = self._names.called(self._of_turn[1])
        if self._text_of_turn in turn:
            raise UnusableError("missing_field", f"the field {where}.{name} is null")
        raise UnusableError("missing_field", f"there is no field {where}.{name}{fields_there(turn, self._names)}")

    def _with_system(self, value: dict[str, Any], said: list[Said]) -> list[Said]:
        """The turns after the system message that stands beside them, unless they have one; it is read, or counted."""
        beside = [name for name in self._systems if name in value and says_something(value[name])]
        if not beside:
            return said
        system = next((text for role, text, _ in said if role == "system"), None)
        if system is None:
            read = beside.pop(0)
            system = self._text(value[read], read)
            said = [("system", system, False), *said]
        self._not_read |= {name for name in beside if value[name] != system}
        return said

    def _beside(self, turn: dict[str, Any], role: Role, where: str) -> bool:
        """Whether a turn's own flags keep it from being trained; counts what else stands in it and is not read."""
        flags: dict[str, bool] = {}
        for name, content in turn.items():
            if name in self._said or content is None:
                continue
            if name not in self._flags and name != PARTS:
                if says_something(content):
                    self._not_read.add(f"{where.rpartition('[')[0]}[].{name}")
            elif self._reply_needed and (name != PARTS or content):
                flags[name] = trained(content, role, f"{where}.{name}")
        if role != "assistant" or not flags:
            return False
        if len(set(flags.values())) > 1:
            raise UnusableError("unsupported_weight", f"{where}: {' and '.join(flags)} contradict each other")
        return False in flags.values()

    def _missing(self, value: dict[str, Any], field: str) -> UnusableError:
        """What to say of a row that lacks a field, or has null in it."""
        names = self._names
        if (name := names.row.get(field, "")) in value:
            return UnusableError("missing_field", f"the field {name} is null")
        other = names_of(value, {})
        if other is not None and other.schema != names.schema:
            detail = (
                f"it is a row of the schema {other.schema}, and its source is read as {names.schema}, as the first row "
                f"or the setting schema says; give each schema a file of its own"
            )
            return UnusableError("other_schema", detail, schema=(other.schema,))
        why = f" ({why})" if (why := no_row(value)) and other is None else ""
        detail = f"there is no field {names.called(field)}{fields_there(value, names)}{why}"
        return UnusableError("missing_field", detail, columns=proposed(value, names, field))


CONVERSIONS: dict[str, Callable[[Converter, dict[str, Any]], list[Said]]] = {
    "instruction": Converter._from_instruction,
    "sharegpt": Converter._from_turns,
    "messages": Converter._from_turns,
}
"""The method for each schema, by the names that the setting `schema` takes."""
