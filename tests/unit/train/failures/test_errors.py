"""What errors become. One process, so the guard has nobody to tell; tests of real peers are in test_guard.py."""

import errno
import os
from collections.abc import Callable

import pytest
import torch

from configs.program.errors import UserError
from train.config.train import TrainConfig
from train.failures.errors import is_out_of_memory, reporting_errors
from train.failures.guard import EXIT_PEER_LOST, Guard


class Heard(Guard):
    """A guard of a run of two whose peers' fate the test decides; notes what it is told."""

    def __init__(self, verdict: str | None = None):
        super().__init__(0, 1)
        self.told: list[tuple[str, int]] = []
        self.verdict = verdict

    def leaving(self, reason: str, code: int, *, after: float = 0.0) -> None:
        self.told.append((reason, code))

    def verdict_within(self, seconds: float) -> str | None:
        return self.verdict


def within(guard: Guard, action: Callable[[], object]) -> None:
    with reporting_errors(guard, TrainConfig(run_dir="runs/a", micro_batch=4), process_rank=3):
        action()


def too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def fails(error: Exception) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    "action", [too_much, fails(torch.OutOfMemoryError("CUDA out of memory")), fails(MemoryError())]
)
def test_too_little_memory_is_one_sentence_with_the_knobs(
    action: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    guard = Heard()
    with pytest.raises(SystemExit) as stop:
        within(guard, action)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("train: micro_batch=4: process 3 ran out of memory")
    for knob in ("micro_batch", "seq_len", "activation_checkpointing=full", "deepspeed=zero3_offload"):
        assert knob in line
    assert guard.told == [("out of memory", 2)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_nothing_is_the_users_to_mend(number: int) -> None:
    guard = Heard()
    with pytest.raises(UserError, match=r"run_dir=runs/a: it can't be written \(.*\); checkpoints .* untouched"):
        within(guard, fails(OSError(number, os.strerror(number))))
    assert [code for _, code in guard.told] == [2]


def test_a_collective_that_failed_because_of_a_peer_leaves_no_traceback() -> None:
    broken = RuntimeError("Connection closed by peer")
    with pytest.raises(SystemExit) as stop:
        within(Heard("process 1 died"), fails(broken))
    assert stop.value.code == EXIT_PEER_LOST
    with pytest.raises(RuntimeError, match="Connection closed by peer"):  # nobody is known to be lost: a fault
        within(Heard(), fails(broken))


@pytest.mark.parametrize("error", [KeyError("w"), OSError(errno.ENOENT, "No such file"), RuntimeError("shape")])
def test_a_fault_keeps_its_traceback_and_the_others_hear_of_it(error: Exception) -> None:
    guard = Heard()
    with pytest.raises(type(error)):
        within(guard, fails(error))
    assert [code for _, code in guard.told] == [1]


def test_the_users_mistakes_pass_and_the_others_hear_of_them() -> None:
    guard = Heard()
    with pytest.raises(UserError):
        within(guard, fails(UserError("optim.lr=-1: no")))
    assert guard.told == [("optim.lr=-1: no", 2)]
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
