"""The disk gets full at ten offsets of a save, turns read-only, hangs, or is slow: the last checkpoint is whole.

A small tmpfs is mounted as the run directory. Its size lets the first checkpoint through and ends within the second,
and so within the first and within the result. The run must end with exit code 2 and say what to do, the last good
checkpoint must be whole, and once there is space the same command must go on and end as the run that nothing happened
to.

A disk that hangs is a file system on a loop device. While a run on one or two processes writes to it, it is frozen by
`fsfreeze`; while one looks for its checkpoint, or reads that or its rows, the kernel holds back all that the device
gives. All must end with exit code 76, within `failures.disk_timeout` but for one that the kernel holds until the disk
comes back; a line must name process and path in that time, and the same command must go on. Needs the right to mount.

A disk that is slow is the same file system on a loop device, to which the kernel writes a tenth of the bytes a second
that checkpoints come with. Training must be at its last step before the first of them is on the disk. Two must never be
written at once, and the run must end as one on a fast disk, in every step; if it is asked to stop meanwhile, it must
save and go on.
"""

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from configs.program.errors import UserError
from train.saving import checkpoint

from .harness.disks import (
    ENOUGH,
    file_system,
    freezing,
    mount,
    mounted,
    silenced,
    slowed,
    why_not,
    why_not_freeze,
    why_not_silence,
    why_not_slow,
)
from .harness.launch import Launch
from .harness.outcome import check_newest, first_difference, hidden, last_checkpoint, last_step, metrics
from .harness.processes import kill
from .harness.trials import attempts, common_arguments, report, require
from .harness.workplace import STEPS, Workplace, opened

PAGE = 4096
SETTINGS = {"keep_last": "1", "save_every": "6"}
DISK_TIMEOUT = 5.0
MARGIN = 15.0
"""Seconds on top, for a machine whose cores are busy."""
BOUND = DISK_TIMEOUT + MARGIN
HANGING = {"failures.disk_timeout": f"{DISK_TIMEOUT:g}"}
READING_ROWS = "hashing base and rows"
SILENT: dict[str, set[str]] = {
    "finding the checkpoint": {"loading the base"},
    "resuming": {"restoring the checkpoint", "resuming"},
    READING_ROWS: set(),
}
"""Phases for which a disk gives nothing, each with those in which that begins: what was read since would be in memory.
For rows it is before the launch: once all have been read, training finds them in memory."""
MIDDLE = (1 << 17, 1 << 19)
"""Begin and size of the bytes that the kernel has to forget of `ROWS` rows."""
ROWS = 8000
SLOWNESS = 10
"""How many times as many bytes come between two checkpoints as a slow disk takes meanwhile."""
LATER = 1.0
"""Seconds in which it takes a checkpoint once training is at its end, so that a trial does not last for minutes."""
OTHERS = 3
"""Pages for the files beside the checkpoints, config.yaml and metrics.jsonl."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torture.py disk`."""
    parser.add_argument("--offsets", type=int, default=10, help="at which the disk is full, over a checkpoint (10)")
    common_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Fills disks, prints, and returns what became of the runs."""
    if reason := why_not():
        raise UserError(f"disk: {reason}; run it as root, outside of a container or in one that may mount")
    with opened(options) as workplace:
        whole = workplace.reference(1, **SETTINGS)
        size, result = pages(checkpoint.paths(whole)[0]), pages(whole / "adapter")
        offsets = [(number + 0.5) / options.offsets for number in range(options.offsets)]
        trials: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            (f"second checkpoint, {offset:.0%}", partial(full, workplace, whole, size + offset * size, first=6))
            for offset in offsets
        ]
        trials += [
            ("first checkpoint, 50%", partial(full, workplace, whole, 0.5 * size, first=0)),
            ("result, 50%", partial(full, workplace, whole, size + 0.5 * result, first=18, save_every="18")),
            ("read-only before the launch", partial(read_only_before, workplace, whole)),
            ("read-only during the run", partial(read_only_during, workplace, whole)),
            ("full between two saves", partial(full_between_saves, workplace)),
        ]
        if reason := why_not_freeze():
            print(f"Without the trials of a disk that hangs: {reason}")
        else:
            trials += [
                (f"frozen after checkpoint {number}", partial(frozen, workplace, after=6 * number))
                for number in range(3)
            ]
            trials += [("frozen after checkpoint 1, one process", partial(frozen, workplace, after=6, processes=1))]
        if reason := why_not_silence():
            print(f"Without the trials of a disk that gives nothing: {reason}")
        else:
            trials += [
                (f"silent for {phase}, {count} process{'es' * (count - 1)}", partial(silent, workplace, phase, count))
                for phase in SILENT
                for count in (1, 2)
            ]
        if reason := why_not_slow():
            print(f"Without the trials of a slow disk: {reason}")
        else:
            trials += [
                ("slow", partial(slow, workplace)),
                ("slow, and the run is asked to stop", partial(slow, workplace, stops=True)),
            ]
        figures = report("Disk full, read-only, hanging or slow", attempts(options, trials), options.seed)
        figures |= {"checkpoint_bytes": size * PAGE, "result_bytes": result * PAGE}
        workplace.keep = bool(figures["failed"])
    return figures


def pages(directory: Path) -> int:
    """What a directory takes of a tmpfs, in pages."""
    return sum(-(-path.stat().st_size // PAGE) for path in directory.rglob("*") if path.is_file())


def full(workplace: Workplace, whole: Path, wanted: float, *, first: int, **changed: str) -> dict[str, Any]:
    """A disk of so many pages for checkpoints and result; `first` is the step of the checkpoint that fits."""
    run = workplace.scratch / "disk"
    with mounted(run, (round(wanted) + OTHERS) * PAGE):
        launch = workplace.launch(run, 1, **SETTINGS | changed)
        sentence = refused(launch)
        require("free space" in sentence, f"it does not say to free space: {sentence}")
        require(f"step-{first:06d}" in sentence or "no checkpoint yet" in sentence or "untouched" in sentence, sentence)
        left, loads = last_checkpoint(run), first and check_newest(run)
        require(left == loads == first, f"the last checkpoint is that of step {left}, not {first}:\n{launch.said()}")
        stopped = last_step(run)
        mount("-o", f"remount,size={ENOUGH}", str(run))
        resumed = goes_on(workplace, run, whole, first, **changed)
    shutil.rmtree(run)
    return {"stopped_after": stopped, "resumed_after": resumed, "said": _short(sentence, run)}


def full_between_saves(workplace: Workplace) -> dict[str, Any]:
    """Only metrics.jsonl is written meanwhile: its lines wait, and the run goes on to its end."""
    settings = SETTINGS | {"save_every": "0", "global_batch": "8", "max_steps": "12"}
    whole = workplace.reference(1, **settings)
    run = workplace.scratch / "disk"
    with mounted(run, ENOUGH):
        launch = workplace.launch(run, 1, **settings)
        launch.until(lambda: last_step(run) >= 1)
        ballast = run / ".ballast.tmp"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"." * PAGE):
                pass
        noticed = launch.until(lambda: "metrics.jsonl can't be written (No space left on device)" in launch.said())
        stopped = last_step(run)
        ballast.unlink()
        codes = launch.wait()
        require(noticed, f"it does not say that metrics.jsonl can't be written:\n{launch.said()}")
        require(codes == [0], f"it ended with {codes}:\n{launch.said()}")
        require(launch.said().count("can't be written") == 1, f"it says so more than once:\n{launch.said()}")
        difference = first_difference(run, whole)
        require(not difference, str(difference))
    shutil.rmtree(run)
    return {"stopped_after": stopped, "resumed_after": stopped}


def read_only_before(workplace: Workplace, whole: Path) -> dict[str, Any]:
    """A run that was stopped; its directory is read-only when it is to go on."""
    run = workplace.scratch / "disk"
    stopped = workplace.interrupted("stopped-for-disk", 8, **SETTINGS)
    with mounted(run, ENOUGH):
        shutil.copytree(stopped, run, dirs_exist_ok=True)
        last = last_checkpoint(run)
        mount("-o", "remount,ro", str(run))
        sentence = refused(workplace.launch(run, 1, **SETTINGS))
        require("writable" in sentence, f"it does not say to make it writable: {sentence}")
        require(check_newest(run) == last, "the last checkpoint is another one")
        mount("-o", "remount,rw", str(run))
        resumed = goes_on(workplace, run, whole, last)
    shutil.rmtree(run)
    return {"stopped_after": last, "resumed_after": resumed, "said": _short(sentence, run)}


def read_only_during(workplace: Workplace, whole: Path) -> dict[str, Any]:
    """checkpoints/ turns read-only once the first one is there."""
    run = workplace.scratch / "disk"
    with mounted(run, ENOUGH):
        launch = workplace.launch(run, 1, **SETTINGS)
        launch.until(lambda: last_checkpoint(run) == 6)
        folder = str(run / checkpoint.FOLDER)
        mount("--bind", folder, folder)
        try:
            mount("-o", "remount,bind,ro", folder)
            sentence = refused(launch)
            require("make it writable" in sentence, f"it does not say to make it writable: {sentence}")
            last, stopped = check_newest(run), last_step(run)
        finally:
            subprocess.run(["umount", "-l", folder], check=True, capture_output=True)
        resumed = goes_on(workplace, run, whole, last)
    shutil.rmtree(run)
    return {"stopped_after": stopped, "resumed_after": resumed, "said": _short(sentence, run)}


def frozen(workplace: Workplace, *, after: int, processes: int = 2, **changed: str) -> dict[str, Any]:
    """The disk of a run hangs once the checkpoint of step `after` is there, and comes back later."""
    settings = SETTINGS | HANGING | changed
    whole = workplace.reference(processes, **settings)
    run = workplace.scratch / "disk"
    told = f"train: process 0 has waited for a disk for {DISK_TIMEOUT:g} s ({run}"
    with file_system(run):
        launch = workplace.launch(run, processes, **settings)
        launch.until(lambda: launch.has_begun and last_checkpoint(run) >= after)
        with freezing(run, at_most=2 * BOUND):
            took = _until(lambda: told in launch.said() and not launch.ranks().keys() - {0})
        codes = launch.wait()
        require(took < BOUND, f"it was not over after {took:.1f} s:\n{launch.said()}")
        require(codes == [76] * processes, f"it ended with {codes}:\n{launch.said()}")
        launch.wait_for_none_left(MARGIN)
        last = last_checkpoint(run)
        require(last >= after and (not last or check_newest(run) == last), "the last checkpoint is another one")
        stopped = last_step(run)
        resumed = workplace.finish(run, processes, **settings).resumed_step
        require(resumed == last, f"it went on after step {resumed}, not {last}")
        difference = first_difference(run, whole)
        require(not difference, str(difference))
    return {"stopped_after": stopped, "resumed_after": resumed, "over_after_seconds": took}


def silent(workplace: Workplace, phase: str, processes: int) -> dict[str, Any]:
    """A run that was stopped goes on, and its disk, or that of its rows, gives nothing when it is in a phase."""
    rows = many_rows(workplace)
    settings = SETTINGS | HANGING
    whole = workplace.reference(processes, **settings, dataset=str(rows))
    stopped = workplace.interrupted(f"stopped-for-silence-{processes}", 8, processes, **settings, dataset=str(rows))
    disk, last, of_rows = workplace.scratch / "disk", last_checkpoint(stopped), phase == READING_ROWS
    with file_system(disk):
        shutil.copytree(rows if of_rows else stopped, disk, dirs_exist_ok=True)
        subprocess.run(["sync", "--file-system", str(disk)], check=True)
        run = workplace.copy(stopped, f"beside-disk-{processes}") if of_rows else disk
        settings |= {"dataset": str(disk if of_rows else rows)}
        with contextlib.ExitStack() as silence:
            if of_rows:
                silence.enter_context(silenced(disk / "train", *MIDDLE))
            launch = workplace.launch(run, processes, **settings)
            if not of_rows:
                launch.until(lambda: launch.position(0) is not None)
                read = launch.position(0) or (lambda: (0, ""))
                launch.until(lambda: read()[1] in SILENT[phase])
                silence.enter_context(silenced(disk))
            took = _until(lambda: not launch.ranks())
            codes = launch.wait()
        require(took < BOUND, f"it was not over after {took:.1f} s:\n{launch.said()}")
        require(codes == [76] * processes, f"it ended with {codes}:\n{launch.said()}")
        launch.wait_for_none_left(MARGIN)
        waited = rf"train: process \d has waited for a disk for {DISK_TIMEOUT:g} s \({re.escape(str(disk))}.*"
        told = re.findall(rf"{waited} was last in its start \((.*?)\)", launch.said())
        expected = {"looking for mistakes", READING_ROWS} if of_rows else SILENT.keys() - {READING_ROWS}
        require(len(told) == 1 and told[0] in expected, f"it does not say so once:\n{launch.said()}")
        require(last_checkpoint(run) == check_newest(run) == last, "the last checkpoint is another one")
        resumed = goes_on(workplace, run, whole, last, processes, **settings)
    return {"stopped_after": last, "resumed_after": resumed, "over_after_seconds": took, "phase": told[0]}


def many_rows(workplace: Workplace) -> Path:
    """A dataset whose rows take more than what is read to open it."""
    rows = workplace.scratch / "many-rows"
    if not rows.exists():
        words = random.Random("rows")
        messages = [[" ".join(str(words.randrange(10)) for _ in range(24)) for _ in range(2)] for _ in range(ROWS)]
        lines = [json.dumps({"instruction": asked, "output": answer}) for asked, answer in messages]
        file = workplace.scratch / "many-rows.jsonl"
        file.write_text("\n".join(lines) + "\n")
        workplace.prepare_rows(f"files=[{file}]", rows)
    return rows


def _until(condition: Callable[[], bool]) -> float:
    """The seconds until a condition holds, and `BOUND` at most."""
    began = time.monotonic()
    while not condition() and time.monotonic() - began < BOUND:
        time.sleep(0.05)
    return time.monotonic() - began


def slow(workplace: Workplace, *, stops: bool = False) -> dict[str, Any]:
    """A disk to which a run on two processes writes its checkpoints; if it `stops`, it is asked to within the first."""
    whole = workplace.reference(2, **SETTINGS)
    run = workplace.scratch / "disk"
    size = pages(checkpoint.paths(whole)[0]) * PAGE
    between = sum(line["seconds"] for line in metrics(whole) if "loss" in line and 6 < line["step"] <= 12)
    first, at_once = checkpoint.path_of(run, 6), 0
    with file_system(run), slowed(run) as limit:
        limit(size / between / SLOWNESS)
        launch = workplace.launch(run, 2, **SETTINGS)
        launch.until(lambda: launch.has_begun)
        step = launch.position(0) or (lambda: (0, ""))

        def look() -> bool:
            """Counts what is half-written; whether the first checkpoint is written, and training is after it."""
            nonlocal at_once
            at_once = max(at_once, sum(name.startswith(".step-") and name.endswith(".tmp") for name, _ in hidden(run)))
            return step()[0] >= (7 if stops else STEPS) or first.exists()

        launch.until(look)
        reached = step()[0]
        require(not first.exists(), f"step {reached} was under way when the first checkpoint was on the disk")
        if stops:
            for pid in launch.ranks().values():
                kill(pid, signal.SIGTERM)
        limit(size / LATER)
        launch.until(lambda: look() and False)
        codes = launch.wait()
        require(codes == ([75, 75] if stops else [0, 0]), f"it ended with {codes}:\n{launch.said()}")
        last = last_step(run)
        require(at_once == 1, f"{at_once} checkpoints were written at once")
        require(check_newest(run) == last, f"the last checkpoint is not that of step {last}")
        took = max(line["checkpoint_seconds"] for line in metrics(run) if "checkpoint_seconds" in line)
        if stops:
            require(workplace.finish(run, 2, **SETTINGS).resumed_step == last, f"it did not go on after step {last}")
        difference = first_difference(run, whole)
        require(not difference, str(difference))
    return {"stopped_after": last, "resumed_after": last if stops else 0, "longest_save_seconds": took}


def refused(launch: Launch) -> str:
    """The sentence with which a launch ends that can't write."""
    codes = launch.wait()
    require(codes == [2], f"it ended with {codes}, not 2:\n{launch.said()}")
    sentences = [line for line in launch.said().splitlines() if line.startswith("train: ")]
    require(len(sentences) == 1, f"it does not say one sentence:\n{launch.said()}")
    return sentences[0]


def goes_on(workplace: Workplace, run: Path, whole: Path, after: int, processes: int = 1, **changed: str) -> int:
    """The same command again, to the end; the step after which it resumed."""
    launch = workplace.finish(run, processes, **SETTINGS | changed)
    require(launch.resumed_step == after, f"it went on after step {launch.resumed_step}, not {after}")
    difference = first_difference(run, whole)
    require(not difference, str(difference))
    return after


def _short(sentence: str, run: Path) -> str:
    return sentence.replace(str(run), "R").removeprefix("train: ")
