"""Packed rows become batches, and a schedule deals them out: each row once an epoch, whatever the processes."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.program.errors import UserError
from data.prepared.dataset import (
    PAD_ID,
    PAD_RUN,
    Batch,
    PackedTable,
    PreparedDataset,
    Schedule,
    evaluation_batches,
    share,
)
from data.prepared.layout import LAYOUT, MANIFEST, MANIFEST_KIND, ROW_SCHEMA, open_split
from data.schema import IGNORE_INDEX, PackedRow
from tests.support.prepared import ROWS, SEQ_LEN, prepared, write

X = IGNORE_INDEX


@pytest.fixture
def table(tmp_path: Path) -> PackedTable:
    write(tmp_path / "rows.arrow", ROWS)
    return PackedTable(pa.ipc.open_file(tmp_path / "rows.arrow").read_all(), SEQ_LEN)


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
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]]
    assert batch.targets.tolist() == [[X] * SEQ_LEN, [30, *[X] * 5]]
    assert batch.is_token.tolist() == [[False] * SEQ_LEN, [True] * 2 + [False] * 4]


def test_the_runs_of_padding_are_few_and_short() -> None:
    """Attention takes each for a conversation."""
    rows = [PackedRow(ids=[1] * 100, spans=[1, 99], lengths=[100], rows=[0])]
    columns = {name: [getattr(row, name) for row in rows] for name in ROW_SCHEMA.names}
    positions = PackedTable(pa.table(columns, schema=ROW_SCHEMA), seq_len=1000).batch([0, None, None]).positions

    for row, used in zip(positions.tolist(), (100, 0, 0), strict=True):
        starts = [place for place, position in enumerate(row) if position == 0]
        assert starts == [0] * bool(used) + list(range(used, 1000, PAD_RUN))
        assert all(after == before + 1 for before, after in itertools.pairwise(row) if after)


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


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_every_process_goes_forward_as_often(table: PackedTable, micro_batch: int, processes: int) -> None:
    rows = [2, 0, 1, 1, 2]
    shares = [list(evaluation_batches(table, rows, micro_batch, rank, processes)) for rank in range(processes)]
    assert {len(dealt) for dealt in shares} == {-(-len(rows) // (micro_batch * processes))}
    assert {len(batch.ids) for dealt in shares for batch in dealt} == {micro_batch}
    expected = sum(table.batch([row]).tokens for row in rows)
    assert sum(batch.tokens for dealt in shares for batch in dealt) == expected


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


# Without packing


def test_batch_is_as_wide_as_its_longest_row_needs() -> None:
    rows = [PackedRow(ids=[1] * n, spans=[1, n - 1], lengths=[n], rows=[n]) for n in (5, 17, 33, 40)]
    columns = {name: [getattr(row, name) for row in rows] for name in ROW_SCHEMA.names}
    table = PackedTable(pa.table(columns, schema=ROW_SCHEMA), seq_len=40, pad_to_longest=True)

    widths = [table.batch(indices).ids.shape[1] for indices in ([0], [0, 1], [2], [3], [None], [None, 1])]
    assert widths == [16, 32, 40, 40, 16, 32]
    batch = table.batch([1, 0])
    assert batch.is_token.sum(dim=1).tolist() == [17, 5]
    assert (batch.targets[1, 5:] == X).all()
    assert batch.positions[1, :5].tolist() == [0, 1, 2, 3, 4]


grouped = st.builds(
    lambda lengths, epochs, rows_per_step, seed: Schedule(len(lengths), epochs, rows_per_step, seed, np.array(lengths)),
    st.lists(st.integers(1, 100), min_size=1, max_size=80),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 2**32),
)


@given(grouped)
def test_grouped_rows_are_seen_once_an_epoch(schedule: Schedule) -> None:
    test_each_epoch_sees_every_row_once.hypothesis.inner_test(schedule)  # type: ignore[attr-defined]
    test_blanks_come_only_at_the_very_end.hypothesis.inner_test(schedule)  # type: ignore[attr-defined]


def test_rows_of_like_length_come_together_and_steps_in_any_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 400)
    schedule = Schedule(400, 3, 10, 0, lengths)
    spreads, means = [], []
    for step in range(schedule.steps):
        of_step = lengths[schedule.rows_of(step)]
        spreads.append(of_step.max() - of_step.min())
        means.append(of_step.mean())
    assert np.median(spreads) < 60  # a tenth of what ten rows at random span
    half = len(means) // 2
    assert abs(np.mean(means[:half]) - np.mean(means[half:])) < 100  # neither short nor long rows come first
    assert schedule.rows_of(0) != Schedule(400, 3, 10, 1, lengths).rows_of(0)


@pytest.mark.parametrize("packing", [True, False])
def test_only_an_unpacked_dataset_groups_by_length(tmp_path: Path, packing: bool) -> None:
    dataset = PreparedDataset(prepared(tmp_path, packing=packing))
    schedule = dataset.schedule(epochs=1, rows_per_step=2, seed=0)
    assert (schedule.lengths is None) == packing
    if not packing:
        assert schedule.lengths is not None
        assert schedule.lengths.tolist() == [5, 6, 2]
        assert dataset.train.batch([2]).ids.shape[1] == SEQ_LEN  # narrower than the multiple: the row's own limit


# The directory


def test_prepared_dataset_opens_its_splits(tmp_path: Path) -> None:
    dataset = PreparedDataset(prepared(tmp_path))
    assert dataset.seq_len == SEQ_LEN
    assert (len(dataset.train), len(dataset.eval)) == (3, 0)


def test_damage_is_noticed(tmp_path: Path) -> None:
    rows = prepared(tmp_path) / "train" / "rows.arrow"
    content = rows.read_bytes()
    for damaged, told in ((content[:-1], "has .* bytes, not"), (content[::-1], "Not an Arrow file")):
        rows.write_bytes(damaged)
        with pytest.raises(UserError, match=f"dataset={tmp_path}: it is not whole .*{told}.*; prepare it again"):
            PreparedDataset(tmp_path)
    rows.unlink()
    with pytest.raises(UserError, match=r"train/rows\.arrow is missing"):
        PreparedDataset(tmp_path)


def test_another_layout_is_refused(tmp_path: Path) -> None:
    manifest = prepared(tmp_path) / MANIFEST
    manifest.write_text(manifest.read_text().replace(f'"layout": {LAYOUT}', f'"layout": {LAYOUT - 1}'))
    with pytest.raises(UserError, match="another version of this program made it"):
        PreparedDataset(tmp_path)


def test_a_dataset_that_changes_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifest and rows belong together, also where a new dataset takes the place of the old between the two."""
    prepared(tmp_path)
    changed = []

    def open_and_change(directory: Path, split: str) -> pa.Table:
        table = open_split(directory, split)
        if not changed:
            manifest = json.loads((directory / MANIFEST).read_text())
            (directory / MANIFEST).write_text(json.dumps({**manifest, "seq_len": 7}))
            changed.append(split)
        return table

    monkeypatch.setattr("data.prepared.dataset.open_split", open_and_change)
    dataset = PreparedDataset(tmp_path)
    assert dataset.seq_len == dataset.train.seq_len == dataset.manifest["seq_len"] == 7


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
