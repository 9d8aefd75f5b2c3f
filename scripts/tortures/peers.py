"""One of two processes is killed or stopped, in every phase of a run: the other ends in time, and says where it was.
So do the others of four, on two machines as they take it, one of each machine, with and without `deepspeed.node_copy`.

Phase and step are read from the page that each process shares with its guardian. With `failures.peer_timeout` of 5
seconds, a process whose peer is killed must end at once, and one whose peer is stopped after those; with exit code 76
and one line that names rank, step and phase. The stopped process must be gone too, and the next launch must go on to
the end of the run that nothing happened to.
"""

import argparse
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

from train.failures.guardian.guardian import KILL_AFTER

from .harness.outcome import first_difference, last_checkpoint
from .harness.processes import kill
from .harness.trials import attempts, common_arguments, generator, report, require
from .harness.workplace import Workplace, opened

PHASES = ("forward", "backward", "update", "saving", "evaluating", "reading rows")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
PEER_TIMEOUT = 5.0
MARGIN = 10.0
"""Seconds on top, for a machine whose cores are busy."""
SETTINGS = {"failures.peer_timeout": f"{PEER_TIMEOUT:g}", "eval_every": "2"}
SAID = re.compile(r"train: process (\d) (?:died in|has .* was last in) step (\d+) \(([a-z ]+)\) on \S+")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torture.py peers`."""
    parser.add_argument("--rounds", type=int, default=1, help="of every phase, killed and stopped (1)")
    common_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Kills and stops, resumes, compares, prints, and returns what happened."""
    with opened(options) as workplace:
        random = generator("peers", options.seed)
        trials = []
        for hosts, copies in ((1, ""), (2, "false"), (2, "true")):
            for number in range(options.rounds * len(PHASES) * len(SIGNALS)):
                way, phase = SIGNALS[number % 2], PHASES[number // 2 % len(PHASES)]
                rank, after = random.randrange(2 * hosts), random.randint(1, 6)
                run_dir = workplace.scratch / f"peers-{hosts}{copies}-{number}"
                trial = partial(lost, workplace, run_dir, way, rank, phase, after, hosts, copies)
                name = f"{way.name} to {rank} of {2 * hosts} in {phase}" + f", node copy {copies}" * bool(copies)
                trials.append((name, trial))
        figures = report("Processes that are killed or stopped", attempts(options, trials), options.seed)
        workplace.keep = bool(figures["failed"])
    return figures


def lost(
    workplace: Workplace,
    run: Path,
    way: signal.Signals,
    rank: int,
    phase: str,
    after: int,
    hosts: int = 1,
    copies: str = "",
) -> dict[str, Any]:
    """One launch of two processes a host that loses one in a phase, after some steps, and one that finishes the run."""
    count = 2 * hosts
    settings = SETTINGS | {"global_batch": f"{count}"} | ({"deepspeed.node_copy": copies} if copies else {})
    whole = workplace.reference(count, nodes=hosts, **settings)
    launch = workplace.launch(run, count, nodes=hosts, **settings)
    require(launch.until(lambda: launch.has_begun), f"it ended early:\n{launch.said()}")
    read = launch.position(rank)
    require(read, f"process {rank} has no guardian")
    assert read is not None
    where = (0, "")
    while launch.running and not (where[0] >= after and where[1] == phase):
        time.sleep(0.0005)  # less than any phase takes; without it a core less would train
        where = read()
    pids = launch.ranks()
    require(len(pids) == count, f"it ended early:\n{launch.said()}")
    began = time.monotonic()
    kill(pids[rank], way)
    where = read()
    others = set(range(count)) - {rank}
    while others & launch.ranks().keys() and time.monotonic() - began < PEER_TIMEOUT + MARGIN + 10:
        time.sleep(0.02)
    took = time.monotonic() - began
    bound = (0.0 if way == signal.SIGKILL else PEER_TIMEOUT) + MARGIN
    require(took <= bound, f"another process lived for {took:.1f} s:\n{launch.said()}")
    launch.wait_for_none_left(KILL_AFTER + MARGIN)
    gone = time.monotonic() - began
    codes = launch.wait()
    require(
        codes[rank] == -9 and {codes[other] for other in others} == {76},
        f"the processes ended with {codes}:\n{launch.said()}",
    )
    said = SAID.findall(launch.said())
    # The page is read a moment after the signal is sent; a process that was killed did not move on.
    told = (str(rank), str(where[0]), where[1])
    require(said == [told] * hosts, f"it says {said}, and was in {told}:\n{launch.said()}")
    last = last_checkpoint(run)
    resumed = workplace.finish(run, count, nodes=hosts, **settings).resumed_step
    require(resumed == last, f"it went on after step {resumed}, not {last}")
    difference = first_difference(run, whole)
    require(not difference, str(difference))
    return {
        "step": where[0],
        "phase": where[1],
        "exit_codes": codes,
        "other_ended_after_seconds": took,
        "all_gone_after_seconds": gone,
        "resumed_after": resumed,
    }
