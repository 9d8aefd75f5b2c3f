"""The vocabulary's merges: the ids of plain text, in which no control token takes part."""

import re
from array import array
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, normalizers

from data.vocabulary import FIRST_PIECE

SPACE = "▁"
"""How SentencePiece writes a space (U+2581)."""

# Ids for texts that the common mistakes get wrong: no space before the first piece after a control token ("[" 28792 for
# "▁[" 733), control tokens read from text, byte pieces, runs of spaces. Computed with SentencePiece from the model
# tokenizer.model.v1 of mistral-common. The fingerprint covers the vocabulary, these what the library makes of it.
PROBES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("[INST] Hello [/INST]", (733, 16289, 28793, 22557, 733, 28748, 16289, 28793)),
    ("</s>", (1867, 28713, 28767)),
    ("x   y\n", (1318, 259, 337, 13)),
    ("🧿 <0x0A>", (28705, 243, 162, 170, 194, 523, 28734, 28744, 28734, 28741, 28767)),
)


UNIT = re.compile(r"\n| *[^ \n]+| +")
"""A word with the spaces before it, a line end, or spaces that end a line."""

CACHED_UNITS = 1 << 18
"""Units whose ids are kept, about 50 MB."""

LONGEST_CACHED = 32
"""Characters of the longest unit that is kept: what is longer seldom comes again."""


class UnitIds(dict[str, bytes]):
    """The ids of units of text, computed when first asked for.

    No piece of the vocabulary has a space after another character, and none holds a line end with something else, so no
    merge reaches over the border of two units: the ids of a text are those of its units, end to end. Most units come
    again and again, and looking them up is several times faster than merging a whole text.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._merge = tokenizer.model.tokenize  # the merges alone: nothing is put before the text

    def text(self, text: str) -> bytes:
        """The ids of a text, each a native uint16."""
        # SentencePiece does not tell its own sign for a space from a space.
        return b"".join(map(self.__getitem__, UNIT.findall(text.replace(SPACE, " "))))

    def __missing__(self, unit: str) -> bytes:
        ids = array("H", [token.id for token in self._merge(unit.replace(" ", SPACE))]).tobytes()
        if len(unit) <= LONGEST_CACHED:
            if len(self) >= CACHED_UNITS:
                self.clear()
            self[unit] = ids
        return ids


def check_merges(ids_of: UnitIds) -> None:
    """Raises `RuntimeError` if the installed library makes other ids of the merges than SentencePiece does."""
    for text, expected in PROBES:
        found = memoryview(ids_of.text(f" {text}")).cast("H").tolist()
        if tuple(found) != expected:
            raise RuntimeError(
                f"this version of the library tokenizers encodes {text!r} as {found}, and SentencePiece as "
                f"{list(expected)}: install the one in constraints.txt"
            )


@lru_cache(maxsize=1)
def merged(pieces: tuple[str, ...]) -> tuple[Tokenizer, UnitIds]:
    """The merges of a vocabulary, whose pieces stand in the order of their ids, and the ids of units by them.

    Made once in a process, or before it is forked: working out 59,000 merges takes longer than many a file of rows.

    Raises:
        RuntimeError: the installed library does not make SentencePiece's ids of them.
    """
    tokenizer = merges_only({piece: index for index, piece in enumerate(pieces)})
    ids_of = UnitIds(tokenizer)
    check_merges(ids_of)
    return tokenizer, ids_of


def merges_only(vocabulary: dict[str, int]) -> Tokenizer:
    """The vocabulary's merges, with SentencePiece's leading space, and without any token that is matched in text."""
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of BPE, strongest first: each way to cut a piece in two is a merge.

    SentencePiece ranks pieces, here by id, and merges the leftmost of equals; a list of merges ranks the cuts of one
    piece too. Putting the cut with the longer left part first gives SentencePiece's ids; stored files have other
    orders, which differ on long runs of one character. Runs of spaces share the last rank.
    """
    pieces = sorted(vocabulary, key=lambda piece: (not piece.strip(SPACE), vocabulary[piece]))
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        if vocabulary[piece] >= FIRST_PIECE
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
