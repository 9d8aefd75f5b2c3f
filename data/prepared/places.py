"""Where each row stood that went into a prepared dataset: its file, and its line or its index in a list."""

import json
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.program.errors import UserError
from data.disk.formats.arrow_file import as_array, from_array, open_table

PLACES = "places.arrow"
SCHEMA = pa.schema([("number", pa.int64())])

LONGEST_NUMBER = 18
"""Digits of a line's number, so that it fits 64 bits."""

Run = tuple[int, str, str]
"""The first row of a file, counted over all sources; the file; and what is counted in it: line or row."""


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file (from 1), or an item of a list (from 0), as rejects.jsonl counts."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


class Places:
    """The place of each row, by its number over all sources: eight bytes a row."""

    def __init__(self, runs: Sequence[Run] = (), numbers: Any = None):
        """Empty, or of rows that are known already: `numbers` has line or item of each."""
        self._runs: list[Run] = list(runs)
        self._numbers = array("q") if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, file: str, unit: str, numbers: Sequence[int]) -> None:
        """The next rows, of one file."""
        if numbers and (not self._runs or self._runs[-1][1:] != (file, unit)):
            self._runs.append((len(self._numbers), file, unit))
        self._numbers.extend(numbers)

    def of(self, row: int) -> Place:
        """The place of a row."""
        _, file, unit = self._runs[bisect_right(self._runs, row, key=lambda run: run[0]) - 1]
        return Place(file, unit, int(self._numbers[row]))

    def rows_at(self, where: str, setting: str) -> range:
        """The rows at `FILE:NUMBER`, several if they stand in one line; a name without its folders is enough for a file
        if no other has that name.

        Raises:
            UserError: there is none; the text begins with `setting`.
        """
        name, _, number = where.rpartition(":")
        runs = [run for run in self._runs if run[1] == name] or [
            run for run in self._runs if run[1].endswith(f"/{name}")
        ]
        if not name or not number.isdecimal() or len(number) > LONGEST_NUMBER:
            raise UserError(f"{setting}={where}: it doesn't name a row; give FILE:NUMBER, for example {self.of(0)}")
        if len(runs) != 1:
            files = ", ".join(list(dict.fromkeys(file for _, file, _ in runs or self._runs))[:5])
            raise UserError(
                f"{setting}={where}: {'several files have' if runs else 'no file has'} that name; give {files}"
            )
        first, file, unit = runs[0]
        after = [start for start, _, _ in self._runs if start > first]
        numbers = np.asarray(self._numbers[first : after[0] if after else len(self._numbers)])
        found, end = np.searchsorted(numbers, int(number), "left"), np.searchsorted(numbers, int(number), "right")
        if found == end:
            raise UserError(
                f"{setting}={where}: no row is there; {file} has them from {unit} {numbers[0]} to {numbers[-1]}"
            )
        return range(first + int(found), first + int(end))

    def write(self, directory: Path) -> None:
        """Writes the file of a dataset."""
        schema = SCHEMA.with_metadata({"runs": json.dumps(self._runs)})
        numbers = from_array(np.asarray(self._numbers, np.int64))
        with pa.OSFile(str(directory / PLACES), "wb") as file, pa.ipc.new_file(file, schema) as arrow:
            arrow.write_batch(pa.RecordBatch.from_arrays([numbers], schema=schema))

    @classmethod
    def read(cls, directory: Path, rows: int) -> "Places":
        """Those of a dataset into which that many rows went, memory-mapped.

        Raises:
            UserError: the file is damaged.
        """
        try:
            table = open_table(directory / PLACES, SCHEMA)
            runs = [
                (int(first), str(file), str(unit)) for first, file, unit in json.loads(table.schema.metadata[b"runs"])
            ]
            numbers = as_array(table["number"])
            if numbers.dtype != np.int64 or len(numbers) != rows or (rows and (not runs or runs[0][0] != 0)):
                raise ValueError
            if any(later[0] <= earlier[0] for earlier, later in pairwise(runs)):
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"output={directory}: its {PLACES} is not whole; prepare it again") from error
        return cls(runs, numbers)
