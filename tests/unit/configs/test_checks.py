"""What a setting may be, and what is said of what it may not."""

import math
import re
from collections.abc import Callable

import pytest

from configs.program.checks import ABOVE_0, BELOW_1, between, choice, not_negative, positive, share
from configs.program.errors import UserError

Check = Callable[[float], None]


def half_open(value: float) -> None:
    between("p", value, ABOVE_0, BELOW_1, "give a number between 0 and 1")


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (lambda value: positive("p", value, "p=1"), (1, 1e-300), (0, -1, math.inf, math.nan)),
        (lambda value: not_negative("p", value), (0, 7), (-1e-300, math.inf, math.nan)),
        (lambda value: share("p", value), (0, 0.5, 1), (-0.1, 1.1, math.nan)),
        (half_open, (1e-300, 0.5, 1 - 1e-16), (0, 1, math.nan)),
    ],
)
def test_numbers_out_of_bounds_are_refused_by_name(check: Check, good: tuple[float], bad: tuple[float]) -> None:
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(UserError, match=rf"^p={re.escape(str(value))}: .*give "):
            check(value)


def test_words_that_are_no_choice_are_refused_with_the_choices() -> None:
    choice("task", "train", "train", "profile")
    with pytest.raises(UserError, match=r"^task=x: there is no such choice; choose one of train, profile$"):
        choice("task", "x", "train", "profile")
