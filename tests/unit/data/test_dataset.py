import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from data.dataset import PAD_ID, Batch, PackedTable, PreparedDataset, Schedule, share
from data.layout import MANIFEST, MANIFEST_KIND, ROW_SCHEMA, SPLITS
from data.schema import IGNORE_INDEX, PackedRow

X = IGNORE_INDEX
SEQ_LEN = 6

ROWS = [
    PackedRow(ids=[1, 10, 11, 1, 12], labels=[X, 10, 11, X, 12], lengths=[3, 2], rows=[7, 3]),
    PackedRow(ids=[1, 20, 21, 22, 23, 2], labels=[X, X, 21, 22, 23, 2], lengths=[6], rows=[5]),
    PackedRow(ids=[1, 30], labels=[X, 30], lengths=[2], rows=[0]),
]


def write(path: Path, rows: list[PackedRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [getattr(row, name) for row in rows] for name in ROW_SCHEMA.names}
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, ROW_SCHEMA) as arrow:
        arrow.write_table(pa.table(columns, schema=ROW_SCHEMA))


@pytest.fixture
def table(tmp_path: Path) -> PackedTable:
    write(tmp_path / "rows.arrow", ROWS)
    return PackedTable(tmp_path / "rows.arrow", SEQ_LEN)


# Batches


def test_table_gives_back_its_rows(table: PackedTable) -> None:
    assert len(table) == 3
    assert [table[i] for i in range(3)] == ROWS


def test_batch_by_hand(table: PackedTable) -> None:
    batch = table.batch([0, 1])
    P = PAD_ID

    assert batch.ids.tolist() == [[1, 10, 11, 1, 12, P], [1, 20, 21, 22, 23, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.targets.tolist() == [[10, 11, X, 12, X, X], [X, 21, 22, 23, 2, X]]
    assert batch.is_token.tolist() == [[True] * 5 + [False], [True] * 6]
    assert (batch.tokens, batch.supervised_tokens) == (11, 7)
    assert {batch.ids.dtype, batch.positions.dtype, batch.targets.dtype} == {torch.int64}
    assert batch.is_token.dtype == torch.bool


def test_blank_row_holds_nothing(table: PackedTable) -> None:
    batch = table.batch([None, 2])

    assert batch.ids.tolist() == [[PAD_ID] * SEQ_LEN, [1, 30, *[PAD_ID] * 4]]
    assert batch.positions.tolist() == [[0] * SEQ_LEN, [0, 1, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[X] * SEQ_LEN, [30, *[X] * 5]]
    assert batch.is_token.tolist() == [[False] * SEQ_LEN, [True] * 2 + [False] * 4]


def test_nothing_predicts_across_a_boundary(table: PackedTable) -> None:
    """Where the next position is 0 another conversation begins, so the token before it has no target."""
    batch = table.batch([0, 1, 2])
    ends = torch.roll(batch.positions, -1, dims=1) == 0
    assert (batch.targets[ends] == X).all()


# Sharing


def same(a: Batch, b: Batch) -> bool:
    tensors = ("ids", "positions", "targets", "is_token")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_any_number_of_processes_shares_the_same_micro_batches(
    table: PackedTable, micro_batch: int, processes: int
) -> None:
    indices: list[int | None] = [2, 0, None, 1, 1, 2, 0, None]
    alone = list(share(table, indices, micro_batch, 0, 1))
    shares = [list(share(table, indices, micro_batch, rank, processes)) for rank in range(processes)]

    assert len(alone) == len(indices) // micro_batch
    assert {len(dealt) for dealt in shares} == {len(alone) // processes}
    dealt_in_turn = [micro for turn in zip(*shares, strict=True) for micro in turn]
    assert all(same(a, b) for a, b in zip(alone, dealt_in_turn, strict=True))


# Schedule


def seen(schedule: Schedule) -> list[int | None]:
    return [row for step in range(schedule.steps) for row in schedule.rows_of(step)]


schedules = st.builds(
    Schedule,
    rows=st.integers(1, 25),
    epochs=st.integers(1, 4),
    rows_per_step=st.integers(1, 60),
    seed=st.integers(0, 2**32),
)


@given(schedules)
def test_each_epoch_sees_every_row_once(schedule: Schedule) -> None:
    rows = seen(schedule)
    for epoch in range(schedule.epochs):
        first = epoch * schedule.rows
        assert sorted(rows[first : first + schedule.rows]) == list(range(schedule.rows))  # type: ignore[type-var]


@given(schedules)
def test_blanks_come_only_at_the_very_end(schedule: Schedule) -> None:
    rows = seen(schedule)
    real = schedule.rows * schedule.epochs

    assert all(len(schedule.rows_of(step)) == schedule.rows_per_step for step in range(schedule.steps))
    assert None not in rows[:real]
    assert rows[real:] == [None] * (len(rows) - real)
    assert len(rows) - real < schedule.rows_per_step


@given(schedules, st.integers(1, 60))
def test_order_does_not_depend_on_the_rows_of_a_step(schedule: Schedule, other: int) -> None:
    same_rows = Schedule(schedule.rows, schedule.epochs, other, schedule.seed)
    real = schedule.rows * schedule.epochs
    assert seen(schedule)[:real] == seen(same_rows)[:real]


@given(schedules)
def test_any_step_can_be_asked_for_first(schedule: Schedule) -> None:
    """A resumed run starts in the middle."""
    backwards = [schedule.rows_of(step) for step in reversed(range(schedule.steps))]
    assert [row for step in reversed(backwards) for row in step] == seen(schedule)


def test_order_differs_between_epochs_and_seeds() -> None:
    first, second = Schedule(50, 1, 50, 0), Schedule(50, 1, 50, 1)
    both = Schedule(50, 2, 50, 0)

    assert first.rows_of(0) != list(range(50))
    assert first.rows_of(0) != second.rows_of(0)
    assert both.rows_of(0) == first.rows_of(0)
    assert both.rows_of(1) not in (both.rows_of(0), second.rows_of(0))


# The directory


def test_prepared_dataset_opens_its_splits(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"kind": MANIFEST_KIND, "seq_len": SEQ_LEN}))
    for split, rows in zip(SPLITS, (ROWS, []), strict=True):
        write(tmp_path / split / "rows.arrow", rows)
    dataset = PreparedDataset(tmp_path)

    assert dataset.seq_len == SEQ_LEN
    assert (len(dataset.train), len(dataset.eval)) == (3, 0)


@pytest.mark.parametrize("exists", [True, False])
def test_directory_without_manifest_is_refused(tmp_path: Path, exists: bool) -> None:
    directory = tmp_path / "prepared"
    if exists:
        directory.mkdir()
    with pytest.raises(UserError, match=f"^dataset={directory}: there is no prepared dataset there; make one"):
        PreparedDataset(directory)


@pytest.mark.parametrize(
    "manifest", ["[]", "{", '{"manifest_version": 3}', json.dumps({"kind": MANIFEST_KIND, "seq_len": SEQ_LEN})]
)
def test_what_is_not_whole_is_refused(tmp_path: Path, manifest: str) -> None:
    (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(UserError, match=f"dataset={tmp_path}: "):
        PreparedDataset(tmp_path)
