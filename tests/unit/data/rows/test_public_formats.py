"""The shapes in which chat data is published: each is taken by looking at it, or by the setting that its refusal
proposes, or refused with the true reason. The rows are written here; only their shapes are others'."""

import json
from typing import Any

import pytest

from data.rows.columns import Names, look
from data.rows.conversion import Converter
from data.rows.reading import RawRow, Reject, as_arguments
from data.schema import Conversation

ASK, SAY = "Where do swifts sleep?", "In the air."
MORE, THEN = "All year?", "All but the weeks at the nest."
BRIEF = "You know birds."

ONE = [("user", ASK), ("assistant", SAY)]
TWO = [*ONE, ("user", MORE), ("assistant", THEN)]
LED = [("system", BRIEF), *ONE]


def turns(speaker: str, text: str, *names: str, said: tuple[str, ...] = (ASK, SAY, MORE, THEN)) -> list[dict[str, Any]]:
    return [{speaker: name, text: words} for name, words in zip(names * 2, said, strict=False)]


def human(*said: str) -> list[dict[str, Any]]:
    return turns("from", "value", "human", "gpt", said=said or (ASK, SAY, MORE, THEN))


def user(*said: str) -> list[dict[str, Any]]:
    return turns("role", "content", "user", "assistant", said=said or (ASK, SAY, MORE, THEN))


def read(row: Any, **settings: Any) -> Conversation | Reject:
    """What becomes of a row of a source in which all look like it."""
    names = look([row], settings.get("columns", {})) or Names.of("instruction", settings.pop("columns", {}))
    settings.pop("columns", None)
    return Converter(names, **settings).convert(RawRow(row, "rows.jsonl", "line", 1))


def said(outcome: Conversation | Reject) -> list[tuple[str, str]]:
    assert isinstance(outcome, Conversation), outcome
    return [(message.role, message.content) for message in outcome.messages]


TAKEN: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "OpenAI": ({"messages": user()}, TWO),
    "OpenAI, developer": ({"messages": [{"role": "developer", "content": BRIEF}, *user(ASK, SAY)]}, LED),
    "OpenAI, names": ({"messages": [{**turn, "name": "x"} for turn in user()]}, TWO),
    "OpenAI, parts": (
        {"messages": turns("role", "content", "user", "assistant", said=([{"type": "text", "text": ASK}], SAY))},  # type: ignore[arg-type]
        ONE,
    ),
    "OpenAI, completions": ({"prompt": ASK, "completion": f" {SAY}"}, ONE),
    "Anthropic": ({"system": BRIEF, "messages": user(ASK, SAY)}, LED),
    "Nova": ({"messages": [{"role": r, "content": [{"text": t}]} for r, t in ONE]}, ONE),
    "Cohere": ({"messages": turns("role", "content", "User", "Chatbot")}, TWO),
    "Gemini": ({"messages": turns("role", "content", "user", "model")}, TWO),
    "ShareGPT": ({"id": "a_0", "conversations": human()}, TWO),
    "ShareGPT 90K": ({"id": "a_0", "conversations": turns("from", "value", "human", "chatgpt")}, TWO),
    "ShareGPT, bing": ({"conversations": turns("from", "value", "user", "bing")}, TWO),
    "ShareGPT of roles": ({"conversations": user()}, TWO),
    "ShareGPT of roles and values": ({"conversations": turns("role", "value", "human", "bot")}, TWO),
    "from and value as messages": ({"messages": human()}, TWO),
    "OpenChat": ({"items": human(), "system": ""}, TWO),
    "SlimOrca": (
        {"conversations": [{"from": "system", "value": BRIEF, "weight": None}, *human(ASK, SAY)]},
        LED,
    ),
    "OpenHermes 2.5": ({"conversations": human(ASK, SAY), "system_prompt": BRIEF, "source": "x", "id": None}, LED),
    "Vicuna": ({"id": "identity_0", "conversations": human()}, TWO),
    "LMSYS, WildChat": ({"conversation_id": "x", "conversation": user(), "turn": 2, "language": "English"}, TWO),
    "Airoboros, Samantha": ({"conversations": [{"from": "system", "value": BRIEF}, *human(ASK, SAY)]}, LED),
    "Alpaca": ({"instruction": ASK, "input": "", "output": SAY}, ONE),
    "Alpaca, no instruction": ({"instruction": "", "input": ASK, "output": SAY}, ONE),
    "Platypus": ({"input": "", "output": SAY, "instruction": ASK, "data_source": "x"}, ONE),
    "WizardLM, CodeAlpaca": ({"instruction": ASK, "output": SAY}, ONE),
    "GPTeacher": ({"instruction": ASK, "input": "", "response": SAY}, ONE),
    "LaMini": ({"instruction": ASK, "response": SAY, "instruction_source": "x"}, ONE),
    "Dolly": (
        {"instruction": ASK, "context": "Swifts are birds.", "response": SAY, "category": "closed_qa"},
        [("user", f"{ASK}\n\nSwifts are birds."), ("assistant", SAY)],
    ),
    "LLaMA-Factory": (
        {"instruction": MORE, "input": "", "output": THEN, "system": BRIEF, "history": [[ASK, SAY]]},
        [("system", BRIEF), *TWO],
    ),
    "ChatGLM": ({"prompt": MORE, "response": THEN, "history": [[ASK, SAY]]}, TWO),
    "ChatGLM 3": ({"conversations": [{"role": "system", "content": BRIEF}, *user(ASK, SAY)]}, LED),
    "history of turns": ({"query": MORE, "response": THEN, "history": user(ASK, SAY)}, TWO),
    "ms-swift": ({"system": BRIEF, "query": ASK, "response": SAY, "history": []}, LED),
    "OpenOrca": ({"id": "x", "system_prompt": BRIEF, "question": ASK, "response": SAY}, LED),
    "GSM8K, Orca-Math": ({"question": ASK, "answer": SAY}, ONE),
    "MetaMath": ({"type": "x", "query": ASK, "original_question": "?", "response": SAY}, ONE),
    "Magicoder, NuminaMath": ({"problem": ASK, "solution": SAY}, ONE),
    "FLAN, P3": ({"inputs": ASK, "targets": SAY}, ONE),
    "LMFlow": ({"input": ASK, "output": SAY}, ONE),
    "a table with capitals": ({"Question": ASK, "Answer": SAY}, ONE),
    "two columns named by who speaks": ({"user": ASK, "assistant": SAY}, ONE),
    "CAMEL": ({"role_1": "Zoologist", "topic;": "x", "message_1": ASK, "message_2": SAY}, ONE),
    "Firefly 1.1M": ({"kind": "OpenQA", "input": ASK, "target": SAY}, ONE),
    "Firefly": (
        {"conversation": [{"human": ASK, "assistant": SAY}, {"human": MORE, "assistant": THEN}], "category": "x"},
        TWO,
    ),
    "XTuner": (
        {"conversation": [{"system": BRIEF, "input": ASK, "output": SAY}, {"input": MORE, "output": THEN}]},
        [("system", BRIEF), *TWO],
    ),
    "Capybara": (
        {"source": "x", "conversation": [{"input": ASK, "output": SAY}, {"input": MORE, "output": THEN}]},
        TWO,
    ),
    "BELLE, one turn": ({"instruction": ASK, "input": "", "output": SAY}, ONE),
    "BELLE, several": ({"id": "1", "conversations": turns("from", "value", "human", "assistant")}, TWO),
    "UltraChat": ({"id": "0", "data": [ASK, SAY, MORE, THEN]}, TWO),
    "UltraChat 200k": ({"prompt": ASK, "messages": user(), "prompt_id": "x"}, TWO),
    "LIMA": ({"conversations": [ASK, SAY], "source": "stackexchange"}, ONE),
    "pairs": ({"conversation": [[ASK, SAY], [MORE, THEN]]}, TWO),
    "a bare list": (user(), TWO),
    "a list written out": ({"conversations": str(human()).replace("'", '"')}, TWO),
    "mistral-finetune": (
        {"messages": [{**turn, "weight": 1} if n % 2 else turn for n, turn in enumerate(user())]},
        TWO,
    ),
    "axolotl": ({"messages": [{**turn, "train": n % 2 == 1} for n, turn in enumerate(user())]}, TWO),
    "Pygmalion": (
        {"conversations": [{"role": "system", "value": BRIEF}, *turns("role", "value", "human", "bot")[:2]]},
        LED,
    ),
    "TRL, conversational": ({"prompt": user(ASK), "completion": [{"role": "assistant", "content": SAY}]}, ONE),
    "TRL, several turns": ({"prompt": user(ASK, SAY, MORE), "completion": THEN}, TWO),
    "Guanaco": ({"text": f"### Human: {ASK}### Assistant: {SAY}"}, ONE),
    "Guanaco, several": (
        {"text": f"### Human: {ASK}\n### Assistant: {SAY}\n### Human: {MORE}\n### Assistant: {THEN}"},
        TWO,
    ),
    "Baize": (
        {"topic": "birds", "input": f"{BRIEF}\n[|Human|] {ASK}\n[|AI|] {SAY}\n[|Human|] "},
        LED,
    ),
    "No Robots, Tulu": ({"prompt": ASK, "prompt_id": "x", "messages": user(), "category": "Open QA"}, TWO),
    "UltraFeedback": ({"prompt": ASK, "messages": user(), "chosen": user(), "rejected": user()}, TWO),
    "a product's answers": ({"question": ASK, "answer": 3}, [("user", ASK), ("assistant", "3")]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken_by_looking(name: str) -> None:
    row, expected = TAKEN[name]
    assert said(read(row)) == expected


HH = f"\n\nHuman: {ASK}\n\nAssistant: {SAY}"
ASSISTANT = {"from": "gpt", "value": SAY}
PROPOSED: dict[str, tuple[Any, str, dict[str, Any], list[tuple[str, str]]]] = {
    # The row, the setting as it is proposed, the same as it is given, what then comes out.
    "HH-RLHF": (
        {"chosen": HH, "rejected": HH},
        "'columns={messages: chosen}'",
        {"columns": {"messages": "chosen"}},
        ONE,
    ),
    "TRL, preferences": (
        {"prompt": ASK, "chosen": SAY, "rejected": "In trees."},
        "'columns={instruction: prompt, output: chosen}'",
        {"columns": {"instruction": "prompt", "output": "chosen"}},
        ONE,
    ),
    "TRL, lists of preferences": (
        {"chosen": user(ASK, SAY), "rejected": user(ASK, "In trees.")},
        "'columns={messages: chosen}'",
        {"columns": {"messages": "chosen"}},
        ONE,
    ),
    "TRL, conversational preferences": (
        {"prompt": user(ASK), "chosen": user("", SAY)[1:], "rejected": user("", "In trees.")[1:]},
        "'columns={instruction: prompt, output: chosen}'",
        {"columns": {"instruction": "prompt", "output": "chosen"}},
        ONE,
    ),
    "LLaMA-Factory, preferences": (
        {"conversations": human(ASK), "chosen": ASSISTANT, "rejected": {"from": "gpt", "value": "In trees."}},
        "'columns={instruction: conversations, output: chosen}'",
        {"columns": {"instruction": "conversations", "output": "chosen"}},
        ONE,
    ),
    "two texts of other names": (
        {"id": 1, "frage": ASK, "antwort": SAY},
        "'columns={instruction: frage, output: antwort}'",
        {"columns": {"instruction": "frage", "output": "antwort"}},
        ONE,
    ),
    "a reply of another name": (
        {"instruction": ASK, "input": "", "reply text": SAY},
        "'columns={output: reply text}'",
        {"columns": {"output": "reply text"}},
        ONE,
    ),
    "a list of another name": (
        {"uid": 1, "thread": user()},
        "'columns={messages: thread}'",
        {"columns": {"messages": "thread"}},
        TWO,
    ),
    "Chatbot Arena": (
        {"conversation_a": user(ASK, SAY), "conversation_b": user(ASK, "In trees."), "winner": "model_a"},
        "'columns={messages: conversation_a}'",
        {"columns": {"messages": "conversation_a"}},
        ONE,
    ),
    "speakers of one's own": (
        {"messages": turns("role", "content", "customer", "agent")},
        "'roles={customer: user, agent: assistant}'",
        {"roles": {"customer": "user", "agent": "assistant"}},
        TWO,
    ),
    "ShareGPT, a reply first": (
        {"conversations": [{"from": "gpt", "value": "Hello!"}, *human()]},
        "'repair=[drop_leading_assistant]'",
        {"repair": ("drop_leading_assistant",)},
        TWO,
    ),
    "ShareGPT, thanks at the end": (
        {"conversations": human(ASK, SAY, "Thanks.")},
        "'repair=[drop_last_user]'",
        {"repair": ("drop_last_user",)},
        ONE,
    ),
    "two in a row": (
        {"messages": [{"role": "user", "content": "Hello"}, *user(ASK, SAY)]},
        "'repair=[merge_same_role]'",
        {"repair": ("merge_same_role",)},
        [("user", f"Hello\n\n{ASK}"), ("assistant", SAY)],
    ),
}


@pytest.mark.parametrize("name", PROPOSED)
def test_taken_by_the_setting_that_the_refusal_proposes(name: str) -> None:
    row, proposed, settings, expected = PROPOSED[name]
    outcome = read(row)
    assert isinstance(outcome, Reject)
    assert as_arguments(outcome.settings) == [proposed]
    assert outcome.record()["settings"] == proposed
    assert said(read(row, **settings)) == expected


REFUSED: dict[str, tuple[Any, str]] = {
    # The row, and a part of the reason.
    "OASST, a tree": (
        {"message_tree_id": "x", "prompt": {"message_id": "x", "text": ASK, "role": "prompter", "replies": []}},
        "the field prompt is a tree of messages (replies)",
    ),
    "OASST, messages": (
        {"message_id": "x", "parent_id": None, "role": "prompter", "text": ASK, "lang": "en"},
        "it is a single message",
    ),
    "one turn a row": ({"role": "user", "content": ASK}, "it is a single message"),
    "plain text": ({"text": "Swifts sleep in the air. They land to breed."}, "all it says is one text, text"),
    "Llama-2 text": ({"text": f"<s>[INST] {ASK} [/INST] {SAY} </s>"}, "all it says is one text, text"),
    "axolotl, segments": (
        {"segments": [{"label": True, "text": ASK}, {"label": False, "text": SAY}]},
        "there is no field instruction; there is segments",
    ),
    "self-instruct": (
        {"id": "x", "instruction": ASK, "instances": [{"input": "", "output": SAY}], "is_classification": False},
        "there is no field output; there are id, instruction, instances, is_classification",
    ),
    "MOSS": (
        {"conversation_id": "1", "num_turns": 1, "chat": {"turn_1": {"Human": ASK, "MOSS": SAY}}},
        "there is no field instruction; there are conversation_id, num_turns, chat",
    ),
    "a call of a tool": (
        {"messages": [*user(ASK), {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}]},
        "messages[1] calls a tool (tool_calls) and says nothing",
    ),
    "a call of a tool, empty": (
        {"messages": [*user(ASK), {"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}]},
        "messages[1] calls a tool (tool_calls) and says nothing",
    ),
    "a tool speaks": (
        {"messages": [*user(ASK), {"role": "tool", "content": "{}"}]},
        "messages[1] is said by 'tool', a tool, for which the LLaMA-2 template has no place",
    ),
    "function_call of ShareGPT": (
        {"conversations": [*human(ASK), {"from": "function_call", "value": "{}"}], "tools": "[]"},
        "conversations[1] is said by 'function_call', a tool",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, *user("", SAY)[1:]]},
        "messages[0].content[0] is a part of type image_url, and only text can be trained on",
    ),
    "null": (
        {"messages": [*user(ASK), {"role": "assistant", "content": None}]},
        "the field messages[1].content is null",
    ),
    "a reply that is null": ({"instruction": ASK, "output": None}, "the field output is null"),
    "another list": ({"messages": {"0": user()}}, "the field messages is dict, not a list"),
    "a fraction": ({"question": ASK, "answer": 0.5}, "the field answer is float, not text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_true_reason(name: str) -> None:
    row, reason = REFUSED[name]
    outcome = read(row)
    assert isinstance(outcome, Reject)
    assert reason in outcome.detail
    assert outcome.settings == {}


def test_a_list_of_questions_is_no_conversation() -> None:
    """As MT-bench has them: the second is not the answer to the first."""
    outcome = read({"question_id": 81, "category": "writing", "turns": [ASK, MORE]})
    assert isinstance(outcome, Reject)
    assert outcome.settings == {}


def test_names_of_fields_come_before_names_of_people() -> None:
    row = {"user": "u_17", "assistant": "v2", "bot": "b", "question": ASK, "answer": SAY}
    assert said(read(row)) == ONE
    assert said(read({"user": "u_17", "prompt": ASK, "completion": SAY, "dialogue": ["x", "y"]})) == ONE


def test_lists_that_are_mixed_are_refused_at_the_odd_place() -> None:
    for mixed, told in (
        ([*human(ASK), SAY], "conversations[1] is str, not an object"),
        ([ASK, *human(SAY)], "conversations[1] is dict, not a text as those before it"),
        ([[ASK, SAY], ASK], "conversations[0] is list, not an object"),
        ([ASK], "conversations[0] is str, not an object"),
        ([5], "conversations[0] is int, not an object"),
    ):
        outcome = read({"conversations": mixed})
        assert isinstance(outcome, Reject)
        assert (outcome.reason, outcome.detail) == ("not_an_object", told)


def test_a_system_message_in_parts_beside_the_turns_is_read() -> None:
    row = {"system": [{"type": "text", "text": BRIEF}], "messages": user(ASK, SAY)}
    converter = Converter(Names.of("messages", {}))
    assert said(converter.convert(RawRow(row, "rows.jsonl", "line", 1))) == LED
    assert not converter.unread


def test_what_a_reply_quotes_is_no_turn() -> None:
    written = [{"from": "human", "value": ASK}, {"from": "gpt", "value": "### Human: Hi ### Assistant: Hello"}]
    assert len(said(read({"conversations": json.dumps(written)}))) == 2
    broken = read({"conversations": json.dumps([written[0]])[:-1] + ","})
    assert isinstance(broken, Reject)


@pytest.mark.parametrize("text", ["\n" * 300_000, "### " * 100_000, "Human: " * 50_000, "[|Human|]" * 50_000])
def test_looking_for_a_transcript_takes_linear_time(text: str) -> None:
    """These took minutes, or would, if a pattern went back over what it has seen."""
    outcome = read({"text": f"{text}::"})
    assert isinstance(outcome, Reject)
