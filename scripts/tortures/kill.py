"""SIGKILL at random points of runs that save often, and resume, until each run is finished.

Every launch of a run but its last serves one point. Its process, or with two one of them, both, or the launcher, is
killed: while it starts, in the middle of steps, while a checkpoint is written, or while the result is. The next launch
goes on. Each finished run must have the losses, gradient norms and evaluation losses of the run that nothing happened
to, and its adapter, to the last bit; no process may be left of a launch before the next one begins.

Launches with one process are forked from a server, as are four in five of those with two; the fifth is `deepspeed …`
as typed (see harness/forked.py).
"""

import argparse
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from .harness.launch import Launch
from .harness.outcome import first_difference, last_checkpoint, last_step, last_written, of_a_save
from .harness.processes import kill
from .harness.trials import FailedError, common_arguments, generator
from .harness.workplace import Workplace, opened

LEAST_INSIDE = 0.3
"""The share of points that must lie inside a save."""
ENDING = 60.0
"""Seconds after a kill within which all of a launch must have ended."""
LAUNCHER_LOST = "the launcher"
TOO_MANY = 5
"""After so many failed runs, no more are made."""

console = Console(width=120)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torture.py kill`."""
    parser.add_argument("--points", type=int, default=100, help="kills (100)")
    parser.add_argument(
        "--processes", choices=("1", "2", "both"), default="both", help="of a run; both shares the kills"
    )
    common_arguments(parser, trials=False)


@dataclass(frozen=True)
class Aim:
    """What is killed, and when."""

    moment: str
    """`start`, `step`, `save` or `result`."""
    number: int
    """Which step or save of the launch it is, from 1."""
    fraction: float
    """The share of the time that a start, a step or a save takes."""
    target: str
    """`all`, `the launcher`, or a process's rank."""
    forked: bool


@dataclass
class Point:
    """One kill."""

    run: str
    aim: Aim
    step: int
    """The last step in metrics.jsonl."""
    inside: list[str]
    """What was half-written: empty outside of saves."""
    file: str | None
    """The file among it that was written to last."""
    phase: dict[str, str]
    """By rank, in which phase a process was, according to its guardian; for runs with two."""
    exit_codes: list[int]
    seconds: float
    """From the kill until nothing was left of the launch."""
    resumed_after: int | None = None
    """The step after which a later launch went on."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Kills, compares, prints, and returns what was done."""
    shares = {"1": {1: options.points}, "2": {2: options.points}}.get(
        options.processes, {1: options.points - options.points // 2, 2: options.points // 2}
    )
    figures: dict[str, Any] = {"seed": options.seed, "failed": []}
    with opened(options) as workplace:
        for processes, count in shares.items():
            points, runs, failed = torment(workplace, processes, count, options.seed)
            figures[f"processes_{processes}"] = summary(points, runs) | {"points": [asdict(point) for point in points]}
            figures["failed"] += failed
            show(processes, points, runs, failed)
        inside = sum(figures[f"processes_{processes}"]["inside_a_save"] for processes in shares)
        if inside < int(LEAST_INSIDE * options.points):
            figures["failed"].append(f"only {inside} of {options.points} points lay inside a save")
        workplace.keep = bool(figures["failed"])
    for failed in figures["failed"]:
        console.print(f"Failed (--seed {options.seed}): {failed}", style="bold red", markup=False)
    return figures


def torment(workplace: Workplace, processes: int, count: int, seed: int) -> tuple[list[Point], int, list[str]]:
    """Kills at so many points; the runs that were finished, and what failed."""
    whole = workplace.reference(processes)
    times = Times.of(whole)
    random = generator("kill", seed, processes)
    points: list[Point] = []
    failed: list[str] = []
    finished = 0
    while len(points) < count and len(failed) < TOO_MANY:
        directory = workplace.scratch / f"killed-{processes}-{finished + len(failed)}"
        own: list[Point] = []
        try:
            while one := _launch(
                workplace, directory, processes, random, times, own, last=len(points) + len(own) >= count
            ):
                own.append(one)
            finished += 1
            if difference := first_difference(directory, whole):
                failed.append(difference)
        except (FailedError, OSError, ValueError) as error:
            failed.append(f"{directory} after {len(own)} kills: {type(error).__name__}: {error}")
            console.print(failed[-1], markup=False)
        points += own
    return points, finished, failed


@dataclass
class Times:
    """How long things take, for aiming at parts of them."""

    start: float
    step: float
    save: float

    @classmethod
    def of(cls, whole: Path) -> "Times":
        """The times of a run that nothing happened to; starting is measured later."""
        import json

        lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        steps = [line["tokens"] / line["tokens_per_second"] for line in lines if "loss" in line]
        saves = [line["checkpoint_seconds"] for line in lines if "checkpoint_seconds" in line]
        return cls(5.0, statistics.median(steps), statistics.median(saves))


def draw(random: Random, processes: int) -> Aim:
    """The next aim."""
    (moment,) = random.choices(("start", "step", "save", "result"), (0.1, 0.28, 0.54, 0.08))
    number, fraction, launched, target = random.randint(1, 4), random.random(), random.random(), random.random()
    forked = processes == 1 or launched < 0.8
    if processes == 1:
        aimed = "all"
    elif moment == "start" and forked:
        aimed = "all"  # before the guards have met, noticing another's end is the launcher's work
    elif not forked and moment in ("start", "step") and target < 0.5:
        aimed = LAUNCHER_LOST
    else:
        aimed = "0" if target < 0.4 else "1" if target < 0.8 else "all"
    return Aim(moment, number, fraction, aimed, forked)


def _launch(
    workplace: Workplace, run: Path, processes: int, random: Random, times: Times, own: list[Point], *, last: bool
) -> Point | None:
    """One launch, which is killed unless it is the `last` or ends before; None if the run is finished."""
    aim = draw(random, processes)
    before = last_checkpoint(run)
    launch = workplace.launch(run, processes, forked=last or aim.forked)
    struck = None if last else strike(launch, aim, times)
    codes = launch.wait() if struck is None else launch.wait(ENDING)
    for point in own:
        if point.resumed_after is None:
            point.resumed_after = launch.resumed_step
    if struck is None and any(codes):
        raise FailedError(f"a launch that nothing was done to ended with {codes}:\n{launch.said()}")
    launch.wait_for_none_left(ENDING)
    # It may have ended by itself in the moment before. The codes alone don't tell: if its launcher is killed,
    # `deepspeed` answers 0.
    if struck is None or (not any(codes) and (run / "receipt.json").exists()):
        return None
    began, inside, file, phase, step = struck
    check(launch, aim, codes, before)
    return Point(run.name, aim, step, sorted(inside), file, phase, codes, time.monotonic() - began)


def strike(launch: Launch, aim: Aim, times: Times) -> tuple[float, set[str], str | None, dict[str, str], int] | None:
    """Kills as aimed; when, what was half-written, phases and the last step. None if the launch ended before."""
    if aim.moment != "start":
        launch.wait_for_ranks()
        if not launch.until(lambda: launch.has_begun):
            return None
        times.start = time.monotonic() - launch.started
    readers = {rank: launch.position(rank) for rank in range(launch.count)}
    first = last_checkpoint(launch.run)
    seen: set[tuple[str, int]] = set()

    def saves() -> int:
        seen.update(entry for entry in launch.writes() if entry[0].startswith(".step-") and entry[0].endswith(".tmp"))
        return len(seen)

    def result() -> bool:
        return any(name.startswith(".adapter.") for name, _ in launch.writes())

    reached, span = {
        "start": (lambda: True, times.start),
        "step": (lambda: last_step(launch.run) >= first + aim.number, times.step),
        "save": (lambda: saves() >= aim.number, times.save),
        "result": (result, times.save),
    }[aim.moment]
    if not launch.until(reached):
        return None
    until = time.monotonic() + aim.fraction * span
    if not launch.until(lambda: time.monotonic() >= until):
        return None
    ranks, launchers = launch.ranks(), launch.launchers()
    targets = launchers[1:] if aim.target == LAUNCHER_LOST else list(ranks.values())
    if aim.target in ("0", "1"):
        targets = [ranks[int(aim.target)]] if int(aim.target) in ranks else []
    elif aim.target == "all":
        targets = launchers + targets
    if not targets or not launch.running:
        return None
    phase = {str(rank): read()[1] for rank, read in readers.items() if read}
    began = time.monotonic()
    for pid in targets:
        kill(pid)
    writes = of_a_save(launch.writes())
    if aim.target == "all":
        launch.wait(ENDING)
        writes = of_a_save(launch.writes())  # nothing moves any more
    file = last_written(launch.run, min(writes)) if writes else None
    return began, writes, file, phase, last_step(launch.run)


def check(launch: Launch, aim: Aim, codes: list[int], before: int) -> None:
    """Raises `FailedError` if a launch that was killed did not end as it should."""
    expected = {
        ("all", True): [[-9] * launch.count],
        ("0", True): [[-9, 76]],
        ("1", True): [[76, -9]],
    }.get((aim.target, launch.forked))
    finished = (launch.run / "receipt.json").exists()  # then the others may have ended before
    if expected and codes not in expected and not finished:
        raise FailedError(f"{aim}: the processes ended with {codes}, not {expected[0]}:\n{launch.said()}")
    if last_checkpoint(launch.run) < before:
        raise FailedError(f"{aim}: the checkpoint of step {before} is gone")


def summary(points: list[Point], runs: int) -> dict[str, Any]:
    """What the table shows of them."""
    files = Counter(point.file for point in points if point.inside and point.file)
    return {
        "kills": len(points),
        "inside_a_save": sum(bool(point.inside) for point in points),
        "runs_compared": runs,
        "by_moment": dict(Counter(point.aim.moment for point in points)),
        "by_target": dict(Counter(point.aim.target for point in points)),
        "by_file": dict(files),
    }


def show(processes: int, points: list[Point], runs: int, failed: list[str]) -> None:
    """Prints them."""
    table = Table("aimed at", "killed", "kills", "inside a save", title=f"SIGKILL, {processes} process(es)")
    kinds = Counter((point.aim.moment, point.aim.target) for point in points)
    inside = Counter((point.aim.moment, point.aim.target) for point in points if point.inside)
    for kind, number in sorted(kinds.items()):
        table.add_row(*kind, str(number), str(inside[kind]))
    table.add_section()
    table.add_row("", "", str(len(points)), str(sum(inside.values())))
    console.print(table)
    files = Counter(point.file for point in points if point.inside and point.file)
    console.print("Written last: " + ", ".join(f"{name} {number}" for name, number in files.most_common()))
    console.print(f"{runs} runs came to their end, {runs - len(failed)} of them identical to the last bit")
