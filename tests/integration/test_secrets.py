"""No key that a user has or types is in anything that a run writes, wandb's files included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.tortures.harness.workplace import Workplace
from tests.integration.conftest import ROOT

pytestmark = pytest.mark.slow

SECRETS = {
    "WANDB_API_KEY": "5ec4e7000000000000000000000000000000beef",
    "HF_TOKEN": "hf_SecretSecretSecretSecret",
    "CLUSTER_PASSWORD": "open-sesame-open",
}


def test_no_secret_is_written_or_said(runs: Workplace, tmp_path: Path) -> None:
    typed = "hf_TypedTypedTypedTypedTyped"
    command = [sys.executable, "-m", "train", "recipe=quickstart", "hardware=cpu", "max_steps=1", "save_every=1"]
    command += [f"dataset={runs.rows}", f"model.path={runs.base}", f"run_dir={tmp_path}/run"]
    command += ["logging.wandb=offline", f"logging.project={SECRETS['CLUSTER_PASSWORD']}", f"name={typed}"]
    env = os.environ | SECRETS | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*command, *more], cwd=ROOT, env=env, capture_output=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    wrong = run(f"+logging.key={typed}")
    assert wrong.returncode == 2

    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert any(path.suffix == ".wandb" for path in written)
    assert any(b"<secret>" in content for content in written.values())  # it was there to be hidden
    said = {Path("output"): done.stdout + done.stderr + wrong.stdout + wrong.stderr}
    for path, content in (written | said).items():
        for secret in [*SECRETS.values(), typed]:
            assert secret.encode() not in content, path
