"""A conversation with a model that answers each question with its place, or with what a test says."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from data.schema import Conversation
from data.template import ChatTokenizer
from inference.chat import talk as module
from inference.chat.commands import Commands
from inference.chat.talk import Talk
from inference.chat.terminal import Output
from inference.config import InferenceConfig
from inference.generate import Answer
from inference.load import Loaded
from tests.support.adapters import make_base


class Asked(list[Conversation]):
    """The conversations that the model was asked, with their seeds; and what it is to answer."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.reason = "stop"
        self.say: Callable[[int], str] = lambda number: f"Answer {number}."


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    seen = Asked()

    def generate(_: Loaded, config: InferenceConfig, conversation: Conversation, write: Any) -> Answer:
        seen.append(conversation)
        seen.seeds.append(config.seed)
        text = seen.say(len(seen))
        write(text)
        return Answer(text, [1] * 5, seen.reason)

    monkeypatch.setattr(module, "generate", generate)
    return seen


def commands(**settings: Any) -> Commands:
    """What takes lines, of a conversation that has just begun."""
    base = make_base(torch.float32, vocab_size=32_000, max_position_embeddings=128)
    config = InferenceConfig(**{"task": "chat", "base": "base", "max_new_tokens": 32} | settings)
    return Commands(Talk(Loaded(base, ChatTokenizer.load()), config, Output(sys.stdout)))


def contents(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]
