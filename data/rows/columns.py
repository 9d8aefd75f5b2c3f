"""What the rows of a source call the fields of their schema, as `columns` says or found by looking at them."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.rows.texts import is_transcript, says_something
from data.schema import KEY_FIELDS, REPLIES, ROW_FIELDS, SPEAKERS, TURN_FIELDS

HARMLESS = {
    "id",
    "_id",
    "idx",
    "index",
    "row_id",
    "uid",
    "uuid",
    "hash",
    "conversation_id",
    "conversation_hash",
    "source",
    "data_source",
    "instruction_source",
    "dataset",
    "url",
    "license",
    "language",
    "lang",
    "category",
    "topic",
    "sub_topic",
    "subject",
    "domain",
    "tags",
    "model",
    "model_name",
    "created_at",
    "timestamp",
    "date",
    "score",
    "views",
    "num_turns",
}
"""Names of fields that describe a row and say nothing in it."""

# Names that are usual for a field beside its own, in the order in which they are looked for, in capitals or not.

PROMPTS = ("prompt", "query", "question", "problem", "message_1", "inputs", "input")
ANSWERS = ("completion", "answer", "target", "targets", "solution", "message_2")
INPUTS = ("input", "context")
LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "items", "data")
TEXTS = ("content", "value", "text")

UNNAMED = ("conversations", "conversation", "dialogue", "dialog", "data")
"""Lists whose texts are said in turn, the user's first, if they are texts alone."""

TRANSCRIPTS = ("text", *PROMPTS)
"""Fields that may hold a whole conversation as one text, if nothing stands beside it that answers."""

PAIRS = ((("instruction", *PROMPTS), (*REPLIES, *ANSWERS)), (("human", "user"), ("assistant", "gpt", "bot")))
"""Fields of what holds both a prompt and its reply: named by what they are, or by who speaks."""

CHOSEN = "chosen"
"""The better one of the two replies that preference data holds for a prompt."""

MOST_NAMES = 12
"""Fields that a sentence lists at most."""


def harmless(fields: Iterable[str]) -> set[str]:
    """Those that only describe; a field of turns is written `messages[].id`."""
    return {field for field in fields if field.rpartition("[].")[2] in HARMLESS}


@dataclass(frozen=True, slots=True)
class Names:
    """What the rows of a source call the fields of their schema.

    A field has no name if that was given to another: `columns={instruction: input}` leaves no `input`.
    """

    schema: str
    row: dict[str, str]
    """Field of a row → its name."""
    turn: dict[str, str]
    """Field of a turn → its name."""
    found: dict[str, str] = field(default_factory=dict)
    """Those that have another name, which was found by looking."""
    given: frozenset[str] = frozenset()
    """Names that `columns` gave."""

    @classmethod
    def of(cls, schema: str, columns: dict[str, str], found: dict[str, str] | None = None) -> "Names":
        """The names of a schema's fields; `columns` has those that are called differently, and so has `found`."""
        found = found or {}
        columns = columns | {field: name for field, name in found.items() if field not in columns}
        of_turns = TURN_FIELDS[schema] or TURN_FIELDS["messages"]  # a prompt may be a list of turns
        row, turn = _named(ROW_FIELDS[schema], columns), _named(of_turns, columns)
        renamed = {name for field, name in (row | turn).items() if name != field and field not in found}
        return cls(schema, row, turn, found, frozenset(renamed))

    def called(self, field: str) -> str:
        """A field by its name in the rows, and the setting that says so."""
        name = (self.row | self.turn).get(field)
        if name is None:
            return f"{field} (columns reads the one of that name as another)"
        return f"{name}, which columns.{field} names" if name in self.given else name


def _named(fields: tuple[str, ...], columns: dict[str, str]) -> dict[str, str]:
    renamed = {field: columns[field] for field in fields if field in columns}
    return {field: renamed.get(field, field) for field in fields if field in renamed or field not in renamed.values()}


# Looking


def look(rows: Sequence[Any], columns: dict[str, str]) -> Names | None:
    """The names of a source by its first rows: schema and prompt by the first that fits one, the others by all of them.

    None if none fits a schema.
    """
    fields: set[str] = set()
    for row in rows:
        if isinstance(row, dict):
            fields.update(name for name, value in row.items() if value is not None)
    for row in rows:
        if (names := names_of(row, columns, fields)) is not None:
            return names
    return None


def names_of(row: Any, columns: dict[str, str], fields: set[str] | None = None) -> Names | None:
    """The names that a row's fields point to, None if they fit no schema; one whose field `columns` names comes first.

    `fields` are those of the rows around it.
    """
    if not isinstance(row, dict):
        return _of_turns("messages", row, columns) if is_conversation(row, unnamed=False) else None
    speaking = _named_key(row, columns) or _usual_key(row, columns)
    if speaking is None:
        return None
    schema, name = speaking
    if schema == "instruction":
        return _of_pairs(name, row[name], columns, fields or set(row))
    return _of_turns(name, row[name], columns)


def _named_key(row: dict[str, Any], columns: dict[str, str]) -> tuple[str, str] | None:
    """A schema, and the name of the field that points to it."""
    for schema in sorted(KEY_FIELDS, key=lambda schema: KEY_FIELDS[schema] not in columns):
        name = _named(ROW_FIELDS[schema], columns).get(KEY_FIELDS[schema])
        if name is not None and row.get(name) is not None:
            return schema, name
    return None


def _usual_key(row: dict[str, Any], columns: dict[str, str]) -> tuple[str, str] | None:
    """The same, for a field that has another usual name."""
    free = {name.lower(): name for name in row if name not in columns.values() and says_something(row[name])}
    pair = pair_of(free)
    for usual in LISTS:
        if usual in free and is_conversation(row[free[usual]], unnamed=usual in UNNAMED and pair is None):
            return "messages", free[usual]
    for usual in TRANSCRIPTS:
        if usual in free and pair is None and is_transcript(row[free[usual]]):
            return "messages", free[usual]
    prompt = pair[0] if pair else _first(PAIRS[0][0], free)
    return None if prompt is None or "instruction" in columns else ("instruction", free[prompt])


def _of_turns(name: str, turns: Any, columns: dict[str, str]) -> Names:
    """A schema of turns for a list of that name: the one that `columns`, the turns or the list's name point to."""
    by_given = [schema for schema in ("messages", "sharegpt") if not columns.keys().isdisjoint(_own(schema))]
    by_turns = [schema for schema in ("messages", "sharegpt") if TURN_FIELDS[schema][0] in _first_turn(turns)]
    by_name = [schema for schema, key in KEY_FIELDS.items() if key == name]
    schema = [*by_given, *by_turns, *by_name, "messages"][0]
    found = {KEY_FIELDS[schema]: name} | _turn_names(TURN_FIELDS[schema][:2], turns)
    return Names.of(schema, columns, _differing(found, columns))


def _first_turn(turns: Any) -> dict[str, Any]:
    return next((turn for turn in turns if isinstance(turn, dict)), {}) if isinstance(turns, list) else {}


def _turn_names(fields: tuple[str, ...], turns: Any) -> dict[str, str]:
    """What turns call who speaks and what is said, if it isn't by these names."""
    item = _first_turn(turns)
    return {
        own: other
        for own, usual in zip(fields, (SPEAKERS, TEXTS), strict=True)
        if own not in item
        for other in usual[::-1]
        if other in item
    }


def _own(schema: str) -> set[str]:
    """The fields that this schema of turns has alone."""
    return {KEY_FIELDS[schema], *TURN_FIELDS[schema][:2]}


def _of_pairs(prompt: str, asked: Any, columns: dict[str, str], fields: set[str]) -> Names:
    """The schema of instructions for rows with these fields, of which one is the prompt, a text or a list of turns."""
    found = {"instruction": prompt} | _turn_names(TURN_FIELDS["messages"][:2], asked)
    free = {name.lower(): name for name in fields if name not in columns.values() and name != prompt}
    for own, usual in ((REPLIES, [reply for _, replies in PAIRS for reply in replies]), (INPUTS[:1], INPUTS)):
        if fields.isdisjoint(own) and (name := _first(usual, free)):
            found[own[0]] = free[name]
    return Names.of("instruction", columns, _differing(found, columns))


def _differing(found: dict[str, str], columns: dict[str, str]) -> dict[str, str]:
    return {field: name for field, name in found.items() if field not in columns and name != field}


def is_conversation(value: Any, *, unnamed: bool = True) -> bool:
    """Whether a value is a list of turns, or of pairs; with `unnamed` its items may be texts alone."""
    if not isinstance(value, list) or not value:
        return False
    first = value[0]
    if isinstance(first, dict):
        return is_turn(first) or pair_of(first) is not None
    if isinstance(first, list):
        return all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in value)
    return unnamed and len(value) >= 2 and all(isinstance(text, str) for text in value)


def is_turn(item: Any) -> bool:
    """Whether an item of a list says who speaks and what."""
    return isinstance(item, dict) and not item.keys().isdisjoint(SPEAKERS) and not item.keys().isdisjoint(TEXTS)


def pair_of(item: dict[str, Any]) -> tuple[str, str] | None:
    """The fields of an item that holds a prompt and its reply."""
    for prompts, replies in PAIRS:
        prompt, reply = _first(prompts, item), _first(replies, item)
        if prompt is not None and reply is not None:
            return prompt, reply
    return None


def _first(names: Iterable[str], there: Container[str]) -> str | None:
    return next((name for name in names if name in there), None)


# What to say of a row that lacks a field


def no_row(row: dict[str, Any]) -> str:
    """Why a row is not a conversation, if it is a part of one, or more than one."""
    if is_turn(row):
        return "it is a single message; put those that belong together into one row, as a list of messages"
    texts = [name for name, value in row.items() if name not in HARMLESS and says_something(value)]
    if len(texts) == 1 and isinstance(row[texts[0]], str):
        return f"all it says is one text, {texts[0]}; a row needs a prompt and a reply"
    return ""


def fields_there(row: dict[str, Any], names: Names) -> str:
    """The end of a sentence that lists a row's fields; empty if all of them are read."""
    if row.keys() <= {*names.row.values()}:
        return ""
    shown = [*row][:MOST_NAMES]
    more = f" and {len(row) - len(shown)} more" if len(row) > len(shown) else ""
    return f"; {'there is' if len(row) == 1 else 'there are'} {', '.join(shown)}{more}"


def proposed(row: dict[str, Any], names: Names, missing: str) -> dict[str, str]:
    """What `columns` could say of a row that lacks a field; empty if nothing in it is a candidate."""
    if no_row(row):
        return {}
    there = [name for name, value in row.items() if says_something(value) and name not in HARMLESS]
    whole = [name for name in there if is_conversation(row[name], unnamed=False) or is_transcript(row[name])]
    prompt = names.row.get("instruction")
    asked = ([prompt] if prompt in there else []) + whole
    if CHOSEN in whole and not _begins_with_reply(row[CHOSEN]):
        return {KEY_FIELDS["messages" if names.schema == "instruction" else names.schema]: CHOSEN}
    if CHOSEN in there and asked:
        return _differing({"instruction": asked[0], "output": CHOSEN}, {})
    free = [name for name in there if isinstance(row[name], str) and name not in names.row.values()]
    if missing in REPLIES and asked:
        return _differing({"output": max(free, key=lambda name: len(row[name]))} if free else {}, {})
    if whole:
        return {KEY_FIELDS["messages" if names.schema == "instruction" else names.schema]: whole[0]}
    return {"instruction": free[0], "output": free[1]} if missing == "instruction" and len(free) > 1 else {}


def _begins_with_reply(turns: Any) -> bool:
    return any(str(_first_turn(turns).get(speaker)).lower() in PAIRS[1][1] for speaker in SPEAKERS)
