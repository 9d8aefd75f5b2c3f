"""The conversation so far: asked, answered, asked again and taken back, in a context that never overflows."""

import time
from bisect import bisect_left
from dataclasses import dataclass, replace

from configs.program.console import console
from configs.program.errors import UserError
from data.schema import Conversation, Message
from data.template import ChatTokenizer
from inference.chat.terminal import Output
from inference.config import InferenceConfig
from inference.generate import context, generate
from inference.load import Loaded
from inference.prompt import check

SEEDS = 2**32


@dataclass(slots=True)
class Timing:
    """What the last answer took."""

    prompt: int
    """Tokens of the prompt."""
    started: float
    first: float | None = None
    """When its first words came, by the same clock as `started`."""
    ended: float | None = None
    tokens: int | None = None
    """How many were generated; None if the answer was stopped."""


class Talk:
    """The conversation, and the settings with which it goes on."""

    def __init__(self, loaded: Loaded, config: InferenceConfig, output: Output, *, may_be_stopped: bool = True):
        """Without `may_be_stopped`, Ctrl-C ends the program and not only an answer."""
        self.loaded = loaded
        self.config = config
        self.system = config.system
        self.turns: list[Message] = []
        """User and assistant in turn. The last may be a message without an answer."""
        self.answers = 0
        """How many there were; each has the next seed."""
        self.timing: Timing | None = None
        self._output = output
        self.may_be_stopped = may_be_stopped
        self._dropped = 0

    @property
    def answered(self) -> list[Message]:
        """The turns that have an answer."""
        return self.turns[: len(self.turns) // 2 * 2]

    def ask(self, text: str) -> None:
        """Answers a message.

        Raises:
            UserError: it holds what no message may hold, or is too long; nothing has changed.
        """
        asked = Message("user", text)
        check(Conversation((asked,)), self.config.markers)
        self._answer([*self.answered, asked])

    def retry(self) -> None:
        """Answers the last message again; without a word of a new answer, the old one stays.

        Raises:
            UserError: there is none.
        """
        if not self.turns:
            raise UserError("/retry: nothing was asked yet; say something first")
        if self.config.temperature == 0:
            tell("temperature=0: the same words are to be expected; /set temperature=0.7 draws others.")
        self._answer(self.turns[: (len(self.turns) - 1) // 2 * 2 + 1])

    def undo(self) -> str:
        """Takes the last message and its answer back; returns the message.

        Raises:
            UserError: there is none.
        """
        if not self.turns:
            raise UserError("/undo: nothing was said yet; say something first")
        index = (len(self.turns) - 1) // 2 * 2
        text = self.turns[index].content
        self.turns = self.turns[:index]
        return text

    def begin(self, system: str | None, turns: list[Message]) -> None:
        """Begins another conversation; its last message is answered if it has no answer.

        Raises:
            UserError: that message is too long; nothing has changed.
        """
        before = self.system, self.turns, self._dropped
        self.system, self.turns, self._dropped = system, turns, 0
        if len(turns) % 2:
            try:
                self._answer(turns)
            except UserError:
                self.system, self.turns, self._dropped = before
                raise

    def tokens(self) -> int:
        """How many tokens the conversation takes."""
        head = [Message("system", self.system)] if self.system else []
        return len(self.loaded.tokenizer.encode(Conversation((*head, *self.answered))).ids) if self.answered else 0

    def _seen(self, turns: list[Message]) -> Conversation:
        """What the context has room for, beside an answer; if it is less than before, a line says so."""
        window = context(self.loaded)
        limit = window - min(self.config.max_new_tokens, window // 2)
        conversation, dropped = fit(self.loaded.tokenizer, self.system, turns, limit)
        if dropped > self._dropped:
            seen = "turn is" if dropped == 1 else f"{dropped} turns are"
            tell(f"The context is full: the oldest {seen} no longer seen.")
        self._dropped = dropped
        return conversation

    def _answer(self, turns: list[Message]) -> None:
        conversation = self._seen(turns)
        timing = self.timing = Timing(len(self.loaded.tokenizer.encode_prompt(conversation)), time.perf_counter())
        said: list[str] = []

        def write(piece: str) -> None:
            timing.first = timing.first or time.perf_counter()
            said.append(piece)
            self._output.write(piece)

        config = replace(self.config, seed=(self.config.seed + self.answers) % SEEDS)
        self.answers += 1
        answer, note = None, ""
        try:
            answer = generate(self.loaded, config, conversation, write)
            timing.tokens = len(answer.ids)
        except KeyboardInterrupt:
            if not self.may_be_stopped:
                raise
            note = " (stopped)"
        timing.ended = time.perf_counter()
        self._output.end(note)
        text = "".join(said)
        if text.strip():
            self.turns = [*turns, Message("assistant", text)]
        elif self.turns[: len(turns)] != turns:  # else it was asked again, and the old answer stays
            self.turns = turns
        if answer is not None and not text.strip():
            tell("The answer is empty, and not kept; /retry asks again.")
        elif answer is not None and answer.finish_reason == "length":
            whole = len(answer.ids) == config.max_new_tokens
            tell(f"The answer is cut off by {f'max_new_tokens={config.max_new_tokens}' if whole else 'the context'}.")


def tell(sentence: str) -> None:
    """Says something about the conversation that is not part of it."""
    console.print(sentence, style="dim", soft_wrap=not console.is_terminal)


def fit(
    tokenizer: ChatTokenizer, system: str | None, turns: list[Message], max_tokens: int
) -> tuple[Conversation, int]:
    """The conversation without its oldest turns, so that its prompt takes at most `max_tokens`; how many it lost.

    Raises:
        UserError: the last message alone takes more.
    """
    head = (Message("system", system),) if system else ()

    def needed(first: int) -> int:
        return len(tokenizer.encode_prompt(Conversation((*head, *turns[first:]))))

    starts = range(0, len(turns), 2)
    if needed(0) <= max_tokens:  # nearly always
        return Conversation((*head, *turns)), 0
    index = bisect_left(starts, True, key=lambda first: needed(first) <= max_tokens)
    if index == len(starts):
        raise UserError(
            f"prompt: it takes {needed(starts[-1])} tokens, and the context has room for {max_tokens}; shorten it"
        )
    return Conversation((*head, *turns[starts[index] :])), index
