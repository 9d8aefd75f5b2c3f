"""The schemas that raw rows come in, and the records that the stages hand on, one a stage. Imports nothing of ours.

raw row → Conversation → TokenizedConversation → PackedRow
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # imported where it is used: settings and the processes that encode do without
    import numpy as np

# The schemas of raw rows. A field stands in a row (`conversations`) or in each of its turns (`from`, `value`).

KEY_FIELDS = {"messages": "messages", "sharegpt": "conversations", "instruction": "instruction"}
"""Each schema and the field by which it is known, in the order in which they are looked for."""

SYSTEMS = ("system_prompt", "system")
"""Fields beside the turns that hold a system message, the first that has one."""

REPLIES = ("output", "response")
"""The names under which instruction rows carry their reply, the first that is there."""

FLAGS = ("weight", "train", "loss", "loss_weight")
"""Fields of a turn that say whether it is trained. OpenAI and mistral-finetune write weight, axolotl train, xtuner
loss."""

ROW_FIELDS: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "input", *REPLIES, "history", *SYSTEMS),
    "sharegpt": ("conversations", *SYSTEMS),
    "messages": ("messages", *SYSTEMS),
}
TURN_FIELDS: dict[str, tuple[str, ...]] = {
    "instruction": (),
    "sharegpt": ("from", "value", *FLAGS),
    "messages": ("role", "content", *FLAGS),
}
"""The fields of each schema; of a turn, first who speaks and then what is said."""

SPEAKERS = ("role", "from", "speaker")
"""Names that are usual for the field of a turn that says who speaks."""


REPAIRS = ("drop_leading_assistant", "drop_last_user", "merge_same_role")
"""What may be done to turns that are out of order, in this order."""


def fields_of(schema: str) -> tuple[str, ...]:
    """All fields of a schema: what `columns` can rename in its rows."""
    return (*ROW_FIELDS[schema], *TURN_FIELDS[schema])


# Records

IGNORE_INDEX = -100
"""The label of a token that is not trained; what torch's cross-entropy ignores."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One speaker's text."""

    role: Role
    content: str
    masked: bool = False
    """Whether a reply is context and not trained. What others say is never trained."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant in turn, the user first.

    A conversation that ends with the assistant is an example to train on; one that ends with the user is a prompt.

    Raises:
        ValueError: the roles are out of that order; the text names the message.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        first = 0 if self.system is None else 1
        if len(self.messages) == first:
            raise ValueError("a conversation needs at least one user message")
        for index, message in enumerate(self.messages[first:]):
            expected = "assistant" if index % 2 else "user"
            if message.role != expected:
                raise ValueError(f"message {first + index}: expected role {expected}, found {message.role}")

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
    """Token ids of a conversation, and which of them are trained.

    ids     | <s> [INST] … [/INST] | ▁reply ▁ </s> | <s> [INST] … [/INST] | ▁reply ▁ </s> |
    spans   | 7                    | 3             | 9                    | 3             |
    trained | no                   | yes           | no                   | yes           |

    A masked reply belongs to what is not trained, and the second span of its turn is empty: 10, 0.
    """

    packed_ids: bytes
    """The ids, two bytes each: native uint16, as the vocabulary has fewer than 65,536 pieces."""
    spans: tuple[int, ...]
    """For each turn its tokens that are not trained and those that are; they sum to the number of ids. A prompt without
    a reply has the first alone."""

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        return memoryview(self.packed_ids).cast("H").tolist()

    @property
    def supervised(self) -> int:
        """Tokens that are trained."""
        return sum(self.spans[1::2])

    @property
    def labels(self) -> list[int]:
        """For each id, itself if it is trained, else `IGNORE_INDEX`."""
        return labels_of(memoryview(self.packed_ids).cast("H"), self.spans).tolist()

    def __len__(self) -> int:
        return len(self.packed_ids) // 2


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Several conversations end to end, at most `seq_len` tokens.

    ids      | conversation 7     | conversation 2   | conversation 9 |
    lengths  | 5                  | 4                | 3              |
    spans    | 2 not trained, 3 … | 2, 2             | 1, 2           |
    position | 0 1 2 3 4            0 1 2 3            0 1 2
    attends  | only within its own conversation, to the left
    """

    ids: list[int]
    spans: list[int]
    """Tokens not trained and trained in turn, two for each turn of each conversation; they sum to `len(ids)`."""
    lengths: list[int]
    """Tokens of each conversation; they sum to `len(ids)`."""
    rows: list[int]
    """For each conversation, the number of the raw row that it came from, counted over all sources from 0."""

    @property
    def labels(self) -> list[int]:
        """For each id, itself if it is trained, else `IGNORE_INDEX`."""
        return labels_of(self.ids, self.spans).tolist()


def labels_of(ids: "np.ndarray | Sequence[int]", spans: "np.ndarray | Sequence[int]") -> "np.ndarray":
    """[T] int64: each id if it is trained, else `IGNORE_INDEX`."""
    import numpy as np

    trained = np.repeat(np.arange(len(spans)) % 2 == 1, spans)
    return np.where(trained, np.asarray(ids, np.int64), IGNORE_INDEX)
