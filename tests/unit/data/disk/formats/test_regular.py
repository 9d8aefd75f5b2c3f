"""A file is read if it is one, and no more of it than was asked for."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data.disk.formats.regular import UnreadableError, open_regular, read_regular

OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda path: None, "No such file"),
    "pipe": (os.mkfifo, "not a regular file"),
    "directory": (Path.mkdir, "not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file|out of its directory"),
    "circle": (lambda path: path.symlink_to(path.name), "symbolic links|link to itself"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("linked", [True, False])
def test_what_is_no_file_is_neither_opened_nor_waited_for(tmp_path: Path, kind: str, linked: bool) -> None:
    make, told = OTHERS[kind]
    make(tmp_path / "file")
    with pytest.raises(UnreadableError, match=told):
        open_regular(tmp_path / "file", linked=linked)


def test_a_path_that_can_be_none(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="no such path"):
        read_regular(tmp_path / "a\0b", 10)


def test_no_more_is_read_than_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5000))
    assert read_regular(tmp_path / "file", 5000) == bytes(5000)
    with pytest.raises(UnreadableError, match="larger than"):
        read_regular(tmp_path / "file", 4999)


def test_a_file_of_the_kernel_that_has_no_size_is_read_to_the_bound() -> None:
    with pytest.raises(UnreadableError, match="larger than"):
        read_regular(Path("/proc/self/maps"), 10)


def test_a_link_out_of_the_directory_is_refused_unless_it_may(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "inside").write_text("y")
    (tmp_path / "model" / "out").symlink_to("../outside")
    (tmp_path / "model" / "in").symlink_to("inside")
    assert read_regular(tmp_path / "model" / "in", 10) == b"y"
    assert read_regular(tmp_path / "model" / "out", 10, linked=True) == b"x"
    with pytest.raises(UnreadableError, match="out of its directory"):
        read_regular(tmp_path / "model" / "out", 10)


def test_the_blobs_of_a_hubs_cache_are_its_own(tmp_path: Path) -> None:
    repository = tmp_path / "models--user--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "abc").write_text("x")
    (tmp_path / "other").write_text("secret")
    snapshot = repository / "snapshots" / "1" / "sub"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../../blobs/abc")
    (snapshot / "stolen.json").symlink_to(tmp_path / "other")
    assert read_regular(snapshot / "config.json", 10) == b"x"
    with pytest.raises(UnreadableError, match="out of its directory"):
        read_regular(snapshot / "stolen.json", 10)
