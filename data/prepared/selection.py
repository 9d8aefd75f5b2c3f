"""Which rows and conversations of a prepared dataset `task=preview` and `task=report` show."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.program.errors import UserError
from data.config import PrepareConfig
from data.disk.formats.arrow_file import as_array
from data.prepared.places import Place, Places
from data.prepared.whole import Rejected, rejects
from data.schema import PackedRow, TokenizedConversation


@dataclass(frozen=True, slots=True)
class ShownConversation:
    """A conversation of a packed row."""

    number: int
    """From 1 in its row."""
    place: Place
    """Where the row stood that it was made from."""
    tokenized: TokenizedConversation


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A packed row, and those of its conversations that are shown."""

    split: str
    number: int
    packed: PackedRow
    conversations: list[ShownConversation]


def selected(
    directory: Path, manifest: dict[str, Any], tables: dict[str, pa.Table], config: PrepareConfig, *, spread: bool
) -> list[ShownRow]:
    """What `where`, `train_rows`, `conversations` and `rows` ask for; `tables` are the rows of the splits.

    If they name nothing, the first rows of the training split, or with `spread` rows from all over it.

    Raises:
        UserError: what they name is not there.
    """
    places = Places.read(directory, manifest["rows"]["in"])
    if config.where is not None:
        return list(_made_of(directory, tables, config.where, places))
    train = tables["train"]
    rows, wanted = train.num_rows, config.conversations
    if not rows:
        raise UserError(f"output={directory}: it holds no rows; prepare more")
    if config.train_rows:
        if beyond := [row for row in config.train_rows if not 0 <= row < rows]:
            raise UserError(f"train_rows=[{beyond[0]}]: the training split has rows 0 to {rows - 1}; give these")
        numbers = config.train_rows
    elif spread:
        numbers = np.unique(np.linspace(0, rows - 1, num=min(wanted or config.rows, rows), dtype=int)).tolist()
    else:
        numbers = list(range(min(wanted or config.rows, rows)))
    shown = [_shown("train", number, train, places) for number in numbers]
    return _first(shown, wanted, spread=spread) if wanted else shown


def _first(rows: list[ShownRow], wanted: int, *, spread: bool) -> list[ShownRow]:
    """So many conversations, those of the first rows, or with `spread` as many of each."""
    some = []
    of_each = -(-wanted // len(rows)) if spread else wanted
    for row in rows:
        taken = row.conversations[: min(of_each, wanted)]
        wanted -= len(taken)
        if taken:
            some.append(replace(row, conversations=taken))
    return some


def _made_of(directory: Path, tables: dict[str, pa.Table], where: str, places: Places) -> Iterator[ShownRow]:
    """The rows with what was made of that raw row, each conversation once."""
    rows = places.rows_at(where, "where")
    seen = set()
    for split, table in tables.items():
        for number in _rows_with(table, rows):
            shown = _shown(split, number, table, places)
            own = []
            for row, conversation in zip(shown.packed.rows, shown.conversations, strict=True):
                if row in rows and conversation.tokenized not in seen:
                    seen.add(conversation.tokenized)
                    own.append(conversation)
            if own:
                yield replace(shown, conversations=own)
    if not seen:
        reject = _reject_of(directory, places.of(rows[0]))
        why = "is not in the dataset" if reject is None else f"was rejected ({reject['reason']}): {reject['detail']}"
        raise UserError(f"where={where}: the row {why}")


def _rows_with(table: pa.Table, rows: range) -> list[int]:
    """The packed rows that hold something of these rows."""
    found: list[int] = []
    first = 0
    for batch in table.select(["rows"]).to_batches():
        ends = as_array(batch["rows"].offsets)[1:]
        values = as_array(batch["rows"].values)
        hits = np.flatnonzero((values >= rows.start) & (values < rows.stop))
        found += (first + np.unique(np.searchsorted(ends, hits, side="right"))).tolist()
        first += batch.num_rows
    return found


def _reject_of(directory: Path, place: Place) -> Rejected | None:
    of_place = (r for r in rejects(directory) if r["file"] == place.file and r.get(place.unit) == place.number)
    return next(of_place, None)


def _shown(split: str, number: int, table: pa.Table, places: Places) -> ShownRow:
    packed = PackedRow(**table.slice(number, 1).to_pylist()[0])
    conversations = []
    spans, position = iter(packed.spans), 0
    for index, (length, row) in enumerate(zip(packed.lengths, packed.rows, strict=True), start=1):
        ids = array("H", packed.ids[position : position + length])
        own: list[int] = []
        while sum(own) < length:  # a turn has two; a masked reply leaves the second empty
            own += (next(spans), next(spans))
        conversations.append(ShownConversation(index, places.of(row), TokenizedConversation(ids.tobytes(), tuple(own))))
        position += length
    return ShownRow(split, number, packed, conversations)
