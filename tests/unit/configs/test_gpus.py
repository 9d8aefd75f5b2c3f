"""What a process finds of GPUs, on machines without: devices, driver and the answers of torch are files and numbers."""

import os
from pathlib import Path

import pytest
import torch

from configs.program import gpus
from configs.program.errors import UserError
from configs.program.launch import OWN_LOCAL_RANK, local_rank

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch can use")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The files of a machine with a GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC\n")
    return {"devices": tmp_path / "dev", "driver": tmp_path / "version"}


def test_a_gpu_that_torch_cannot_use_is_told_with_driver_and_build(
    driver: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "driver 535.104.05 is here" in gpus.unusable(**driver)
    assert f"torch {torch.__version__} was built without CUDA" in gpus.unusable(**driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = gpus.unusable(**driver)
    assert "built for CUDA 13.0, can't use it (it says: " in found
    assert "install a newer driver" in found
    driver["driver"].unlink()
    assert "driver unknown" in gpus.unusable(**driver)


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_a_gpu_that_is_hidden_is_none(driver: dict[str, Path], hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpus.unusable(**driver) is None


def test_without_a_gpu_nothing_is_told(driver: dict[str, Path]) -> None:
    (driver["devices"] / "nvidia0").unlink()
    (driver["devices"] / "nvidiactl").touch()
    assert gpus.unusable(**driver) is None


def test_cuda_where_there_is_none_is_refused_with_the_reason(
    driver: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^device=cuda: torch finds no CUDA GPU here; use device=cpu"):
        gpus.check("cuda", "device")
    reason = gpus.unusable(**driver)
    monkeypatch.setattr(gpus, "unusable", lambda: reason)
    with pytest.raises(UserError, match=r"^hardware\.device=cuda: an NVIDIA GPU with driver 535\.104\.05 is here"):
        gpus.check("cuda", "hardware.device")
    gpus.check("auto", "device")
    gpus.check("cpu", "device")


@pytest.mark.parametrize(
    ("rank", "seen", "shown", "device"),
    [
        (0, 1, None, 0),
        (1, 2, None, 1),
        (1, 2, "4,7", 1),
        (0, 1, "3", 0),  # bound one to a task
        (5, 1, "3", 0),
        (1, 1, None, None),
        (2, 2, "4,7", None),
    ],
)
def test_each_process_takes_a_gpu_of_its_own(
    rank: int, seen: int, shown: str | None, device: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": str(rank)} | ({"CUDA_VISIBLE_DEVICES": shown} if shown else {}))
    if device is None:
        with pytest.raises(UserError, match=rf"^LOCAL_RANK={rank}: this process sees {seen} GPUs"):
            gpus.take_device()
        return
    assert gpus.take_device() == device
    assert os.environ["LOCAL_RANK"] == str(device)  # from which DeepSpeed takes it
    assert local_rank() == rank  # who speaks for the machine stays the same
    assert gpus.take_device() == device
    assert (OWN_LOCAL_RANK in os.environ) == (rank != device)
