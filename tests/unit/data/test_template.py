import json
import random
import re
import shutil
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.program.errors import UserError
from data.export import BREAK
from data.merges import merged
from data.rows.conversion import to_conversation
from data.rows.reading import RawRow
from data.schema import IGNORE_INDEX, Conversation, Message
from data.template import ChatTokenizer
from data.vocabulary import FIRST_PIECE, load_vocabulary
from tests.conftest import golden

GOLDEN = golden("llama2_mixtral")
SENTENCEPIECE_MODEL = Path(str(resources.files("mistral_common") / "data" / "tokenizer.model.v1"))


@cache
def chat() -> ChatTokenizer:
    return ChatTokenizer.load()


@cache
def sentencepiece() -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(SENTENCEPIECE_MODEL))


def conversation_of(messages: list[dict[str, str]]) -> Conversation:
    return Conversation(tuple(Message(m["role"], m["content"]) for m in messages))  # type: ignore[arg-type]


# Golden files


@pytest.mark.parametrize("row", GOLDEN)
def test_golden_text_ids_and_mask(row: dict[str, Any]) -> None:
    conversation = conversation_of(row["messages"])
    tokenized = chat().encode(conversation)

    assert chat().render(conversation) == row["text"]
    assert tokenized.ids == row["ids"]
    assert [label != IGNORE_INDEX for label in tokenized.labels] == [bool(trained) for trained in row["train"]]
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(tokenized.ids, tokenized.labels, strict=True))


@pytest.mark.parametrize("row", GOLDEN)
def test_golden_prompt(row: dict[str, Any]) -> None:
    conversation = conversation_of(row["messages"])
    prompt = chat().encode_prompt(conversation)

    if conversation.is_prompt:
        assert prompt == row["ids"]
        return
    last_untrained = max(place for place, trained in enumerate(row["train"]) if not trained)
    assert prompt == row["ids"][: last_untrained + 1]
    assert len(prompt) < len(row["ids"])


def test_no_piece_crosses_the_border_of_two_units() -> None:
    """What lets a text be encoded unit by unit; see `UnitIds`."""
    pieces = [piece for piece, number in chat()._vocabulary.items() if number >= FIRST_PIECE]
    assert not [piece for piece in pieces if re.search(r"[^▁]▁", piece) or ("\n" in piece and piece != "\n")]


def test_units_are_forgotten_without_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.merges.CACHED_UNITS", 3)
    merged.cache_clear()  # the units of the tests before this one
    forgetful = ChatTokenizer(load_vocabulary("embedded", None, "tokenizer"))
    text = "one two three four five six one two " * 5
    for _ in range(2):
        ids = memoryview(forgetful._ids_of.text(f" {text}")).cast("H").tolist()
        assert ids == sentencepiece().encode(text)
        assert len(forgetful._ids_of) <= 3


# Against SentencePiece

fragments = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20),
    st.text(st.sampled_from(" \t\n\r\u00a0\u2003\u3000▁"), max_size=20),
    st.builds(lambda character, times: character * times, st.sampled_from("a=-#0.▁ é🧿"), st.integers(1, 70)),
    st.sampled_from(
        (
            "<s>",
            "</s>",
            "<unk>",
            "<0x0A>",
            "<0xF0>",
            "[INST]",
            "[/INST]",
            "<<SYS>>",
            "<</SYS>>",
            "▁[",
            "\ufdd0",
            "\ufdd01",
        )
    ),
    st.sampled_from(("def f(x):\n    return x", "The answer is", "Größe", "你好", "مرحبا", "e\u0301", "12345.67")),
    st.sampled_from(("👩\u200d👩\u200d👧", "🧿", "\u200b", "\ufeff", "\x7f", "\x01", "\U0010ffff")),
)
contents = st.lists(fragments, max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    system = draw(st.none() | contents)
    turns = draw(st.lists(contents, min_size=1, max_size=5))
    messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)]
    return Conversation((*([] if system is None else [Message("system", system)]), *messages))


def expected_turns(conversation: Conversation) -> list[tuple[str, str | None]]:
    """Prompt and reply texts, written out from the specification of the template."""
    pairs: list[tuple[str, str | None]] = []
    opening = ""
    for message in conversation.messages:
        if message.role == "system":
            opening = f"<<SYS>>\n{message.content}\n<</SYS>>\n\n"
        elif message.role == "user":
            pairs.append((f"[INST] {(opening + message.content).strip()} [/INST]", None))
            opening = ""
        else:
            pairs[-1] = (pairs[-1][0], f" {message.content.strip()} ")
    return pairs


@settings(max_examples=3000)
@given(conversations())
def test_ids_and_mask_are_sentencepieces(conversation: Conversation) -> None:
    ids: list[int] = []
    labels: list[int] = []
    for prompt, reply in expected_turns(conversation):
        prompt_ids = sentencepiece().encode(prompt)
        turn_ids = sentencepiece().encode(prompt + (reply or ""))
        assert turn_ids[: len(prompt_ids)] == prompt_ids
        ids += [1, *turn_ids]
        labels += [IGNORE_INDEX] * (1 + len(prompt_ids))
        if reply is not None:
            ids.append(2)
            labels += [*turn_ids[len(prompt_ids) :], 2]

    tokenized = chat().encode(conversation)
    assert tokenized.ids == ids
    assert tokenized.labels == labels


@given(conversations(), st.lists(st.booleans(), min_size=3, max_size=3))
def test_masked_replies_change_the_mask_alone(conversation: Conversation, masks: list[bool]) -> None:
    turns = conversation.turns
    head = conversation.messages[: len(conversation.messages) - len(turns)]
    mixed = [Message(m.role, m.content, m.role == "assistant" and masks[i // 2]) for i, m in enumerate(turns)]
    plain, masked = chat().encode(conversation), chat().encode(Conversation((*head, *mixed)))
    assert masked.ids == plain.ids
    expected = plain.labels
    ends = [place + 1 for place, i in enumerate(plain.ids) if i == 2]
    for turn, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if masks[turn]:
            expected[begin:end] = [IGNORE_INDEX] * (end - begin)
    assert masked.labels == expected


@given(conversations())
def test_text_never_becomes_a_control_token(conversation: Conversation) -> None:
    turns = expected_turns(conversation)
    ids = chat().encode(conversation).ids

    assert ids.count(0) == 0
    assert ids.count(1) == len(turns)
    assert ids.count(2) == sum(reply is not None for _, reply in turns)
    # Each </s> is followed by the next <s>, or by nothing.
    assert all(place + 1 == len(ids) or ids[place + 1] == 1 for place, i in enumerate(ids) if i == 2)


@given(conversations())
def test_prompt_is_a_prefix(conversation: Conversation) -> None:
    ids = chat().encode(conversation).ids
    prompt = chat().encode_prompt(conversation)

    if conversation.is_prompt:
        assert prompt == ids
    else:
        assert prompt == ids[: len(prompt)]
        assert len(prompt) < len(ids)


@given(contents.filter(lambda text: "▁" not in text))  # U+2581 is SentencePiece's space, so it comes back as one
def test_reply_survives_the_round_trip(reply: str) -> None:
    tokenized = chat().encode(Conversation((Message("user", "say it"), Message("assistant", reply))))
    trained = [label for label in tokenized.labels if label != IGNORE_INDEX]
    assert chat().decode(trained) == reply.strip()


# Stored forms


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A directory with the tokenizer as this project saves it."""
    directory = tmp_path / "stored"
    directory.mkdir()
    chat().save(directory)
    return directory


def edit(directory: Path, change: Any) -> None:
    """Rewrites the `model` part of a tokenizer.json."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content["model"])
    path.write_text(json.dumps(content), encoding="utf-8")


def test_saved_form_is_the_same_tokenizer(stored: Path) -> None:
    assert ChatTokenizer.load(str(stored)).fingerprint == chat().fingerprint


@pytest.mark.parametrize("form", [list, " ".join], ids=["pairs", "strings"])
def test_order_of_stored_cuts_does_not_matter(stored: Path, form: Any) -> None:
    def shortest_left_first(model: dict[str, Any]) -> None:
        place = {}
        for left, right in model["merges"]:
            place.setdefault(left + right, len(place))
        ordered = sorted(model["merges"], key=lambda merge: (place["".join(merge)], len(merge[0])))
        assert ordered != model["merges"]
        model["merges"] = [form(merge) for merge in ordered]

    edit(stored, shortest_left_first)
    assert ChatTokenizer.load(str(stored)).fingerprint == chat().fingerprint


def test_sentencepiece_model_is_the_same_tokenizer(tmp_path: Path) -> None:
    shutil.copy(SENTENCEPIECE_MODEL, tmp_path / "tokenizer.model")
    assert ChatTokenizer.load(str(tmp_path)).fingerprint == chat().fingerprint


TEXTS = [row.values[0]["text"] for row in GOLDEN if row.values[0]] + [
    "  \n\n x   y\t🧿",
    "[INST] Größe [/INST]",
    "aaaaaaaaa",
]


@pytest.mark.parametrize("own", ["none", "same", "other trainer", "equal scores", "damaged", "another"])
def test_the_saved_sentencepiece_model_gives_our_ids(tmp_path: Path, own: str) -> None:
    """It is the base's own to the last byte, where SentencePiece makes the same of it; else the embedded one."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    model = sentencepiece_model_pb2.ModelProto()
    embedded = SENTENCEPIECE_MODEL.read_bytes()
    model.ParseFromString(embedded)
    if own == "other trainer":
        model.trainer_spec.num_threads = 7
    elif own == "equal scores":  # as a converter writes that knew none
        for piece in model.pieces:
            piece.score = 0.0
    elif own == "another":
        del model.pieces[-1]
    if own != "none":
        content = b"\xff" * 100 if own == "damaged" else model.SerializeToString()
        (base / "tokenizer.model").write_bytes(content)
    chat().save(out, base)
    taken = own in ("same", "other trainer")
    assert (out / "tokenizer.model").read_bytes() == ((base / "tokenizer.model").read_bytes() if taken else embedded)
    saved = SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    for text in TEXTS:
        assert saved.encode(text) == memoryview(chat()._ids_of.text(f" {text}")).cast("H").tolist()


def shuffle_ids(model: dict[str, Any]) -> None:
    pieces = list(model["vocab"])
    random.Random(0).shuffle(pieces)
    model["vocab"] = {piece: place for place, piece in enumerate(pieces)}


def foreign_without_unk(model: dict[str, Any]) -> None:
    """As in GPT-2 and its kin, which have neither <unk> nor byte pieces."""
    model.update(vocab={"a": 0, "b": 1, "ab": 2}, merges=[["a", "b"]], unk_token=None)


def foreign_with_unk(model: dict[str, Any]) -> None:
    model.update(vocab={"<unk>": 0, "a": 1, "b": 2, "ab": 3}, merges=[["a", "b"]])


def merge_outside_the_vocabulary(model: dict[str, Any]) -> None:
    model.update(vocab={"<unk>": 0, "a": 1, "b": 2}, merges=[["a", "b"]])


@pytest.mark.parametrize(
    "change",
    [
        shuffle_ids,
        foreign_without_unk,
        foreign_with_unk,
        merge_outside_the_vocabulary,
    ],
)
def test_another_vocabulary_is_refused(stored: Path, change: Any) -> None:
    edit(stored, change)
    with pytest.raises(UserError, match=f"tokenizer={stored}"):
        ChatTokenizer.load(str(stored))


def test_shuffled_merges_change_no_ids_unseen(stored: Path) -> None:
    """Ranks decide which pieces a text becomes: another ranking is refused, or has no say."""
    edit(stored, lambda model: random.Random(0).shuffle(model["merges"]))
    try:
        loaded = ChatTokenizer.load(str(stored))
    except UserError:
        return
    assert loaded.fingerprint == chat().fingerprint


def test_two_swapped_pieces_are_refused(stored: Path) -> None:
    """Of 32,000 pieces, two that no short probe is likely to hold."""

    def swap(model: dict[str, Any]) -> None:
        vocabulary = model["vocab"]
        vocabulary["▁Campaign"], vocabulary["▁bapt"] = vocabulary["▁bapt"], vocabulary["▁Campaign"]

    edit(stored, swap)
    with pytest.raises(UserError, match=f"tokenizer={stored}"):
        ChatTokenizer.load(str(stored))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_garbage_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x07 no tokenizer \xff")
    with pytest.raises(UserError, match=f"tokenizer={tmp_path}"):
        ChatTokenizer.load(str(tmp_path))


def test_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        ChatTokenizer.load(str(tmp_path))


def test_name_that_is_no_place_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokenizer=\./no/such/place: there is no such directory"):
        ChatTokenizer.load("./no/such/place")


# Stock transformers


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("stock")
    chat().save(directory)
    return AutoTokenizer.from_pretrained(directory)


def stock_ids(stock: Any, conversation: Conversation) -> list[int]:
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    return stock.apply_chat_template(messages, tokenize=True, return_dict=False)


@pytest.mark.parametrize("row", GOLDEN)
def test_stock_transformers_gives_golden_ids(stock: Any, row: dict[str, Any]) -> None:
    """Every golden row, the one that spells out control tokens among them."""
    assert stock.apply_chat_template(row["messages"], tokenize=True, return_dict=False) == row["ids"]
    prompt = stock.apply_chat_template(row["messages"], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert prompt == row["ids"]


@pytest.mark.parametrize("row", GOLDEN)
def test_programs_that_render_first_and_tokenize_then_get_the_same_ids(stock: Any, row: dict[str, Any]) -> None:
    """Servers do; whether they ask for special tokens or not, `<s>` is not doubled."""
    text = stock.apply_chat_template(row["messages"], tokenize=False)
    assert stock(text, add_special_tokens=False).input_ids == stock(text).input_ids == row["ids"]


@given(conversations())
@settings(max_examples=300)
def test_stock_transformers_gives_our_ids_whatever_is_said(stock: Any, conversation: Conversation) -> None:
    assert stock_ids(stock, conversation) == chat().encode(conversation).ids


@pytest.mark.parametrize(
    "text",
    [
        "\ufdd0",
        "\ufdd00",
        "\ufdd01",
        "<\ufdd01s>",
        "\ufdd01\ufdd00<s>\ufdd0</s>",
        "<<s>s>",
        "</</s>s>",
        "<s",
        "</s>\ufdd0",
    ],
)
def test_the_escape_itself_can_be_said(stock: Any, text: str) -> None:
    conversation = Conversation((Message("system", text), Message("user", text), Message("assistant", text)))
    assert stock_ids(stock, conversation) == chat().encode(conversation).ids


@pytest.mark.parametrize("row", GOLDEN)
def test_stock_template_renders_the_text(stock: Any, row: dict[str, Any]) -> None:
    text = stock.apply_chat_template(row["messages"], tokenize=False)
    assert text.replace(BREAK, "") == row["text"]
    spelled = any(token in message["content"] for message in row["messages"] for token in ("<s>", "</s>", "<unk>"))
    assert (BREAK in text) == spelled


def test_stock_decoding_shows_the_answer_without_the_space_before_it(stock: Any) -> None:
    conversation = Conversation((Message("user", "x"), Message("assistant", "Größe 🧿")))
    answer = chat().encode(conversation).ids[len(chat().encode_prompt(conversation)) :]
    assert stock.decode(answer, skip_special_tokens=True) == "Größe 🧿 "


@given(conversations())
def test_the_stock_mask_is_our_labels_token_by_token(stock: Any, conversation: Conversation) -> None:
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    encoded = stock.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    tokenized = chat().encode(conversation)
    assert encoded["input_ids"] == tokenized.ids
    assert encoded["assistant_masks"] == [int(label != IGNORE_INDEX) for label in tokenized.labels]


@given(contents.map(str.strip).filter(lambda text: text and not text.endswith("▁")))
def test_a_last_message_can_be_continued_whatever_it_says(stock: Any, begun: str) -> None:
    conversation = Conversation((Message("user", "Hi"), Message("assistant", begun)))
    messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
    in_parts = [messages[0], {"role": "assistant", "content": [{"type": "text", "text": begun}]}]
    expected = chat().encode(conversation).ids[:-2]  # without the space after it and </s>
    for given_as in (messages, in_parts):
        assert stock.apply_chat_template(given_as, return_dict=False, continue_final_message=True) == expected


def test_the_end_of_a_message_that_is_continued_stays_as_it_is(stock: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "One, </s> two:\n"}]
    text = stock.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text == f"<s>[INST] Hi [/INST] One, <{BREAK}/s> two:\n"


def test_parts_of_text_are_joined_before_control_tokens_are_looked_for(stock: Any) -> None:
    parts = [{"type": "text", "text": text} for text in ("a <", "s> b", "", " c ")]
    messages = [{"role": role, "content": parts} for role in ("system", "user", "assistant")]
    conversation = Conversation(
        (Message("system", "a <s> b c "), Message("user", "a <s> b c "), Message("assistant", "a <s> b c "))
    )
    assert stock.apply_chat_template(messages, return_dict=False) == chat().encode(conversation).ids


@pytest.mark.parametrize("texts", [("two ", "words"), ("two", "words"), ("two", " ", "words"), ("\n", "Hi", " ")])
def test_parts_of_rows_are_joined_as_the_stored_template_joins_them(stock: Any, texts: tuple[str, ...]) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    messages = [{"role": role, "content": parts} for role in ("system", "user", "assistant", "user", "assistant")]
    conversation = to_conversation(RawRow({"messages": messages}, "rows.jsonl", "line", 1), "messages")
    assert isinstance(conversation, Conversation)
    assert stock.apply_chat_template(messages, return_dict=False) == chat().encode(conversation).ids


USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "find_parcel", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "find_parcel", "arguments": {"number": 11}}}


@pytest.mark.parametrize(
    ("messages", "more", "told"),
    [
        ([{"role": "user", "content": [{"type": "image", "url": "table.png"}]}], {}, "give parts of type text"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "give parts of type text"),
        ([{"role": "user", "content": ["Hi"]}], {}, "give parts of type text"),
        ([{"role": "user", "content": None}], {}, "has to be text"),
        ([{"role": "user"}], {}, "has to be text"),
        ([{"role": "user", "content": 5}], {}, "has to be text"),
        ([{"role": "user", "content": {"type": "text", "text": "Hi"}}], {}, "has to be text"),
        ([{"role": "system", "content": None}, USER], {}, "has to be text"),
        ([{"role": "system", "content": "Be brief."}], {}, "there is nothing to answer"),
        ([USER], {"tools": [TOOL]}, "trained without tools"),
        ([USER], {"documents": [{"title": "a", "text": "b"}]}, "trained without tools and documents"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], {}, "leave out tool_calls"),
        ([USER, {"role": "tool", "content": "11"}], {}, "alternate"),
    ],
)
def test_what_the_model_never_learned_to_read_is_refused(
    stock: Any, messages: list[dict[str, Any]], more: dict[str, Any], told: str
) -> None:
    """Left out, or as Python's text of it, it would change the answer without a word."""
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match=told):
        stock.apply_chat_template(messages, tokenize=False, **more)


@pytest.mark.parametrize("more", [{"tools": None}, {"tools": []}, {"documents": []}])
def test_what_clients_send_though_it_is_empty_is_taken(stock: Any, more: dict[str, Any]) -> None:
    answered = [USER, {"role": "assistant", "content": "Hello.", "tool_calls": None}, USER]
    assert stock.apply_chat_template(answered, tokenize=False, **more).endswith("</s><s>[INST] Hi [/INST]")


def test_prompts_of_several_lengths_are_padded_on_the_left(stock: Any) -> None:
    padded = stock(["Hi", "Hello there"], padding=True)
    assert sorted(padded) == ["attention_mask", "input_ids"] == sorted(stock.model_input_names)
    assert padded["input_ids"] == [[0, *stock("Hi").input_ids], stock("Hello there").input_ids]
    assert padded["attention_mask"] == [[0, 1], [1, 1]]


@pytest.mark.parametrize("roles", [("assistant",), ("user", "user"), ("system", "assistant"), ("user", "system")])
def test_stock_template_refuses_roles_out_of_order(stock: Any, roles: tuple[str, ...]) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="alternate"):
        stock.apply_chat_template([{"role": role, "content": "x"} for role in roles], tokenize=False)
