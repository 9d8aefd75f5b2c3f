"""A file of rows, in any form that `python -m data` takes → what can be answered, and error lines for the rest."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.program.errors import UserError
from data.rows.columns import Names, names_of
from data.rows.conversion import Converter
from data.rows.reading import RawRow, Reject, Unreadable, read_file
from data.schema import KEY_FIELDS, Conversation, Message
from data.template import ChatTokenizer
from inference.config import InferenceConfig
from inference.prompt import is_blank

LONGEST_REASON = 200
"""Characters of a row's fault that a sentence about the whole file quotes."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row that can be answered: its position, its id, and the token ids that generation starts from."""

    line: int
    """Its line in the input, from 1, or its index in a list, from 0."""
    id: Any
    ids: list[int]
    unit: str = "line"
    """`line`, or `row` in a list."""


def read_rows(source: Path, config: InferenceConfig) -> list[RawRow | Reject]:
    """The rows of JSON Lines, a JSON array or Parquet, plain or compressed; blank lines are not rows.

    Raises:
        UserError: the file is none of these, or holds no row that could be answered.
    """
    if not source.is_file():
        raise UserError(f"input={source}: it is not a file; give JSON Lines, a JSON array or Parquet")
    try:
        rows = [row for chunk in read_file(str(source)) for row in chunk.rows()]
    except UserError as error:  # data calls the setting by another name
        raise UserError(str(error).replace(f"files={source}", f"input={source}", 1)) from error
    if not rows:
        raise UserError(f'input={source}: it holds no rows; give for example a line {{"prompt": "Hello"}}')
    faults: list[tuple[str, str]] = []
    for row in rows:
        outcome = _read(row, config)[1]
        if isinstance(outcome, Conversation):
            return rows
        faults.append(outcome)
    raise _unanswerable(source, rows, faults[0][1])


def read_prompts(
    rows: Iterable[RawRow | Reject], tokenizer: ChatTokenizer, config: InferenceConfig, max_tokens: int
) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """The rows that can be answered within `max_tokens`, and the answer lines of those that can't.

    Raises:
        UserError: there are rows, and none can be answered.
    """
    prompts: list[Prompt] = []
    errors: list[dict[str, Any]] = []
    rows = list(rows)
    for row in rows:
        identity, outcome = _read(row, config)
        if isinstance(outcome, Conversation):
            ids = tokenizer.encode_prompt(outcome)
            if len(ids) < max_tokens:
                prompts.append(Prompt(row.number, identity, ids, row.unit))
                continue
            reason, detail = "too_long", f"the prompt takes {len(ids)} tokens, and the model's context is {max_tokens}"
        else:
            reason, detail = outcome
        errors.append({row.unit: row.number, "id": identity, "error": {"reason": reason, "detail": detail}})
    if errors and not prompts:
        raise _unanswerable(Path(str(config.input)), rows, errors[0]["error"]["detail"])
    return prompts, errors


def _unanswerable(source: Path, rows: list[RawRow | Reject], detail: str) -> UserError:
    first = f"{rows[0].unit} {rows[0].number}: {detail[:LONGEST_REASON]}"
    which = "its only row can't" if len(rows) == 1 else f"none of its {len(rows)} rows can"
    return UserError(f"input={source}: {which} be answered ({first}); mend the rows")


def _read(row: RawRow | Reject, config: InferenceConfig) -> tuple[Any, Conversation | tuple[str, str]]:
    """The row's id, and its conversation, or reason and detail. `system` is used if the row has no system message."""
    if isinstance(row, Reject):
        return None, (row.reason, row.detail)
    identity = _identity(row.value.get("id")) if isinstance(row.value, dict) else None
    value = _with_prompt(row.value)
    names = names_of(value, {})
    if names is None:
        return identity, ("unknown_schema", "it has none of the fields messages, conversations, instruction, prompt")
    # What answers a prompt is not needed, whatever it is.
    names = Names.of(names.schema, {}, {field: name for field, name in names.found.items() if field != "output"})
    row = RawRow(value, row.file, row.unit, row.number)
    outcome = Converter(names, keep_markers=config.markers == "keep", reply_needed=False).convert(row)
    if not isinstance(outcome, Conversation):
        return identity, (outcome.reason, outcome.detail)
    if is_blank(outcome.messages[-1].content):
        return identity, ("empty_field", "there is nothing to answer: nothing in the prompt is visible")
    if config.system and outcome.system is None:
        outcome = Conversation((Message("system", config.system), *outcome.messages))
    return identity, outcome


def _with_prompt(value: Any) -> Any:
    """A row whose field `prompt` is a text or a list of messages, under the name that a schema has for it."""
    if not isinstance(value, dict) or any(value.get(key) is not None for key in KEY_FIELDS.values()):
        return value
    prompt = value.get("prompt")
    if isinstance(prompt, str):
        return {**value, "instruction": prompt}
    return {**value, "messages": prompt} if isinstance(prompt, list) else value


def _identity(value: Any) -> Any:
    """An id that JSON can hold: Parquet has kinds of values that it can't."""
    if isinstance(value, Unreadable):
        return None
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def encoded(record: dict[str, Any]) -> bytes:
    """A record as a line of JSON that people can read; escaped if a text can't be UTF-8, as with half a surrogate."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"
