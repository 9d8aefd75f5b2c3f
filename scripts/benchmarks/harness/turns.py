"""Starts a process of `trainers.py` and asks it for a step."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.harness.trainers import Settings

ROOT = Path(__file__).parents[3]


class Trainer:
    """A training process that waits for its turn."""

    def __init__(self, name: str, settings: Settings):
        command = [sys.executable, "-P", "-m", "benchmarks.harness.trainers", name, json.dumps(asdict(settings))]
        path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        if settings.device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"a trainer ended:\n{self._errors.read()[-4000:]}")
        return json.loads(line)

    def step(self) -> dict[str, float]:
        """One step: seconds, loss, tokens, supervised tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> dict[str, float]:
        """Ends the process; its peak memory above the model in MiB, and of ours what noting the routers takes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer = self._answer()
        self._process.wait(60)
        return answer
