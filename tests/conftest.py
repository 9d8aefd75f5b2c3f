"""Fixtures that tests of every folder use."""

import importlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from xdist.remote import Producer

from configs.program.console import quiet_libraries
from tests.support.hub import Hub
from tests.support.in_turn import InTurn, arrange

PROJECT_ROOT = Path(__file__).parents[1]
SHARED = PROJECT_ROOT.parent / "shared"
"""Golden files and real data that belong to no checkout; tests that need them skip where they are not."""

PROGRAMS = {"data": "data.run", "train": "train.program", "inference": "inference.run"}

# How long an example takes says nothing about whether it holds.
settings.register_profile("project", deadline=None, print_blob=True)
settings.load_profile("project")

quiet_libraries()
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores, and so does what they start: more threads than cores wait for each other, busily.
    share = max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(share)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> InTurn:
    """Instead of any that `--dist` names."""
    config.option.loadscopereorder = False
    return InTurn(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Brings the tests into the order of `InTurn`."""
    arrange(items)


def golden(name: str) -> list[Any]:
    """The rows of ../shared/golden/{name}.jsonl as parameters of a test, each with its row's name as id."""
    path = SHARED / "golden" / f"{name}.jsonl"
    if not path.is_file():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"{path} is not here"))]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [pytest.param(row, id=row["name"]) for row in rows]


@pytest.fixture
def project_root() -> Path:
    """The checkout."""
    return PROJECT_ROOT


@pytest.fixture
def shared() -> Path:
    """../shared; skips the test where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


class Outcome(NamedTuple):
    """What a program left behind."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs a program's `main` in this process and in `tmp_path`: run_program("data", "files=[x.jsonl]").

    What `python -m` adds is left to the integration tests, which start real processes.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", ""))  # set by the program; put back
    monkeypatch.setenv("COLUMNS", "200")
    for module in (sys, threading):  # set by the program; put back
        monkeypatch.setattr(module, "excepthook", module.excepthook)

    def run(program: str, *arguments: str) -> Outcome:
        main = importlib.import_module(PROGRAMS[program]).main
        monkeypatch.setattr(sys, "argv", [f"python -m {program}", *arguments])
        capsys.readouterr()
        exit_code = 0
        try:
            main()
        except SystemExit as stop:
            assert stop.code is None or isinstance(stop.code, int)
            exit_code = stop.code or 0
        finally:
            GlobalHydra.instance().clear()
        return Outcome(exit_code, *capsys.readouterr())

    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of the test's own, which this process asks, with an empty cache; waits between tries take no time."""
    from huggingface_hub import constants

    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        server.waits = []
        monkeypatch.setattr("data.disk.hub.time", SimpleNamespace(sleep=server.waits.append))
        for module in ("utils._http", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda _: None))
        yield server


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, set[str]]]:
    """What the disk is asked to keep, in its order: the path of a file or directory, and of a directory the names in it
    at that moment."""
    asked: list[tuple[Path, set[str]]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        asked.append((path, {name.name for name in path.iterdir()} if path.is_dir() else set()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return asked


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


class Live(TorchDispatchMode):
    """Notes how many bytes the tensors have at most that operations made and that are alive at the same time."""

    peak = 0

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._seen = {place: seen for place, seen in self._seen.items() if not seen[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._seen.values()))
        return out
