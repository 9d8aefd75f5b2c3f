"""Whether a run that is there is the one that is asked for: settings, dataset and base. One process, no launcher."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from configs.program.errors import UserError
from data.prepared.dataset import PreparedDataset
from tests.unit.train.saving.launches import checkpointed, directory, launch
from train.config.engine import DeepSpeedConfig, OptimConfig
from train.config.lora import LoraConfig
from train.config.model import ModelConfig
from train.config.train import FailureConfig, LoggingConfig, TrainConfig
from train.engine import processes as processes_module
from train.engine.processes import Processes, check_same
from train.saving import identity
from train.saving.identity import Inputs


def test_what_decides_no_number_may_change(interrupted: Path, dataset: PreparedDataset, processes: Processes) -> None:
    changed = {
        "name": "other",
        "save_every": 3,
        "keep_last": 9,
        "eval_every": 5,
        "logging": LoggingConfig(every=9),
        "failures": FailureConfig(grace=1),
        "activation_checkpointing": "attention",
        "deepspeed": DeepSpeedConfig(persistence_threshold=0, max_live_parameters=5, node_copy=True, bucket_size=7),
    }
    assert directory(dataset, processes, interrupted, **changed).resumes


@pytest.mark.parametrize("what", ["none", "attention", "full", True])
def test_a_run_that_knew_checkpointing_as_true_or_false_goes_on(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path, what: Any
) -> None:
    run, record = launch(dataset, processes, tmp_path / "run")
    later = ("prefetch_bucket_size", "max_live_parameters", "node_copy")
    deepspeed = {name: value for name, value in record.settings["deepspeed"].items() if name not in later}
    checkpointed(run, record, 7, activation_checkpointing=True, deepspeed=deepspeed)
    assert directory(dataset, processes, run.path, activation_checkpointing=what).resumes


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"epochs": 4}, "epochs"),
        ({"max_steps": 9}, "max_steps"),
        ({"optim": OptimConfig(lr=1.0)}, "optim.lr"),
        ({"optim": OptimConfig(betas=[0.9, 0.99])}, "optim.betas"),
        ({"deepspeed": DeepSpeedConfig(stage=2)}, "deepspeed.stage"),
        ({"model": ModelConfig(weights="nf4")}, "model.weights"),
    ],
)
def test_a_setting_that_differs_is_named_and_can_be_let_through(
    interrupted: Path, dataset: PreparedDataset, processes: Processes, changed: dict[str, Any], field: str
) -> None:
    with pytest.raises(UserError, match=rf"^{field}=.*was started with .*resume_despite=\[{field}\]"):
        directory(dataset, processes, interrupted, **changed)
    assert directory(dataset, processes, interrupted, **changed, resume_despite=[field]).resumes
    assert directory(
        dataset, processes, interrupted, **changed, resume_despite=[field.split(".", maxsplit=1)[0]]
    ).resumes


def test_a_run_that_knew_no_four_bits_had_a_base_in_16(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    run, record = launch(dataset, processes, tmp_path / "run")
    model = {name: value for name, value in record.settings["model"].items() if name != "weights"}
    checkpointed(run, record, 7, model=model)
    assert directory(dataset, processes, run.path).resumes
    with pytest.raises(UserError, match=r"^model\.weights=nf4: the run that is there was started with bf16"):
        directory(dataset, processes, run.path, model=ModelConfig(weights="nf4"))


def test_what_decides_the_rows_can_not_be_let_through(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    with pytest.raises(UserError, match=r"resume_despite=\[global_batch\]: it decides which rows"):
        directory(dataset, processes, interrupted, global_batch=4, resume_despite=["global_batch"])


def test_another_dataset_or_one_whose_rows_changed_is_refused(
    interrupted: Path, dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    rows = dataset.directory / "train" / "rows.arrow"
    good = rows.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    rows.write_bytes(bad)
    with pytest.raises(UserError, match=r"train/rows\.arrow is not whole \(it has changed since it was prepared"):
        directory(dataset, processes, interrupted)
    rows.write_bytes(good)

    manifest = dataset.directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    other = PreparedDataset(dataset.directory)
    with pytest.raises(UserError, match=r"dataset=.*it is not the one that the run was started on"):
        directory(other, processes, interrupted)
    assert directory(other, processes, interrupted, resume_despite=["dataset"]).resumes


def test_a_base_with_one_byte_changed_anywhere_is_refused(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.zeros(100_000)}, base / "model.safetensors")
    model = ModelConfig(path=str(base))
    checkpointed(*launch(dataset, processes, tmp_path / "run", model=model), 7)
    assert directory(dataset, processes, tmp_path / "run", model=model).resumes
    changed = torch.zeros(100_000)
    changed[30_000] = 1.0  # where the fingerprint takes no sample
    save_file({"w": changed}, base / "model.safetensors")
    with pytest.raises(
        UserError, match=r"model\.path=.*model\.safetensors has changed.*resume_despite=\[model\.path\]"
    ):
        directory(dataset, processes, tmp_path / "run", model=model)


HASHING = """
import resource, sys
from pathlib import Path
from data.disk.loading import progress
from data.disk.weights import StoredWeights

weights = StoredWeights(Path(sys.argv[1]), "model.path=base")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
progress.WORTH_A_LINE >>= 2
with progress.progress("Hashing the base", weights.bytes, shown=True) as advance:
    weights.contents(advance)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_base_is_hashed_in_little_memory_and_a_log_tells_its_size(project_root: Path, tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [1 << 27], "data_offsets": [0, 1 << 28]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 28))  # a hole, which takes no disk
    command = [sys.executable, "-c", HASHING, str(tmp_path)]
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 10, "KiB"
    assert done.stderr == "Hashing the base: 0.3 GB\n"


@pytest.fixture
def lora(tmp_path: Path) -> LoraConfig:
    """With a load and a start, whose contents are `old`."""
    (tmp_path / "start").mkdir()
    files = tmp_path / "load.json", tmp_path / "start" / "adapter_model.safetensors"
    for file in files:
        file.write_text("old")
    return LoraConfig(load=str(files[0]), start=str(files[1].parent))


FILES_OF_LORA = {"lora.load": "load.json", "lora.start": "start/adapter_model.safetensors"}


@pytest.mark.parametrize("field", FILES_OF_LORA)
def test_a_file_of_lora_that_changed_is_refused(
    dataset: PreparedDataset, tmp_path: Path, lora: LoraConfig, field: str
) -> None:
    def hashes() -> dict[str, Any]:
        return Inputs(config, dataset).hashes()

    config = TrainConfig(lora=lora)
    stored = {"settings": identity.stored_settings(config), **hashes()}
    identity.check(stored, config, hashes())
    (tmp_path / FILES_OF_LORA[field]).write_text("new")
    with pytest.raises(UserError, match=rf"^{field}=.*: it has changed since the run was started"):
        identity.check(stored, config, hashes())
    if field == "lora.start":
        identity.check(stored, TrainConfig(lora=lora, resume_despite=[field]), hashes())
        del stored["start"]  # as older runs recorded it
        identity.check(stored, config, hashes())


def test_what_is_recorded_is_what_the_processes_agreed_on(
    dataset: PreparedDataset, tmp_path: Path, lora: LoraConfig
) -> None:
    """Each input is hashed once: a file that is replaced meanwhile is not recorded in place of the one compared."""
    inputs = Inputs(TrainConfig(lora=lora), dataset)
    agreed = inputs.same_everywhere()
    for path in (dataset.directory / "manifest.json", *(tmp_path / name for name in FILES_OF_LORA.values())):
        path.write_text("new")
    hashes = inputs.hashes()
    assert hashes["dataset"]["manifest_sha256"] == agreed["dataset (its manifest.json)"]
    assert hashes["load"] == agreed["lora.load (its content)"]
    assert hashes["start"] == agreed["lora.start (its adapter_model.safetensors)"]
    assert hashes["load"] == hashes["start"] == xxhash.xxh3_128_hexdigest(b"old")


@pytest.mark.parametrize("field", FILES_OF_LORA)
@pytest.mark.parametrize("changed", ["new", None])
def test_processes_with_other_files_are_refused(
    dataset: PreparedDataset,
    processes: Processes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: LoraConfig,
    field: str,
    changed: str | None,
) -> None:
    """The paths may differ between machines, the contents not."""
    here = Inputs(TrainConfig(lora=lora), dataset).same_everywhere()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "start").mkdir(parents=True)
    for name in FILES_OF_LORA.values():
        (elsewhere / name).write_text("old")
    other = LoraConfig(load=str(elsewhere / "load.json"), start=str(elsewhere / "start"))
    assert Inputs(TrainConfig(lora=other), dataset).same_everywhere() == here
    if changed is None:
        (elsewhere / FILES_OF_LORA[field]).unlink()
    else:
        (elsewhere / FILES_OF_LORA[field]).write_text(changed)
    there = Inputs(TrainConfig(lora=other), dataset).same_everywhere()
    monkeypatch.setattr(processes_module, "gathered", lambda value: [here, there])
    with pytest.raises(UserError, match=rf"^{field} \(its .*\)=.*: that is what process 1 was given, and process 0"):
        check_same(there)


def test_all_that_takes_long_is_read_at_once(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that processes that wait for each other in a collective never wait for a disk."""
    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.zeros(1000)}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    inputs = Inputs(TrainConfig(model=ModelConfig(path=str(base))), dataset)
    monkeypatch.delenv("RANK", raising=False)
    inputs.read()
    for name in ("file_hash", "sha256", "StoredWeights"):
        monkeypatch.setattr(identity, name, lambda *_: pytest.fail("it is read again"))
    assert inputs.hashes()["base"]["files"]["model.safetensors"]
    assert inputs.hashes()["base"]["fingerprint"] in inputs.same_everywhere().values()
    assert inputs.wrong_rows is None
