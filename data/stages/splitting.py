"""Which rows are held out: a seeded draw in which equal conversations stay on one side.

rows       0 1 2 3 4 5 6 7          1, 4 and 6 hold the same conversation
drawn      1         5              as many as the fraction says, of rows that repeat no earlier one
held out   1     4   5 6            with all that repeat them, if they are not too many
"""

import random
from collections import defaultdict

import numpy as np

from configs.program.errors import UserError
from data.stages.store import Index


def repetitions(index: Index) -> dict[int, int]:
    """For each row with a conversation that an earlier row has too, the first row that it has to stay with."""
    _, firsts, kinds = np.unique(index.hashes, return_index=True, return_inverse=True)
    earlier = index.rows[firsts[kinds]]
    again = np.flatnonzero(earlier != index.rows)
    bound: dict[int, int] = {}

    def first_of(row: int) -> int:
        while row in bound:
            row = bound[row]
        return row

    for row, before in zip(index.rows[again].tolist(), earlier[again].tolist(), strict=True):
        one, other = sorted((first_of(row), first_of(before)))  # a split row has several conversations
        if one != other:
            bound[other] = one
    return {row: first_of(row) for row in bound}


def choose_eval(rows: list[int], repeats: dict[int, int], fraction: float, seed: int) -> set[int]:
    """Those of the rows that are held out, with all that was made of them: at least one unless the fraction is 0.

    Rows that hold the same conversation stay together. A group of them that is larger than what is left to hold out is
    trained on, unless there are only such; then the smallest is held out.

    Raises:
        UserError: nothing would be left to train on.
    """
    if fraction == 0:
        return set()
    number = max(1, round(len(rows) * fraction))
    if number >= len(rows):
        raise UserError(
            f"eval_fraction={fraction}: it would hold out {number} of {len(rows)} rows and leave none to train on; "
            f"give more rows, or eval_fraction=0"
        )
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row in rows:
        groups[repeats.get(row, row)].append(row)
    if len(groups) == 1:
        raise UserError(
            f"eval_fraction={fraction}: all {len(rows)} rows hold the same conversation, which can't be trained on and "
            f"held out; give other rows, or eval_fraction=0"
        )
    held_out: set[int] = set()
    for first in random.Random(seed).sample(list(groups), min(number, len(groups))):
        if len(held_out) + len(groups[first]) <= number:
            held_out.update(groups[first])
    smallest = min(groups.values(), key=len)
    return held_out or set(smallest)
