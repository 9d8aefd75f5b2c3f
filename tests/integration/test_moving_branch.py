"""A hub's branch that moved between the downloads of a run's nodes, each into a cache of its own."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.support.adapters import make_base
from tests.support.hub import SECOND, Hub

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

    def environment(rank: int) -> dict[str, str]:
        """The second node has the base already, and may not ask."""
        there = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        there |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": str(rank)}
        there |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / f"home{rank}")}
        return {name: value for name, value in os.environ.items() if name != "HF_HUB_CACHE"} | there

    def start(rank: int) -> subprocess.Popen[str]:
        settings = ("hardware=cpu", "logging=quiet", f"dataset={tmp_path}/out", "model.path=user/base", "max_steps=1")
        command = [sys.executable, "-m", "train", *settings, "model.dtype=float32", f"run_dir={tmp_path}/run"]
        return subprocess.Popen(command, cwd=ROOT, env=environment(rank), stderr=subprocess.PIPE, text=True)

    with_cache_1 = environment(1) | {"HF_HUB_OFFLINE": "0"}
    download = "from huggingface_hub import snapshot_download; snapshot_download('user/base')"
    subprocess.run([sys.executable, "-c", download], cwd=ROOT, env=with_cache_1, check=True, capture_output=True)
    held.commits[SECOND] = files | {"config.json": mended}
    nodes = [start(rank) for rank in range(2)]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], said
    wrong = [
        line for text in said for line in text.splitlines() if line.startswith("train: model.path (its config.json")
    ]
    assert wrong, said
    assert all("model.revision=COMMIT" in line and "process 0 has" in line for line in wrong)
    assert not (tmp_path / "run").exists()
