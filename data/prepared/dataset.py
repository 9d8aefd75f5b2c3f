"""The prepared dataset → batches, the same rows in the same order whatever the number of processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from configs.program.errors import UserError
from data.disk.formats.arrow_file import as_array
from data.disk.formats.regular import UnreadableError
from data.prepared.layout import SPLITS, damage, open_split, read_manifest
from data.schema import IGNORE_INDEX, PackedRow, labels_of

PAD_ID = 0
"""The id in unused slots (`<unk>`). Nothing attends to it from a conversation, and it is never trained."""

PAD_MULTIPLE = 16
"""What the width of a padded batch is a multiple of: kernels are built for such widths."""

PAD_RUN = 256
"""Unused slots whose positions count up before they start again. Attention takes each run for a conversation: one for
each slot would be thousands of them, one for all would cost the square of their number."""

GROUPED_STEPS = 32
"""Steps whose rows are sorted by length together: more makes less padding, and an order that is less random."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of B rows, each padded to T tokens: seq_len, or without packing what the longest of them needs.

    ids        | a0 a1 a2 b0 b1 pad pad |
    positions  |  0  1  2  0  1  0   1  |
    targets    | a1 a2  -  b1 -  -   -  |   where trained, else IGNORE_INDEX: what the token's output should predict
    """

    ids: torch.Tensor
    """[B, T] int64."""
    positions: torch.Tensor
    """[B, T] int64. Each conversation counts from 0, and so does the padding, anew every PAD_RUN slots: where the count
    does not go up by one, attention is cut."""
    targets: torch.Tensor
    """[B, T] int64."""
    is_token: torch.Tensor
    """[B, T] bool. False in padding."""

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.is_token.sum())

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are trained."""
        return int((self.targets != IGNORE_INDEX).sum())

    @property
    def pairs(self) -> int:
        """Pairs of a token and one that it attends to: those before it in its conversation, and itself."""
        return int((self.positions + 1)[self.is_token].sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(
            ids=self.ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            is_token=self.is_token.to(device, non_blocking=True),
        )


class PackedTable:
    """The packed rows of one split, memory-mapped: only the rows that are asked for are read."""

    def __init__(self, rows: pa.Table, seq_len: int, *, pad_to_longest: bool = False):
        """Over rows of `ROW_SCHEMA`; with `pad_to_longest` batches are no wider than they have to be."""
        self.seq_len, self.pad_to_longest = seq_len, pad_to_longest
        self._table = rows

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> PackedRow:
        # Copied by Arrow, which waits for the disk without Python's lock.
        row = self._table.slice(index, 1).take([0])
        return PackedRow(**row.to_pylist()[0])

    def lengths(self) -> np.ndarray:
        """[rows] int64: the tokens of each row."""
        return as_array(pc.list_value_length(self._table["ids"])).astype(np.int64)

    def batch(self, indices: list[int | None]) -> Batch:
        """The rows at these indices; None stands for a row without tokens."""
        rows = [None if index is None else self[index] for index in indices]
        width = self.seq_len
        if self.pad_to_longest:
            longest = max((len(row.ids) for row in rows if row is not None), default=1)
            width = min(self.seq_len, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
        shape = (len(rows), width)
        ids = np.full(shape, PAD_ID, dtype=np.int64)
        positions = np.empty(shape, dtype=np.int64)
        labels = np.full((len(rows), width + 1), IGNORE_INDEX, dtype=np.int64)
        is_token = np.zeros(shape, dtype=bool)
        for index, row in enumerate(rows):
            used = 0 if row is None else len(row.ids)
            positions[index, used:] = np.arange(width - used) % PAD_RUN
            if row is None:
                continue
            ids[index, :used] = row.ids
            labels[index, :used] = labels_of(ids[index, :used], row.spans)
            positions[index, :used] = np.concatenate([np.arange(length) for length in row.lengths])
            is_token[index, :used] = True
        # A conversation's first token is never trained, so shifting across a boundary trains nothing.
        targets = np.ascontiguousarray(labels[:, 1:])
        return Batch(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            targets=torch.from_numpy(targets),
            is_token=torch.from_numpy(is_token),
        )


class PreparedDataset:
    """A directory that `python -m data` wrote."""

    def __init__(self, directory: str | Path):
        """Opens it.

        Raises:
            UserError: there is no prepared dataset, or a part of it is missing or damaged.
        """
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        # Until the manifest is that of the rows: a new dataset may replace the old one at any time.
        while True:
            wrong = damage(self.directory, self.manifest)
            try:
                tables = [] if wrong else self._open()
            except UnreadableError as error:
                wrong = f"it is not whole ({error})"
            now = read_manifest(self.directory)
            if now == self.manifest:
                break
            self.manifest = now
        if wrong:
            raise UserError(f"dataset={directory}: {wrong}; prepare it again")
        self.seq_len: int = self.manifest["seq_len"]
        self.packing: bool = self.manifest["packing"]
        self.train, self.eval = tables
        if not len(self.train):
            raise UserError(f"dataset={directory}: it holds no rows to train on; prepare more rows")

    def _open(self) -> list[PackedTable]:
        seq_len, packing = self.manifest["seq_len"], self.manifest["packing"]
        return [PackedTable(open_split(self.directory, split), seq_len, pad_to_longest=not packing) for split in SPLITS]

    def schedule(self, *, epochs: int, rows_per_step: int, seed: int) -> "Schedule":
        """Which rows of the training split each step takes; without packing, rows of like length."""
        lengths = None if self.packing else self.train.lengths()
        return Schedule(len(self.train), epochs, rows_per_step, seed, lengths)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which rows each optimizer step takes: the epochs, each in its own seeded order, end to end.

    The last step's missing rows are blank, so every row of every epoch is seen exactly once.
    """

    rows: int
    """Rows of the training split."""
    epochs: int
    rows_per_step: int
    """Rows of one optimizer step, over all processes (the global batch)."""
    seed: int
    lengths: np.ndarray | None = None
    """[rows] tokens of each row, if rows of like length are to come together; the order then depends on
    `rows_per_step`.

    shuffled  5 1 8 2 | 7 4 6 3      two steps of four rows
    sorted    1 2 3 4 | 5 6 7 8      by length, among the rows of GROUPED_STEPS steps
    shuffled  5 6 7 8 | 1 2 3 4      the steps
    """
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def steps(self) -> int:
        """Optimizer steps in all epochs."""
        return -(-self.rows * self.epochs // self.rows_per_step)

    def epochs_after(self, steps: int) -> float:
        """How often the rows have been seen after that many steps."""
        return min(steps * self.rows_per_step / self.rows, float(self.epochs))

    def rows_of(self, step: int) -> list[int | None]:
        """The rows of a step (from 0), always `rows_per_step` of them."""
        first = step * self.rows_per_step
        positions = range(first, first + self.rows_per_step)
        epochs = {position // self.rows for position in positions if position < self.rows * self.epochs}
        orders = {epoch: self._order(epoch) for epoch in epochs}
        return [
            int(orders[position // self.rows][position % self.rows]) if position // self.rows in orders else None
            for position in positions
        ]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            for past in [other for other in self._orders if other < epoch - 1]:  # steps go forward
                del self._orders[past]
            self._orders[epoch] = self._draw(epoch)
        return self._orders[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.rows)
        if self.lengths is None:
            return order
        # The first rows complete the step in which the epoch before ended.
        lead = -epoch * self.rows % self.rows_per_step
        body = order[lead:]
        whole = len(body) // self.rows_per_step * self.rows_per_step
        window = GROUPED_STEPS * self.rows_per_step
        for first in range(0, len(body), window):
            rows = body[first : first + window]
            body[first : first + window] = rows[np.argsort(self.lengths[rows], kind="stable")]
        steps = body[:whole].reshape(-1, self.rows_per_step)
        return np.concatenate([order[:lead], rng.permutation(steps).reshape(-1), body[whole:]])


def share(
    table: PackedTable, indices: list[int | None], micro_batch: int, process_rank: int, processes: int
) -> Iterator[Batch]:
    """The micro-batches of one process, out of the rows of one step.

    The step's micro-batches are dealt in turn, so their contents do not depend on the number of processes:

        micro-batch   0 1 2 3      2 processes × 2 micro-batches, 1 process × 4, 4 processes × 1
        process       0 1 0 1
    """
    chunks = [indices[start : start + micro_batch] for start in range(0, len(indices), micro_batch)]
    for chunk in chunks[process_rank::processes]:
        yield table.batch(chunk)


def evaluation_batches(
    table: PackedTable, indices: Sequence[int], micro_batch: int, process_rank: int, processes: int
) -> Iterator[Batch]:
    """The micro-batches of one process, out of rows that are only run forward.

    Blank rows fill the last ones, so that every process makes the same number of forwards.
    """
    blank = -len(indices) % (micro_batch * processes)
    yield from share(table, [*indices, *[None] * blank], micro_batch, process_rank, processes)
