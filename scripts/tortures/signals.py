"""SIGTERM and SIGINT to one process, to all with skew, to what started them: saved at the same step, and resumed.

The steps are long enough for the skew to fall within one. After the first signal both processes must finish the same
step, save and leave with exit code 75, and the next launch must go on to the end of the run that nothing happened to.
A second signal must end its process at once, and `failures.grace` must bound how long a step may still take.

wandb logs offline meanwhile, by a process of its own, which some of the signals end as well. Ended alone, or stopped,
it must change nothing.
"""

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from .harness.launch import Launch
from .harness.outcome import check_newest, first_difference, last_checkpoint, last_step
from .harness.processes import kill
from .harness.trials import attempts, common_arguments, generator, report, require
from .harness.workplace import Workplace, opened

WANDB = {"logging.wandb": "offline"}
"""For the runs that get signals; those to compare with take the same steps without."""
LONG = {"max_steps": "4", "global_batch": "24", "save_every": "0", "eval_every": "2", "epochs": "20"}
"""Steps of a second or a few."""
LONGER = {"max_steps": "3", "global_batch": "100", "save_every": "1", "eval_every": "0", "epochs": "20"}
"""Steps that outlive a second signal and a short grace period."""
PREEMPTED, TERMINATED = 75, 128 + signal.SIGTERM


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torture.py signals`."""
    parser.add_argument("--trials", type=int, default=20, help="of signals that ask once (20)")
    common_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Sends signals, resumes, compares, prints, and returns what happened."""
    with opened(options) as workplace:
        figures = report(
            "Signals to runs on two processes", attempts(options, everything(options, workplace)), options.seed
        )
        workplace.keep = bool(figures["failed"])
    return figures


def everything(options: argparse.Namespace, workplace: Workplace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """All trials with their names, each drawn when the one before is over."""
    random = generator("signals", options.seed)
    for number in range(options.trials):
        way, name = ORDER[number % len(ORDER)], signal.SIGTERM if random.random() < 0.6 else signal.SIGINT
        if way == "the script" and number // len(ORDER) % 2:
            way = "the launcher of the machine"
        run_dir, after = workplace.scratch / f"asked-{number}", random.randint(1, 2)
        yield f"{name.name} to {way}", partial(asked_once, workplace, run_dir, way, name, random, after)
    yield "SIGTERM while starting", partial(while_starting, workplace, random)
    yield "SIGTERM twice to one", partial(twice, workplace, random)
    yield "SIGTERM to all, failures.grace=1", partial(out_of_grace, workplace)
    for name in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        run_dir = workplace.scratch / f"wandb-{name.name}"
        yield f"{name.name} to wandb's process", partial(wandb_alone, workplace, run_dir, name)


def to_one(launch: Launch, number: int, random: Random) -> float:
    """One of the two processes."""
    kill(launch.ranks()[random.randrange(2)], number)
    return 0.0


def to_all(launch: Launch, number: int, random: Random) -> float:
    """Both processes, one after the other."""
    first = random.randrange(2)
    ranks, skew = launch.ranks(), random.uniform(0.0, 3.0)
    kill(ranks[first], number)
    time.sleep(skew)
    if 1 - first in launch.ranks():
        kill(ranks[1 - first], number)
    return skew


def to_script(launch: Launch, number: int, random: Random) -> float:
    """scripts/launch/per_node.sh, which passes it on; `deepspeed` itself does not."""
    kill(launch.launchers()[0], number)
    return 0.0


def to_inner_launcher(launch: Launch, number: int, random: Random) -> float:
    """The process that `deepspeed` starts on every machine, and that starts the training processes."""
    kill(launch.launchers()[1], number)
    return 0.0


def to_group(launch: Launch, number: int, random: Random) -> float:
    """Signals the process group, as a terminal does: launchers, training processes and guardians at once.

    DeepSpeed's launcher then ends what the training processes have started, wandb's process too.
    """
    os.killpg(launch.group, number)
    return 0.0


Way = Callable[[Launch, int, Random], float]
WAYS: dict[str, tuple[Way, dict[str, Any]]] = {
    "one": (to_one, {"forked": True}),
    "one, under the launcher": (to_one, {"forked": False}),
    "all": (to_all, {"forked": True}),
    "the script": (to_script, {"forked": False, "by_script": True}),
    "the launcher of the machine": (to_inner_launcher, {"forked": False}),
    "the process group": (to_group, {"forked": False}),
    "the process group of one process": (to_group, {"forked": False, "processes": 1}),
}
"""What sends a signal and returns the skew in seconds, and how the run is launched for it."""
ORDER = (
    *("all", "one", "the process group", "one, under the launcher", "all"),
    *("the script", "one", "all", "the process group", "the process group of one process"),
)
"""The order in which trials take turns; every other time the machine's launcher stands in for the script."""


def asked_once(
    workplace: Workplace,
    run: Path,
    way: str,
    number: signal.Signals,
    random: Random,
    after: int,
    settings: dict[str, str] = LONG,
) -> dict[str, Any]:
    """One launch that is asked to stop in the middle of the step `after` this, and one that finishes the run."""
    send, how = WAYS[way]
    how = {"processes": 2} | how
    processes = how["processes"]
    whole = workplace.reference(processes, **settings)
    fraction = random.random()
    launch = workplace.launch(run, **how, **settings, **WANDB)
    require(launch.until(lambda: launch.has_begun and last_step(run) >= after), f"it ended early:\n{launch.said()}")
    launch.until(_after(fraction * 1.5))
    began = time.monotonic()
    skew = send(launch, number, random)
    codes = launch.wait()
    through_launcher = processes > 1 and send in (to_inner_launcher, to_group)
    launch.wait_for_none_left(30 if through_launcher else 5)  # `deepspeed` itself does not wait for them then
    took = time.monotonic() - began
    stopped = last_checkpoint(run)
    expected = {PREEMPTED}
    if through_launcher:
        expected |= {1, -number}  # DeepSpeed's own codes if it was signalled itself
    require(set(codes) <= expected, f"it ended with {codes}:\n{launch.said()}")
    require(
        f"Stopped and saved after step {stopped}" in launch.said(),
        f"it does not say after which step:\n{launch.said()}",
    )
    require("leaving at once" not in launch.said(), f"one signal counts as two:\n{launch.said()}")
    if not through_launcher:  # `deepspeed` prints one of its own
        require("Traceback" not in launch.said(), f"it prints a traceback:\n{launch.said()}")
    require(last_step(run) == stopped == check_newest(run), f"the checkpoint is that of step {stopped}")
    resumed = workplace.finish(run, processes, **settings, **WANDB).resumed_step
    require(resumed == stopped, f"it went on after step {resumed}, not {stopped}")
    difference = first_difference(run, whole)
    require(not difference, str(difference))
    return {"skew": skew, "exit_codes": codes, "seconds": took, "stopped_after": stopped, "resumed_after": resumed}


def wandb_alone(workplace: Workplace, run: Path, number: signal.Signals) -> dict[str, Any]:
    """wandb's process gets a signal in the middle of a run, which goes on without it and ends as if it had none."""
    settings = {"max_steps": "8", "global_batch": "8", "save_every": "4", "epochs": "20"}
    whole = workplace.reference(1, **settings)
    launch = workplace.launch(run, 1, **settings, **WANDB)
    launch.until(lambda: any(run.glob("wandb/*/run-*.wandb")))
    process, after = launch.wandb(), last_step(run)
    require(process is not None and after < 8, f"it ended early:\n{launch.said()}")
    assert process is not None
    process.send_signal(number)
    codes = launch.wait()
    if number == signal.SIGSTOP:
        process.kill()  # nobody else does
    launch.wait_for_none_left(5)
    require(codes == [0], f"it ended with {codes}:\n{launch.said()}")
    said = launch.said().replace(str(run), "")  # its name has wandb in it
    told = [line for line in said.splitlines() if "wandb" in line or "Traceback" in line]
    once = len(told) == 1 and told[0].startswith("wandb stopped: ")
    require(once, f"it does not say once that wandb stopped:\n{launch.said()}")
    difference = first_difference(run, whole)
    require(not difference, str(difference))
    return {"exit_codes": codes, "stopped_after": after}


def while_starting(workplace: Workplace, random: Random) -> dict[str, Any]:
    """A signal before there is anything to save: both leave at once."""
    run = workplace.scratch / "starting"
    launch = workplace.launch(run, 2, **LONG, **WANDB)
    launch.until(_after(random.uniform(0.5, 2.0)))
    began = time.monotonic()
    for pid in launch.ranks().values():
        kill(pid, signal.SIGTERM)
    codes = launch.wait()
    launch.wait_for_none_left(5)
    early = set(codes) <= {PREEMPTED, -signal.SIGTERM}  # the latter before the program listens
    require(early, f"it ended with {codes}:\n{launch.said()}")
    return {"exit_codes": codes, "seconds": time.monotonic() - began}


def twice(workplace: Workplace, random: Random) -> dict[str, Any]:
    """A second signal within a long step: the process leaves at once, and the other because of it, with its code."""
    run, rank = workplace.scratch / "twice", random.randrange(2)
    launch = workplace.launch(run, 2, **LONGER, **WANDB)
    launch.until(lambda: launch.has_begun and last_step(run) >= 1)
    launch.until(_after(0.3))
    pid = launch.ranks()[rank]
    kill(pid, signal.SIGTERM)
    launch.until(_after(1.5))  # signals within a second count as one
    require(launch.running, f"the step was over before the second signal:\n{launch.said()}")
    began = time.monotonic()
    kill(pid, signal.SIGTERM)
    codes = launch.wait()
    took = time.monotonic() - began
    launch.wait_for_none_left(5)
    require(codes == [TERMINATED] * 2, f"it ended with {codes}:\n{launch.said()}")
    return {"exit_codes": codes, "seconds": took} | _goes_on(workplace, run)


def out_of_grace(workplace: Workplace) -> dict[str, Any]:
    """A step that takes longer than the grace period is given up."""
    run = workplace.scratch / "grace"
    launch = workplace.launch(run, 2, failures__grace="1", **LONGER, **WANDB)
    launch.until(lambda: launch.has_begun and last_step(run) >= 1)
    launch.until(_after(0.3))
    began = time.monotonic()
    for pid in launch.ranks().values():
        kill(pid, signal.SIGTERM)
    codes = launch.wait()
    took = time.monotonic() - began
    launch.wait_for_none_left(5)
    require(codes == [PREEMPTED] * 2, f"it ended with {codes}:\n{launch.said()}")
    require("failures.grace=1 seconds are over" in launch.said(), f"it does not say why:\n{launch.said()}")
    return {"exit_codes": codes, "seconds": took} | _goes_on(workplace, run)


def _goes_on(workplace: Workplace, run: Path) -> dict[str, Any]:
    """The run to its end, from the checkpoint before the step that was given up."""
    whole, last = workplace.reference(2, **LONGER), last_checkpoint(run)
    resumed = workplace.finish(run, 2, **LONGER, **WANDB).resumed_step
    require(resumed == last, f"it went on after step {resumed}, not {last}")
    difference = first_difference(run, whole)
    require(not difference, str(difference))
    return {"resumed_after": resumed}


def _after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until
