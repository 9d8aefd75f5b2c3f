"""Encoded conversations on disk, between encoding and packing: memory holds a few numbers for each, not its tokens."""

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data.schema import TokenizedConversation


@dataclass(frozen=True, slots=True)
class Index:
    """For each conversation, in the order of the rows; all [n]."""

    rows: np.ndarray
    """The row that it came from, counted over all sources from 0, ascending; a split row has several."""
    lengths: np.ndarray
    """Its tokens."""
    supervised: np.ndarray
    """Its trained tokens."""
    spans: np.ndarray
    """How many spans it has."""
    hashes: np.ndarray
    """uint64 of its tokens, whichever of them are trained."""


class ConversationStore:
    """Conversations that are appended one by one and then read in any order."""

    def __init__(self, directory: Path):
        """Opens the files in an existing directory."""
        self._ids = (directory / "ids").open("w+b", buffering=1 << 20)
        self._spans = (directory / "spans").open("w+b", buffering=1 << 16)
        self._rows, self._lengths = array("q"), array("i")
        self._supervised, self._span_counts = array("i"), array("i")
        self._hashes = array("Q")

    def append(self, row: int, tokenized: TokenizedConversation) -> None:
        """Adds a conversation of a row."""
        self._ids.write(tokenized.packed_ids)
        self._spans.write(array("i", tokenized.spans))
        self._rows.append(row)
        self._lengths.append(len(tokenized))
        self._supervised.append(tokenized.supervised)
        self._span_counts.append(len(tokenized.spans))
        self._hashes.append(xxhash.xxh3_64_intdigest(tokenized.packed_ids))

    def __len__(self) -> int:
        return len(self._rows)

    def index(self) -> Index:
        """What is known of each; nothing may be appended after."""
        self._ids.flush()
        self._spans.flush()
        columns = (self._rows, self._lengths, self._supervised, self._span_counts, self._hashes)
        index = Index(*(np.asarray(column) for column in columns))
        self._id_starts = _starts(index.lengths)
        self._span_starts = _starts(index.spans)
        return index

    def read(self, members: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids [tokens] uint16 and spans [spans] int32 of several conversations, end to end.

        By reading, not by mapping: what is mapped counts as the process's own memory.
        """
        ids = _gather(self._ids.fileno(), self._id_starts, members, 2)
        spans = _gather(self._spans.fileno(), self._span_starts, members, 4)
        return np.frombuffer(ids, np.uint16), np.frombuffer(spans, np.int32)

    def close(self) -> None:
        """Closes the files."""
        self._ids.close()
        self._spans.close()


@contextmanager
def conversation_store(directory: Path) -> Iterator[ConversationStore]:
    """A store whose files go with it."""
    directory.mkdir(parents=True)
    store = ConversationStore(directory)
    try:
        yield store
    finally:
        store.close()
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def _starts(lengths: np.ndarray) -> np.ndarray:
    """[n + 1] int64: where each begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _gather(file: int, starts: np.ndarray, members: Sequence[int], width: int) -> bytes:
    begin, end = starts[list(members)] * width, starts[[member + 1 for member in members]] * width
    sizes = (end - begin).tolist()
    return b"".join(os.pread(file, size, offset) for size, offset in zip(sizes, begin.tolist(), strict=True))
