"""Checks of single settings: each refuses a value in one sentence, `UserError`, of setting, value and remedy."""

import math

from configs.program.errors import UserError

ABOVE_0, BELOW_1 = math.nextafter(0, 1), math.nextafter(1, 0)
"""Bounds of numbers that may come as close as they like."""


def choice(setting: str, value: str, *choices: str) -> None:
    """One of a few words."""
    if value not in choices:
        raise UserError(f"{setting}={value}: there is no such choice; choose one of {', '.join(choices)}")


def positive(setting: str, value: float, example: str) -> None:
    """A finite number above 0."""
    if not 0 < value < math.inf:
        raise UserError(f"{setting}={value}: it must be above 0, and finite; give for example {example}")


def not_negative(setting: str, value: float) -> None:
    """A finite number from 0 up."""
    if not 0 <= value < math.inf:
        raise UserError(f"{setting}={value}: it must be finite and not negative; give 0 or more")


def share(setting: str, value: float) -> None:
    """A number from 0 to 1."""
    between(setting, value, 0, 1, "it is a share; give a number from 0 to 1")


def between(setting: str, value: float, least: float, most: float, remedy: str) -> None:
    """A number in these bounds, both included; `remedy` is the end of the sentence."""
    if not least <= value <= most:
        raise UserError(f"{setting}={value}: {remedy}")
