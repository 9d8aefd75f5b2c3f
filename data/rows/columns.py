"""What the rows of a source call the fields of their schema, and which other fields say nothing."""

from collections.abc import Iterable
from dataclasses import dataclass

from data.schema import ROW_FIELDS, TURN_FIELDS

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
    "source",
    "dataset",
    "url",
    "license",
    "language",
    "lang",
    "category",
    "topic",
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
}
"""Names of fields that describe a row and say nothing in it."""


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

    @classmethod
    def of(cls, schema: str, columns: dict[str, str]) -> "Names":
        """The names of a schema's fields; `columns` has those that are called differently."""
        return cls(schema, _named(ROW_FIELDS[schema], columns), _named(TURN_FIELDS[schema], columns))

    @property
    def renamed(self) -> set[str]:
        """Names that differ from their fields'."""
        return {name for field, name in (self.row | self.turn).items() if name != field}

    def called(self, field: str) -> str:
        """A field by its name in the rows, and the setting that says so."""
        name = (self.row | self.turn).get(field)
        if name is None:
            return f"{field} (columns reads the one of that name as another)"
        return name if name == field else f"{name}, which columns.{field} names"


def _named(fields: tuple[str, ...], columns: dict[str, str]) -> dict[str, str]:
    renamed = {field: columns[field] for field in fields if field in columns}
    return {field: renamed.get(field, field) for field in fields if field in renamed or field not in renamed.values()}
