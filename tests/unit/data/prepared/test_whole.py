"""Rows are read if they are those that were written, and if they can be rows at all."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from configs.program.errors import UserError
from data.config import PrepareConfig
from data.disk.files import sha256
from data.prepared.dataset import PreparedDataset
from data.prepared.layout import MANIFEST, ROW_SCHEMA, damage, read_manifest
from data.prepared.whole import check_files, check_rows, open_checked
from data.run import run
from train.config.train import TrainConfig
from train.saving.identity import Inputs

FILE = "train/rows.arrow"
ROWS = {
    "ids": [[1, 5, 6, 2], [1, 7, 2]],
    "spans": [[2, 2], [1, 1, 1, 0]],
    "lengths": [[4], [2, 1]],
    "rows": [[0], [1, 2]],
}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    rows = [{"instruction": f"Question {n}", "output": f"Answer {n}"} for n in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    output = tmp_path / "out"
    run(PrepareConfig(files=[str(tmp_path / "rows.json")], output=str(output), seq_len=64, workers=1))
    return output


def wrong_in_training(directory: Path) -> str | None:
    return Inputs(TrainConfig(dataset=str(directory)), PreparedDataset(directory)).wrong_rows


def seal(directory: Path) -> None:
    """Gives the damaged rows their hash, as whoever meant harm would."""
    held = json.loads((directory / MANIFEST).read_text())
    held["files"][FILE] = {"bytes": (directory / FILE).stat().st_size, "sha256": sha256(directory / FILE)}
    (directory / MANIFEST).write_text(json.dumps(held))


def flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def offset(content: bytearray) -> None:
    with pa.BufferReader(bytes(content)) as file:
        lists = pa.ipc.open_file(file).read_all()["ids"].chunk(0)
        offsets = lists.buffers()[1].to_pybytes()[: 4 * (len(lists) + 1)]
    struct.pack_into("<i", content, content.find(offsets) + 4, 2**31 - 1)


def footer(content: bytearray) -> None:
    content[-40] ^= 1


@pytest.mark.parametrize("damaging", [flip, offset, footer])
@pytest.mark.parametrize("sealed", [False, True])
def test_damaged_rows_are_refused_by_every_reader(
    prepared: Path, damaging: Callable[[bytearray], None], sealed: bool
) -> None:
    """Preview and report end in a sentence, where they ended by a signal; so does training before its first step."""
    content = bytearray((prepared / FILE).read_bytes())
    damaging(content)
    (prepared / FILE).write_bytes(content)
    if sealed:
        seal(prepared)
    if sealed and damaging is flip:
        return  # another token may stand there
    for task in ("preview", "report"):
        with pytest.raises(UserError, match=rf"^output={prepared}: {FILE} is not whole \("):
            run(PrepareConfig(task=task, output=str(prepared)))
    try:
        told = wrong_in_training(prepared)
    except UserError as error:  # it can't even be opened
        told = str(error)
    assert str(told).startswith(f"dataset={prepared}: ")
    assert "is not whole (" in str(told)


def test_sound_rows_are_taken(prepared: Path) -> None:
    manifest, tables = open_checked(prepared, "output")
    assert tables["train"].num_rows == manifest["train"]["packed_rows"]
    assert wrong_in_training(prepared) is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "id": ({"ids": [[1, 5, 32_000, 2], [1, 7, 2]]}, "id 32000"),
    "empty": ({"ids": [[], [1, 7, 2]], "spans": [[], [1, 2]], "lengths": [[], [3]], "rows": [[], [1]]}, "0 tokens"),
    "long": ({"ids": [[1] * 9, [1, 7, 2]]}, "9 tokens"),
    "spans beyond": ({"spans": [[2, 3], [1, 1, 1, 0]]}, "spans of a row don't add up"),
    "spans elsewhere": ({"spans": [[2, 1], [1, 3, 0, 0]]}, "spans of a row don't add up"),
    "negative span": ({"spans": [[5, -1], [1, 1, 1, 0]]}, "spans is -1"),
    "half a turn": ({"spans": [[4], [1, 1, 1, 0]]}, "half a turn"),
    "lengths beyond": ({"lengths": [[4], [2, 2]]}, "lengths of a row don't add up"),
    "no length": ({"lengths": [[4], [3, 0]]}, "lengths is 0"),
    "within a turn": ({"lengths": [[1, 3], [2, 1]], "rows": [[0, 0], [1, 2]]}, "ends within a turn"),
    "beyond": ({"rows": [[0], [1, 3]]}, "beyond the 3"),
    "before": ({"rows": [[-1], [1, 2]]}, "beyond the 3"),
    "from nowhere": ({"rows": [[0], [1]]}, "comes from nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rows_that_can_be_none_are_named(case: str) -> None:
    check_rows(pa.table(ROWS, schema=ROW_SCHEMA), 8, 3)
    changed, told = WRONG[case]
    with pytest.raises(ValueError, match=told):
        check_rows(pa.table({**ROWS, **changed}, schema=ROW_SCHEMA), 8, 3)


def test_no_rows_are_rows_too() -> None:
    check_rows(pa.table({name: [] for name in ROWS}, schema=ROW_SCHEMA), 8, 3)


READ = {"schema": "messages", "rows": 1, "unread_fields": {}, "harmless_fields": {}}
MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "files list": ({"files": []}, "files: expected object, got array"),
    "files empty": ({"files": {}}, "is missing or unknown"),
    "files number": ({"files": {FILE: 5}}, "expected object, got int"),
    "files without": ({"files": {FILE: {}}}, "missing required field bytes"),
    "inputs": ({"inputs": 5}, "inputs: expected array, got int"),
    "input without a hash": ({"inputs": [{**READ, "file": "a.jsonl"}]}, "inputs[0]: what was read is not named"),
    "input of files": (
        {"inputs": [{**READ, "dataset": "d", "files": [{"file": "a"}]}]},
        "inputs[0]: what was read is not named",
    ),
    "tokenizer": ({"tokenizer": 5}, "tokenizer: expected object"),
    "versions": ({"versions": 5}, "versions: expected object"),
    "repaired": ({"repaired": {"merged": "BF16"}}, "repaired[...]: expected int, got str"),
    "length": ({"seq_len": 2**40}, "seq_len: expected int"),
    "share": ({"train": {"conversations": -1}}, "train"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_says_which_field_is_wrong(prepared: Path, case: str) -> None:
    changed, told = MANIFESTS[case]
    held = json.loads((prepared / MANIFEST).read_text())
    (prepared / MANIFEST).write_text(json.dumps({**held, **changed}))
    assert told in str(damage(prepared, read_manifest(prepared)))
    for reading in (lambda: open_checked(prepared, "dataset"), lambda: PreparedDataset(prepared)):
        with pytest.raises(UserError, match=f"^dataset={prepared}: its {MANIFEST} is not as it was written"):
            reading()


def test_looking_at_rows_imports_no_pandas(prepared: Path, project_root: Path) -> None:
    """Which would take time and memory of every process of a training run."""
    look = "open_checked(Path(sys.argv[1]), 'dataset'); PreparedDataset(Path(sys.argv[1])).train.lengths()"
    code = "import sys; from pathlib import Path; from data.prepared.dataset import PreparedDataset\n"
    code += f"from data.prepared.whole import open_checked; {look}; sys.exit('pandas' in sys.modules)"
    command = [sys.executable, "-c", code, str(prepared)]
    assert subprocess.run(command, cwd=project_root, check=False).returncode == 0


def test_what_is_damaged_can_be_prepared_again(prepared: Path) -> None:
    """As the sentence says: a manifest of ours that is wrong is no foreign file."""
    held = json.loads((prepared / MANIFEST).read_text())
    (prepared / MANIFEST).write_text(json.dumps({**held, "files": 5, "inputs": None}))
    rows = str(prepared.parent / "rows.json")
    run(PrepareConfig(files=[rows], output=str(prepared), seq_len=64, workers=1))
    check_files(prepared, read_manifest(prepared), "dataset")
