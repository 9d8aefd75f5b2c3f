"""Chunks of rows → encoded conversations and rejects, by one process or several, in the order of the rows."""

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING

from configs.program.errors import UserError
from configs.program.launch import cores
from data.config import PrepareConfig
from data.rows.columns import Names
from data.rows.conversion import Converter
from data.rows.reading import Chunk, RawRow, Reject
from data.schema import Conversation, TokenizedConversation
from data.stages.overlong import least_tokens, split_turns, truncate, within_reach
from data.template import EOS_ID, ChatTokenizer
from data.vocabulary import local_tokenizer

if TYPE_CHECKING:  # imported where they are used: most runs do without, and each further process imports for itself
    from data.stages.contamination import Evaluations
    from data.stages.duplicates import Likeness

AHEAD = 3
"""Chunks that are handed to each further process before it has encoded the first of them."""

LONGEST_QUEUE = 16
"""Chunks for each further process that are under way or wait for an earlier one; bounds the memory."""

BYTES_PER_WORKER = 16 << 20
"""Bytes of rows for which a further process is worth the second that it takes to start."""


@dataclass(frozen=True, slots=True)
class Shortened:
    """What a conversation longer than a row lost."""

    turns_left_out: int
    replies_cut: int

    @classmethod
    def of(cls, whole: TokenizedConversation, parts: list[TokenizedConversation]) -> "Shortened":
        """What is in the whole and not in the parts; a whole reply ends with `</s>`."""
        kept = sum(len(part.spans) for part in parts)
        return cls((len(whole.spans) - kept) // 2, sum(not part.packed_ids.endswith(EOS_ID) for part in parts))


@dataclass(slots=True)
class EncodedChunk:
    """What became of the rows of a chunk; `index` counts from 0 in the chunk."""

    file: str
    unit: str
    numbers: list[int]
    """Line of each row, or its position in the list."""
    kept: list[tuple[int, list[TokenizedConversation]]] = field(default_factory=list)
    """Index of a row and what is kept of it: one conversation, or several if it was split."""
    likenesses: "list[Likeness]" = field(default_factory=list)
    """Side by side with `kept`; empty if duplicates are kept."""
    rejects: list[tuple[int, Reject]] = field(default_factory=list)
    """Index of a row that can't be used, and why."""
    shortened: dict[int, Shortened] = field(default_factory=dict)
    """Indices of kept rows that lost something."""
    unread: Counter[str] = field(default_factory=Counter)
    """Fields that are not read, and in how many rows."""
    repaired: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Indices of rows whose turns were put in order, and by which repairs."""
    seen: set[str] = field(default_factory=set)
    """Those names in `columns` that a row has."""


class Encoder:
    """Converts, checks and encodes the rows of chunks."""

    def __init__(self, config: PrepareConfig, tokenizer: ChatTokenizer, evaluations: "Evaluations | None"):
        self.config, self.tokenizer, self.evaluations = config, tokenizer, evaluations

    def encode(self, chunk: Chunk, names: Names) -> EncodedChunk:
        """What became of each row; `names` are those of its source."""
        config = self.config
        converter = Converter(
            names,
            roles=config.roles,
            repair=tuple(config.repair),
            keep_markers=config.markers == "keep",
            refuse_unread=config.unread == "reject",
        )
        encoded = EncodedChunk(chunk.file, chunk.unit, chunk.numbers, unread=converter.unread)
        for index, row in enumerate(chunk.rows()):
            outcome = row if isinstance(row, Reject) else self._conversation(row, converter)
            if isinstance(outcome, Conversation) and isinstance(row, RawRow):
                tokenized = self.tokenizer.encode(outcome)
                if parts := self._fit(outcome, tokenized):
                    encoded.kept.append((index, parts))
                    if converter.repaired:
                        encoded.repaired[index] = converter.repaired
                    if len(tokenized) > config.seq_len:
                        encoded.shortened[index] = Shortened.of(tokenized, parts)
                    if config.duplicates != "keep":
                        from data.stages.duplicates import likeness

                        encoded.likenesses.append(likeness(outcome, near=config.duplicates == "drop_near"))
                    continue
                outcome = self._too_long(row, f"{len(tokenized)} tokens")
            assert isinstance(outcome, Reject)
            encoded.rejects.append((index, outcome))
        encoded.seen = set(names.given) - converter.unseen
        return encoded

    def _conversation(self, row: RawRow, converter: Converter) -> Conversation | Reject:
        """The conversation of a row, as far as it can be kept."""
        outcome = converter.convert(row)
        if isinstance(outcome, Reject):
            return outcome
        if self.config.overlong != "drop":
            outcome = within_reach(outcome, self.config.seq_len)
        elif (least := least_tokens(outcome)) > self.config.seq_len:
            return self._too_long(row, f"at least {least} tokens")
        if self.evaluations is None:
            return outcome
        shared = self.evaluations.shared_with(outcome)
        return outcome if shared is None else Reject.of(row, "contaminated", f"evaluation data has it too: {shared}")

    def _too_long(self, row: RawRow, has: str) -> Reject:
        dropped = self.config.overlong == "drop"
        what = "the conversation" if dropped else "no prompt fits with something to train after it: the conversation"
        detail = f"{what} has {has}, and a row holds {self.config.seq_len} (seq_len)"
        return Reject.of(row, "too_long", detail, {"overlong": ("truncate",)} if dropped else {})

    def _fit(self, conversation: Conversation, tokenized: TokenizedConversation) -> list[TokenizedConversation]:
        """What is kept of a conversation: itself if it fits a row, else what the policy makes of it."""
        seq_len, overlong = self.config.seq_len, self.config.overlong
        if len(tokenized) <= seq_len:
            return [tokenized]
        if overlong == "split_turns":
            return split_turns(conversation, self.tokenizer, seq_len)
        part = truncate(tokenized, seq_len) if overlong == "truncate" else None
        return [] if part is None else [part]


class Pool:
    """Encodes chunks in this process and in further ones, with a bounded number of them under way."""

    def __init__(self, config: PrepareConfig, evaluations: "Evaluations | None", workers: int):
        """`workers` is the number of processes, this one included.

        Raises:
            UserError: there is no such tokenizer.
        """
        self._others = workers - 1
        tokenizer = local_tokenizer(config.tokenizer)  # here alone, so that all processes have the same
        self._executor: ProcessPoolExecutor | None = None
        if self._others:
            self._executor = ProcessPoolExecutor(
                self._others,
                mp_context=get_context("spawn"),  # forking a process that has threads, as Arrow's, can hang
                initializer=_start,
                initargs=(config, tokenizer, evaluations),
            )
            with without_interrupts():  # a process that this starts never sees Ctrl-C
                self._executor.submit(_ready)  # starts one, which gets ready while this one does
        self.encoder = Encoder(config, ChatTokenizer.load(tokenizer), evaluations)

    def encode(self, chunks: Iterable[Chunk], names: Names) -> Iterator[EncodedChunk]:
        """The encoded chunks, in the order of the chunks; `names` are those of their source.

        Raises:
            UserError: a process was killed, most likely for lack of memory.
        """
        if self._executor is None:
            for chunk in chunks:
                yield self.encoder.encode(chunk, names)
            return
        # In their order: what others encode, done or not, and between it what was encoded here while all of them had
        # enough to do.
        under_way: deque[Future[EncodedChunk] | EncodedChunk] = deque()
        try:
            for chunk in chunks:
                # A large row is encoded here, as handing it over would copy it twice.
                waiting = sum(isinstance(piece, Future) and not piece.done() for piece in under_way)
                if waiting < AHEAD * self._others and not chunk.is_large:
                    with without_interrupts():
                        under_way.append(self._executor.submit(_encode, chunk.handed_over(), names))
                else:
                    under_way.append(self.encoder.encode(chunk, names))
                while under_way and (_is_there(under_way[0]) or len(under_way) > LONGEST_QUEUE * self._others):
                    yield _result(under_way.popleft())
            while under_way:
                yield _result(under_way.popleft())
        except BrokenProcessPool as error:
            raise UserError(
                f"workers={self._others + 1}: a process was killed; look for lack of memory, or give workers=1"
            ) from error

    def close(self) -> None:
        """Ends the processes."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def _is_there(piece: "Future[EncodedChunk] | EncodedChunk") -> bool:
    return not isinstance(piece, Future) or piece.done()


def _result(piece: "Future[EncodedChunk] | EncodedChunk") -> EncodedChunk:
    return piece.result() if isinstance(piece, Future) else piece


@contextmanager
def pool(config: PrepareConfig, evaluations: "Evaluations | None", workers: int) -> Iterator[Pool]:
    """A pool that is closed in the end."""
    opened = Pool(config, evaluations, workers)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Keeps Ctrl-C waiting; processes that are started meanwhile inherit that, and leave it to the one that waits for
    them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def number_of_workers(asked: int, total_bytes: int) -> int:
    """As many as asked for; if that is left open, one a core, and fewer if `total_bytes` of rows are few."""
    if asked:
        return asked
    return min(cores(), 1 + total_bytes // BYTES_PER_WORKER)


# In the other processes

_encoder: Encoder


def _start(config: PrepareConfig, tokenizer: str, evaluations: "Evaluations | None") -> None:
    global _encoder  # noqa: PLW0603 - the state of a worker process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(config, ChatTokenizer.load(tokenizer), evaluations)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _ready() -> None:
    """Nothing to do but to be there."""


def _encode(chunk: Chunk, names: Names) -> EncodedChunk:
    return _encoder.encode(chunk, names)
