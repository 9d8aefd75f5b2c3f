"""What lies in an adapter's directory, or where answers go, ends in a sentence if it is damaged, and hangs nobody."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.program.errors import UserError
from data.disk import adapter_directory
from data.disk.adapter_directory import CONFIG, MOST_NAMES, RECEIPT, WEIGHTS
from data.disk.formats import sizes
from inference.batch.journal import FIRST_BYTES, open_journal
from inference.config import InferenceConfig
from inference.load import find_adapter, find_base
from tests.support.adapters import KINDS, make_adapter, make_base


@pytest.fixture
def asked(tmp_path: Path) -> InferenceConfig:
    base = make_base(torch.float32)
    base.save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **KINDS["attention-only"])
    return InferenceConfig(base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), device="cpu")


def find(asked: InferenceConfig) -> Any:
    return find_adapter(asked, find_base(asked))


def say(asked: InferenceConfig, **settings: Any) -> None:
    path = Path(str(asked.adapter)) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


NAMES: dict[str, dict[str, Any]] = {
    "pattern of targets": {"target_modules": "(.*.*.*.*.*.*.*.*.*.*.*.*)*X$"},
    "pattern of ranks": {"rank_pattern": {"([a-z_.0-9]+)+X": 2}},
    "many targets": {"target_modules": [f"m{number}" for number in range(MOST_NAMES + 1)]},
    "long pattern": {"target_modules": "x" * 10_000},
    "many ranks": {"rank_pattern": {f"m{number}": 2 for number in range(MOST_NAMES + 1)}},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", NAMES)
def test_names_and_patterns_are_bounded_in_number_and_in_time(
    asked: InferenceConfig, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT compares each with each module, and a pattern can make it try for ever."""
    monkeypatch.setattr("inference.peft_layers.MOST_SECONDS", 2.0)
    say(asked, **NAMES[case])
    with pytest.raises(UserError, match=f"^adapter={asked.adapter}: its {CONFIG} "):
        find(asked)


RECEIPTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "not a regular file"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "not a regular file|out of its directory"),
    "deep": (lambda path: path.write_text("[" * 100_000), "nested more than"),
    "list": (lambda path: path.write_text("[]"), "expected object, got array"),
    "base": (lambda path: path.write_text('{"base": [1]}'), "base: expected object"),
    "fingerprint": (lambda path: path.write_text('{"base": {"fingerprint": 5}}'), "base.fingerprint: expected"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", RECEIPTS)
def test_a_receipt_that_cant_be_read_says_so(asked: InferenceConfig, case: str) -> None:
    """It tells whether the base is the right one; nobody guesses."""
    make, told = RECEIPTS[case]
    make(Path(str(asked.adapter)) / RECEIPT)
    with pytest.raises(UserError, match=rf"its {RECEIPT} can't be read \(.*({told})"):
        find(asked)


@pytest.mark.parametrize("content", [{"dataset": [1]}, {"dataset": 5, "base": {}}, {"settings": None}])
def test_the_rest_of_a_receipt_only_tells_a_story(asked: InferenceConfig, content: dict[str, Any]) -> None:
    (Path(str(asked.adapter)) / RECEIPT).write_text(json.dumps(content))
    assert find(asked).trained_on is None


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "5", '{"r": 4, "r": 8}', '{"peft_type": "LORA", "r": NaN}'])
def test_settings_that_are_none(asked: InferenceConfig, content: str) -> None:
    (Path(str(asked.adapter)) / CONFIG).write_text(content)
    with pytest.raises(UserError, match=f"its {CONFIG} can't be read"):
        find(asked)


def test_settings_of_megabytes_are_not_parsed(asked: InferenceConfig) -> None:
    say(asked, auto_mapping="x" * sizes.SETTINGS)
    with pytest.raises(UserError, match=rf"its {CONFIG} can't be read \(it is larger than 4 MiB\)"):
        find(asked)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_that_are_no_numbers_to_add(asked: InferenceConfig, dtype: torch.dtype) -> None:
    path = Path(str(asked.adapter)) / WEIGHTS
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match="is stored as"):
        find(asked)


def test_what_decides_nothing_is_not_told_to_peft(asked: InferenceConfig) -> None:
    """PEFT reads the file again by itself when the adapter stays unfolded, and would fail on these."""
    from inference.load import keep_apart, load_base

    say(asked, lora_dropout="x", runtime_config=5, auto_mapping={"parent_library": "os", "base_model_class": "x"})
    base = find_base(asked)
    asked.dtype = "float32"
    keep_apart(load_base(base, asked), find_adapter(asked, base), autocast_adapter_dtype=False)


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_journal_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "answers.jsonl.part")
    with (
        pytest.raises(UserError, match="not a regular file"),
        open_journal(tmp_path / "answers.jsonl.part", {"input": "x"}),
    ):
        pass


@pytest.mark.parametrize("head", [b"cut", b'x", "input": "x"}'])
def test_a_journal_whose_head_is_damaged_is_refused(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "journal").write_bytes(FIRST_BYTES + head + b'\n{"line": 1}\n')
    with pytest.raises(UserError, match="damaged"), open_journal(tmp_path / "journal", {"input": "x"}):
        pass


def test_the_limits_are_the_peers_own(asked: InferenceConfig) -> None:
    """What is below them is taken: a name for each matrix of the largest Mixtral."""
    names = [f"layers.{layer}.experts.{expert}.w{n}" for layer in range(56) for expert in range(8) for n in (1, 2, 3)]
    assert len(names) < MOST_NAMES
    held = json.loads((Path(str(asked.adapter)) / CONFIG).read_text())
    adapter_directory.check_settings(held | {"target_modules": names}, "adapter")
