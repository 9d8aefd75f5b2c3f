"""What an evaluation measured stands in the merged model's card and in its metadata, if it is of this very model."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from data.disk.adapter_directory import WEIGHTS
from data.disk.files import sha256
from inference.card.scores import read_scores
from inference.config import InferenceConfig
from inference.evaluation.evaluate import evaluate
from inference.load import find_base
from inference.merging.merge import merge
from tests.support.adapters import make
from tests.support.leaderboard import write_rows

MEASURED: dict[str, Any] = {
    "arc": {"score": 0.63911, "standard_error": 0.01404, "questions": 1172},
    "gsm8k": {"score": 0.5, "standard_error": 0.05, "questions": 100},
    "truthfulqa": {"score": 0.25, "standard_error": 0.015, "questions": 817},
}


def merged(top: Path, **changes: Any) -> tuple[str, ModelCard]:
    """The card of a model whose adapter has an evaluation beside it, with these changes; its text, and as the hub
    reads it."""
    config = make(top, kind="attention-only")
    model = {
        "fingerprint": find_base(config).weights.fingerprint,
        "adapter_sha256": sha256(top / "adapter" / WEIGHTS),
    }
    result = {"model": model, "settings": {"chat": False}, "prompts": {"truthfulqa": {"equal": False}}}
    result |= {"tasks": MEASURED} | changes
    (top / "evaluation").mkdir()
    (top / "evaluation" / "results.json").write_text(json.dumps(result))
    config.verify = False
    merge(config)
    text = (top / "out" / "README.md").read_text(encoding="utf-8")
    return text, ModelCard(text)


def test_the_scores_stand_in_the_card_and_in_its_metadata(tmp_path: Path) -> None:
    text, card = merged(tmp_path)
    assert "## Evaluation" in text
    assert "| ARC | 25 | 63.91 ± 1.40 | 1,172 |" in text
    assert "| GSM8K | 5 | 50.00 ± 5.00 | 100 of 1,319 |" in text
    assert "| TruthfulQA | 0 | 25.00 ± 1.50 | 817, other rows than the leaderboard's |" in text
    assert card.data.model_name == "out"
    assert card.data.eval_results is not None
    (arc,) = card.data.eval_results  # the others would stand there without what is said beside them
    assert (arc.dataset_type, arc.dataset_config, arc.dataset_name) == (
        "allenai/ai2_arc",
        "ARC-Challenge",
        "ARC (25-shot)",
    )
    assert (arc.metric_type, arc.metric_value) == ("acc_norm", 63.91)
    assert arc.metric_args == {"standard_error": 1.40, "questions": 1172}


def test_within_the_chat_template_nothing_is_the_leaderboards(tmp_path: Path) -> None:
    text, card = merged(tmp_path, settings={"chat": True})
    assert "within the chat template: percent" in text
    assert card.data.eval_results is None


def test_what_training_changed_stands_beside_the_scores(tmp_path: Path) -> None:
    base = {name: scores | {"score": 0.25} for name, scores in MEASURED.items()}
    pairs = {name: {"difference": {"value": 0.125, "error": 0.0075}} for name in MEASURED}
    averages = [{"score": score, "standard_error": 0.005} for score in (0.5, 0.375)]
    text, _ = merged(
        tmp_path,
        average=averages[0],
        before={"tasks": base, "average": averages[1]},
        comparison={"tasks": pairs, "average": {"value": 0.125, "error": 0.0025}},
    )
    assert "| task | shots | base | score | difference | questions |" in text
    assert "| ARC | 25 | 25.00 ± 1.40 | 63.91 ± 1.40 | +12.50 ± 0.75 | 1,172 |" in text
    assert "| average |  | 37.50 ± 0.50 | 50.00 ± 0.50 | +12.50 ± 0.25 |  |" in text


def test_examples_of_another_split_are_not_the_leaderboards(tmp_path: Path) -> None:
    scores = {"hellaswag": {"score": 0.8414, "standard_error": 0.0036, "questions": 10_042}}
    prompts = {"hellaswag": {"equal": None, "examples_from": "validation"}}
    text, card = merged(tmp_path, tasks=scores, prompts=prompts)
    assert "| HellaSwag | 10 | 84.14 ± 0.36 | 10,042, other rows than the leaderboard's |" in text
    assert card.data.eval_results is None


def test_tasks_of_the_harness_stand_in_the_card_and_not_in_its_metadata(tmp_path: Path) -> None:
    metrics = {"acc": {"value": 0.5, "standard_error": 0.25}, "bleu": {"value": 17.5, "standard_error": None}}
    others = {"if|eval\n": {"shots": 0, "questions": 1541, "metrics": metrics | {"odd": {"value": "high"}}}, "odd": 5}
    text, card = merged(tmp_path, tasks={}, others=others)
    assert "| if\\|eval | acc | 0 | 0.5000 ± 0.2500 | 1,541 |" in text
    assert "| if\\|eval | bleu | 0 | 17.5000 | 1,541 |" in text
    assert "| odd" not in text
    assert "Leaderboard" not in text
    assert card.data.eval_results is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"fingerprint": "another", "adapter_sha256": "another"}}, "of another base or adapter"),
        ({"model": 5}, "of another base or adapter"),
        ({"tasks": {"arc": 5}}, "no scores can be read"),
        ({"tasks": MEASURED | {"arc": {"score": "high"}}}, "no scores can be read"),
        ({"tasks": MEASURED | {"arc": MEASURED["arc"] | {"score": 66.3}}}, "no scores can be read"),
        ({"tasks": {}}, "no scores can be read"),
    ],
)
def test_scores_of_another_model_or_shape_are_left_out_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    text, card = merged(tmp_path, **changes)
    assert "## Evaluation" not in text
    assert "model_name" not in text
    assert card.data.eval_results is None
    assert told in " ".join(capsys.readouterr().err.split())


def test_what_an_evaluation_writes_is_read(tmp_path: Path) -> None:
    config = make(tmp_path, kind="attention-only")
    asked = InferenceConfig(
        task="evaluate",
        base=config.base,
        adapter=config.adapter,
        data=str(write_rows(tmp_path / "rows")),
        tasks=["winogrande"],
        device="cpu",
    )
    result = evaluate(asked)["tasks"]["winogrande"]
    base = find_base(config)
    measured, told = read_scores(Path(str(config.adapter)), base.weights.fingerprint)
    assert told is None
    assert measured is not None
    (score,) = measured.scores
    assert (score.task.title, score.value, score.questions) == ("Winogrande", result["score"], 5)
    assert score.other_rows
    assert not score.stands_alone
