"""Each process reads what it holds of the base, and nothing else; it holds what transformers would have sent to it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts.tortures.harness.workplace import Workplace
from tests.integration.conftest import train
from tests.integration.loading import DIVISIONS, FILES

pytestmark = pytest.mark.slow

ALLOWED = 256 << 20


@pytest.mark.parametrize(("processes", "nodes"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_what_is_read_in_slices_is_what_transformers_loads(tmp_path: Path, processes: int, nodes: int) -> None:
    train(processes, f"run_dir={tmp_path}", module="tests.integration.loading", nodes=nodes)
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    divisions = 1 if nodes > 1 else len(DIVISIONS) - 1
    assert len(found) == 3 * len(FILES) * divisions
    assert {name: wrong for name, wrong in found.items() if any(wrong)} == {}


def test_no_process_takes_more_than_its_share_and_256_mib(tmp_path: Path) -> None:
    train(2, f"run_dir={tmp_path}", module="tests.integration.memory")
    found = json.loads((tmp_path / "found.json").read_text())
    shares = {way: of_way[0]["share"] for way, of_way in found.items()}
    for way, of_way in found.items():
        for process in of_way:
            assert process["took"] <= process["share"] + ALLOWED, (way, process)
    # Whoever held all of it, or its half in 16 bits, would be found.
    assert all(process["took"] > shares["zero3"] + ALLOWED for process in found["none"])
    assert shares["zero3"] > shares["zero3, nf4"] + ALLOWED


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("missing", "its tensor model.norm.weight is missing"),
        ("doubled", "is there twice, by two names"),
        ("misshapen", "its tensor model.norm.weight is [63], and its config.json asks for [64]"),
        ("cut", "its model.safetensors can't be read ("),
    ],
)
def test_a_damaged_base_ends_all_processes_with_one_sentence(runs: Workplace, damage: str, says: str) -> None:
    base = shutil.copytree(runs.base, runs.scratch / f"base-{damage}")
    file = base / "model.safetensors"
    stored = load_file(file)
    if damage == "missing":
        del stored["model.norm.weight"]
    elif damage == "doubled":
        one = stored["model.layers.0.block_sparse_moe.experts.0.w2.weight"]
        stored["model.layers.0.mlp.experts.down_proj"] = one.expand(8, *one.shape).contiguous()
    elif damage == "misshapen":
        stored["model.norm.weight"] = stored["model.norm.weight"][:63].clone()
    save_file(stored, file, metadata={"format": "pt"})
    if damage == "cut":
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 1000)
    launch = runs.launch(runs.scratch / f"run-{damage}", 2, **{"model.path": str(base)})
    assert launch.wait() == [2, 2], launch.said()
    (sentence,) = {line for line in launch.said().splitlines() if line.startswith("train: ")}
    assert sentence.startswith(f"train: model.path={base}: ")
    assert says in sentence
    assert "Traceback" not in launch.said()
