"""`task=plan`: its page, its JSON, the best settings, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = ("recipe=openhermes_mixtral_8x7b", "task=plan")
"""The full size on the meta device: no weights, no dataset."""


def test_the_page_fits_100_columns_and_the_json_holds_what_it_says(
    run_program: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = run_program("train", *RECIPE, "cluster=h100_8", "plan.json=plan.json", "plan.conversations=100000")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert max(map(len, outcome.stdout.splitlines())) <= 100
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["memory"]["peak"] == pytest.approx(sum(plan["memory"]["parts"].values()))
    assert plan["step"]["seconds"] == pytest.approx(sum(plan["step"]["parts"].values()))
    assert plan["fits"]
    assert f"Peak {plan['memory']['peak'] / 1e9:.1f} of 84.9 GB" in outcome.stdout
    assert "isn't prepared" in outcome.stdout
    assert "nothing here was measured" in outcome.stdout


def test_what_does_not_fit_is_refused_with_the_reason(run_program: Callable[..., Any], tmp_path: Path) -> None:
    settings = ("cluster=h100_8", "deepspeed=zero2", "plan.json=plan.json")
    assert run_program("train", *RECIPE, *settings).exit_code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["refused"] == "93.4 GB of base on a GPU of 85 GB"


def test_the_best_settings_can_be_pasted_and_plan_to_fit(run_program: Callable[..., Any], tmp_path: Path) -> None:
    best = run_program("train", *RECIPE, "cluster=l40s_1", "best=true").stdout.split()
    # 93.4 GB of base in 16 bits fit no GPU of 48 GB
    assert {"model.weights=nf4", "deepspeed=zero3_offload"} & set(best)
    outcome = run_program("train", *RECIPE, "cluster=l40s_1", "plan.json=plan.json", *best)
    assert outcome.exit_code == 0
    assert json.loads((tmp_path / "plan.json").read_text())["fits"]


def test_the_best_settings_undo_what_the_recipe_offloads(run_program: Callable[..., Any], tmp_path: Path) -> None:
    recipe = ("recipe=openhermes_mixtral_8x7b_8x24gb", "task=plan", "cluster=h100_8")
    best = run_program("train", *recipe, "best=true").stdout.split()
    assert "deepspeed.offload_param=none" in best
    peaks = []
    for number, settings in enumerate(((), best)):
        outcome = run_program("train", *recipe, f"plan.json={number}.json", *settings)
        assert outcome.exit_code == 0
        plan = json.loads((tmp_path / f"{number}.json").read_text())
        cheapest = next(each for each in plan["alternatives"] if each["settings"] == plan["by_money"][0])
        peaks.append((plan if settings else cheapest)["memory"]["peak"])
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("cluster=h300_8",), ["h300_8", "h100_8"]),
        (("cluster=h100_8", "cluster.price=-1"), ["cluster.price=-1", "not negative"]),
        (("cluster.gpu=H300",), ["cluster.gpu=H300", "cluster.memory", "cluster=h100_8"]),
        (("cluster=h100_8", "dataset=nowhere"), ["dataset=nowhere", "no prepared dataset"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_mistakes_are_told_in_a_sentence(
    run_program: Callable[..., Any], settings: tuple[str, ...], said: list[str]
) -> None:
    outcome = run_program("train", *RECIPE, *settings)
    assert outcome.exit_code == 2
    assert len(outcome.stderr.splitlines()) == 1
    assert all(part in outcome.stderr for part in said), outcome.stderr
