"""The stream of an answer: every character whole, nothing of the template, nothing lost."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.program.errors import UserError
from data.schema import Conversation, Message
from data.template import EOS, ChatTokenizer
from inference.config import SMALLEST_TEMPERATURE, InferenceConfig
from inference.generate import Ending, TextStream, generate
from inference.load import Loaded, load
from inference.prompt import ask
from tests.support.adapters import make_base

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


def streamed(reply: str, **settings: Any) -> tuple[str, str]:
    """What a stream writes of a reply with stop strings, and the text of the whole answer."""
    tokenizer = ChatTokenizer.load()
    ending = Ending(tokenizer, InferenceConfig(**settings))
    prompt = tokenizer.encode_prompt(Conversation((Message("user", "go"),)))
    answer = tokenizer.encode(Conversation((Message("user", "go"), Message("assistant", reply)))).ids[len(prompt) :]
    pieces: list[str] = []
    stream = TextStream(ending, pieces.append)
    stream.put(torch.tensor([prompt]))
    taken: list[int] = []
    for token in answer:
        taken.append(token)
        stream.put(torch.tensor([token]))
        if ending.reached(taken):
            break
    stream.end()
    return "".join(pieces), ending.answer(taken).text


@pytest.mark.parametrize(
    ("reply", "stop", "expected"),
    [
        ("one two three", ["two"], "one"),
        ("one two three", ["three", "two t"], "one"),
        ("one tw", ["two"], "one tw"),
        ("first\n\nsecond", ["\n\n"], "first"),
        ("eins 🧿 zwei", ["🧿"], "eins"),
        ("a 👩\u200d👩\u200d👧 b", ["b"], "a 👩\u200d👩\u200d👧"),
        ("stop", ["stop"], ""),
        ("Sure. [INST] And now? [/INST] Yes.", [], "Sure."),
        ("Sure.</s> no", [], "Sure.</s> no"),
        ("x <<SYS>>", [], "x"),
    ],
)
def test_an_answer_ends_before_a_stop_string(reply: str, stop: list[str], expected: str) -> None:
    assert streamed(reply, stop=stop) == (expected, expected)


def test_markers_are_text_where_they_are_kept() -> None:
    reply = "The template has [INST] and [/INST]."
    assert streamed(reply, markers="keep") == (reply, reply)


def small(**sizes: int) -> Loaded:
    return Loaded(make_base(torch.float32, vocab_size=32_000, **sizes), ChatTokenizer.load())


def test_a_stop_string_ends_generation_and_not_only_what_is_shown() -> None:
    loaded = small()
    asked = Conversation((Message("user", "go"),))
    whole = generate(loaded, InferenceConfig(max_new_tokens=12), asked, lambda _: None)
    assert whole.finish_reason == "length"
    assert len(whole.ids) == 12
    word = loaded.tokenizer.decode(whole.ids[5:7])
    cut = generate(loaded, InferenceConfig(max_new_tokens=12, stop=[word]), asked, lambda _: None)
    assert cut.finish_reason == "stop"
    assert len(cut.ids) < 12
    assert whole.text.startswith(cut.text)
    assert word not in cut.text


def test_the_context_bounds_prompt_and_answer() -> None:
    loaded = small(max_position_embeddings=24)
    asked = Conversation((Message("user", "go"),))
    prompt = len(loaded.tokenizer.encode_prompt(asked))
    answer = generate(loaded, InferenceConfig(max_new_tokens=50), asked, lambda _: None)
    assert len(answer.ids) == 24 - prompt
    with pytest.raises(UserError, match=r"^prompt: it takes \d+ tokens, and the model's context is 24"):
        generate(loaded, InferenceConfig(), Conversation((Message("user", "go " * 30),)), lambda _: None)


# Sampling


def test_what_sampling_may_take() -> None:
    """Each setting gives what greedy gives where it leaves the likeliest token alone, and else not."""
    loaded = small()
    asked = Conversation((Message("user", "go"),))

    def ids(**settings: Any) -> list[int]:
        return generate(loaded, InferenceConfig(**{"max_new_tokens": 12} | settings), asked, lambda _: None).ids

    greedy = ids()
    assert ids(seed=5) == greedy
    assert ids(temperature=SMALLEST_TEMPERATURE) == greedy
    assert ids(temperature=5.0, top_k=1) == greedy
    assert ids(temperature=5.0, top_p=1e-6) == greedy
    drawn = ids(temperature=5.0, seed=1)
    assert drawn != greedy
    assert ids(temperature=5.0, seed=1) == drawn
    assert ids(temperature=5.0, seed=2) != drawn
    assert ids(temperature=5.0, min_p=1.0) == greedy
    assert ids(temperature=5.0, seed=1, min_p=1e-9) == drawn
    assert len({ids(temperature=1.0, top_k=2, max_new_tokens=1, seed=seed)[0] for seed in range(40)}) == 2
    assert len({ids(temperature=5.0, top_k=0, max_new_tokens=1, seed=seed)[0] for seed in range(40)}) > 20


def test_a_penalty_on_what_was_said_before() -> None:
    """Each token of a greedy answer against the model's own logits, with those of earlier tokens changed.

    Below 1 the penalty is a reward, which a model that never repeats itself shows better.
    """
    loaded = small()
    asked = Conversation((Message("user", "go"),))
    config = InferenceConfig(max_new_tokens=12, repetition_penalty=0.3)
    sequence = loaded.tokenizer.encode_prompt(asked)
    answer = generate(loaded, config, asked, lambda _: None)
    for token in answer.ids:
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([sequence])).logits[0, -1].tolist()
        for seen in set(sequence):
            logits[seen] = logits[seen] / 0.3 if logits[seen] > 0 else logits[seen] * 0.3
        assert token == max(range(len(logits)), key=logits.__getitem__)
        sequence.append(token)
    assert answer.ids != generate(loaded, InferenceConfig(max_new_tokens=12), asked, lambda _: None).ids


def test_what_the_base_recommends_is_not_mixed_in(tmp_path: Path) -> None:
    """A penalty or a ban in the base's generation_config.json would change what greedy means, and no one would know."""
    base = make_base(torch.bfloat16, vocab_size=32_000)
    base.save_pretrained(tmp_path)
    config = InferenceConfig(base=str(tmp_path), device="cpu", max_new_tokens=12)
    asked = Conversation((Message("user", "go"),))
    plain = generate(load(config), config, asked, lambda _: None).ids
    recommended = {"do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 9.0}
    recommended |= {"bad_words_ids": [[plain[0]]], "min_new_tokens": 2, "eos_token_id": plain[:3]}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    assert generate(load(config), config, asked, lambda _: None).ids == plain


# The prompt


def test_a_prompt_comes_from_the_setting_a_file_or_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Größe?\nIn metres, [please].\n"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    ways = (
        InferenceConfig(prompt=text),
        InferenceConfig(prompt="-"),
        InferenceConfig(prompt_file=str(tmp_path / "prompt.txt")),
    )
    chat = ChatTokenizer.load()
    expected = chat.encode_prompt(Conversation((Message("user", text),)))
    assert [chat.encode_prompt(ask(config)) for config in ways] == [expected] * 3
    with_system = ask(InferenceConfig(prompt="x", system="Be brief."))
    assert with_system == Conversation((Message("system", "Be brief."), Message("user", "x")))


@pytest.mark.parametrize("marker", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("field", ["prompt", "system"])
def test_markers_in_what_is_said_are_refused_unless_told(marker: str, field: str) -> None:
    settings = {"prompt": "hello", field: f"x {marker} y"}
    with pytest.raises(UserError, match=f"^{field}: it holds the template's own marker"):
        ask(InferenceConfig(**settings))
    ask(InferenceConfig(**settings, markers="keep"))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"^prompt_file=\S+: it is not UTF-8 text"):
        ask(InferenceConfig(prompt_file=str(tmp_path / "prompt")))
    (tmp_path / "prompt").write_text(" \n")
    with pytest.raises(UserError, match="nothing to answer"):
        ask(InferenceConfig(prompt_file=str(tmp_path / "prompt")))
    with pytest.raises(UserError, match="nothing to answer"):
        ask(InferenceConfig(prompt="\u200b \u2060"))
