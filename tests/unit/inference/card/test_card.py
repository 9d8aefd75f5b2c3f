"""`task=card`: the card of an adapter says what was recorded and measured, and nobody's own words are lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from configs.program.errors import UserError
from data.card import is_untouched, write_adapter_card
from data.disk.adapter_directory import WEIGHTS
from data.disk.files import sha256
from inference.card.card import card
from inference.config import InferenceConfig

SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
SCORES = {"arc": {"score": 0.63911, "standard_error": 0.01404, "questions": 1172}}


def make_run(top: Path, **receipt: Any) -> InferenceConfig:
    """A run's adapter, with scores beside it, and its base."""
    base, adapter = top / "base", top / "mine" / "adapter"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    adapter.mkdir(parents=True)
    (adapter / WEIGHTS).write_bytes(b"weights")
    settings = SETTINGS | {"base_model_name_or_path": "base"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "train_config.yaml").write_text("epochs: 3\nglobal_batch: 16\nseed: 0\n")
    training = {"base": {"path": str(base), "revision": None, "fingerprint": "f00"}} | receipt
    (adapter / "receipt.json").write_text(json.dumps(training))
    results = {
        "model": {"fingerprint": "f00", "adapter_sha256": sha256(adapter / WEIGHTS)},
        "settings": {"chat": False},
        "prompts": {},
        "tasks": SCORES,
    }
    (top / "mine" / "evaluation").mkdir()
    (top / "mine" / "evaluation" / "results.json").write_text(json.dumps(results))
    config = InferenceConfig(task="card", adapter=str(adapter))
    config.check()
    return config


def test_the_card_that_training_wrote_gets_the_scores(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    adapter = Path(str(config.adapter))
    write_adapter_card(adapter, "mine", SETTINGS, json.loads((adapter / "receipt.json").read_text()))
    assert is_untouched(adapter / "README.md")
    assert "## Evaluation" not in (adapter / "README.md").read_text()

    path = card(config)
    assert path == adapter / "README.md"
    text = path.read_text(encoding="utf-8")
    for part in (
        "# mine\n",
        "| ARC | 25 | 63.91 ± 1.40 | 1,172 |",
        "LoRA rank 4, alpha 8",
        "- 3 epochs, 16 packed rows a step, seed 0",
        "Fingerprint of its weights: `f00`",
    ):
        assert part in text, part
    assert str(tmp_path) not in text
    read = ModelCard(text).data
    assert (read.license, read.library_name, read.model_name) == ("apache-2.0", "peft", "mine")
    assert [result.metric_value for result in read.eval_results or []] == [63.91]

    config.licence = "mit"  # once more, because nobody has touched it
    assert ModelCard(card(config).read_text()).data.license == "mit"


@pytest.mark.parametrize("words", ["# Mine\n", "edited"])
def test_what_a_person_wrote_stays_unless_told(tmp_path: Path, words: str) -> None:
    config = make_run(tmp_path)
    path = Path(str(config.adapter)) / "README.md"
    if words == "edited":
        card(config)
        words = path.read_text().replace("## Recipe", "Thanks to my cat.\n\n## Recipe")
    path.write_text(words)
    with pytest.raises(UserError, match=r"README\.md: it was not written by this program, or was edited since"):
        card(config)
    assert path.read_text() == words
    config.output = str(tmp_path / "card.md")
    assert "## Recipe" in card(config).read_text()
    assert path.read_text() == words
    config.output, config.overwrite = None, True
    assert "cat" not in card(config).read_text()


def test_an_adapter_of_others_has_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_run(tmp_path)
    adapter = Path(str(config.adapter))
    for name in ("receipt.json", "train_config.yaml"):
        (adapter / name).unlink()
    settings = SETTINGS | {"base_model_name_or_path": "nobody/mixtral"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    text = card(config).read_text()
    assert "base_model: nobody/mixtral" in text
    assert "Low-rank adapters for a Mixtral.\n" in text
    assert "## Prompt format" not in text  # nobody knows it
    assert "63.91" in text
    assert "names no licence" in text
    assert "licence is left out, unless licence= names it" in " ".join(capsys.readouterr().err.split())


def test_what_can_not_be_a_card_is_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    config.output = str(tmp_path)
    with pytest.raises(UserError, match="it is a directory; name a file"):
        card(config)
    config.output = str(tmp_path / "no" / "card.md")
    with pytest.raises(UserError, match=r"output=.*card.md: it can't be written"):
        card(config)
    with pytest.raises(UserError, match="there is nothing to write a card for"):
        InferenceConfig(task="card", base="x").check()
