"""Files and directories are whole or not there, whenever the process is killed; the directory is a prepared dataset."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.program.errors import UserError
from data.disk import files
from data.disk.files import lock, occupied, open_alone, remove, replace_file, staging
from data.prepared.dataset import PreparedDataset
from data.prepared.layout import LAYOUT, MANIFEST, MANIFEST_KIND
from data.stages import writing
from data.stages.writing import publish
from tests.support.killing import killed_at_every_change

ROOT = Path(__file__).parents[4]
KILLS = 8


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / MANIFEST).read_text())  # type: ignore[no-any-return]


def as_told(directory: Path) -> bool:
    """Whether every file has the contents that the manifest names, and there is no other."""
    import hashlib

    told = manifest_of(directory)["files"]
    there = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST}
    return told.keys() == there.keys() and all(
        hashlib.sha256(path.read_bytes()).hexdigest() == told[name]["sha256"] for name, path in there.items()
    )


# Killed at random moments


def command(rows: Path, output: Path, seed: int) -> list[str]:
    settings = [f"files=[{rows}]", f"output={output}", "seq_len=128", f"seed={seed}", "workers=2"]
    return [sys.executable, "-m", "data", *settings]


def test_killing_it_at_random_moments_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out"
    line = json.dumps({"instruction": "Count to {}.", "output": "one two three four five"})
    rows.write_text("".join(line.replace("{}", str(n)) + "\n" for n in range(6000)))
    started = time.monotonic()
    subprocess.run(command(rows, output, 0), cwd=ROOT, check=True, capture_output=True)
    whole_run = time.monotonic() - started
    rng = random.Random(0)
    seeds = [0]
    for seed in range(1, KILLS + 1):
        process = subprocess.Popen(command(rows, output, seed), cwd=ROOT, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, whole_run))
        process.send_signal(signal.SIGKILL)
        process.wait()
        PreparedDataset(output)
        assert as_told(output)
        seeds.append(manifest_of(output)["seed"])
        assert seeds[-1] in (seeds[-2], seed)
    # The next run takes away what the killed ones left.
    subprocess.run(command(rows, output, KILLS + 1), cwd=ROOT, check=True, capture_output=True)
    assert manifest_of(output)["seed"] == KILLS + 1
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out"}


# Killed at every change


def dataset(directory: Path, number: int) -> Path:
    (directory / "train").mkdir(parents=True)
    (directory / "train" / "rows.arrow").write_bytes(bytes([number]) * 1000)
    return directory


def manifest(number: int) -> dict[str, Any]:
    return {"kind": MANIFEST_KIND, "layout": LAYOUT, "number": number}


def every_change(directory: Path) -> int:
    """Publishes over and over, killed one change of the disk later each time; returns how many there are."""
    place = directory / "out"

    def publish_number(number: int) -> None:
        with staging(place, setting="output") as temporary:
            publish(dataset(temporary / "dataset", number), place, manifest(number))

    publish_number(0)
    modules = (writing.__file__, files.__file__)
    killed = killed_at_every_change(directory, lambda frame: frame.f_code.co_filename in modules, publish_number)
    for number, was_killed in enumerate(killed, 1):
        assert as_told(place)
        assert manifest_of(place)["number"] <= number
        if not was_killed:
            assert manifest_of(place)["number"] == number
            assert [path.name for path in directory.iterdir()] == ["out"]
    return number - 1


def test_killing_it_at_every_change_of_publishing_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    # In a process without threads, as it forks.
    command = [sys.executable, "-m", "tests.unit.data.disk.test_files", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5


# Changing places


def test_a_file_system_that_cannot_exchange_gets_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

    monkeypatch.setattr("ctypes.CDLL", Libc)
    place = tmp_path / "out"
    for number in (1, 2):
        with staging(place, setting="output") as temporary:
            publish(dataset(temporary / "dataset", number), place, manifest(number))
    assert manifest_of(place)["number"] == 2
    assert as_told(place)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Without a staging directory around it, nothing of the old one is left either.
    files.publish(dataset(tmp_path / "new", 3), place)
    assert (place / "train" / "rows.arrow").read_bytes() == bytes([3]) * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Single files


def test_a_file_is_forced_to_the_disk_before_its_name_is(tmp_path: Path, on_disk: list[tuple[Path, set[str]]]) -> None:
    replace_file(tmp_path / "a.txt", [b"one", b"two"])
    assert on_disk == [(tmp_path / ".a.txt.tmp", set()), (tmp_path, {"a.txt"})]
    assert (tmp_path / "a.txt").read_bytes() == b"onetwo"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_cannot_be_written_is_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, [b"new"])
    assert path.read_bytes() == b"old"


def test_what_is_removed_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = dataset(tmp_path / "out", 1)
    dataset(tmp_path / ".out.old", 2)  # of a removal that was killed
    names: list[str] = []
    rmtree = shutil.rmtree

    def noting(path: Path, **settings: Any) -> None:
        names.append(f"{path.name} {directory.exists()}")
        rmtree(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", noting)
    remove(directory)
    assert names == [".out.old True", ".out.old False"]
    assert list(tmp_path.iterdir()) == []


# Locks and questions


def test_a_lock_is_held_once_and_goes_with_its_descriptor(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert lock(first)
    assert not lock(second)
    os.close(first)
    assert lock(second)
    os.close(second)


@pytest.mark.parametrize("content", [None, "", "kept\n"])
def test_what_a_link_leads_to_is_not_written_by_who_appends(tmp_path: Path, content: str | None) -> None:
    target, link = tmp_path / "elsewhere", tmp_path / "journal"
    if content is not None:
        target.write_text(content)
    link.symlink_to(target)
    with pytest.raises(UserError, match=r"output: .*journal is a link; remove it, or name another"):
        open_alone(link, setting="output")
    assert (target.read_text() if target.exists() else None) == content


def test_what_is_at_a_path(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not occupied(out, [])
    out.mkdir()
    assert not occupied(out, [])
    (out / "b" / "c").mkdir(parents=True)
    assert occupied(out, [], deep=True).names == []  # folders hold nothing by themselves
    (out / "b" / "c" / "rows").touch()
    (out / "a").touch()
    assert occupied(out, []).names == ["a", "b"]
    assert occupied(out, [], deep=True).names == ["a", "b/c/rows"]
    assert occupied(out, []).foreign({"a"}) == "b"
    assert occupied(out, []).foreign({"a", "b"}) is None
    assert occupied(out / "a", []).is_file
    assert occupied(out / "a", [])
    (tmp_path / "link").symlink_to(out)
    for needed in (out, out / "b" / "c" / "rows", tmp_path / "link" / "a"):
        assert occupied(out, [needed]).needed
        assert occupied(tmp_path / "link", [needed]).needed
    assert not occupied(out, [tmp_path, tmp_path / "outside"]).needed
    assert not occupied(tmp_path / "no", [tmp_path / "no" / "base"]).needed  # nothing is there to be replaced
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="Symlink loop"):
        occupied(tmp_path / "round", [])


def test_the_working_directory_is_always_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert occupied(tmp_path / "a", []).needed
    assert not occupied(tmp_path / "a" / "b" / "c", []).needed


def test_a_reader_keeps_what_it_opened(run_program: Callable[..., Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    for word in ("old", "new"):
        rows.write_text(json.dumps([{"instruction": f"{word} {n}", "output": word * 9} for n in range(50)]))
        assert run_program("data", "files=[rows.json]", "output=out", "seq_len=64").exit_code == 0
        if word == "old":
            reader = PreparedDataset(tmp_path / "out")
            before = [reader.train[i].ids for i in range(len(reader.train))]
    assert [reader.train[i].ids for i in range(len(reader.train))] == before
    now = PreparedDataset(tmp_path / "out").train
    assert [now[i].ids for i in range(len(now))] != before


def test_what_another_process_is_making_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "out"
    alive, dead = tmp_path / ".out.1.tmp", tmp_path / ".out.2.tmp"
    for directory in (alive, dead):
        directory.mkdir()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with staging(place, setting="output"):
        assert alive.is_dir()
        assert not dead.exists()
    os.close(lock)
    with staging(place, setting="output"):
        assert not alive.exists()


def test_a_full_disk_leaves_the_old_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "out"
    with staging(place, setting="output") as temporary:
        publish(dataset(temporary / "dataset", 1), place, manifest(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told = r"output=.*: it can't be written \(No space left on device\)"
    with pytest.raises(UserError, match=told), staging(place, setting="output") as temporary:
        publish(dataset(temporary / "dataset", 2), place, manifest(2))
    assert manifest_of(place)["number"] == 1
    assert as_told(place)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


if __name__ == "__main__":
    top = Path(sys.argv[1])
    print(every_change(top))
    shutil.rmtree(top / "out")


def test_what_cannot_be_written_is_told_by_the_callers_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run_dir="), staging(tmp_path / "file" / "x", setting="run_dir"):
        pass
