"""The card of an adapter says what was recorded, and nothing of the machine."""

from pathlib import Path
from typing import Any

import pytest

from data.card import write_adapter_card

SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("base", "told", "not_told"),
    [
        (
            {"path": "user/Mixtral", "revision": "abc", "fingerprint": "f00"},
            ["base_model: user/Mixtral", "user/Mixtral, revision abc. Fingerprint of its weights: `f00`", "lora"],
            [],
        ),
        ({"path": "{top}/base", "revision": None}, ["license: apache-2.0", 'from_pretrained("base"'], ["base_model:"]),
        ({"path": "{top}/gone", "revision": None}, ['from_pretrained("gone"', "names no licence"], []),
        ({"path": None}, ["Random weights.", 'from_pretrained("path/to/the/base"'], ["base_model:"]),
        (None, ["Not recorded."], []),
    ],
)
def test_the_card_of_an_adapter(tmp_path: Path, base: Any, told: list[str], not_told: list[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    directory = tmp_path / "adapter"
    (directory / "per_expert").mkdir(parents=True)
    if base and base["path"]:
        base = base | {"path": base["path"].format(top=tmp_path)}
    for place, form in ((directory, "is for transformers 5; `per"), (directory / "per_expert", "the directory above")):
        write_adapter_card(place, "mine", SETTINGS, {"base": base, "dataset": {"path": "x", "manifest_sha256": "5a"}})
        card = (place / "README.md").read_text()
        for text in ("# mine", "LoRA rank 4, alpha 8", "manifest `5a`", "## Prompt format", form, *told):
            assert text in card
        for text in (str(tmp_path), *not_told):
            assert text not in card
