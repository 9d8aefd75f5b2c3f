"""What stands beside base and adapter may have any shape: no merge is lost by it, nothing is read without bound."""

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.program.errors import UserError
from data.card import Story, read_story
from data.disk.formats import sizes
from data.disk.plain_text import json_if_readable, parse_yaml, plain
from inference.card.merged import write_card
from inference.merging.merge import merge
from tests.support.adapters import make

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
DEEP = "[" * 100_000
SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def story_of(top: Path, card: str | bytes | None = None, **beside: Any) -> Story:
    """The story of a base with that card and of an adapter with that receipt and these files."""
    for name in ("base", "adapter"):
        (top / name).mkdir(exist_ok=True)
    if card is not None:
        (top / "base" / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    for name, content in beside.items():
        (top / "adapter" / name.replace("__", ".")).write_text(content)
    receipt = json_if_readable(top / "adapter" / "receipt.json", sizes.RECORD)
    return read_story(top / "base", top / "adapter", SETTINGS, receipt)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, None),
        ("# no head", None),
        ("---\nlicense: apache-2.0\n---\n# Base", "apache-2.0"),
        ("\ufeff---\r\nlicense: 'mit'\r\ntags:\r\n- a\r\n---\r\n", "mit"),
        ("---\nlicense: apache-2.0\n---\n" + "long " * 100_000, "apache-2.0"),
        ("---\nlicense: 1.10\n---", "1.10"),
        ("---\nlicense: ~\n---\n", None),
        ("---\nlicense:\n---\n", None),
        ("---\nother: x\n---\n", None),
    ],
    ids=itertools.count(),
)
def test_a_licence_is_read(tmp_path: Path, card: str | None, licence: str | None) -> None:
    found = story_of(tmp_path, card)
    assert found.licence == licence
    assert not found.left_out


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [\n---\n",
        f"---\nlicense: {'[' * 20_000}\n---\n",
        f"---\n{BOMB}license: *a11\n---\n",
        f"---\n{BOMB}license: mit\n---\n",
        "---\nlicense: &x mit\nother: *x\n---\n",
        "---\nlicense: [mit, apache-2.0]\n---\n",
        "---\nlicense: {name: mit}\n---\n",
        f"---\nlicense: {'x' * 5000}\n---\n",
        "---\n- a\n- b\n---\n",
        "---\n? [a, b]\n: c\nlicense: mit\n---\n",
        b"---\nlicense: \x00\n---\n",
    ],
    ids=itertools.count(),
)
def test_a_licence_that_cannot_be_read_is_left_out_with_a_line(tmp_path: Path, card: str | bytes) -> None:
    found = story_of(tmp_path, card)
    assert found.licence is None
    assert found.left_out == ("the base's README.md: its head can't be read as plain YAML, so its licence is left out",)


def test_tags_of_yaml_make_no_objects() -> None:
    assert parse_yaml("a: !!python/object/apply:os.system [exit]\nb: !!timestamp x\nc: 2024-99-99") == {
        "a": ["exit"],
        "b": "x",
        "c": "2024-99-99",
    }


MANIFESTS = [
    '{"inputs": 5}',
    '{"inputs": [5, null, {"rows": {}}, {"file": [], "rows": "many"}], "rows": 5}',
    '{"rows": {"in": [], "kept": null}}',
    '{"inputs": [{"dataset": 5, "revision": {}, "rows": true}]}',
    '{"inputs": [{"file": "\\ud800", "rows": 1}], "rows": {"in": 1, "kept": 1}}',
    "[]",
    DEEP,
]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=itertools.count())
def test_a_manifest_of_another_shape_is_told_as_far_as_it_goes(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    dataset = {"path": str(tmp_path), "manifest_sha256": hashlib.sha256(manifest.encode()).hexdigest()}
    found = story_of(tmp_path, receipt__json=json.dumps({"dataset": dataset}))
    assert found.data.startswith("Prepared dataset with manifest `")
    found.data.encode()


@pytest.mark.parametrize("there", ["nothing", "another", "pipe"])
def test_a_manifest_that_is_not_the_one_that_was_trained_on_is_left_out_with_a_line(tmp_path: Path, there: str) -> None:
    manifest = tmp_path / "manifest.json"
    if there == "another":
        manifest.write_text('{"inputs": [{"file": "a.jsonl", "rows": 5}]}')
    elif there == "pipe":
        os.mkfifo(manifest)
    dataset = {"path": str(tmp_path), "manifest_sha256": "0" * 64}
    found = story_of(tmp_path, receipt__json=json.dumps({"dataset": dataset}))
    assert found.data == f"Prepared dataset with manifest `{'0' * 64}` (SHA-256).\n"
    told = (
        ()
        if there == "nothing"
        else ("the dataset's manifest.json: it is not the one that was trained on, so it is left out",)
    )
    assert found.left_out == told


@pytest.mark.parametrize(
    "receipt",
    [
        '{"dataset": [1]}',
        '{"dataset": 5}',
        '{"dataset": {"path": 5, "manifest_sha256": "x"}}',
        '{"dataset": {"path": "\\u0000", "manifest_sha256": "x"}}',
        '{"dataset": {"manifest_sha256": {}}}',
        f'{{"dataset": {{"path": "{"x" * 5000}", "manifest_sha256": "x"}}}}',
        DEEP,
        "[]",
    ],
    ids=itertools.count(),
)
def test_a_receipt_of_another_shape_is_left_out(tmp_path: Path, receipt: str) -> None:
    assert story_of(tmp_path, receipt__json=receipt).data


@pytest.mark.parametrize(
    "settings", ["lora: [\n", BOMB, DEEP, "5", "optim: 5", "optim: {lr: [1]}", "\x00"], ids=itertools.count()
)
def test_settings_of_a_training_of_another_shape_are_left_out(tmp_path: Path, settings: str) -> None:
    found = story_of(tmp_path, train_config__yaml=settings)
    assert "LoRA rank 4, alpha 8" in found.recipe
    assert (len(found.left_out) == 1) == ("optim" not in settings)


def test_the_settings_of_a_training_are_told(tmp_path: Path) -> None:
    settings = "epochs: 3\nglobal_batch: 16\nseed: 0\noptim:\n  lr: 1.0e-05\n  clip: 1.0\n"
    recipe = story_of(tmp_path, train_config__yaml=settings).recipe
    assert "- 3 epochs, 16 packed rows a step, seed 0" in recipe
    assert "peak learning rate 1.0e-05, warm-up over unknown of the steps" in recipe
    assert "None" not in recipe


@pytest.mark.parametrize("name", ["receipt.json", "train_config.yaml"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "directory"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "adapter").mkdir()
    path = tmp_path / "adapter" / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert story_of(tmp_path).data == "Not recorded.\n"


def test_json_is_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, expected in [
        ('{"a": 1}', {"a": 1}),
        ('{"a": ' + "[" * 30 + "]" * 30 + "}", None),
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", {}),
    ]:
        path.write_text(text)
        assert json_if_readable(path, sizes.RECORD) == (json.loads(text) if expected is None else expected)
    path.write_text(" " * (17 << 20) + "{}")
    assert json_if_readable(path, sizes.RECORD) == {}


def test_json_is_read_from_no_link_out_of_its_directory(tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text('{"a": 1}')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "receipt.json").symlink_to("../outside.json")
    assert json_if_readable(tmp_path / "adapter" / "receipt.json", sizes.RECORD) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\n b", "a b"),
        (5, "5"),
        (True, None),
        ([], None),
        ("", None),
        ("x" * 301, None),
    ],
)
def test_what_is_plain(value: Any, text: str | None) -> None:
    assert plain(value) == text
    assert plain("\ud800") == "?"
    assert plain(10**5000) is None


def test_a_name_that_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    base = {"path": "a\udcffb", "revision": None, "fingerprint": "f"}
    receipt = {"base": base, "adapter": {"trained_on_base_in": "bf16"}, "verification": None}
    write_card(tmp_path, "out\udcff", Story(None, "d", "r", ()), None, receipt, None)
    assert "# out?" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_merge_with_everything_odd_beside_it_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its configuration names nothing that only the base had."""
    config = make(tmp_path, kind="attention-only")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: [\n---\n")
    (tmp_path / "adapter" / "receipt.json").write_text('{"dataset": 5, "deep": ' + "[" * 30 + "]" * 30 + "}")
    (tmp_path / "adapter" / "train_config.yaml").write_text(BOMB)
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    odd = {"use_cache": False, "auto_map": {"AutoConfig": "own.Own"}, "quantization_config": None}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings | odd))
    config.verify = False
    merge(config)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == settings | {"use_cache": True}
    told = " ".join(capsys.readouterr().err.split())
    assert "its licence is left out" in told
    assert "train_config.yaml: it can't be read as plain YAML" in told
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    adapter_config = tmp_path / "adapter" / "adapter_config.json"
    deep = json.loads(adapter_config.read_text()) | {"runtime_config": json.loads("[" * 300 + "]" * 300)}
    adapter_config.write_text(json.dumps(deep))
    with pytest.raises(UserError, match=r"adapter_config\.json can't be read"):
        merge(config)
