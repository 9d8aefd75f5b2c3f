"""One checkpoint on disk: complete or invisible, and whatever is not as it was written is noticed."""

import json
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.disk.files import file_hash
from tests.unit.train.saving.launches import trainer_state
from train.saving import checkpoint
from train.saving.background import Background
from train.saving.checkpoint import STATE, Checkpoint, CheckpointWriter, DamagedError

SHAPES = {"layers.0.A": (3, 4, 5), "layers.0.B": (3, 2), "norm": (7,)}


def state() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return {name: {kind: torch.randn(shape) for kind in STATE} for name, shape in SHAPES.items()}


def write(place: Path, background: Background, **trainer: object) -> dict[str, dict[str, torch.Tensor]]:
    tensors = state()
    writer = CheckpointWriter(place, SHAPES, background)
    for name, of_parameter in tensors.items():
        writer.write(name, of_parameter)
    background.submit((writer.directory / "adapter").mkdir)
    background.submit(lambda: (writer.directory / "adapter" / "adapter_config.json").write_text("{}"))  # type: ignore[func-returns-value]
    writer.finish({**trainer_state(checkpoint.step_of(place) or 0), **trainer})
    return tensors


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint that nothing is wrong with."""
    background = Background()
    place = checkpoint.path_of(tmp_path, 12)
    write(place, background)
    assert background.take_error() is None
    return place


def test_what_is_read_is_what_was_written(whole: Path) -> None:
    found = Checkpoint(whole)
    found.check(SHAPES)
    assert found.step == 12
    for name, of_parameter in state().items():
        assert all(torch.equal(found.read(name, kind), of_parameter[kind]) for kind in STATE)
    assert set(load_file(whole / "master.safetensors")) == set(SHAPES)  # as the library reads it
    name = max(SHAPES, key=lambda name: math.prod(SHAPES[name]))
    read, path = found.read(name, "master"), whole / "master.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(read, state()[name]["master"])  # read then, and not when it is needed
    path.write_bytes(b"")
    with pytest.raises(DamagedError, match=r"master\.safetensors can't be read: it has become shorter"):
        found.read(name, "master")


def test_it_is_no_larger_than_what_it_holds(tmp_path: Path) -> None:
    shapes = {"a": (400, 300), "b": (500, 100)}
    background = Background()
    writer = CheckpointWriter(checkpoint.path_of(tmp_path, 1), shapes, background)
    for name, shape in shapes.items():
        writer.write(name, dict.fromkeys(STATE, torch.zeros(shape)))
    writer.finish({"step": 1})
    background.wait()
    size = sum(file.stat().st_size for file in checkpoint.path_of(tmp_path, 1).rglob("*"))
    assert size < 1.1 * 3 * 4 * (400 * 300 + 500 * 100)


def damaged(place: Path) -> str:
    with pytest.raises(DamagedError) as told:
        Checkpoint(place).check(SHAPES)
    return str(told.value)


FILES = [f"{kind}.safetensors" for kind in STATE] + ["trainer.json", "manifest.json", "adapter/adapter_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_cut_short_or_has_one_other_bit_is_noticed(whole: Path, name: str) -> None:
    path = whole / name
    good = path.read_bytes()
    rng = random.Random(name)
    for _ in range(40):
        place = rng.randrange(len(good))
        flipped = bytearray(good)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert name in damaged(whole)
        path.write_bytes(good[:place])
        assert name in damaged(whole)
    path.unlink()
    assert name in damaged(whole)
    path.write_bytes(good)
    Checkpoint(whole).check(SHAPES)


def reseal(place: Path) -> None:
    """Makes the manifest fit what the files are now."""
    files = {
        str(path.relative_to(place)): {"bytes": path.stat().st_size, "xxh3": file_hash(path)}
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name != checkpoint.MANIFEST
    }
    (place / checkpoint.MANIFEST).write_bytes(checkpoint._sealed({"files": files}))


@pytest.mark.parametrize("name", [checkpoint.MANIFEST, checkpoint.TRAINER])
def test_what_a_checkpoint_says_is_read_from_no_link_out_of_it(whole: Path, name: str) -> None:
    (whole / name).rename(whole.parent / name)
    (whole / name).symlink_to(whole.parent / name)
    assert f"{name} can't be read: it is a link out of its directory" in damaged(whole)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("norm"), "exp_avg.safetensors lacks the tensor norm"),
        (lambda t: t.update(Norm=t.pop("norm")), "exp_avg.safetensors lacks the tensor norm"),
        (lambda t: t.update(more=torch.zeros(1)), "exp_avg.safetensors has an unknown tensor more"),
        (lambda t: t.update(norm=t["norm"][:6].clone()), "has the tensor norm as"),
        (lambda t: t.update(norm=t["norm"].double()), "has the tensor norm as"),
    ],
    ids=["missing", "renamed", "unknown", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_are_named_even_where_the_hashes_do(
    whole: Path, change: Callable[[dict[str, torch.Tensor]], object], told: str
) -> None:
    tensors = load_file(whole / "exp_avg.safetensors")
    change(tensors)
    save_file(tensors, whole / "exp_avg.safetensors")
    reseal(whole)
    assert told in damaged(whole)


def test_half_of_one_is_never_seen(tmp_path: Path) -> None:
    """Whatever job is the last that is done, the checkpoint is not there before the last of all."""
    background = Background()
    place = checkpoint.path_of(tmp_path, 3)
    go = threading.Event()
    background.submit(lambda: go.wait() and None)
    seen: list[list[Path]] = []
    submit = background.submit

    def watched(job: Callable[[], None], size: int = 0) -> None:
        submit(lambda: seen.append(checkpoint.paths(tmp_path)))
        submit(job, size)

    background.submit = watched  # type: ignore[method-assign]
    write(place, background)
    go.set()
    background.wait()
    assert len(seen) > 10
    assert all(found == [] for found in seen)
    assert checkpoint.paths(tmp_path) == [place]


def test_the_newest_are_kept_and_the_best_of_those_evaluated(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        checkpoint.path_of(tmp_path, step).mkdir(parents=True)
    (tmp_path / checkpoint.FOLDER / "step-notes").mkdir()
    steps = [checkpoint.step_of(place) for place in checkpoint.paths(tmp_path)]
    assert steps == [10, 8, 6, 4, 2]
    best = checkpoint.best({2: 3.0, 4: 1.5, 8: 2.0, 12: 0.1}, [2, 4, 6, 8, 10])
    assert best == 4
    checkpoint.prune(tmp_path, newest=10, keep_last=2, best=best)
    assert [checkpoint.step_of(place) for place in checkpoint.paths(tmp_path)] == [10, 8, 4]
    assert checkpoint.best({}, [8, 10]) is None
    assert checkpoint.best({8: float("nan"), 10: 2.0}, [10, 8]) == 10


def test_one_that_was_just_written_stays_whatever_damaged_ones_are_newer(tmp_path: Path) -> None:
    for step in (10, 13, 20):
        checkpoint.path_of(tmp_path, step).mkdir(parents=True)
    checkpoint.prune(tmp_path, newest=13, keep_last=1, best=None)
    assert [checkpoint.step_of(place) for place in checkpoint.paths(tmp_path)] == [13]


def test_what_a_kill_left_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    keep = checkpoint.path_of(tmp_path, 4)
    for path in (
        keep,
        keep.with_name(".step-000006.tmp"),
        keep.with_name(".step-000002.old"),
        tmp_path / ".adapter.tmp",
    ):
        (path / "inside").mkdir(parents=True)
    (tmp_path / ".receipt.json.tmp").write_text("{")
    (tmp_path / ".env").write_text("mine")
    checkpoint.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", checkpoint.FOLDER]
    assert [path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()] == [keep.name]


def test_after_an_error_nothing_more_is_written_until_it_is_taken(tmp_path: Path) -> None:
    background = Background()
    (tmp_path / checkpoint.FOLDER).write_text("a file where a directory must be")
    write(checkpoint.path_of(tmp_path, 1), background)
    assert isinstance(background.take_error(), OSError)
    assert not background.failed
    (tmp_path / checkpoint.FOLDER).unlink()
    write(checkpoint.path_of(tmp_path, 2), background)
    assert background.take_error() is None
    Checkpoint(checkpoint.path_of(tmp_path, 2)).check(SHAPES)


def test_what_waits_to_be_written_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.saving.background.IN_FLIGHT", 100)
    background, go = Background(), threading.Event()
    background.submit(lambda: go.wait() and None, 90)
    third = threading.Thread(target=lambda: background.submit(lambda: None, 20))
    third.start()
    third.join(0.2)
    assert third.is_alive()  # 110 bytes would be held
    go.set()
    third.join(20)
    assert not third.is_alive()


def test_a_slow_disk_holds_up_no_step_and_one_save_ends_before_the_next_begins(tmp_path: Path) -> None:
    background, go = Background(), threading.Event()
    seen: list[set[str]] = []
    background.submit(lambda: go.wait() and None)  # the disk takes nothing
    for step in (1, 2):
        write(checkpoint.path_of(tmp_path, step), background)  # comes back all the same
        background.submit(lambda: seen.append({path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()}))
    assert not list(tmp_path.iterdir())
    go.set()
    assert background.take_error() is None
    assert seen == [{"step-000001"}, {"step-000001", "step-000002"}]


def test_every_byte_that_is_hashed_is_told(whole: Path) -> None:
    read: list[int] = []
    found = Checkpoint(whole)
    found.check(SHAPES, read.append)
    there = [path.stat().st_size for path in whole.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert sum(read) == found.bytes == sum(there)


def test_the_manifest_says_what_is_there(whole: Path) -> None:
    told = json.loads((whole / "manifest.json").read_text())["files"]
    there = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert set(told) == there - {"manifest.json"}
