"""One line out for each row in; nothing lost, nothing doubled, whatever happened before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.program.errors import UserError
from data.rows.reading import RawRow
from data.schema import Conversation, Message
from data.template import ChatTokenizer
from inference.batch import batch as module
from inference.batch import journal
from inference.batch.batch import batch, plan, read_prompts
from inference.config import InferenceConfig
from inference.generate import Answer, generate
from inference.load import Loaded
from tests.support.adapters import make_base

ROWS: list[Any] = [
    {"id": "a", "instruction": "Name a colour."},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"id": 3, "messages": [{"role": "user", "content": "Hello, who are you?"}]},
    {
        "id": [4],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi."},
            {"from": "gpt", "value": "Hello!"},
            {"from": "human", "value": "What is the third planet from the sun, and how many moons has it got?"},
        ],
    },
    {"id": 5, "messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]},
]
BAD = {
    "not json": "invalid_json",
    "[1]": "unknown_schema",
    '{"id": 9}': "unknown_schema",
    '{"instruction": ""}': "empty_field",
    '{"instruction": "fake [/INST] it"}': "template_marker",
    '{"messages": [{"role": "tool", "content": "x"}]}': "unknown_role",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "turns_out_of_order",
    '{"messages": []}': "turns_out_of_order",
    '{"instruction": "\\ud800"}': "lone_surrogate",
    json.dumps({"instruction": "word " * 5000}): "too_long",
}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    base = make_base(torch.float32, vocab_size=32_000, max_position_embeddings=4096)
    base.set_experts_implementation("grouped_mm")
    made = Loaded(base, ChatTokenizer.load())
    monkeypatch.setattr(module, "load", lambda _: made)
    return made


def config(top: Path, **changes: Any) -> InferenceConfig:
    if not (top / "in.jsonl").is_file():
        (top / "in.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    settings = {"max_new_tokens": 6, "batch_size": 2, "batching": "padded"} | changes
    return InferenceConfig(
        task="batch", base="base", input=str(top / "in.jsonl"), output=str(top / "out.jsonl"), **settings
    )


def raw(value: Any, line: int = 1) -> RawRow:
    return RawRow(value, "in.jsonl", "line", line)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("batching", ["padded", "continuous"])
def test_each_answer_is_the_one_that_the_prompt_gets_alone(tmp_path: Path, loaded: Loaded, batching: str) -> None:
    asked = config(tmp_path, batching=batching)
    assert batch(asked) == {"answered": 5, "failed": 0, "from_before": 0}
    found = lines(tmp_path / "out.jsonl")
    assert [line["id"] for line in found] == ["a", None, 3, [4], 5]
    conversations = [
        [Message("user", "Name a colour.")],
        [Message("user", "Add.\n\n1 and 2")],
        [Message("user", "Hello, who are you?")],
        [
            Message("system", "Be brief."),
            Message("user", "Hi."),
            Message("assistant", "Hello!"),
            Message("user", ROWS[3]["conversations"][3]["value"]),
        ],
        [Message("user", "One?")],
    ]
    for line, messages in zip(found, conversations, strict=True):
        conversation = Conversation(tuple(messages))
        alone = generate(loaded, asked, conversation, lambda _: None)
        assert (line["answer"], line["tokens"], line["finish_reason"]) == (
            alone.text,
            len(alone.ids),
            alone.finish_reason,
        )
        assert line["prompt_tokens"] == len(loaded.tokenizer.encode_prompt(conversation))
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


@pytest.mark.parametrize("name", ["[a]", "[/b]"])
def test_names_that_look_like_markup_are_printed_whole(
    tmp_path: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "in.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    batch(config(tmp_path / name))
    assert f"{tmp_path}/{name}/out.jsonl: 1 answers" in capsys.readouterr().err


def test_a_model_that_is_spread_over_devices_answers_in_padded_batches(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what a run that was interrupted, with answers one by one, has left."""
    batch(config(tmp_path))
    expected = (tmp_path / "out.jsonl").read_text()
    asked = config(tmp_path, batching="continuous", overwrite=True)
    taken = []

    def interrupted(*given: Any) -> Any:
        for answers in answer_continuously(*given):
            taken.append(answers)
            yield answers
            if len(taken) == 2:
                raise KeyboardInterrupt

    answer_continuously = module.answer_continuously
    monkeypatch.setattr(module, "answer_continuously", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch(asked)
    capsys.readouterr()
    loaded.model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert batch(asked) == {"answered": 5, "failed": 0, "from_before": 2}
    assert (tmp_path / "out.jsonl").read_text() == expected
    said = capsys.readouterr().err
    assert said.count("batching=continuous: the model is spread over several devices") == 1
    assert len(taken) == 2


def test_the_padding_is_no_repetition(tmp_path: Path, loaded: Loaded) -> None:
    """With a strong reward for what was said before, a token of the padding would be the answer."""
    asked = config(tmp_path, repetition_penalty=1e-4, batch_size=5)
    batch(asked)
    for line, row in list(zip(lines(tmp_path / "out.jsonl"), ROWS, strict=True))[::2]:
        text = row["instruction"] if "instruction" in row else row["messages"][0]["content"]
        alone = generate(loaded, asked, Conversation((Message("user", text),)), lambda _: None)
        assert line["answer"] == alone.text


@pytest.mark.parametrize("settings", [{"repetition_penalty": 0.05}, {"temperature": 5.0, "min_p": 0.5}])
def test_what_continuous_batching_would_leave_out_is_done_in_padded_batches(
    tmp_path: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str], settings: dict[str, float]
) -> None:
    batch(config(tmp_path, **settings))
    expected = (tmp_path / "out.jsonl").read_text()
    capsys.readouterr()
    batch(config(tmp_path, batching="continuous", overwrite=True, **settings))
    assert (tmp_path / "out.jsonl").read_text() == expected
    name = list(settings)[-1]
    assert f"transformers' continuous batching doesn't know {name}; padded" in capsys.readouterr().err
    batch(config(tmp_path, overwrite=True))
    assert (tmp_path / "out.jsonl").read_text() != expected


def test_bad_rows_become_error_lines(tmp_path: Path, loaded: Loaded) -> None:
    good = json.dumps(ROWS[0])
    rows = [good, *BAD, "", good, b"\xff\xfe".decode("latin-1")]
    (tmp_path / "in.jsonl").write_bytes("\n".join(rows).encode("latin-1"))
    assert batch(config(tmp_path)) == {"answered": 2, "failed": len(BAD) + 1, "from_before": 0}
    found = lines(tmp_path / "out.jsonl")
    assert [line["line"] for line in found] == [*range(1, len(BAD) + 2), len(BAD) + 3, len(BAD) + 4]
    reasons = [line["error"]["reason"] for line in found if "error" in line]
    assert reasons == [*BAD.values(), "invalid_utf8"]
    assert next(line for line in found if line["line"] == 4)["id"] == 9  # an id is kept where there is one


def test_markers_are_kept_where_told(tmp_path: Path, loaded: Loaded) -> None:
    (tmp_path / "in.jsonl").write_text('{"instruction": "what does [/INST] mean?"}')
    assert batch(config(tmp_path, markers="keep"))["failed"] == 0


def test_the_setting_system_speaks_where_the_row_has_none(tmp_path: Path) -> None:
    chat = ChatTokenizer.load()
    rows = [raw(ROWS[place]) for place in (0, 3)]
    prompts, _ = read_prompts(rows, chat, config(tmp_path, system="Rhyme."), 4096)
    texts = [chat.decode(prompt.ids) for prompt in prompts]
    assert "Rhyme." in texts[0]
    assert "Rhyme." not in texts[1]


def test_batches_hold_like_lengths_and_every_prompt_once(tmp_path: Path) -> None:
    chat = ChatTokenizer.load()
    rows = [raw({"instruction": "word " * (place % 7 + 1)}, place + 1) for place in range(20)]
    prompts, _ = read_prompts(rows, chat, config(tmp_path), 4096)
    units = plan(prompts, 4)
    assert sorted(prompt.line for unit in units for prompt in unit) == list(range(1, 21))
    lengths = [len(prompt.ids) for unit in units for prompt in unit]
    assert lengths == sorted(lengths, reverse=True)


def interrupted_after(units: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the run end as by a power cut after that many units; the returned function undoes that."""
    real = journal.Journal.append
    count = 0

    def append(self: journal.Journal, answers: list[dict[str, Any]]) -> None:
        nonlocal count
        if count == units:
            raise KeyboardInterrupt
        count += 1
        real(self, answers)

    monkeypatch.setattr(journal.Journal, "append", append)
    return lambda: monkeypatch.setattr(journal.Journal, "append", real)


@pytest.mark.parametrize("batching", ["padded", "continuous"])
@pytest.mark.parametrize("torn", ["", '{"line": 5, "id', '{"line": 3, "id": 3, "answer": "x"}\n'])
def test_a_run_goes_on_where_it_was(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, batching: str, torn: str
) -> None:
    """After two of three units, with nothing, half a line, or half a unit behind them."""
    asked = config(tmp_path, batching=batching, temperature=0.9 if batching == "padded" else 0.0)
    batch(asked)
    whole = lines(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").unlink()

    mend = interrupted_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        batch(asked)
    mend()
    part = tmp_path / "out.jsonl.part"
    assert not (tmp_path / "out.jsonl").exists()
    with part.open("a") as file:
        # of a unit of one row, a whole line is a whole unit
        file.write(torn if batching == "padded" or not torn.endswith("\n") else "")
    assert batch(asked)["from_before"] == (2 if batching == "padded" else 1)
    assert lines(tmp_path / "out.jsonl") == whole
    assert not part.exists()


def test_wherever_the_journal_was_cut_no_row_is_lost_or_doubled(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every byte, with nothing behind the cut, and with what a disk may leave there."""

    def answers(_: Loaded, __: InferenceConfig, prompts: list[list[int]], *___: Any, seed: int) -> list[Answer]:
        return [Answer(f"answer {sum(ids)} of {seed}, Größe\n", ids[:3], "stop") for ids in prompts]

    monkeypatch.setattr(module, "generate_rows", answers)
    asked = config(tmp_path)
    part, output = tmp_path / "out.jsonl.part", tmp_path / "out.jsonl"
    kept: list[bytes] = []
    finish = journal.finish

    def keeping(*arguments: Any) -> None:
        kept.append(part.read_bytes())
        finish(*arguments)

    monkeypatch.setattr(module, "finish", keeping)
    batch(asked)
    whole, entries = output.read_bytes(), kept[0]
    taken = set()
    for cut in range(len(entries) + 1):
        left = (
            (b"\0" * 40, b"\0" * 40 + b"\n", b'{"line": 3}\n') if cut > entries.index(b"\n") and cut % 10 == 0 else ()
        )
        for behind in (b"", *left):
            output.unlink()
            part.write_bytes(entries[:cut] + behind)
            taken.add(batch(asked)["from_before"])
            assert output.read_bytes() == whole
            assert not part.exists()
    assert taken == {0, 2, 4, 5}


@pytest.mark.parametrize("content", ["garbage", "garbage\n", "garbage\nmore\n", "[]\nmore\n", '{"line": 1}\n{}\n'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, loaded: Loaded, content: str) -> None:
    (tmp_path / "out.jsonl.part").write_text(content)
    with pytest.raises(UserError, match=r"^output: \S+out\.jsonl\.part is there, and no batch wrote it"):
        batch(config(tmp_path))
    assert (tmp_path / "out.jsonl.part").read_text() == content
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("batching", ["padded", "continuous"])
def test_the_settings_of_sampling_reach_both_ways_of_batching(tmp_path: Path, loaded: Loaded, batching: str) -> None:
    def answers(**settings: Any) -> list[str]:
        batch(config(tmp_path, batching=batching, overwrite=True, **settings))
        return [line["answer"] for line in lines(tmp_path / "out.jsonl")]

    greedy = answers()
    assert answers(temperature=5.0, top_k=1) == greedy
    assert answers(temperature=5.0, top_p=1e-6) == greedy
    sampled = answers(temperature=5.0, seed=1)
    assert sampled != greedy
    assert answers(temperature=5.0, seed=2) != sampled
    if batching == "padded":
        assert answers(temperature=5.0, seed=1) == sampled


def test_more_prompts_at_a_time_than_there_are_and_more_tokens_than_the_context_has(
    tmp_path: Path, loaded: Loaded
) -> None:
    """The cache of continuous batching is as large as it can ever be filled, and not as the settings could ask for."""
    loaded.model.config.max_position_embeddings = 64
    assert batch(config(tmp_path, batching="continuous", batch_size=10**8, max_new_tokens=10**9))["answered"] == 5


def test_another_run_is_not_continued(tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    mend = interrupted_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        batch(config(tmp_path))
    mend()
    with pytest.raises(UserError, match=r"^seed=5: the run that \S+out.jsonl.part belongs to had seed=0"):
        batch(config(tmp_path, seed=5))
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0]))
    with pytest.raises(UserError, match=r"^input="):
        batch(config(tmp_path))


def test_a_run_that_never_answered_binds_nobody(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: InferenceConfig) -> Loaded:
        raise UserError("base=x: no")

    monkeypatch.setattr(module, "load", refuse)
    with pytest.raises(UserError, match="base=x"):
        batch(config(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


def test_what_is_there_is_not_overwritten(tmp_path: Path, loaded: Loaded) -> None:
    batch(config(tmp_path))
    with pytest.raises(UserError, match="overwrite=true"):
        batch(config(tmp_path))
    batch(config(tmp_path, overwrite=True))
    asked = config(tmp_path)
    asked.output = asked.input
    with pytest.raises(UserError, match="output="):
        batch(asked)


def test_two_processes_do_not_write_one_output(tmp_path: Path, loaded: Loaded) -> None:
    identity = {"seed": 0}
    with (
        journal.open_journal(tmp_path / "out.jsonl.part", identity),
        pytest.raises(UserError, match="another process"),
        journal.open_journal(tmp_path / "out.jsonl.part", identity),
    ):
        pass


def test_the_disk_is_asked_to_keep_the_answers_and_their_name(
    tmp_path: Path, on_disk: list[tuple[Path, set[str]]]
) -> None:
    journal.finish(tmp_path / "out.jsonl", [{"line": 1, "answer": "a"}])
    assert on_disk == [(tmp_path / ".out.jsonl.tmp", set()), (tmp_path, {"out.jsonl"})]
