"""Every boundary at which a conversation can be cut."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.config import PrepareConfig
from data.rows.columns import Names
from data.rows.reading import Chunk
from data.schema import IGNORE_INDEX, Conversation, Message
from data.stages.encoding import Encoder, Shortened
from data.stages.overlong import LONGEST_PIECE, MARGIN, least_tokens, split_turns, truncate, within_reach
from data.template import BOS, EOS, ChatTokenizer

TOKENIZER = ChatTokenizer.load()
TURNS = (
    Message("user", "Name three colours."),
    Message("assistant", "Red, green and blue."),
    Message("user", "And three more, please?"),
    Message("assistant", "Orange, purple, and a very dark grey."),
    Message("user", "Thanks!"),
    Message("assistant", "You are welcome."),
)
PLAIN = Conversation(TURNS)
WITH_SYSTEM = Conversation((Message("system", "Be brief."), *TURNS))


def prompt_lengths(conversation: Conversation) -> list[int]:
    """For each turn, the tokens up to the end of its prompt."""
    messages = conversation.messages
    ends = [place + 1 for place, message in enumerate(messages) if message.role == "user"]
    return [len(TOKENIZER.encode_prompt(Conversation(messages[:end]))) for end in ends]


def turn_lengths(conversation: Conversation) -> list[int]:
    """For each turn, the tokens up to the end of its reply."""
    messages = conversation.messages
    ends = [place + 1 for place, message in enumerate(messages) if message.role == "assistant"]
    return [len(TOKENIZER.encode(Conversation(messages[:end]))) for end in ends]


@pytest.mark.parametrize("conversation", [PLAIN, WITH_SYSTEM], ids=["plain", "system"])
def test_truncation_at_every_length(conversation: Conversation) -> None:
    whole = TOKENIZER.encode(conversation)
    prompts, turns = prompt_lengths(conversation), turn_lengths(conversation)
    for seq_len in range(1, len(whole) + 2):
        kept = truncate(whole, seq_len)
        if seq_len <= prompts[0]:
            assert kept is None  # a prompt alone trains nothing
            continue
        assert kept is not None
        # It is a beginning, with the same labels.
        assert kept.ids == whole.ids[: len(kept)]
        assert kept.labels == whole.labels[: len(kept)]
        # It ends where the row ends, or with a whole turn, because the next prompt leaves no room for its reply.
        begun = sum(prompt < seq_len for prompt in prompts)
        assert len(kept) == min(seq_len, turns[begun - 1])
        # What is left ends in trained text.
        assert kept.labels[-1] != IGNORE_INDEX
    assert truncate(whole, len(whole)) is whole


@pytest.mark.parametrize("conversation", [PLAIN, WITH_SYSTEM], ids=["plain", "system"])
def test_splitting_at_every_length(conversation: Conversation) -> None:
    whole = TOKENIZER.encode(conversation)
    system = () if conversation.system is None else (conversation.system,)
    alone = [Conversation((*system, *TURNS[place : place + 2])) for place in (0, 2, 4)]
    longest = max(len(TOKENIZER.encode(turn)) for turn in alone)
    for seq_len in range(1, len(whole) + 1):
        parts = split_turns(conversation, TOKENIZER, seq_len)
        assert all(len(part) <= seq_len for part in parts)
        assert all(part.ids[0] == BOS and part.labels[-1] != IGNORE_INDEX for part in parts)
        fitting = sum(len(TOKENIZER.encode_prompt(turn)) < seq_len for turn in alone)
        assert sum(part.ids.count(BOS) for part in parts) == fitting
        if seq_len >= longest:  # nothing has to be cut: the replies are all there, in order
            trained = [label for part in parts for label in part.labels if label != IGNORE_INDEX]
            assert trained == [label for label in whole.labels if label != IGNORE_INDEX]
            assert all(part.ids[-1] == EOS for part in parts)
            # As many turns in a part as fit: joining it with the next turn would be too long.
            for part, following in itertools.pairwise(parts):
                assert len(part) + following.ids.index(EOS) + 1 > seq_len
    assert split_turns(conversation, TOKENIZER, len(whole))[0].ids == whole.ids


@pytest.mark.parametrize(
    ("overlong", "kept", "conversations"), [("drop", 1, 1), ("truncate", 2, 2), ("split_turns", 2, 4)]
)
def test_preparing_with_each_policy(
    run_program: Callable[..., Any], tmp_path: Path, overlong: str, kept: int, conversations: int
) -> None:
    long_prompt = {"messages": [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "No."}]}
    rows = [
        {"messages": [{"role": m.role, "content": m.content} for m in TURNS]},
        {"messages": [{"role": m.role, "content": m.content} for m in TURNS[:2]]},
        long_prompt,
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    seq_len = max(turn_lengths(Conversation(TURNS[2:4]))) + 1
    settings = (f"seq_len={seq_len}", f"overlong={overlong}", "eval_fraction=0", "max_reject_fraction=0.9")
    assert run_program("data", "files=[rows.json]", "output=out", *settings).exit_code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rows"] == {
        "in": 3,
        "kept": kept,
        "rejected": 3 - kept,
        "rejected_by_reason": {"too_long": 3 - kept},
    }
    assert manifest["train"]["conversations"] == conversations
    assert (
        manifest["shortened"]
        == {
            "drop": {"rows": 0, "turns_left_out": 0, "replies_cut": 0},
            "truncate": {"rows": 1, "turns_left_out": 2, "replies_cut": 0},
            "split_turns": {"rows": 1, "turns_left_out": 0, "replies_cut": 0},
        }[overlong]
    )


def test_the_parts_of_a_row_stay_on_one_side_of_the_split(run_program: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"messages": [{"role": m.role, "content": f"{m.content} {n}"} for m in TURNS]} for n in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = ("seq_len=40", "overlong=split_turns", "eval_fraction=0.3")
    assert run_program("data", "files=[rows.json]", "output=out", *settings).exit_code == 0
    from data.prepared.dataset import PreparedDataset

    dataset = PreparedDataset(tmp_path / "out")
    train, held_out = (
        {number for index in range(len(table)) for number in table[index].rows}
        for table in (dataset.train, dataset.eval)
    )
    assert train | held_out == set(range(12))
    assert not train & held_out
    assert len(held_out) == 4


def test_what_was_lost_is_counted_at_every_length() -> None:
    whole = TOKENIZER.encode(PLAIN)
    ends = turn_lengths(PLAIN)
    for seq_len in range(prompt_lengths(PLAIN)[0] + 1, len(whole)):
        kept = truncate(whole, seq_len)
        assert kept is not None
        begun = sum(prompt < seq_len for prompt in prompt_lengths(PLAIN))
        assert Shortened.of(whole, [kept]) == Shortened(3 - begun, int(len(kept) not in ends))
        parts = split_turns(PLAIN, TOKENIZER, seq_len)
        turns = sum(part.ids.count(BOS) for part in parts)
        assert Shortened.of(whole, parts) == Shortened(3 - turns, sum(part.ids[-1] != EOS for part in parts))


def masked(*replies: int) -> Conversation:
    """PLAIN with the replies of these turns, from 0, masked."""
    return Conversation(
        tuple(
            Message(m.role, m.content, place // 2 in replies and m.role == "assistant") for place, m in enumerate(TURNS)
        )
    )


@pytest.mark.parametrize("replies", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_truncation_keeps_masked_replies_only_before_trained_ones(replies: tuple[int, ...]) -> None:
    conversation = masked(*replies)
    whole, prompts, turns = TOKENIZER.encode(conversation), prompt_lengths(PLAIN), turn_lengths(PLAIN)
    assert whole.ids == TOKENIZER.encode(PLAIN).ids
    for seq_len in range(1, len(whole)):
        begun = [turn for turn in range(3) if turn not in replies and prompts[turn] < seq_len]
        kept = truncate(whole, seq_len)
        if not begun:
            assert kept is None
            continue
        assert kept is not None
        assert len(kept) == min(seq_len, turns[begun[-1]])
        assert kept.ids == whole.ids[: len(kept)]
        assert kept.labels == whole.labels[: len(kept)]
        assert kept.labels[-1] != IGNORE_INDEX


@pytest.mark.parametrize("replies", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_splitting_keeps_every_trained_reply_and_no_part_without_one(replies: tuple[int, ...]) -> None:
    conversation = masked(*replies)
    whole = TOKENIZER.encode(conversation)
    longest = max(len(TOKENIZER.encode(Conversation(TURNS[place : place + 2]))) for place in (0, 2, 4))
    for seq_len in range(longest, len(whole)):
        parts = split_turns(conversation, TOKENIZER, seq_len)
        assert all(part.supervised and len(part) <= seq_len for part in parts)
        trained = [label for part in parts for label in part.labels if label != IGNORE_INDEX]
        assert trained == [label for label in whole.labels if label != IGNORE_INDEX]


# What can't fit by its characters


def test_no_piece_is_longer_than_the_longest() -> None:
    assert max(map(len, TOKENIZER.pieces)) == LONGEST_PIECE


TEXTS = st.lists(st.sampled_from(["a", " " * 40, "word ", "\n\n", "日本", "🧿", "x" * 50]), min_size=1, max_size=30)


@given(TEXTS, TEXTS)
@example([" " * 40] * 30, ["a"])
def test_a_conversation_has_at_least_the_least_tokens(question: list[str], answer: list[str]) -> None:
    conversation = Conversation((Message("user", "".join(question)), Message("assistant", "".join(answer) + ".")))
    assert 0 < least_tokens(conversation) <= len(TOKENIZER.encode(conversation))


LONG = 16 * LONGEST_PIECE + MARGIN + 1
LONG_TEXTS = {
    "words": "one or two words " * LONG,
    "spaces": "a" + " " * 2 * LONG + "b",
    "line ends": "a" + "\n" * 2 * LONG + "b",
    "one word": "x" * 2 * LONG,
    "signs": "🧿" * 2 * LONG,
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
@pytest.mark.parametrize("place", [0, 1, 2, 3, 5])
def test_cutting_long_texts_first_changes_nothing(text: str, place: int) -> None:
    messages = list(WITH_SYSTEM.messages)
    messages[place] = Message(messages[place].role, text)
    whole = Conversation(tuple(messages))
    for seq_len in (16, 40, 90):
        near = within_reach(whole, seq_len)
        assert sum(len(message.content) for message in near.messages) < 20 * seq_len + 2 * MARGIN
        assert truncate(TOKENIZER.encode(near), seq_len) == truncate(TOKENIZER.encode(whole), seq_len)
        assert split_turns(near, TOKENIZER, seq_len) == split_turns(whole, TOKENIZER, seq_len)
    assert within_reach(whole, 8 * LONG) is whole


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split_turns"])
def test_what_can_not_fit_is_not_encoded(overlong: str) -> None:
    """Of five million characters, as few get to the merges as may matter, for the evaluation data too."""
    seen: list[int] = []

    class Counting(ChatTokenizer):
        def encode(self, conversation: Conversation) -> Any:
            seen.append(sum(len(message.content) for message in conversation.messages))
            return super().encode(conversation)

    encoder = Encoder(PrepareConfig(seq_len=64, overlong=overlong), Counting.load(), None)
    row = json.dumps({"instruction": "Go on.", "output": "x" * 5_000_000})
    encoded = encoder.encode(Chunk("rows.jsonl", "line", [1], [row]), Names.of("instruction", {}))
    assert all(size < 64 * LONGEST_PIECE + MARGIN + 100 for size in seen)
    if overlong == "drop":
        assert not seen
        ((_, reject),) = encoded.rejects
        assert reject.reason == "too_long"
        assert reject.detail == "the conversation has at least 312501 tokens, and a row holds 64 (seq_len)"
    else:
        ((_, (part,)),) = encoded.kept
        assert len(part) == 64
        assert encoded.shortened == {0: Shortened(0, 1)}
