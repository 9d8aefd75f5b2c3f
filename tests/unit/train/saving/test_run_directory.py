"""What a run may replace, and from what it goes on. One process, which needs no launcher."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from configs.program.errors import UserError
from data.disk.files import file_hash
from data.prepared.dataset import PreparedDataset
from tests.conftest import Outcome
from train.config.engine import DeepSpeedConfig, HardwareConfig, OptimConfig
from train.config.lora import LoraConfig
from train.config.model import ModelConfig
from train.config.train import FailureConfig, LoggingConfig, TrainConfig
from train.engine import processes as processes_module
from train.engine.processes import Processes, check_same, join_processes
from train.saving import checkpoint, identity
from train.saving.identity import Inputs
from train.saving.receipt import Record, record_launch
from train.saving.resume import check_same_run, find_checkpoint
from train.saving.run_directory import RunDirectory


@pytest.fixture(scope="module")
def processes() -> Processes:
    return join_processes(HardwareConfig(device="cpu"))


@pytest.fixture
def dataset(run_program, tmp_path: Path, project_root: Path) -> PreparedDataset:
    rows = project_root / "data" / "sample" / "identity.jsonl"
    outcome: Outcome = run_program("data", f"files=[{rows}]", "output=prepared", "seq_len=256")
    assert outcome.exit_code == 0
    return PreparedDataset(tmp_path / "prepared")


def launch(
    dataset: PreparedDataset, processes: Processes, run_dir: Path, **more: object
) -> tuple[RunDirectory, Record]:
    """As `run_on` begins."""
    config = TrainConfig(run_dir=str(run_dir), lora=LoraConfig(method="none"), **more)  # type: ignore[arg-type]
    directory, inputs = RunDirectory(config, dataset.directory, processes), Inputs(config, dataset.directory)
    record = record_launch(directory, config, config.batch(1), inputs, processes, training_rows=len(dataset.train))
    check_same_run(directory, record, dataset)
    return directory, record


def directory(dataset: PreparedDataset, processes: Processes, run_dir: Path, **more: object) -> RunDirectory:
    return launch(dataset, processes, run_dir, **more)[0]


def old_run(place: Path) -> Path:
    (place / "model").mkdir(parents=True)
    (place / "config.yaml").write_text("name: old\n")
    return place


def test_a_run_is_replaced_only_where_that_is_asked(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    place = old_run(tmp_path / "run")
    with pytest.raises(UserError, match=f"run_dir={place}: a run is there already"):
        directory(dataset, processes, place)
    replacing, record = launch(dataset, processes, place, overwrite=True)
    assert (place / "config.yaml").read_text() == "name: old\n"  # not before everything else was checked
    itself = place.stat().st_ino
    replacing.create(record.config_yaml)
    assert not (place / "model").exists()
    assert "overwrite: true" in (place / "config.yaml").read_text()
    assert place.stat().st_ino == itself  # emptied: a disk that is mounted there could not be removed


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_fresh_run_refuses_rows_that_are_not_those_of_the_manifest(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path, split: str
) -> None:
    """One bit, which changes no size."""
    rows = dataset.directory / split / "rows.arrow"
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    rows.write_bytes(content)
    with pytest.raises(UserError, match=rf"^dataset=.*: {split}/rows\.arrow has changed since it was prepared"):
        directory(dataset, processes, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_no_run_wrote_is_never_replaced(dataset: PreparedDataset, processes: Processes, tmp_path: Path) -> None:
    place = old_run(tmp_path / "project")
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt is there, which no run writes"):
        directory(dataset, processes, place, overwrite=True)


@pytest.mark.parametrize("inside", ["base", "dataset", "working directory"])
def test_what_the_run_needs_is_never_replaced(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path, inside: str
) -> None:
    place = {"base": old_run(tmp_path / "run"), "dataset": dataset.directory, "working directory": tmp_path}[inside]
    base = ModelConfig(path=str(tmp_path / "run" / "model")) if inside == "base" else ModelConfig()
    with pytest.raises(UserError, match="it holds the working directory, the dataset or the base"):
        directory(dataset, processes, place, overwrite=True, model=base)


def test_a_start_that_fails_leaves_the_old_run(run_program, dataset: PreparedDataset, tmp_path: Path) -> None:
    place = old_run(tmp_path / "run")
    outcome: Outcome = run_program(
        "train", "run_dir=run", "overwrite=true", "model.path=/nowhere", "dataset=prepared", "hardware=cpu"
    )
    assert outcome.exit_code == 2
    assert "model.path=/nowhere: it is neither a directory nor a name on a hub" in outcome.stderr
    assert (place / "config.yaml").read_text() == "name: old\n"


def checkpointed(directory: RunDirectory, record: Record, step: int, **settings: object) -> Path:
    """A checkpoint of a run, with what is compared and nothing else."""
    path = checkpoint.path_of(directory.path, step)
    path.mkdir(parents=True)
    trainer = {"format": checkpoint.FORMAT, "step": step, "settings": record.settings | settings, **record.inputs}
    (path / checkpoint.TRAINER).write_text(json.dumps(trainer))
    written = {"bytes": (path / checkpoint.TRAINER).stat().st_size, "xxh3": file_hash(path / checkpoint.TRAINER)}
    (path / checkpoint.MANIFEST).write_bytes(checkpoint._sealed({"files": {checkpoint.TRAINER: written}}))
    return path


@pytest.fixture
def interrupted(dataset: PreparedDataset, processes: Processes, tmp_path: Path) -> Path:
    """The directory of a run of which nothing is left but a checkpoint."""
    checkpointed(*launch(dataset, processes, tmp_path / "run"), 7)
    return tmp_path / "run"


def test_a_run_with_a_checkpoint_goes_on_unless_told_otherwise(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    assert directory(dataset, processes, interrupted).resumes
    assert not directory(dataset, processes, interrupted, overwrite=True).resumes
    with pytest.raises(UserError, match="a run is there already"):
        directory(dataset, processes, interrupted, resume="never")


def test_what_a_user_keeps_beside_a_run_hinders_nothing_that_replaces_nothing(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    (interrupted / "notes.txt").write_text("looks good so far")
    assert directory(dataset, processes, interrupted).resumes
    with pytest.raises(UserError, match=r"notes\.txt is there, which no run writes"):
        directory(dataset, processes, interrupted, overwrite=True)
    (interrupted / checkpoint.FOLDER).rename(interrupted.parent / "gone")
    with pytest.raises(UserError, match=r"notes\.txt is there, which no run writes"):  # it would start over
        directory(dataset, processes, interrupted)


def test_checkpoints_that_cannot_be_looked_at_are_not_taken_for_none(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    (interrupted / checkpoint.FOLDER).rename(interrupted.parent / "gone")
    (interrupted / checkpoint.FOLDER).write_text("")
    with pytest.raises(UserError, match="it can't be used"):
        directory(dataset, processes, interrupted)


def test_a_checkpoint_of_another_version_is_refused_by_name(
    interrupted: Path, dataset: PreparedDataset, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    run = launch(dataset, processes, interrupted)
    with pytest.raises(UserError, match=r"step-000007: trainer\.json is of another version of this program"):
        find_checkpoint(*run, {})


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


def test_another_dataset_or_one_whose_rows_changed_is_refused(
    interrupted: Path, dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    rows = dataset.directory / "train" / "rows.arrow"
    good = rows.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    rows.write_bytes(bad)
    with pytest.raises(UserError, match=r"train/rows\.arrow has changed since it was prepared"):
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
        return Inputs(config, dataset.directory).hashes()

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
    inputs = Inputs(TrainConfig(lora=lora), dataset.directory)
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
    here = Inputs(TrainConfig(lora=lora), dataset.directory).same_everywhere()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "start").mkdir(parents=True)
    for name in FILES_OF_LORA.values():
        (elsewhere / name).write_text("old")
    other = LoraConfig(load=str(elsewhere / "load.json"), start=str(elsewhere / "start"))
    assert Inputs(TrainConfig(lora=other), dataset.directory).same_everywhere() == here
    if changed is None:
        (elsewhere / FILES_OF_LORA[field]).unlink()
    else:
        (elsewhere / FILES_OF_LORA[field]).write_text(changed)
    there = Inputs(TrainConfig(lora=other), dataset.directory).same_everywhere()
    monkeypatch.setattr(processes_module, "gathered", lambda value: [here, there])
    with pytest.raises(UserError, match=rf"^{field} \(its .*\)=.*: that is what process 1 was given, and process 0"):
        check_same(there)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    interrupted: Path,
    dataset: PreparedDataset,
    processes: Processes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    newer = checkpointed(*launch(dataset, processes, interrupted), 8)
    (newer / checkpoint.TRAINER).write_text((newer / checkpoint.TRAINER).read_text().replace("8", "9"))
    run = launch(dataset, processes, interrupted)
    with pytest.raises(
        UserError, match=r"none of them is whole \(step-000008: trainer\.json is not as it was written\)"
    ):
        find_checkpoint(*run, {"w": (1,)})  # the older one holds no tensors either
    told = " ".join(capsys.readouterr().err.split())
    assert "step-000008 is damaged (trainer.json is not as it was written); the one before is used" in told
    assert "step-000007 is damaged (master.safetensors is missing)" in told


def test_two_launches_do_not_work_in_one_directory(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    first = directory(dataset, processes, interrupted)
    with pytest.raises(UserError, match="another launch is at work in it"):
        directory(dataset, processes, interrupted)
    del first  # as when its process ends
    assert directory(dataset, processes, interrupted).resumes


def test_a_launch_that_loads_while_another_begins_does_not_replace_it(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    """Both see no directory; the second is ready to make it when the first has long begun, or even ended."""
    (first, record), (second, _) = (launch(dataset, processes, tmp_path / "run") for _ in range(2))
    first.create(record.config_yaml)
    path = checkpointed(first, record, 7)
    with pytest.raises(UserError, match="another launch is at work in it"):
        second.create(record.config_yaml)
    del first
    with pytest.raises(UserError, match="another launch has begun in it meanwhile"):
        second.create(record.config_yaml)
    assert path.exists()


def test_a_directory_that_cannot_be_used_is_one_sentence(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^run_dir=.*/file/run: it can't be used \(Not a directory: .*\); make it"):
        directory(dataset, processes, tmp_path / "file" / "run").create("")


def test_what_decides_the_rows_can_not_be_let_through(
    interrupted: Path, dataset: PreparedDataset, processes: Processes
) -> None:
    with pytest.raises(UserError, match=r"resume_despite=\[global_batch\]: it decides which rows"):
        directory(dataset, processes, interrupted, global_batch=4, resume_despite=["global_batch"])


def test_a_finished_run_is_left_alone_where_the_same_is_asked(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path
) -> None:
    run, record = launch(dataset, processes, tmp_path / "run")
    old_run(run.path)
    (run.path / "receipt.json").write_text(json.dumps({"settings": record.settings, **record.inputs}))
    assert directory(dataset, processes, run.path).finished
    with pytest.raises(UserError, match=r"^seed=5: the run that is there was started with 0"):
        directory(dataset, processes, run.path, seed=5)
    for other in ("{}", "[]", "not JSON"):
        (run.path / "receipt.json").write_text(other)
        with pytest.raises(UserError, match=r"its receipt\.json can't be read"):
            directory(dataset, processes, run.path)


def test_a_run_that_saved_nothing_starts_again_and_says_so(
    dataset: PreparedDataset, processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert not directory(dataset, processes, tmp_path / "run").resumes
    assert "it starts from the beginning" in " ".join(capsys.readouterr().err.split())
