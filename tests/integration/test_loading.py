"""Each process reads what it holds of the base, and nothing else; it holds what transformers would have sent to it."""

import json
from pathlib import Path

import pytest

from tests.integration.conftest import train
from tests.integration.loading import DIVISIONS, FILES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("processes", "nodes"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_what_is_read_in_slices_is_what_transformers_loads(tmp_path: Path, processes: int, nodes: int) -> None:
    train(processes, f"run_dir={tmp_path}", module="tests.integration.loading", nodes=nodes)
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    divisions = 1 if nodes > 1 else len(DIVISIONS) - 1
    assert len(found) == 2 * len(FILES) * divisions
    assert {name: wrong for name, wrong in found.items() if any(wrong)} == {}
