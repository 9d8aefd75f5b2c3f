"""The prepared dataset → batches, the same rows in the same order whatever the number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from configs.errors import UserError
from data.layout import SPLITS, read_manifest
from data.schema import IGNORE_INDEX, PackedRow

PAD_ID = 0
"""The id in unused slots (`<unk>`). Nothing attends to it from a conversation, and it is never trained."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of B rows, each padded to T = seq_len tokens.

    ids        | a0 a1 a2 b0 b1 pad |
    positions  |  0  1  2  0  1  0  |
    targets    | a1 a2  -  b1 -  -  |   where trained, else IGNORE_INDEX: what the token's output should predict
    """

    ids: torch.Tensor
    """[B, T] int64."""
    positions: torch.Tensor
    """[B, T] int64. Each conversation counts from 0, and so does the padding: where the count does not go up by one,
    attention is cut."""
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

    def __init__(self, path: Path, seq_len: int):
        self.seq_len = seq_len
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> PackedRow:
        row = self._table.slice(index, 1).to_pylist()[0]
        return PackedRow(**row)

    def batch(self, indices: list[int | None]) -> Batch:
        """The rows at these indices; None stands for a row without tokens."""
        shape = (len(indices), self.seq_len)
        ids = np.full(shape, PAD_ID, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        labels = np.full((len(indices), self.seq_len + 1), IGNORE_INDEX, dtype=np.int64)
        is_token = np.zeros(shape, dtype=bool)
        for place, index in enumerate(indices):
            if index is None:
                continue
            row = self[index]
            used = len(row.ids)
            ids[place, :used] = row.ids
            labels[place, :used] = row.labels
            positions[place, :used] = np.concatenate([np.arange(length) for length in row.lengths])
            is_token[place, :used] = True
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
        self.seq_len: int = self.manifest["seq_len"]
        try:
            tables = [PackedTable(self.directory / split / "rows.arrow", self.seq_len) for split in SPLITS]
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"dataset={directory}: it is not whole ({error}); prepare it again") from error
        self.train, self.eval = tables
        if not len(self.train):
            raise UserError(f"dataset={directory}: it holds no rows to train on; prepare more rows")


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

    @property
    def steps(self) -> int:
        """Optimizer steps in all epochs."""
        return -(-self.rows * self.epochs // self.rows_per_step)

    def rows_of(self, step: int) -> list[int | None]:
        """The rows of a step (from 0), always `rows_per_step` of them."""
        first = step * self.rows_per_step
        places = range(first, first + self.rows_per_step)
        epochs = {place // self.rows for place in places if place < self.rows * self.epochs}
        orders = {epoch: self._order(epoch) for epoch in epochs}
        return [
            int(orders[place // self.rows][place % self.rows]) if place // self.rows in orders else None
            for place in places
        ]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.rows)


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
