"""Which questions were trained on: those that share thirteen words in a row with the prepared training rows.

The same measure by which `python -m data` keeps evaluation data out of training, here from the other side.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.prepared.dataset import PackedTable
from data.prepared.whole import open_checked
from data.stages.contamination import grams_of, units_of
from data.template import ChatTokenizer
from inference.evaluation.leaderboard.questions import Question


def trained_on(questions: Sequence[Question], dataset: Path, tokenizer: ChatTokenizer) -> list[bool]:
    """For each question, whether its text or its answers' text is in the training split of a prepared dataset.

    Raises:
        UserError: there is no prepared dataset, or it is not whole.
    """
    manifest, tables = open_checked(dataset, "trained_on")
    rows = PackedTable(tables["train"], manifest["seq_len"])
    grams = [grams_of(units_of(question.content))[0] for question in questions]
    wanted = np.unique(np.concatenate([np.empty(0, np.uint64), *grams]))
    if not len(wanted):
        return [False] * len(questions)
    seen = np.zeros(len(wanted), bool)
    for index in range(len(rows)):
        row = rows[index]
        start = 0
        for length in row.lengths:
            text = tokenizer.spell(row.ids[start : start + length])
            found = grams_of(units_of(text))[0]
            indices = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
            seen[indices[wanted[indices] == found]] = True
            start += length
    return [bool(seen[np.searchsorted(wanted, of_question)].any()) for of_question in grams]
