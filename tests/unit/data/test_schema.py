from array import array
from dataclasses import FrozenInstanceError

import pytest

from data.schema import Conversation, Message, TokenizedConversation


def of_roles(*roles: str) -> Conversation:
    return Conversation(tuple(Message(role, f"text {i}") for i, role in enumerate(roles)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("roles", "is_prompt"),
    [
        (("user",), True),
        (("user", "assistant"), False),
        (("user", "assistant", "user"), True),
        (("system", "user"), True),
        (("system", "user", "assistant", "user", "assistant"), False),
    ],
)
def test_ordered_roles_are_taken(roles: tuple[str, ...], is_prompt: bool) -> None:
    conversation = of_roles(*roles)
    has_system = roles[0] == "system"

    assert conversation.is_prompt is is_prompt
    assert conversation.system == (conversation.messages[0] if has_system else None)
    assert conversation.turns == conversation.messages[has_system:]


@pytest.mark.parametrize(
    ("roles", "sentence"),
    [
        (("assistant",), "message 0: expected role user, found assistant"),
        (("user", "user"), "message 1: expected role assistant, found user"),
        (("user", "system"), "message 1: expected role assistant, found system"),
        (("system", "assistant"), "message 1: expected role user, found assistant"),
        (("system", "system", "user"), "message 1: expected role user, found system"),
        (("system", "user", "assistant", "assistant"), "message 3: expected role user, found assistant"),
        (("user", "tool"), "message 1: expected role assistant, found tool"),
    ],
)
def test_disorder_is_refused_with_its_place(roles: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        of_roles(*roles)


@pytest.mark.parametrize("roles", [(), ("system",)])
def test_nothing_said_is_refused(roles: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="at least one user message"):
        of_roles(*roles)


def test_records_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        of_roles("user").messages = ()  # type: ignore[misc]


def test_length_is_tokens() -> None:
    tokenized = TokenizedConversation(array("H", [1, 5, 2, 1, 7, 2]).tobytes(), (1, 2, 2, 1))
    assert len(tokenized) == 6
    assert tokenized.ids == [1, 5, 2, 1, 7, 2]
    assert tokenized.labels == [-100, 5, 2, -100, -100, 2]


def test_a_turn_may_have_nothing_that_is_trained() -> None:
    tokenized = TokenizedConversation(array("H", [1, 5, 2, 1, 7, 2]).tobytes(), (3, 0, 2, 1))
    assert tokenized.labels == [-100, -100, -100, -100, -100, 2]
    assert tokenized.supervised == 1
