"""Questions → sequences of token ids, packed so that what several of them begin with is read once.

    The sky is        blue | green | grey        three sequences, each a context and a choice

    The sky is blue green grey                   what the model reads: `green` attends to `The sky is` and itself alone,
    0   1   2  3    3     3                      and its position is that after `is`

Within a document the choices share the context; MMLU's questions share their subject's examples, TruthfulQA's the six
questions before each. A row holds sequences until it is full, without padding, so that the memory of a forward is known
beforehand, and depends on nothing but the sequences themselves: a continued run reads the same rows.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import xxhash

from data.schema import Conversation, Message
from data.template import BOS, ChatTokenizer
from inference.evaluation.leaderboard.questions import Question


@dataclass(frozen=True, slots=True)
class Scored:
    """Ids whose log-likelihood is asked for."""

    ids: "array[int]"
    """Context and continuation, uint16: tens of millions of them are held at a time."""
    continuation: int
    """How many of the last ids are the continuation, at least one; before it there is at least one id."""

    @property
    def inputs(self) -> "array[int]":
        """What the model reads: nothing is predicted from the last id."""
        return self.ids[:-1]


def sequences_of(question: Question, tokenizer: ChatTokenizer, *, bos: bool, chat: bool, longest: int) -> list[Scored]:
    """A question's sequences, one for each choice.

    Args:
        question: one with choices.
        tokenizer: of the model.
        bos: whether `<s>` stands before the context; the chat template has it in any case.
        chat: whether the context is a user's message in the chat template, and the choice the reply.
        longest: ids of the model's context; of a longer sequence the beginning is left out, as the leaderboard did.
    """
    scored = []
    contexts: dict[str, array[int]] = {}
    for context, choice in zip(question.contexts, question.choices, strict=True):
        text = context.rstrip(" ")
        if context not in contexts:
            contexts[context] = context_ids(text, tokenizer, bos=bos, chat=chat)
        # Spaces at the end of a context belong to what follows: no piece of the vocabulary ends in one.
        ids = tokenizer.encode_text(context[len(text) :] + choice, begins=False)
        scored.append(Scored((contexts[context] + ids)[-longest - 1 :], len(ids)))
    return scored


def context_ids(text: str, tokenizer: ChatTokenizer, *, bos: bool, chat: bool) -> "array[int]":
    """The ids of a context, uint16."""
    if chat:
        return array("H", tokenizer.encode_prompt(Conversation((Message("user", text),))))
    ids = tokenizer.encode_text(text) if text else array("H")
    # Something must stand before the first id that is scored.
    return array("H", [BOS]) + ids if bos or not ids else ids


@dataclass(slots=True)
class PackedSequences:
    """Sequences in one row of T ids."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """The position of each id within its own sequence."""
    paths: list[list[int]] = field(default_factory=list)
    """For each sequence, the indices of its inputs in the row."""
    sequences: list[Scored] = field(default_factory=list)

    def add(self, sequences: Sequence[Scored]) -> None:
        """Appends them, each after what it shares with the one before."""
        for sequence in sequences:
            inputs = sequence.inputs
            kept = shared(self.sequences[-1].inputs, inputs) if self.sequences else 0
            start = len(self.ids)
            self.ids += inputs[kept:]
            self.positions += range(kept, len(inputs))
            self.paths.append([*(self.paths[-1][:kept] if kept else ()), *range(start, len(self.ids))])
            self.sequences.append(sequence)

    def mask(self) -> torch.Tensor:
        """[T, T] bool: the ids (columns) that each id (row) attends to: itself, and what is before it in a sequence."""
        size = len(self.ids)
        mask = torch.zeros(size, size, dtype=torch.bool)
        indices = torch.arange(size)
        end = 0
        for path in self.paths:
            if not path or path[-1] < end:  # nothing but what others have
                continue
            own = [index for index in path if index >= end]
            before = path[: len(path) - len(own)]
            rows = slice(own[0], own[-1] + 1)
            mask[rows, before] = True
            mask[rows, rows] = indices[rows, None] >= indices[rows]  # much faster than `tril` of as many ones
            end = own[-1] + 1
        return mask


def shared(first: "array[int]", second: "array[int]") -> int:
    """How many ids two sequences begin with alike."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    low, high = 0, length  # the first `low` are alike, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class Unit:
    """Questions that are answered together."""

    numbers: tuple[int, ...]
    """Which questions of the run."""
    packed: PackedSequences
    key: str
    """The same for the same ids."""


def groups_of(sequences: Sequence[Sequence[Scored]], max_tokens: int) -> list[tuple[int, ...]]:
    """Which questions are answered together: as many as fit `max_tokens` ids; a longer one is alone.

    Args:
        sequences: those of each question.
        max_tokens: ids that one forward reads.
    """
    groups: list[tuple[int, ...]] = []
    numbers: list[int] = []
    size, last = 0, array("H")
    for number in sorted(range(len(sequences)), key=lambda number: (sequences[number][0].ids, number)):
        added, last = _cost(last, sequences[number])
        if numbers and size + added > max_tokens:
            groups.append(tuple(numbers))
            numbers, size = [], 0
            added, last = _cost(array("H"), sequences[number])
        numbers.append(number)
        size += added
    return [*groups, tuple(numbers)] if numbers else groups


def _cost(last: "array[int]", sequences: Sequence[Scored]) -> tuple[int, "array[int]"]:
    """How many ids a question adds to a row whose last sequence reads `last`, and what its own last one reads."""
    added = 0
    for sequence in sequences:
        added += len(sequence.inputs) - shared(last, sequence.inputs)
        last = sequence.inputs
    return added, last


def unit_of(numbers: tuple[int, ...], sequences: Sequence[Sequence[Scored]]) -> Unit:
    """These questions in one row. Packed, a sequence takes many times the memory of its ids, so a row is packed when
    its turn comes."""
    packed = PackedSequences()
    for number in numbers:
        packed.add(sequences[number])
    return Unit(numbers, packed, key_of(sequence.ids for sequence in packed.sequences))


def units_of(sequences: Sequence[Sequence[Scored]], max_tokens: int) -> Iterator[Unit]:
    """All questions in units of at most `max_tokens` ids, as `groups_of` divides them."""
    return (unit_of(numbers, sequences) for numbers in groups_of(sequences, max_tokens))


def key_of(sequences: Iterable["array[int]"]) -> str:
    """What tells lists of sequences apart: a hash of 128 bits."""
    digest = xxhash.xxh3_128()
    for ids in sequences:
        digest.update(len(ids).to_bytes(4, "little"))
        digest.update(ids.tobytes())
    return digest.hexdigest()
