"""Our scores and lm-evaluation-harness's own model, on the same questions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.program.errors import UserError
from data.template import ChatTokenizer
from inference.config import SCORED, InferenceConfig
from inference.evaluation.answering import answer_all, plan_of
from inference.evaluation.journal import open_journal
from inference.evaluation.leaderboard.rows import read_task
from inference.generate import context
from inference.load import Loaded
from tests.support.adapters import make_base
from tests.support.leaderboard import write_rows

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install -e '.[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from inference.evaluation.harness import HarnessModel, score_others  # noqa: E402


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    base = make_base(vocab_size=32_000, max_position_embeddings=4096, initializer_range=0.3)
    return Loaded(base.eval(), ChatTokenizer.load())


@pytest.fixture(scope="module")
def theirs(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    """The harness's own model over the same weights, with the tokenizer that we save."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    loaded.tokenizer.save(directory)
    return HFLM(
        pretrained=loaded.model,
        tokenizer=AutoTokenizer.from_pretrained(directory),
        batch_size=4,
        max_length=4096,
        softmax_dtype="float32",
        add_bos_token=False,
    )


def nothing(_: int) -> None:
    pass


def begin(_: int) -> Callable[[int], None]:
    return nothing


def test_log_likelihoods_are_the_harnesss_own(loaded: Loaded, theirs: HFLM, tmp_path: Path) -> None:
    config = InferenceConfig(task="evaluate", base="base", bos="never", max_tokens=1024)
    rows = write_rows(tmp_path / "rows")
    questions = [question for name in SCORED if name != "gsm8k" for question in read_task(name, str(rows)).questions]
    with open_journal(tmp_path / "answers.part", {}) as journal:
        plan = plan_of(questions, loaded.tokenizer, config, context(loaded))
        answers = answer_all(loaded, config, plan, journal, nothing)
    requests = [
        Instance("loglikelihood", {}, pair, 0)
        for question in questions
        for pair in zip(question.contexts, question.choices, strict=True)
    ]
    expected = [total for total, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    found = [total for answered in answers for total in answered.log_likelihoods]
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(found)) > len(found) / 2  # the model tells choices apart


def task(kind: str, **more: Any) -> ConfigurableTask:
    def rows(**_: Any) -> Any:
        from datasets import Dataset

        sky = {"question": "What colour is the sky?", "choices": ["blue", "a green one"], "answer": 0}
        grass = {"question": "And grass", "choices": ["green", "red"], "answer": 0}
        return {"test": Dataset.from_list([sky, grass])}

    return ConfigurableTask(
        config={
            "task": kind,
            "custom_dataset": rows,
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[answer]}}" if kind != "multiple_choice" else "answer",
            **more,
        }
    )


KINDS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"doc_to_choice": "choices"},
    "loglikelihood": {},
    "loglikelihood_rolling": {"doc_to_target": "{{question}}"},
    "generate_until": {"generation_kwargs": {"until": ["e"], "max_gen_toks": 12}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_harness_gets_the_same_answers_from_us(loaded: Loaded, theirs: HFLM, tmp_path: Path, kind: str) -> None:
    config = InferenceConfig(task="evaluate", base="base", bos="never", batch_size=1)
    given = task(kind, **KINDS[kind])
    given.build_all_requests(rank=0, world_size=1)
    with open_journal(tmp_path / "answers.part", {}) as journal:
        ours = HarnessModel(loaded, config, journal, begin)
        method: Callable[[Any], Any] = lambda model: getattr(model, given.instances[0].request_type)  # noqa: E731
        found, expected = method(ours)(given.instances), method(theirs)(given.instances)
        again = method(HarnessModel(loaded, config, journal, begin))(given.instances)  # from the journal
    assert found == again
    if kind == "generate_until":
        assert found == [text.strip() for text in expected]
        return
    numbers = [value[0] if isinstance(value, tuple) else value for value in found]
    assert numbers == pytest.approx([v[0] if isinstance(v, tuple) else v for v in expected], abs=1e-4)
    assert all(v[1] == w[1] for v, w in zip(found, expected, strict=True) if isinstance(v, tuple))


def test_a_task_of_the_harness_is_scored(loaded: Loaded, tmp_path: Path) -> None:
    config = InferenceConfig(task="evaluate", base="base")
    begun: list[int] = []
    answered: list[int] = []

    def counted(requests: int) -> Callable[[int], None]:
        begun.append(requests)
        return answered.append

    with open_journal(tmp_path / "answers.part", {}) as journal:
        found = score_others([task("multiple_choice", doc_to_choice="choices")], loaded, config, journal, counted)
        assert set(found) == {"multiple_choice"}
        assert (found["multiple_choice"]["shots"], found["multiple_choice"]["questions"]) == (0, 2)
        accuracy = found["multiple_choice"]["metrics"]["acc"]
        right = round(2 * accuracy["value"])
        assert accuracy["standard_error"] == pytest.approx(0.5 if right == 1 else 0.0)  # of two questions
        assert begun == [4]  # two choices of two questions
        assert sum(answered) == 4
        with pytest.raises(UserError, match="lm-eval can't score them"):
            score_others(["no_such_task_anywhere"], loaded, config, journal, begin)


def test_the_chat_template_is_the_one_of_training(loaded: Loaded, tmp_path: Path) -> None:
    from data.schema import Conversation, Message

    config = InferenceConfig(task="evaluate", base="base", chat=True)
    with open_journal(tmp_path / "answers.part", {}) as journal:
        model = HarnessModel(loaded, config, journal, begin)
    text = model.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sky?"}])
    context_ids, choice_ids = model._encode_pair(text, "(A)")
    turns = (Message("system", "Be brief."), Message("user", "Sky?"), Message("assistant", "(A)"))
    trained = loaded.tokenizer.encode(Conversation(turns)).ids
    assert context_ids + choice_ids == trained[:-2]  # without the space and </s> after the reply
    assert loaded.tokenizer.spell(choice_ids) == " (A)"
