"""Damaged files, the short form of `torture.py files`: each is refused in a sentence or does no harm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRIES = 200
READERS = "^(?!train: (base|dataset|goes on))"
"""All but those that go on to train if the damage is harmless: each takes seconds."""


@pytest.mark.slow
def test_damaged_files_end_in_a_sentence(project_root: Path, tmp_path: Path) -> None:
    """Two hundred files, each damaged in a way of its own."""
    command = [sys.executable, str(project_root / "scripts" / "torture.py"), "files", f"--tries={TRIES}", "--seed=7"]
    options = ["--only", READERS, "--json", str(tmp_path / "figures.json"), "--scratch", str(tmp_path / "scratch")]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["torture"] == "files"
    figures = record["figures"]
    assert figures["tries"] == TRIES
    assert figures["refused"] > TRIES / 3
    assert figures["harmless"] > 0
