"""Whatever trains and however the work is divided, two steps are those of plain data parallelism."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import train
from tests.integration.targets import CASES, CHECKPOINTING, STEPS, case

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each combination gave: all in one launch of two processes."""
    directory: Path = tmp_path_factory.mktemp("targets")
    train(2, f"run_dir={directory}", module="tests.integration.targets")
    return {name: json.loads((directory / f"{name}.json").read_text()) for name in (case(*which) for which in CASES)}


@pytest.mark.parametrize(("target", "division", "checkpointing"), CASES)
def test_two_steps_equal_those_without_zero_and_without_checkpointing(
    found: dict[str, dict[str, Any]], target: str, division: str, checkpointing: str
) -> None:
    here, plain = found[case(target, division, checkpointing)], found[case(target, "none", CHECKPOINTING[0])]
    assert "error" not in here, here["error"]
    assert here["applied"] == [True] * STEPS
    assert here["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert here["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    assert here["losses"][0] != here["losses"][1]
    assert here["parameters"].keys() == plain["parameters"].keys()
    for name, numbers in plain["parameters"].items():
        assert here["parameters"][name] == pytest.approx(numbers, rel=1e-5, abs=1e-5), name
