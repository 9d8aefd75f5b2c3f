"""What a run tells, and where."""

import json
import math
import os
import resource
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.program.errors import UserError
from train.config.train import LoggingConfig
from train.history import History, StepRecord, finite
from train.lora.proof import Movement
from train.model.routing import Routing
from train.reporting.metrics import Metrics, _keep_lines
from train.saving.result import show_movements


def record(step: int, *, loss: float = 2.0, applied: bool = True) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        learning_rate=1e-3,
        gradient_norm=0.5,
        applied=applied,
        load_balancing_loss=2.0,
        tokens=100,
        supervised_tokens=60,
        seconds=0.5,
        epoch=step / 4,
        flops=3e9,
    )


def lines(directory: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]


def test_every_nth_step_the_last_and_every_refused_one_are_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LoggingConfig(every=3, wandb="off", progress=False), {}, is_main=True)
    with metrics.progress(7, done=0):
        for step in range(1, 8):
            bad = step == 5
            rows = [10 * step, None]
            metrics.stepped(
                record(step, loss=float("nan") if bad else 2.0, applied=not bad), "refused" if bad else None, rows
            )
    metrics.close()
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [3, 5, 6, 7]
    assert written[1]["loss"] == "nan"
    assert written[0]["tokens_per_second"] == 200
    assert (written[1]["wrong"], written[1]["rows"]) == ("refused", [50])  # with the rows that did it
    assert "rows" not in written[0]
    assert written[0]["flops_per_second"] == 6e9
    assert "share_of_peak" not in written[0]  # nobody knows it of a CPU
    assert (written[0]["epoch"], written[0]["seconds"], written[0]["load_balancing_loss"]) == (0.75, 0.5, 2.0)


def test_what_stands_beside_the_plan_are_medians_without_the_first_step(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LoggingConfig(wandb="off", progress=False), {}, is_main=True)
    assert set(metrics.measured()) == {"memory_gib"}
    for step, seconds in enumerate((90.0, 2.0, 4.0, 3.0), 1):
        metrics.stepped(replace(record(step), seconds=seconds), None, [])
    measured = metrics.measured()
    assert (measured["seconds"], measured["tokens_per_second"]) == (3.0, pytest.approx(100 / 3))
    metrics.close()


def test_a_spike_says_how_to_see_its_rows(
    run_program: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a command that can be pasted, and that shows the rows of the step."""
    rows = [{"instruction": f"Say {n}.", "output": str(n)} for n in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = ("packing=false", "eval_fraction=0")
    assert run_program("data", "files=[rows.json]", "output=my data", *settings).exit_code == 0
    metrics = Metrics(tmp_path, LoggingConfig(wandb="off", progress=False), {"dataset": "my data"}, is_main=True)
    capsys.readouterr()
    metrics.stepped(record(1, loss=9.0), "spike", [17, 3, None])
    metrics.close()
    said = "".join(capsys.readouterr())
    assert len(said.splitlines()) == 1
    command = shlex.split(said[said.index("python -m data") :])
    assert command[:3] == ["python", "-m", "data"]
    outcome = run_program("data", *command[3:])
    assert [line.split(":")[0] for line in outcome.stdout.splitlines() if line.startswith("row ")] == [
        "row 17",
        "row 3",
    ]


def test_numbers_that_json_does_not_know_come_back_from_a_checkpoint() -> None:
    history = History()
    history.last = record(1, loss=math.nan, applied=False)
    history.evaluations[1] = math.inf
    resumed = History(json.loads(json.dumps(history.state(), allow_nan=False)))
    assert resumed.last is not None
    assert math.isnan(resumed.last.loss)
    assert resumed.last.learning_rate == 1e-3
    assert resumed.evaluations == {1: math.inf}
    former = {("router_balance" if n == "load_balancing_loss" else n): v for n, v in history.state()["last"].items()}
    del former["epoch"]
    older = History({"last": former}).last  # as checkpoints named it
    assert older is not None
    assert (older.load_balancing_loss, older.step) == (2.0, 1)
    assert finite({"a": [1.0, math.nan, (math.inf,)]}) == {"a": [1.0, "nan", ["inf"]]}


def test_the_progress_bar_shows_how_the_run_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.reporting.metrics.console.width", 120)
    metrics = Metrics(tmp_path, LoggingConfig(wandb="off"), {}, is_main=True, peak=12e9)
    with metrics.progress(2, done=0):
        metrics.stepped(record(1), None, [])
        metrics.stepped(replace(record(2), tokens=290), None, [])
    metrics.evaluated(2, 1.25)
    metrics.close()
    told = capsys.readouterr().err
    assert "2/2 steps" in told
    # the step before counts nine tenths: (0.9 · 100 + 290) tokens in (0.9 + 1) · 0.5 s
    assert "loss 2.000  400 tokens/s  50% of peak  epoch 0.50  lr 1.0e-03  norm 0.5" in told
    assert "step 2: evaluation loss 1.2500" in told
    assert [line["share_of_peak"] for line in lines(tmp_path) if "loss" in line] == [0.5, 0.5]


def test_other_processes_tell_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, LoggingConfig(), {}, is_main=False)
    with metrics.progress(1, done=0):
        metrics.stepped(record(1), None, [])
        metrics.evaluated(1, 1.0)
    metrics.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_routers_go_to_the_file_by_layer_and_movement_to_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(tmp_path, LoggingConfig(wandb="off", progress=False), {}, is_main=True)
    metrics.routed(3, Routing.none(torch.Size((2, 4))))
    metrics.close()
    (line,) = lines(tmp_path)
    assert line["step"] == 3
    assert len(line["expert_load"]) == len(line["router_entropy"]) == len(line["load_balancing_loss_by_layer"]) == 2
    assert len(line["unused_experts"]) == 8

    # An expert of rank 0 has nothing that could move, and one that stood still is counted.
    show_movements([Movement(1, "down_proj", (4, 4, 0, 4), [0.25, 0.0, 0.0, 3.0])])
    shown = capsys.readouterr().err
    for part in ("down_proj", "0 (1, 1)", "0.25", "3 (1, 3)", "2 of 3"):
        assert part in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_a_run_that_goes_on_keeps_the_lines_up_to_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = LoggingConfig(wandb="off", progress=False)
    history = History()
    first = Metrics(tmp_path, quiet, {}, is_main=True)
    with first.progress(9, done=0):
        first.evaluated(0, 3.0)
        for step in (1, 2):
            first.stepped(record(step), None, [])
        first.evaluated(2, 2.5)
        history.evaluations |= {0: 3.0, 2: 2.5}
        history.last = record(2)
        state = json.loads(json.dumps(history.state() | first.state()))
        first.saved(2, 0.1, 0.2)
        first.evaluated(1, 2.7)  # after the checkpoint: it will be made again
        first.stepped(record(3), "spike", [1])
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # as a kill leaves it

    second = Metrics(tmp_path, quiet, {}, is_main=True, resumed=state)
    resumed = History(state)
    assert (resumed.evaluations, resumed.last) == ({0: 3.0, 2: 2.5}, record(2))
    assert resumed.state() | second.state() == state
    second.stepped(record(3), None, [])
    second.close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 2, 2, 3]
    assert "step 3: loss 2.000 is far above" in capsys.readouterr().err


def test_a_resumed_run_is_the_same_one_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = LoggingConfig(wandb="offline", progress=False)
    first = Metrics(tmp_path, config, {}, is_main=True)
    state = first.state()
    first.close()
    assert state["wandb"]
    without = Metrics(tmp_path, LoggingConfig(wandb="off", progress=False), {}, is_main=True, resumed=state)
    assert without.state() == state  # a launch without wandb does not forget it
    without.close()
    for resumed in (json.loads(json.dumps(state)), None):
        metrics = Metrics(tmp_path, config, {}, is_main=True, resumed=resumed)
        assert (metrics.state()["wandb"] == state["wandb"]) == (resumed is not None)
        metrics.close()
    stored = [path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert stored.count(state["wandb"]) >= 1
    assert len(set(stored)) == 2


def test_a_new_run_keeps_no_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "evaluation_loss": 1}\n{"step": 1}\n')
    Metrics(tmp_path, LoggingConfig(wandb="off", progress=False), {}, is_main=True).close()
    assert lines(tmp_path) == []


def test_routers_go_to_wandb_by_layer_with_the_numbers_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []

    class Run:
        id = "1"

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values))

        def close(self, within: float) -> None:
            pass

    monkeypatch.setattr("train.reporting.metrics.Wandb", lambda *_: Run())
    torch.manual_seed(0)
    metrics = Metrics(tmp_path, LoggingConfig(wandb="offline", progress=False), {}, is_main=True)
    logits = tuple(torch.randn(9, 4) - 99 * (torch.arange(4) == 2) for _ in range(3))  # nobody chooses expert 2
    targets, is_token = torch.arange(9), torch.ones(9, dtype=torch.bool)
    metrics.routed(7, Routing.of(logits, 2, torch.arange(9), targets, is_token))
    metrics.close()

    (line,), ((step, values),) = lines(tmp_path), logged
    expected = {f"routers/router_entropy/layer_{layer}": line["router_entropy"][layer] for layer in range(3)}
    balance = line["load_balancing_loss_by_layer"]
    expected |= {f"routers/load_balancing_loss/layer_{layer}": balance[layer] for layer in range(3)}
    expected |= {
        f"routers/expert_load/layer_{layer}/expert_{expert}": line["expert_load"][layer][expert]
        for layer in range(3)
        for expert in range(4)
    }
    assert line["unused_experts"] == [[layer, 2] for layer in range(3)]
    assert (step, values) == (7, expected | {"routers/unused_experts": 3})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Any]]:
    """Within `disk(n)`, metrics.jsonl takes n bytes more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def with_room_for(count: int) -> Iterator[None]:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + count, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield with_room_for
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_that_the_disk_has_no_room_for_come_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], disk: Callable[[int], Any]
) -> None:
    metrics = Metrics(tmp_path, LoggingConfig(wandb="off", progress=False), {}, is_main=True)
    metrics.stepped(record(1), None, [])
    metrics.sync()
    with disk(20):
        for step in (2, 3):
            metrics.stepped(record(step), None, [])
        metrics.routed(3, Routing.none(torch.Size((2, 4))))
        metrics.saved(3, 0.1, 0.2)
        metrics.sync()
        assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[1].startswith(b'{"step": 2')  # a part of it
    assert capsys.readouterr().err.count("metrics.jsonl can't be written (File too large)") == 1
    metrics.stepped(record(4), None, [])
    metrics.sync()
    with disk(0):
        metrics.evaluated(4, 2.0)
        metrics.sync()
    metrics.sync()  # and no checkpoint knows more than the lines
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 3, 3, 4, 4]
    assert capsys.readouterr().err.count("can't be written") == 1
    with disk(0):
        metrics.evaluated(5, 2.0)
        metrics.close()
    assert len(lines(tmp_path)) == 7


def test_only_so_many_lines_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Callable[[int], Any]) -> None:
    monkeypatch.setattr("train.reporting.lines.UNWRITTEN", 1000)
    metrics = Metrics(tmp_path, LoggingConfig(wandb="off", progress=False), {}, is_main=True)
    with disk(10):
        for step in range(100):
            metrics.stepped(record(step), None, [])
        metrics.sync()
    metrics.close()
    assert 2 <= len(lines(tmp_path)) <= 5  # whole ones


def test_what_can_not_hold_lines_is_refused_before_training(tmp_path: Path) -> None:
    quiet = LoggingConfig(wandb="off", progress=False)
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"its metrics.jsonl is not a regular file; remove it"):
        Metrics(tmp_path, quiet, {}, is_main=True)
    with pytest.raises(UserError, match=r"its metrics.jsonl can't be written \(No such file or directory\)"):
        Metrics(tmp_path / "gone", quiet, {}, is_main=True)


def test_what_a_link_leads_to_stays_as_it_is(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text('{"step": 1, "loss": 2.0}\n')
    os.utime(elsewhere, (1, 1))
    (tmp_path / "metrics.jsonl").symlink_to(elsewhere)
    _keep_lines(tmp_path / "metrics.jsonl", 0, {})
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (elsewhere.read_text(), elsewhere.stat().st_mtime) == ('{"step": 1, "loss": 2.0}\n', 1)


def test_the_disk_is_asked_to_keep_the_lines_and_their_name(
    tmp_path: Path, on_disk: list[tuple[Path, set[str]]]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 2.0}\n')
    _keep_lines(tmp_path / "metrics.jsonl", 1, {})
    assert on_disk == [(tmp_path / ".metrics.jsonl.tmp", set()), (tmp_path, {"metrics.jsonl"})]
