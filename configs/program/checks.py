"""Checks of single settings; each refuses in one sentence: field, value, remedy."""

import math

from configs.program.errors import UserError


def positive(name: str, value: float, example: str) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name}={value}: it must be above 0, and finite; give for example {example}")


def not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"{name}={value}: it can't be negative; give 0 or more")


def choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise UserError(f"{name}={value}: there is no such choice; choose one of {', '.join(choices)}")
