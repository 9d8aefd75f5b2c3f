"""A base that a hub keeps: of one commit, downloaded once, or one sentence that says why not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.program.errors import UserError
from inference.adapter import Adapter
from inference.config import InferenceConfig
from inference.load import find_adapter, find_base, load, load_base, load_tokenizer
from tests.support.adapters import make_adapter, make_base
from tests.support.hub import FIRST, SECOND, Hub
from train.config.model import ModelConfig
from train.config.train import TrainConfig
from train.model import mixtral
from train.run import fetch_base


def files_of(base: Any, directory: Path) -> dict[str, bytes]:
    """A model in several files, with Mixtral's tokenizer."""
    base.save_pretrained(directory, max_shard_size="50KB")
    tokenizer = resources.files("mistral_common").joinpath("data", "tokenizer.model.v1").read_bytes()
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())} | {"tokenizer.model": tokenizer}


@pytest.fixture
def versions(tmp_path: Path) -> list[dict[str, bytes]]:
    """Two commits with different weights, of a base that has an embedding for each of a dataset's ids."""
    made = []
    for number in (1, 2):
        base = make_base(vocab_size=32_000)
        base.lm_head.weight.data += number
        made.append(files_of(base, tmp_path / f"base{number}"))
    return made


def asked(**settings: Any) -> InferenceConfig:
    return InferenceConfig(**{"base": "user/base", "prompt": "hello", "dtype": "float32", "device": "cpu", **settings})


def test_all_of_a_base_is_of_the_commit_that_was_found(
    hub: Hub, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    held = hub.add("models/user/base", versions[0])
    assert len(versions[0]) > 4  # config, index, several files of weights, tokenizer
    base = find_base(asked())
    assert base.revision == FIRST
    assert set(hub.sent) == {"models/user/base/config.json"}
    held.commits[SECOND] = versions[1]  # the branch moves while it loads
    load_tokenizer(base)
    found, wanted = load_base(base, asked()).state_dict(), make_base_of(tmp_path / "base1")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    held.refs = {"v1": FIRST}  # a tag
    for revision, commit in ((None, SECOND), ("main", SECOND), ("v1", FIRST), (FIRST, FIRST)):
        assert find_base(asked(revision=revision)).revision == commit


def make_base_of(directory: Path) -> dict[str, torch.Tensor]:
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def test_a_second_start_downloads_nothing(hub: Hub, versions: list[dict[str, bytes]]) -> None:
    hub.add("models/user/base", versions[0])
    load(asked())
    assert set(hub.sent.values()) == {1}
    assert set(hub.sent) == {f"models/user/base/{name}" for name in versions[0]}
    hub.requests.clear()
    load(asked())
    assert hub.requests == [("GET", "/api/models/user/base")]


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"cut": {"config.json": 1000}}, "the transfer was cut off again and again"),
        ({"answers": [503] * 100}, "the hub answered 503"),
        ({"gated": True}, "only to those who were granted access"),
    ],
)
def test_a_base_that_can_t_be_had_is_told(
    hub: Hub, versions: list[dict[str, bytes]], run_program: Callable[..., Any], behaviour: dict[str, Any], said: str
) -> None:
    hub.add("models/user/base", versions[0], **behaviour)
    outcome = run_program("inference", "base=user/base", "prompt=hello", "device=cpu")
    assert outcome.exit_code == 2
    (sentence,) = [line for line in outcome.stderr.splitlines() if not line.startswith("hub: ")]
    assert sentence.startswith("inference: base=user/base: ")
    assert said in sentence


def test_weights_that_are_cut_off_are_told_and_the_rest_is_kept(hub: Hub, versions: list[dict[str, bytes]]) -> None:
    name = next(name for name in versions[0] if name.endswith(".safetensors"))
    held = hub.add("models/user/base", versions[0], cut={name: 1000})
    with pytest.raises(UserError, match="base=user/base: there is no such directory, and the transfer was cut off"):
        load(asked())
    held.cut.clear()
    hub.sent.clear()
    load(asked())
    assert f"models/user/base/{name}" in hub.sent
    assert "models/user/base/config.json" not in hub.sent


def test_training_pins_the_commit_and_has_all_before_processes_meet(
    hub: Hub, versions: list[dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = hub.add("models/user/base", files_of(make_base(vocab_size=32_000), tmp_path / "base"))
    config = ModelConfig(path="user/base", dtype="float32")
    fetch_base(TrainConfig(model=config))
    assert config.revision == FIRST
    held.commits[SECOND] = versions[1]
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nothing is left to ask for
    found, wanted = mixtral.pretrained(config).state_dict(), make_base_of(tmp_path / "base")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert hub.requests == []


def test_training_ends_before_processes_meet_if_the_base_can_t_be_had(
    hub: Hub,
    versions: list[dict[str, bytes]],
    run_program: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    rows = '{"instruction": "Say it.", "output": "It."}\n' * 20
    (tmp_path / "rows.jsonl").write_text(rows)
    assert run_program("data", "files=[rows.jsonl]", "output=out", "seq_len=64", "eval_fraction=0").exit_code == 0
    hub.add("models/user/base", {"config.json": b"{}"}, cut={"config.json": 1000})
    monkeypatch.setattr("train.run.Signals", lambda grace: None)
    met = torch.distributed.is_initialized()  # a test before this one may have left it so
    outcome = run_program("train", "dataset=out", "run_dir=run", "hardware=cpu", "model.path=user/base")
    assert outcome.exit_code == 2
    assert "train: model.path=user/base: there is no such directory, and the transfer was cut off" in outcome.stderr
    assert torch.distributed.is_initialized() == met
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_a_hub_is_read_with_the_base_that_it_names(
    hub: Hub, versions: list[dict[str, bytes]], tmp_path: Path
) -> None:
    """Of the commit that was found; no more of it is downloaded than is read."""
    base = make_base(vocab_size=32_000)
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "user/base"})
    )
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    held = hub.add("models/user/adapter", files | {"per_expert/adapter_config.json": b"", "more.bin": b"x" * 1000})
    held.commits[SECOND] = files | {"adapter_model.safetensors": b"another"}
    hub.add("models/user/base", versions[0])
    config = asked(base=None, adapter="user/adapter", adapter_revision=FIRST)
    found = find_base(config)
    assert (found.source, found.revision) == ("user/base", FIRST)
    assert find_adapter(config, found).updates.keys() == Adapter(tmp_path / "adapter", base.config).updates.keys()
    assert {name.rpartition("/")[2] for name in hub.sent if "/adapter/" in name} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    with pytest.raises(UserError, match=r"its adapter_model\.safetensors is damaged"):
        newest = asked(base=None, adapter="user/adapter")
        find_adapter(newest, find_base(newest))
    with pytest.raises(UserError, match=r"^adapter=user/nothing: "):
        find_base(asked(adapter="user/nothing"))


def test_a_pickled_base_of_a_hub_is_told_and_not_downloaded(hub: Hub, versions: list[dict[str, bytes]]) -> None:
    pickled = {name: content for name, content in versions[0].items() if "safetensors" not in name}
    hub.add("models/user/base", pickled | {"pytorch_model-00001-of-00002.bin": b"x"})
    with pytest.raises(UserError, match=r"base=user/base: its weights are pickled \(pytorch_model-00001-"):
        load(asked())
    assert not any(name.endswith(".bin") for name in hub.sent)


FETCH = """
from data.disk import hub, weights
hub.WORTH_A_LINE = 1
weights.local_directory('user/base', None, 'base=user/base')
"""


@pytest.mark.parametrize("caches", [1, 2])
def test_of_the_processes_of_a_machine_one_downloads_and_the_others_wait(
    hub: Hub, project_root: Path, tmp_path: Path, caches: int
) -> None:
    """Two processes that ask at once, with one cache as on a machine, and with two as on two machines."""
    hub.add("models/user/base", {"config.json": b"{}", "model.safetensors": os.urandom(100_000)}, delay=1.0)
    processes = []
    for number in range(2):
        home = str(tmp_path / f"home{number % caches}")
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
        environment.pop("HF_HUB_CACHE", None)
        command = [sys.executable, "-c", FETCH]
        processes.append(
            subprocess.Popen(command, cwd=project_root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert set(hub.sent.values()) == {caches}
    assert sum(err.count(b"hub: downloading") for _, err in said) == caches
