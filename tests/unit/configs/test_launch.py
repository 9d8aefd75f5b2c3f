"""How many cores and threads a process takes: what binds it, its container's quota, OMP_NUM_THREADS."""

import math
import os
from pathlib import Path

import pytest

from configs.program import launch


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups, in place of this machine's."""
    monkeypatch.setattr(launch, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(launch, "OWN_CGROUPS", tmp_path / "own")
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


def say(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_a_quota_all_cores_count(groups: Path) -> None:
    assert launch.cores() == 8  # no control groups at all
    (groups / "own").write_text("0::/a/b\n")
    say(groups / "cgroup" / "a" / "b", cpu__max="max 100000")
    assert launch.cores() == 8


@pytest.mark.parametrize(("quota", "cores"), [("300000", 3), ("250000", 2), ("50000", 1), ("1600000", 8)])
def test_a_quota_of_version_2(groups: Path, quota: str, cores: int) -> None:
    (groups / "own").write_text("0::/a/b\n")
    say(groups / "cgroup" / "a", cpu__max=f"{quota} 100000")
    say(groups / "cgroup" / "a" / "b", cpu__max="max 100000")
    assert launch.cores() == cores


def test_a_quota_where_the_groups_own_path_is_not_mounted(groups: Path) -> None:
    (groups / "own").write_text("0::/docker/abc\n")
    say(groups / "cgroup", cpu__max="200000 100000")
    assert launch.cores() == 2


def test_a_quota_of_version_1(groups: Path) -> None:
    (groups / "own").write_text("5:cpuset:/\n4:cpu,cpuacct:/job\n0::/\n")
    say(groups / "cgroup" / "cpu,cpuacct" / "job", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert launch._quota(groups / "cgroup", groups / "own") == math.inf
    say(groups / "cgroup" / "cpu,cpuacct" / "job", cpu__cfs_quota_us="150000", cpu__cfs_period_us="50000")
    assert launch.cores() == 3


@pytest.mark.parametrize(
    ("variable", "processes", "threads"),
    [(None, None, 8), (None, "3", 2), (None, "16", 1), ("5", "2", 5), ("4,2", None, 4), ("0", "2", 4), ("x", "2", 4)],
)
def test_threads(
    groups: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, processes: str | None, threads: int
) -> None:
    for name, value in (("OMP_NUM_THREADS", variable), ("LOCAL_WORLD_SIZE", processes)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert launch.threads() == threads
