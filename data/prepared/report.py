"""`task=report`: one self-contained HTML page about a prepared dataset."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.program.console import console
from configs.program.errors import UserError
from configs.program.page.page import render
from data.config import PrepareConfig
from data.disk.files import replace_file
from data.disk.formats.arrow_file import as_array
from data.prepared.layout import SPLITS
from data.prepared.selection import ShownRow, selected
from data.prepared.whole import Rejected, open_checked, rejects
from data.template import BOS, ChatTokenizer

BARS = 48
"""Bars of a histogram, fewer if there are fewer values."""

EXAMPLES_OF_A_REASON = 3


@dataclass(frozen=True, slots=True)
class Bar:
    """Values from `first` to `last`, how many, and the share of the highest bar."""

    first: int
    last: int
    count: int
    height: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often each value occurs."""

    counts: np.ndarray
    """[greatest value + 1]"""

    @property
    def bars(self) -> list[Bar]:
        """Bars of equal width from the least value to the greatest."""
        values = np.flatnonzero(self.counts)
        if not len(values):
            return []
        least, greatest = int(values[0]), int(values[-1])
        width = -(-(greatest - least + 1) // BARS)
        starts = range(least, greatest + 1, width)
        counts = [int(self.counts[start : start + width].sum()) for start in starts]
        highest = max(counts)
        return [
            Bar(start, min(start + width - 1, greatest), count, count / highest)
            for start, count in zip(starts, counts, strict=True)
        ]

    def quantile(self, share: float) -> int:
        """The value that this share of all does not exceed."""
        return int(np.searchsorted(np.cumsum(self.counts), share * self.counts.sum()))

    @property
    def mean(self) -> float:
        """The mean of all values."""
        return float(np.average(np.arange(len(self.counts)), weights=self.counts))


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a conversation's text that is trained, or is not."""

    text: str
    trained: bool


def report(config: PrepareConfig) -> None:
    """Writes the page beside the prepared dataset in `output`."""
    directory = Path(config.output)
    manifest, tables = open_checked(directory, "output")
    rows = selected(directory, manifest, tables, config, spread=True)
    tokenizer = ChatTokenizer.load(config.tokenizer)
    lengths, turns, used = _histograms(tables, manifest["seq_len"])
    page = render(
        Path(__file__).with_name("report.html.j2"),
        name=directory.name,
        manifest=manifest,
        splits=SPLITS,
        histograms=[
            ("Length of conversations", "tokens", lengths),
            ("Turns of conversations", "turns", turns),
            ("Tokens in rows", f"tokens of {manifest['seq_len']:,}", used),
        ],
        rejects=_rejects(directory),
        examples=[example(row, tokenizer) for row in rows],
    )
    path = directory.with_name(f"{directory.name}-report.html")
    try:
        replace_file(path, [page.encode("utf-8", "replace")])
    except OSError as error:
        raise UserError(f"output={directory}: {path} can't be written ({error.strerror}); make it writable") from error
    console.print(f"Wrote {path}", soft_wrap=True)


def _histograms(tables: dict[str, pa.Table], seq_len: int) -> tuple[Histogram, Histogram, Histogram]:
    """Tokens and turns of each conversation, tokens of each row; both splits, a batch in memory at a time."""
    of_lengths, of_turns, of_used = (np.zeros(seq_len + 1, np.int64) for _ in range(3))
    for batch in (batch for table in tables.values() for batch in table.to_batches()):
        ids, lengths = as_array(batch["ids"].flatten()), as_array(batch["lengths"].flatten())
        starts = np.cumsum(lengths) - lengths
        turns = np.add.reduceat(ids == BOS, starts, dtype=np.int64)
        used = np.diff(as_array(batch["ids"].offsets))
        of_lengths += np.bincount(lengths, minlength=seq_len + 1)
        of_turns += np.bincount(turns, minlength=seq_len + 1)
        of_used += np.bincount(used, minlength=seq_len + 1)
    return Histogram(of_lengths), Histogram(of_turns), Histogram(of_used)


def _rejects(directory: Path) -> list[dict[str, Any]]:
    """Each reason with its number and its first examples, the commonest first."""
    numbers: Counter[str] = Counter()
    examples: defaultdict[str, list[Rejected]] = defaultdict(list)
    for reject in rejects(directory):
        numbers[reject["reason"]] += 1
        if len(examples[reject["reason"]]) < EXAMPLES_OF_A_REASON:
            examples[reject["reason"]].append(reject)
    return [{"reason": reason, "count": count, "examples": examples[reason]} for reason, count in numbers.most_common()]


def example(row: ShownRow, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """The conversations of a row, each in segments."""
    conversations = []
    for conversation in row.conversations:
        segments, position, ids = [], 0, conversation.tokenized.ids
        for index, span in enumerate(conversation.tokenized.spans):
            if span:  # a masked reply leaves its turn nothing that is trained
                segments.append(Segment(tokenizer.spell(ids[position : position + span]), trained=index % 2 == 1))
            position += span
        conversations.append({"place": str(conversation.place), "tokens": len(ids), "segments": segments})
    return {"split": row.split, "number": row.number, "packed": row.packed, "conversations": conversations}
