"""Runs that go on under other conditions: fewer processes, all parameters, nothing sharded."""

import json
from pathlib import Path

import pytest

from scripts.tortures.harness.outcome import first_difference
from scripts.tortures.harness.workplace import Workplace
from tests.integration.conftest import evaluations, steps, train

pytestmark = pytest.mark.slow

STEPS, STOPPED_AT = 8, 3


@pytest.mark.parametrize(
    "more",
    [
        {"deepspeed": "none", "lora.dropout": "0.2"},
        {"deepspeed": "zero2", "lora": "none", "lora.dropout": "0", "optim.weight_decay": "0.1"},
    ],
    ids=["adapters, no ZeRO, dropout", "all parameters, ZeRO-2"],
)
def test_the_result_is_that_of_a_run_that_never_stopped(runs: Workplace, more: dict[str, str]) -> None:
    how = {"max_steps": str(STEPS), "eval_every": "2", **more}
    run = runs.interrupted(f"stopped-{more['deepspeed']}", STOPPED_AT, **how)
    assert "Resuming" in runs.finish(run, 1, **how).said()
    assert first_difference(run, runs.reference(1, **how)) is None
    assert len(steps(run)) == STEPS

    newest = sorted((run / "checkpoints").iterdir())[-1]
    trained = (newest / "master.safetensors").stat().st_size // 4
    # What an adapter needs to be handed on alone has a size of its own, whatever was trained.
    files = [file for file in newest.rglob("*") if file.is_file() and not file.name.startswith("tokenizer")]
    size = sum(file.stat().st_size for file in files if file.suffix not in (".md", ".jinja"))
    assert size <= 1.1 * trained * (2 + 3 * 4)  # the parameters in bfloat16, masters, two moments


def test_other_numbers_of_processes_take_the_same_rows_to_the_same_losses(runs: Workplace) -> None:
    """Two, then one that is stopped, then three, which divide no tensor evenly; with dropout, whose masks belong to the
    micro-batches."""
    how = {"max_steps": str(STEPS), "global_batch": "6", "model.dtype": "float32", "eval_every": "4"}
    whole = runs.reference(2, **how)
    run = runs.interrupted("stopped-alone", STOPPED_AT, **how)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert json.loads((newest / "trainer.json").read_text())["processes"] == 1
    runs.finish(run, 3, **how)
    taken, expected = steps(run), steps(whole)
    assert [step["step"] for step in taken] == [step["step"] for step in expected] == list(range(1, STEPS + 1))
    for name in ("loss", "gradient_norm"):
        assert [step[name] for step in taken] == pytest.approx([step[name] for step in expected], rel=1e-5)
    assert evaluations(run) == pytest.approx(evaluations(whole), rel=1e-5)


def test_processes_that_were_given_different_things_do_not_begin(runs: Workplace, tmp_path: Path) -> None:
    settings = runs.settings(tmp_path / "run", seed="${oc.env:RANK}")
    said = train(2, *(f"{name}={value}" for name, value in settings.items()), expect=2)
    assert "train: seed=1: that is what process 1 was given, and process 0 has 0; give all processes the same" in (
        said.splitlines()
    )
    assert not (tmp_path / "run").exists()
