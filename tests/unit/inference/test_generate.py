"""The stream of an answer: every character whole, nothing of the template, nothing lost."""

import pytest
import torch

from data.schema import Conversation, Message
from data.template import EOS, ChatTokenizer
from inference.config import InferenceConfig
from inference.generate import Ending, TextStream

REPLIES = [
    "Hello there!",
    "def f(x):\n    return x\n",
    "Family 👨‍👩‍👧 — flag 🇺🇳.",
    "𓀀 𝔘𝔫𝔦 🧿",
    "tail  spaces   inside",
    "你好，世界",
    "</s> spelled, not meant <s>",
]


@pytest.mark.parametrize("reply", REPLIES)
def test_the_pieces_of_a_stream_are_the_reply(reply: str) -> None:
    tokenizer = ChatTokenizer.load()
    conversation = Conversation((Message("user", "go"), Message("assistant", reply)))
    prompt = tokenizer.encode_prompt(conversation)
    answer = tokenizer.encode(conversation).ids[len(prompt) :]
    assert answer[-1] == EOS

    pieces: list[str] = []
    stream = TextStream(Ending(tokenizer, InferenceConfig()), pieces.append)
    stream.put(torch.tensor([prompt]))
    for token in answer:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == reply.strip()
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 1  # it streams


def test_a_stream_cut_in_the_middle_of_a_character_ends_there() -> None:
    tokenizer = ChatTokenizer.load()
    reply = tokenizer.encode(Conversation((Message("user", "go"), Message("assistant", "a 🧿")))).ids[:-3]
    pieces: list[str] = []
    stream = TextStream(Ending(tokenizer, InferenceConfig()), pieces.append)
    prompt = tokenizer.encode_prompt(Conversation((Message("user", "go"),)))
    stream.put(torch.tensor([prompt]))
    for token in reply[len(prompt) :]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces).startswith("a ")
