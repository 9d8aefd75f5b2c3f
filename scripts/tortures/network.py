"""A bad network between two hosts: the run is slower and exact, or ends in time and goes on exactly.

The hosts are network namespaces, the cable is a wire of ours (harness/wire.py). A network that loses, delays, reorders
or is slow, one that is silent for less than `failures.peer_timeout`, and a process that stands still for less than that
must not end a run: if one of them does, that is a wrong verdict. After a longer silence both hosts must end with exit
code 76, within the timeout and a margin, each saying whom it lost and where; then the same command must go on to the
end of the run that nothing happened to. Four processes on two hosts, with and without a copy of the shards on each
node, are cut off from each other in every phase, and go on on 1, 2, 3 and 4 processes. Needs the right to make network
namespaces.
"""

import argparse
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from configs.program.errors import UserError

from .harness.launch import Launch
from .harness.outcome import first_difference, last_checkpoint, last_step
from .harness.processes import kill
from .harness.trials import attempts, common_arguments, generator, report, require
from .harness.wire import Quality, Wire, why_not, wire
from .harness.workplace import Workplace, opened

PEER_TIMEOUT = 20.0
MARGIN = 15.0
"""Seconds on top, for a machine whose cores are busy."""
LONGEST = 900.0
"""Seconds that a run may take over a slow network."""
SETTINGS = {"failures.peer_timeout": f"{PEER_TIMEOUT:g}", "max_steps": "8", "eval_every": "4"}
SLOW = {
    "1 % is lost": Quality(loss=0.01),
    "200 ms of delay": Quality(delay=0.2),
    "10 Mbit/s": Quality(bits_per_second=10e6),
    "one packet overtakes another": Quality(delay=0.005, jitter=0.01),
}
SILENCES = (5, 30, 90)
"""Seconds."""
UNBEARABLE = r"silence of (30|90)|four cut off"
"""Names of trials that end a run."""
WRONG = "a wrong verdict"
STILL = 8.0
"""Seconds for which a process is stopped that is only slow."""
PHASES = ("forward", "backward", "update", "saving", "evaluating", "reading rows")
FOUR = {**SETTINGS, "failures.peer_timeout": "5", "global_batch": "12", "model.dtype": "float32"}
"""12 rows of a step can be divided by 1, 2, 3 and 4 processes; bfloat16 would round each number's losses otherwise."""
TRIES = 5
"""Of a trial whose phase was over before the network was."""
TOLERANCE = 1e-4
"""Of losses in float32 on another number of processes, after a few steps."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torture.py network`."""
    parser.add_argument("--rounds", type=int, default=1, help="of every trial, with other seeds (1)")
    common_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Spoils the network, resumes, compares, prints, and returns what happened."""
    if reason := why_not():
        raise UserError(f"network: {reason}; run it as root, outside of a container or in one that may make them")
    random = generator("network", options.seed)
    trials: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    with opened(options) as workplace:
        for number in range(options.rounds):
            seed, of_round = random.randrange(1 << 30), f"round {number}"
            for stage in ("zero2", "zero3"):
                for name, quality in SLOW.items():
                    trials.append((f"{name}, {stage}, {of_round}", partial(slow, workplace, seed, quality, stage)))
            for seconds in SILENCES:
                trials.append((f"silence of {seconds} s, {of_round}", partial(silence, workplace, seed, seconds)))
            trials.append((f"a process stands still, {of_round}", partial(still, workplace, seed, random.randrange(2))))
            for copies in ("false", "true"):
                for phase in PHASES:
                    trial = partial(cut, workplace, seed, phase, copies)
                    trials.append((f"four cut off in {phase}, node copy {copies}, {of_round}", trial))
        figures = report("A bad network", attempts(options, trials), options.seed)
        slower = [trial for trial in figures["trials"] if not re.match(UNBEARABLE, trial["trial"])]
        wrong = sum(WRONG in (trial["failed"] or "") for trial in slower)
        figures |= {"runs_that_are_only_slower": len(slower), "wrong_verdicts": wrong}
        print(f"{wrong} wrong verdicts in {len(slower)} runs that had only to be slower")
        workplace.keep = bool(figures["failed"])
    return figures


def slow(workplace: Workplace, seed: int, quality: Quality, stage: str) -> dict[str, Any]:
    """A run over a network of that quality from its beginning to its end."""
    settings = SETTINGS | {"deepspeed": stage}
    whole = workplace.reference(2, **settings)
    with wire(seed) as between:
        between.quality = quality
        launch = workplace.launch(_new(workplace, "slow"), 2, namespaces=between.names, **settings)
        return _borne(launch, whole, between)


def silence(workplace: Workplace, seed: int, seconds: float) -> dict[str, Any]:
    """The network is silent for some seconds after the first step."""
    whole = workplace.reference(2, **SETTINGS)
    run = _new(workplace, "silence")
    with wire(seed) as between:
        launch = workplace.launch(run, 2, namespaces=between.names, **SETTINGS)
        require(launch.until(lambda: last_step(run) >= 1), f"it ended early:\n{launch.said()}")
        between.quality = Quality(silent=True)
        if seconds < PEER_TIMEOUT:
            time.sleep(seconds)
            between.quality = Quality()
            return _borne(launch, whole, between)
        took = _ends(launch, PEER_TIMEOUT, max(seconds, PEER_TIMEOUT + MARGIN))
        for rank in range(2):
            # Where it was is as old as its last beat: a process may have come from its start into a step since.
            told = rf"train: process {rank} has not been heard of for {PEER_TIMEOUT:g} s .* in (step \d+|its start) \("
            require(re.search(told, launch.said()), f"it does not say that process {rank} is lost:\n{launch.said()}")
        between.quality = Quality()
        resumed = _goes_on(workplace, run, whole, 2, namespaces=between.names, **SETTINGS)
    return {"ended_after_seconds": took, "resumed_after": resumed}


def still(workplace: Workplace, seed: int, rank: int) -> dict[str, Any]:
    """A process that is stopped for a while, twice."""
    whole = workplace.reference(2, **SETTINGS)
    run = _new(workplace, "still")
    with wire(seed) as between:
        launch = workplace.launch(run, 2, namespaces=between.names, **SETTINGS)
        require(launch.until(lambda: last_step(run) >= 1), f"it ended early:\n{launch.said()}")
        pid = launch.ranks()[rank]
        for _ in range(2):
            kill(pid, signal.SIGSTOP)
            time.sleep(STILL)
            kill(pid, signal.SIGCONT)
            time.sleep(1)
        return _borne(launch, whole, between)


def cut(workplace: Workplace, seed: int, phase: str, copies: str) -> dict[str, Any]:
    """Four processes on two hosts that lose each other in a phase; then on each number of processes to the end.

    If the phase was over before the network was, it is tried again.
    """
    settings = FOUR | {"deepspeed.node_copy": copies}
    calm = settings | {"failures.peer_timeout": SETTINGS["failures.peer_timeout"]}  # of runs that nothing happens to
    whole = workplace.reference(4, nodes=2, **calm)
    with wire(seed) as between:
        launch, where = _cut_off(workplace, between, phase, settings)
        tries = 1
        while where[1] != phase and tries < TRIES:
            launch.end()
            between.quality = Quality()
            launch, where = _cut_off(workplace, between, phase, settings)
            tries += 1
        require(where[1] == phase, f"it was cut off in {where} in the last of {tries} tries")
        run = launch.run
        took = _ends(launch, float(settings["failures.peer_timeout"]), 60)
        for lost, last in (("processes 2 and 3 have", "process [23]"), ("process 0 has", "it")):
            told = f"train: {lost} not been heard of for 5 s .*; {last} was last in step"
            require(re.search(told, launch.said()), f"the other host does not say that {lost}:\n{launch.said()}")
        between.quality = Quality()
        last = last_checkpoint(run)
        for number in (1, 2, 3):
            copy = workplace.copy(run, f"{run.name}-on-{number}")
            workplace.finish(copy, number, **calm | {"deepspeed.node_copy": "false"})
            _about_the_same(copy, whole)
            shutil.rmtree(copy)
        resumed = _goes_on(workplace, run, whole, 4, namespaces=between.names, **calm)
    found = {"step": where[0], "phase": where[1], "tries": tries}
    return found | {"ended_after_seconds": took, "resumed_after": resumed, "last_checkpoint": last}


def _cut_off(
    workplace: Workplace, between: Wire, phase: str, settings: dict[str, str]
) -> tuple[Launch, tuple[int, str]]:
    """A launch whose hosts lose each other as soon as process 2 is in the phase, and where that was when they had."""
    run = _new(workplace, "cut")
    launch = workplace.launch(run, 4, namespaces=between.names, **settings)
    require(launch.until(lambda: last_step(run) >= 2), f"it ended early:\n{launch.said()}")
    read = launch.position(2)
    require(read, "process 2 has no guardian")
    assert read is not None
    while launch.running and read()[1] != phase:
        time.sleep(0.0005)
    between.quality = Quality(silent=True)
    return launch, read()


def _new(workplace: Workplace, name: str) -> Path:
    return workplace.scratch / f"{name}-{time.monotonic_ns()}"


def _borne(launch: Launch, whole: Path, between: Wire) -> dict[str, Any]:
    """What came of a run that had only to be slower."""
    codes = launch.wait(LONGEST)
    seconds = time.monotonic() - launch.started
    require(76 not in codes, f"{WRONG}:\n{launch.said()}")
    require(not any(codes), f"it ended with {codes}:\n{launch.said()}")
    difference = first_difference(launch.run, whole)
    require(not difference, str(difference))
    return {"seconds": seconds, "packets": between.carried}


def _ends(launch: Launch, timeout: float, silent: float) -> float:
    """How long it took until no process was left, of a run whose hosts lose each other for `silent` seconds."""
    began = time.monotonic()
    launch.wait_for_none_left(timeout + MARGIN)
    took = time.monotonic() - began
    codes = launch.wait()
    require(set(codes) == {76}, f"it ended with {codes}:\n{launch.said()}")
    time.sleep(max(0.0, silent - took))
    return took


def _goes_on(
    workplace: Workplace, run: Path, whole: Path, processes: int, *, namespaces: tuple[str, ...], **settings: str
) -> int:
    """The same command again, to the end; the step after which it resumed."""
    last = last_checkpoint(run)
    resumed = workplace.finish(run, processes, namespaces=namespaces, **settings).resumed_step
    require(resumed == last, f"it went on after step {resumed}, not {last}")
    difference = first_difference(run, whole)
    require(not difference, str(difference))
    return last


def _about_the_same(run: Path, whole: Path) -> None:
    """The same losses but for rounding."""
    ours, theirs = (
        [line for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
        for run_dir in (run, whole)
    )
    require([line["step"] for line in ours] == [line["step"] for line in theirs], f"{run}: it took other steps")
    for mine, other in zip(ours, theirs, strict=True):
        apart = abs(mine["loss"] - other["loss"])
        require(apart <= TOLERANCE, f"{run}: step {mine['step']} has a loss that is {apart} from that of {whole}")
