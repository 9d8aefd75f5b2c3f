"""Best fit: by its definition on random lengths, and beside TRL's on real ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.prepared.dataset import PreparedDataset
from data.stages.packing import pack


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths and a seq_len; small rows make ties, full rows and rows of one."""
    seq_len = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, seq_len), max_size=60)), seq_len


@given(problem=problems())
def test_every_conversation_exactly_once(problem: tuple[list[int], int]) -> None:
    lengths, seq_len = problem
    assert sorted(i for row in pack(lengths, seq_len) for i in row) == list(range(len(lengths)))


@given(problem=problems())
def test_no_row_is_empty_or_too_long(problem: tuple[list[int], int]) -> None:
    lengths, seq_len = problem
    assert all(0 < sum(lengths[i] for i in row) <= seq_len for row in pack(lengths, seq_len))


@given(problem=problems())
def test_plan_depends_on_the_lengths_alone(problem: tuple[list[int], int]) -> None:
    lengths, seq_len = problem
    assert pack(list(lengths), seq_len) == pack(lengths, seq_len)


@given(problems())
def test_no_two_rows_fit_in_one(problem: tuple[list[int], int]) -> None:
    lengths, seq_len = problem
    used = sorted(sum(lengths[i] for i in row) for row in pack(lengths, seq_len))
    assert len(used) < 2 or used[0] + used[1] > seq_len


@given(problems())
def test_each_goes_where_it_fits_best(problem: tuple[list[int], int]) -> None:
    """Replays the plan, longest first: the row taken has the least space that suffices, and is new only without one."""
    lengths, seq_len = problem
    plan = pack(lengths, seq_len)
    row_of = {i: place for place, row in enumerate(plan) for i in row}
    assert all([lengths[i] for i in row] == sorted((lengths[i] for i in row), reverse=True) for row in plan)

    free: dict[int, int] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [space for space in free.values() if space >= lengths[i]]
        row = row_of[i]
        if fitting:
            assert free.get(row) == min(fitting)
        else:
            assert row not in free
        free[row] = free.get(row, seq_len) - lengths[i]


def test_plan_of_the_drawing() -> None:
    assert pack([7, 3, 6, 2, 2], 10) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("lengths", [[0], [3, -1], [11], [2, 11, 4]])
def test_bad_length_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="tokens, and a row holds 1 to 10"):
        pack(lengths, 10)


@pytest.mark.parametrize("seq_len", [2048, 4096])
@pytest.mark.parametrize("name", ["gpteacher_codegen", "alpaca_en_demo", "glaive_toolcall_en_demo"])
def test_real_rows_fill_their_slots_as_well_as_trls(
    run_program: Callable[..., Any], shared: Path, tmp_path: Path, name: str, seq_len: int
) -> None:
    path = shared / "data" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    settings = (f"seq_len={seq_len}", "eval_fraction=0", "max_reject_fraction=0.9")
    assert run_program("data", f"files=[{path}]", "output=out", *settings).exit_code == 0
    table = PreparedDataset(tmp_path / "out").train

    # TRL's best fit, which keeps conversations whole too, and its cutting into rows, which are as few as can be.
    lengths = [length for i in range(len(table)) for length in table[i].lengths]
    assert len(table) <= rows_of_trl(lengths, seq_len, "bfd")
    assert len(table) <= rows_of_trl(lengths, seq_len, "wrapped") + 1


def rows_of_trl(lengths: list[int], seq_len: int, strategy: str) -> int:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    dataset = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    return len(trl.pack_dataset(dataset, seq_len, strategy=strategy))
