"""The records that the data stages hand on, one per stage. Imports nothing of ours.

raw row → Conversation → TokenizedConversation → PackedRow
"""

from dataclasses import dataclass
from typing import Literal

IGNORE_INDEX = -100
"""The label of a token that is not trained; what torch's cross-entropy ignores."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One speaker's text."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant in turn, the user first.

    A conversation that ends with the assistant is an example to train on; one that ends with the user is a prompt.

    Raises:
        ValueError: the roles are out of that order; the text names the message.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError("a conversation needs at least one user message")
        for place, message in enumerate(self.turns):
            expected = "user" if place % 2 == 0 else "assistant"
            if message.role != expected:
                raise ValueError(f"message {place + bool(self.system)}: expected role {expected}, found {message.role}")

    @property
    def system(self) -> Message | None:
        """The system message, if there is one."""
        first = self.messages[0] if self.messages else None
        return first if first is not None and first.role == "system" else None

    @property
    def turns(self) -> tuple[Message, ...]:
        """User and assistant messages in turn, without the system message."""
        return self.messages if self.system is None else self.messages[1:]

    @property
    def is_prompt(self) -> bool:
        """Whether the last word is the user's, so that there is something left to answer."""
        return self.turns[-1].role == "user"


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """Token ids of a conversation, and the labels: `labels[i] == ids[i]` where trained, else `IGNORE_INDEX`."""

    ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Several conversations end to end, at most `seq_len` tokens.

    ids      | conversation 7     | conversation 2   | conversation 9 |
    lengths  | 5                  | 4                | 3              |
    position | 0 1 2 3 4            0 1 2 3            0 1 2
    attends  | only within its own conversation, to the left
    """

    ids: list[int]
    labels: list[int]
    lengths: list[int]
    """Tokens of each conversation; they sum to `len(ids)`."""
    rows: list[int]
    """For each conversation, the number of the raw row that it came from, counted over all input files from 0."""
