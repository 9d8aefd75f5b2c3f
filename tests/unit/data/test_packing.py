from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import PrepareConfig
from data.packing import pack
from data.prepare import encode_rows
from data.sources import find_sources
from data.template import ChatTokenizer


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths and a seq_len; small rows make ties, full rows and rows of one."""
    seq_len = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, seq_len), max_size=60)), seq_len


@given(problems())
def test_every_conversation_exactly_once(problem: tuple[list[int], int]) -> None:
    lengths, seq_len = problem
    assert sorted(i for row in pack(lengths, seq_len) for i in row) == list(range(len(lengths)))


@given(problems())
def test_no_row_is_empty_or_too_long(problem: tuple[list[int], int]) -> None:
    lengths, seq_len = problem
    assert all(0 < sum(lengths[i] for i in row) <= seq_len for row in pack(lengths, seq_len))


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


@given(problems())
def test_plan_depends_on_the_lengths_alone(problem: tuple[list[int], int]) -> None:
    lengths, seq_len = problem
    assert pack(list(lengths), seq_len) == pack(lengths, seq_len)


def test_plan_of_the_drawing() -> None:
    assert pack([7, 3, 6, 2, 2], 10) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("lengths", [[0], [3, -1], [11], [2, 11, 4]])
def test_bad_length_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="tokens, and a row holds 1 to 10"):
        pack(lengths, 10)


def test_real_rows_fill_their_slots(shared: Path) -> None:
    path = shared / "data" / "gpteacher_codegen.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    config = PrepareConfig(files=[str(path)], seq_len=2048)
    encoded = encode_rows(find_sources(config), config, ChatTokenizer.load())
    lengths = [len(tokenized) for tokenized in encoded.tokenized]
    rows = pack(lengths, config.seq_len)

    assert encoded.rows_in == 4535
    assert len(lengths) > 4000
    full = [sum(lengths[i] for i in row) for row in rows[:-1]]
    assert sum(full) >= 0.995 * len(full) * config.seq_len
