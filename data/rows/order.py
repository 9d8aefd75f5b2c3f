"""Messages in whatever order a row has them → a conversation: system, then user and assistant in turn.

What is out of order is rejected, or repaired if the setting `repair` allows it, and only then:

    drop_leading_assistant   a greeting before the first question
    drop_last_user           what the user says after the last reply
    merge_same_role          several messages of one role in a row, joined by a blank line
"""

from collections.abc import Iterable

from data.rows.texts import UnusableError
from data.schema import REPAIRS, Conversation, Message, Role

Said = tuple[Role, str, bool]
"""Who speaks, what, and whether it is masked: a `Message` to be."""


def in_order(said: list[Said], repair: Iterable[str], *, reply_needed: bool) -> tuple[Conversation, tuple[str, ...]]:
    """The conversation, without the edges that the template takes off, and what was repaired.

    What is rendered alike is equal. The edges of a system message stay, and so does the beginning of the text after it.

    Raises:
        UnusableError: they can't be a conversation, or leave nothing to train; it has the repairs that would help.
    """
    done: tuple[str, ...] = ()
    if repair:
        said, done = _repaired(said, repair)
    try:
        return _conversation(said, reply_needed=reply_needed), done
    except UnusableError as unusable:
        unusable.settings["repair"] = _helpful(said, reply_needed=reply_needed)
        raise


def _conversation(said: list[Said], *, reply_needed: bool) -> Conversation:
    messages = []
    after_system = False
    for role, text, masked in said:
        stripped = text if role == "system" else text.rstrip() if after_system else text.strip()
        messages.append(Message(role, stripped, masked))
        after_system = role == "system"
    try:
        conversation = Conversation(tuple(messages))
    except ValueError as error:
        raise UnusableError("turns_out_of_order", str(error)) from error
    if not reply_needed:
        return conversation
    if messages[-1].role == "user":
        raise UnusableError("no_reply", "the last message is the user's, and nothing answers it")
    if messages[-1].masked and all(message.masked for message in conversation.turns[1::2]):
        raise UnusableError("nothing_trained", "the row itself says that none of its replies is trained")
    return conversation


def _repaired(said: list[Said], repair: Iterable[str]) -> tuple[list[Said], tuple[str, ...]]:
    """The messages after these repairs, and which of them changed something."""
    done = []
    for name in repair:
        before = len(said)
        said = REPAIR[name](said)
        if len(said) != before:
            done.append(name)
    return said, tuple(done)


def _helpful(said: list[Said], *, reply_needed: bool) -> tuple[str, ...]:
    """The repairs that would make a conversation of it; none if they wouldn't."""
    try:
        said, done = _repaired(said, REPAIRS)
        _conversation(said, reply_needed=reply_needed)
    except UnusableError:
        return ()
    return done


def _drop_leading_assistant(said: list[Said]) -> list[Said]:
    first = next((index for index, (role, _, _) in enumerate(said) if role != "system"), 0)
    last = next((index for index, (role, _, _) in enumerate(said) if index >= first and role != "assistant"), len(said))
    return said[:first] + said[last:]


def _drop_last_user(said: list[Said]) -> list[Said]:
    end = len(said)
    while end and said[end - 1][0] == "user":
        end -= 1
    return said[:end]


def _merge_same_role(said: list[Said]) -> list[Said]:
    merged: list[Said] = []
    for role, text, masked in said:
        if not merged or merged[-1][0] != role:
            merged.append((role, text, masked))
            continue
        _, earlier, earlier_masked = merged[-1]
        if masked != earlier_masked:
            raise UnusableError("unsupported_weight", "of two replies in a row one is trained and one is not")
        merged[-1] = (role, f"{earlier.rstrip()}\n\n{text.lstrip()}", masked)
    return merged


REPAIR = dict(zip(REPAIRS, (_drop_leading_assistant, _drop_last_user, _merge_same_role), strict=True))
