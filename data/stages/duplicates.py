"""Conversations that were there before: to the letter, or nearly.

Whoever encodes a row computes what it is compared by; one process compares, in the order of the rows, so that the first
of each kind is kept however many processes encode.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from data.schema import Conversation

if TYPE_CHECKING:  # imported where it is used: it takes half a second, and most runs do without
    from datasketch import MinHash

PERMUTATIONS = 128
"""Values of a signature: the similarity that it estimates is off by 0.04 or so (one standard deviation at 0.8)."""

LOOSENESS = 0.85
"""The threshold of the index as a share of the one that counts: at 0.8 it finds all but two in a thousand."""

SHINGLE = 5
"""Words of a sequence by which two texts are compared."""

WORD = re.compile(r"\w+|[^\w\s]")
"""Words, and signs one by one: 2+3 and 2*3 are not alike."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """What a conversation is compared by."""

    digest: bytes
    """Equal exactly for conversations with the same messages of which the same are trained."""
    signature: np.ndarray | None
    """[PERMUTATIONS] uint32; None if only the digest counts, as for a text without words."""


def likeness(conversation: Conversation, *, near: bool) -> Likeness:
    """What a conversation is compared by; with `near`, also by what its turns say, system message aside."""
    exact = hashlib.blake2b(digest_size=16)
    for message in conversation.messages:
        exact.update(f"{message.role}\0{message.content}\0{message.masked:d}\0".encode())
    if not near:
        return Likeness(exact.digest(), None)
    words = WORD.findall(" ".join(message.content for message in conversation.turns).lower())
    if not words:
        return Likeness(exact.digest(), None)
    count = max(1, len(words) - SHINGLE + 1)
    minhash = _blank().copy()
    minhash.update_batch({" ".join(words[first : first + SHINGLE]).encode() for first in range(count)})
    return Likeness(exact.digest(), minhash.hashvalues)


@cache
def _blank() -> "MinHash":
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, scheme="affine32")


class Seen:
    """The conversations so far.

    They take memory, measured: 0.13 KB for each if digests are compared, 8 KB if signatures are, most of it the
    library's index.
    """

    def __init__(self, *, near_threshold: float | None):
        self._threshold = near_threshold or 1.0
        self._by_digest: dict[bytes, int] = {}
        self._signatures: dict[int, np.ndarray] = {}
        self._index = None
        if near_threshold is not None:
            from datasketch import MinHashLSH

            # The index only names candidates, so it may name too many: at its own threshold it would miss one in seven.
            loose = LOOSENESS * near_threshold
            self._index = MinHashLSH(threshold=loose, num_perm=PERMUTATIONS, weights=(0.1, 0.9))

    def earlier(self, row: int, found: Likeness) -> tuple[int, float | None] | None:
        """The row that was there before, and how alike they are, None if equal; or None, and then `row` is kept."""
        same = self._by_digest.get(found.digest)
        if same is not None:
            return same, None
        if self._index is not None and found.signature is not None:
            minhash = _blank().copy()
            minhash.hashvalues = found.signature
            alike = [(self._similarity(other, found.signature), -other) for other in self._index.query(minhash)]
            if alike and max(alike)[0] >= self._threshold:
                similarity, other = max(alike)
                return -other, similarity
            self._index.insert(row, minhash, check_duplication=False)
            self._signatures[row] = found.signature
        self._by_digest[found.digest] = row
        return None

    def _similarity(self, row: int, signature: np.ndarray) -> float:
        """The share of equal values, which estimates the Jaccard similarity."""
        return float(np.mean(self._signatures[row] == signature))
