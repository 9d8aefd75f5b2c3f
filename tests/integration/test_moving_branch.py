"""A hub's branch that moves while the nodes of a run download from it, each into a cache of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.hub import SECOND, Hub
from tests.support.adapters import make_base

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_nodes_that_found_different_commits_are_refused(
    hub: Hub, run_program: Callable[..., Any], tmp_path: Path
) -> None:
    """The new commit mends one number of config.json: no weight and no setting tells."""
    rows = '{"instruction": "Say it.", "output": "It."}\n' * 20
    (tmp_path / "rows.jsonl").write_text(rows)
    assert run_program("data", "files=[rows.jsonl]", "output=out", "seq_len=64", "eval_fraction=0").exit_code == 0
    make_base(vocab_size=32_000).save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    files["tokenizer.model"] = resources.files("mistral_common").joinpath("data", "tokenizer.model.v1").read_bytes()
    held = hub.add("models/user/base", files)
    architecture = json.loads(files["config.json"])
    mended = json.dumps(architecture | {"rms_norm_eps": 2 * architecture["rms_norm_eps"]}).encode()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def start(rank: int) -> subprocess.Popen[str]:
        there = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        there |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "0"}
        there |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / f"home{rank}")}
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_CACHE"} | there
        settings = ("hardware=cpu", "logging=quiet", f"dataset={tmp_path}/out", "model.path=user/base", "max_steps=1")
        command = [sys.executable, "-m", "train", *settings, "model.dtype=float32", f"run_dir={tmp_path}/run"]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    nodes = [start(1)]
    until = time.monotonic() + 300
    while not hub.sent["models/user/base/model.safetensors"]:
        assert nodes[0].poll() is None, nodes[0].communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    held.commits[SECOND] = files | {"config.json": mended}
    nodes.append(start(0))
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], said
    wrong = [
        line for text in said for line in text.splitlines() if line.startswith("train: model.path (its config.json")
    ]
    assert wrong, said
    assert all("model.revision=COMMIT" in line and "process 0 has" in line for line in wrong)
    assert not (tmp_path / "run").exists()
