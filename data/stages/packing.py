"""Conversations of varied length → rows that are full.

First best fit, longest first: each conversation goes into the open row that it fills best.

    seq_len 10        lengths 7 3 6 2 2  →  | 7 7 7 7 7 7 7 3 3 3 |
                                            | 6 6 6 6 6 6 2 2 2 2 |

Then the rows that it leaves least full are packed again, each with conversations whose lengths add up to just a row:
what is left over gathers in the last row. Together they come within a hair of as few rows as the tokens could fill.
"""

from collections import defaultdict

AGAIN = (4, 16, 64, 256, 1024)
"""How many of the least full rows are packed again, one try after the other."""


def pack(lengths: list[int], seq_len: int) -> list[list[int]]:
    """Plans the rows: for each row, the indices of the conversations that it holds; the least full row comes last.

    Args:
        lengths: tokens of each conversation, each from 1 to `seq_len`.
        seq_len: tokens that a row holds.

    The plan depends on the lengths and their order alone, and has no more rows than `best_fit`.
    """
    plan = _fullest_first(best_fit(lengths, seq_len), lengths)
    for count in AGAIN:
        partly = [row for row in plan if _used(row, lengths) < seq_len][-count:]
        full = plan[: len(plan) - len(partly)]
        again = fill([index for row in partly for index in row], lengths, seq_len)
        candidate = _fullest_first(full + again, lengths)
        if candidate and (len(candidate), _used(candidate[-1], lengths)) < (len(plan), _used(plan[-1], lengths)):
            plan = candidate
    return plan


def _fullest_first(plan: list[list[int]], lengths: list[int]) -> list[list[int]]:
    return sorted(plan, key=lambda row: -_used(row, lengths))


def _used(row: list[int], lengths: list[int]) -> int:
    return sum(lengths[index] for index in row)


def best_fit(lengths: list[int], seq_len: int) -> list[list[int]]:
    """Longest first, each into the row with the least space that suffices.

    One step a conversation, whatever the number of open rows: an integer's bits say which amounts of free space exist,
    and the lowest bit at or above a length is the best fit.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces = 0  # bit n is set if some row has exactly n tokens free
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 1 <= length <= seq_len:
            raise ValueError(f"conversation {index} has {length} tokens, and a row holds 1 to {seq_len}")
        fitting = spaces >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = with_space[free].pop()
            if not with_space[free]:
                spaces &= ~(1 << free)
        else:
            free, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        if left := free - length:
            with_space.setdefault(left, []).append(row)
            spaces |= 1 << left
    return rows


def fill(members: list[int], lengths: list[int], seq_len: int) -> list[list[int]]:
    """Each row begins with the longest conversation that is left; others fill it as nearly as any choice of them could.

    Subset sums by dynamic programming: an integer's bits say which sums can be reached with the conversations so far.
    Long ones are tried first, as the short ones fit anywhere later, and trying ends when the sum is there.
    """
    left: dict[int, list[int]] = defaultdict(list)
    for index in members:
        left[lengths[index]].append(index)
    rows = []
    while left:
        sizes = sorted(left, reverse=True)
        space = seq_len - sizes[0]
        row = [_take(left, sizes[0])]
        reachable, tried = 1, []
        for size in (size for size in sizes if size <= space and size in left):
            for _ in left[size]:
                tried.append((size, reachable))
                reachable |= (reachable << size) & ((1 << space + 1) - 1)
                if reachable >> space or reachable == tried[-1][1]:
                    break
            if reachable >> space:
                break
        target = reachable.bit_length() - 1
        for size, before in reversed(tried):
            if not before >> target & 1:  # only with this one
                row.append(_take(left, size))
                target -= size
        rows.append(row)
    return rows


def _take(left: dict[int, list[int]], size: int) -> int:
    index = left[size].pop()
    if not left[size]:
        del left[size]
    return index
