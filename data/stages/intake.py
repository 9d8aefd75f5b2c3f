"""Encoded chunks, in the order of the rows → kept conversations in the store, or a line in the file of rejects.

What depends on the rows before (duplicates) or on the number of a row (weights) is decided here, by one process.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any, TextIO

from configs.program.errors import UserError
from data.config import AUTO, PrepareConfig
from data.prepared.places import Places
from data.rows.columns import Names, harmless, look
from data.rows.reading import Chunk, RawRow, Reject, Settings
from data.rows.sources import Source
from data.schema import KEY_FIELDS, fields_of
from data.stages.duplicates import Seen
from data.stages.encoding import EncodedChunk, Pool
from data.stages.store import ConversationStore

CLEANED = ("contaminated", "duplicate", "near_duplicate", "left_out")
"""Reasons of rejects that were asked for, and say nothing against the data."""


MOST_PROPOSALS = 10_000
"""Settings that are counted, each with an entry."""


class Intake:
    """Takes in the rows of all sources and keeps the count: rows = kept + rejected, always."""

    def __init__(self, config: PrepareConfig, store: ConversationStore, rejects: TextIO):
        """Kept conversations go to `store`, a line for each of the other rows to `rejects`."""
        self.rows = 0
        """Rows read."""
        self.kept = 0
        """Rows of which something is in the store."""
        self.rejected: Counter[str] = Counter()
        """The others, by reason."""
        self.first_unusable: Reject | None = None
        self.helpful: Counter[tuple[str, str, str]] = Counter()
        """Settings with which unusable rows could be used, each with an entry, and for how many rows."""
        self.repaired: Counter[str] = Counter()
        """Kept rows whose turns were put in order, by the repairs."""
        self.shortened: Counter[str] = Counter()
        """Kept rows that were longer than allowed, and what they lost."""
        self.copies = array("i")
        """For each conversation in the store, how often an epoch trains on it."""
        self.places = Places()
        """Where each row stands."""
        self.inputs: list[dict[str, Any]] = []
        """What the manifest says of each source."""
        self.unseen = {name for field, name in config.columns.items() if name != field}
        """Names in `columns` that no row so far has."""

        self._config, self._store, self._rejects = config, store, rejects
        near_threshold = config.near_threshold if config.duplicates == "drop_near" else None
        self._seen = None if config.duplicates == "keep" else Seen(near_threshold=near_threshold)
        self._useless = set(config.columns)  # that no source so far has a use for

    def read(self, source: Source, pool: Pool, *, is_last: bool) -> Iterator[int]:
        """Takes in the rows of a source; yields how many rows were read so far, over all sources.

        Raises:
            UserError: after the last source is known, `columns` names a field that none of their schemas has.
        """
        first = self.rows
        names, chunks = _with_names(source, self._config)
        schema = names.schema
        self._useless -= set(fields_of(schema))
        if is_last and self._useless:
            raise UserError(
                f"columns.{min(self._useless)}: the rows are read as {schema}, which has no such field; it is one of "
                f"{', '.join(fields_of(schema))}; or give schema=… if they are of another"
            )
        unread: Counter[str] = Counter()
        for encoded in pool.encode(chunks, names):
            self._take(encoded, source)
            unread.update(encoded.unread)
            self.unseen -= encoded.seen
            yield self.rows
        read = {"schema": schema, "columns": names.found, "rows": self.rows - first}
        self.inputs.append({**source.description, **read, **_told(unread)})

    @property
    def unusable(self) -> int:
        """Rows that were rejected for what they are."""
        return sum(number for reason, number in self.rejected.items() if reason not in CLEANED)

    @property
    def helpful_settings(self) -> Settings:
        """Settings with which unusable rows could be used; one that concerns all rows has to help most of them."""
        found: dict[str, dict[str, str]] = {}
        for (setting, entry, value), rows in self.helpful.most_common():
            most = self.rows // 2 + 1
            least = {"columns": most, "schema": most, "roles": self.unusable / 10}
            if rows >= least.get(setting, 1):
                found.setdefault(setting, {}).setdefault(entry, value)
        return {name: entries if any(entries.values()) else tuple(entries) for name, entries in found.items()}

    def _take(self, encoded: EncodedChunk, source: Source) -> None:
        rejects = dict(encoded.rejects)
        self.places.add(encoded.file, encoded.unit, encoded.numbers)
        for position, (index, parts) in enumerate(encoded.kept):
            row = self.rows + index
            copies = copies_of(row, source.weight, self._config.seed)
            reject = None
            if copies == 0:
                detail = f"the weight {source.weight} of its source leaves it out"
                reject = Reject(encoded.file, encoded.unit, encoded.numbers[index], "left_out", detail)
            elif self._seen is not None:
                reject = self._duplicate(encoded, position, row)
            if reject is not None:
                rejects[index] = reject
                continue
            self.kept += 1
            self.repaired.update(encoded.repaired.get(index, ()))
            if lost := encoded.shortened.get(index):
                self.shortened.update(rows=1, turns_left_out=lost.turns_left_out, replies_cut=lost.replies_cut)
            for part in parts:
                self._store.append(row, part)
                self.copies.append(copies)
        for _, reject in sorted(rejects.items()):
            self.rejected[reject.reason] += 1
            if self.first_unusable is None and reject.reason not in CLEANED:
                self.first_unusable = reject
            if len(self.helpful) < MOST_PROPOSALS:  # rows that each propose something else propose nothing
                self.helpful.update(_entries(reject))
            self._rejects.write(json.dumps(reject.record(), ensure_ascii=False) + "\n")
        self.rows += len(encoded.numbers)

    def _duplicate(self, encoded: EncodedChunk, position: int, row: int) -> Reject | None:
        assert self._seen is not None
        earlier = self._seen.earlier(row, encoded.likenesses[position])
        if earlier is None:
            return None
        other, similarity = earlier
        number = encoded.numbers[encoded.kept[position][0]]
        kept = self.places.of(other)
        if similarity is None:
            detail, reason = "the same conversation was there before", "duplicate"
        else:
            detail, reason = (
                f"a conversation that is alike was there before (similarity {similarity:.2f})",
                "near_duplicate",
            )
        return Reject(encoded.file, encoded.unit, number, reason, detail, {"file": kept.file, kept.unit: kept.number})


def _told(unread: Counter[str]) -> dict[str, dict[str, int]]:
    """What the manifest says of the fields that were not read, the commonest first: in how many rows each is."""
    describing = harmless(unread)
    ordered = sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    return {
        "unread_fields": {field: rows for field, rows in ordered if field not in describing},
        "harmless_fields": {field: rows for field, rows in ordered if field in describing},
    }


def copies_of(row: int, weight: float, seed: int) -> int:
    """How often an epoch trains on a row of a source of that weight: 1.5 is once, and for a seeded half once more."""
    whole, share = divmod(weight, 1)
    if share == 0:
        return int(whole)
    draw = int.from_bytes(hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest())
    return int(whole) + (draw < share * 2**64)


def _entries(reject: Reject) -> Iterator[tuple[str, str, str]]:
    """Each setting that a reject proposes, by its entries."""
    for setting, given in reject.settings.items():
        for entry in given:
            yield setting, entry, given[entry] if isinstance(given, dict) else ""


def _with_names(source: Source, config: PrepareConfig) -> tuple[Names, Iterator[Chunk]]:
    """What a source's rows call their fields, found by the first ones if no schema is given, and all its chunks."""
    chunks = source.chunks()
    if config.schema != AUTO:
        return Names.of(config.schema, config.columns), chunks
    first = next(chunks, None)
    rows = [] if first is None else [row.value for row in first.rows() if isinstance(row, RawRow)]
    # If none fits, the one whose field has a name, or the plainest: its rejects say what is missing.
    schema = next((schema for schema, key in KEY_FIELDS.items() if key in config.columns), "instruction")
    names = look(rows, config.columns) or Names.of(schema, config.columns)
    return names, chain([] if first is None else [first], chunks)
