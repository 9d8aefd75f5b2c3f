"""A long run on two processes: nothing grows, and a step takes as long at its end as at its beginning.

Twenty thousand steps, with checkpoints, evaluations and wandb offline. Meanwhile resident memory, open files, threads
and the machine's shared memory are looked at once a second. After a twentieth of the steps and at the end, memory and
the median time of a step must be within 5 %, and files, threads and shared memory the same; checkpoints must be pruned,
metrics.jsonl must hold a line for each step, and the report must be a page that can be opened.

Memory does grow at first: what a step frees stays in the heap (train/engine/cpu.py), and until tensors of all sizes
that the rows bring have found room there, and oneDNN has made its code for them, it gets larger. So the first look is
after `SETTLED` steps at the earliest.
"""

import argparse
import json
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from data.prepared.dataset import PreparedDataset
from train.saving import checkpoint

from .harness.outcome import last_step
from .harness.trials import attempt, common_arguments, report, require
from .harness.workplace import Workplace, opened

GROWTH = 0.05
"""By how much memory and the time of a step may grow."""
SETTLED = 300
"""Steps after which the heap has its size."""
WINDOWS = 20
"""Parts of the run whose memory is told, and of which two are compared."""
LOOKS = 1000
"""A run of fewer steps than these is looked at more often than once a second."""
LONGEST_PAGE = 20 << 20
"""Bytes of a report that a browser still opens at once."""
SHARED = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Sample:
    """What is seen of the run at a moment."""

    step: int
    memory: int
    """Resident bytes of both processes and their guardians, but for those of files, which the kernel may take back."""
    files: int
    """That the two hold open."""
    threads: int
    shared: int
    """Bytes in /dev/shm."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torture.py long`."""
    parser.add_argument("--steps", type=int, default=20_000, help="of the run (20000)")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints and evaluations (500)")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="parts of the run, of which two are compared (20)")
    parser.add_argument("--growth", type=float, default=GROWTH, help="that is borne, as a share (0.05)")
    common_arguments(parser, trials=False)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains, looks, compares, prints, and returns what was seen."""
    with opened(options) as workplace:
        name = f"{options.steps} steps"
        of_window = max(1, options.steps // options.windows)
        trial = attempt(name, lambda: watched(workplace, options.steps, options.every, of_window, options.growth))
        figures = report("A long run", [trial], options.seed)
        workplace.keep = bool(figures["failed"])
    return figures


def watched(workplace: Workplace, steps: int, every: int, of_window: int, growth: float) -> dict[str, Any]:
    """The run, and what was seen of it; windows have `of_window` steps."""
    run_dir = workplace.scratch / "long"
    rows = len(PreparedDataset(str(workplace.rows)).train)
    settings = {"max_steps": f"{steps}", "save_every": f"{every}", "eval_every": f"{every}"}
    settings |= {"epochs": f"{2 * steps // rows + 1}", "logging": "default", "logging.wandb": "offline"}
    launch = workplace.launch(run_dir, 2, **settings, **{"logging.progress": "false"})
    samples: list[Sample] = []
    while launch.running:
        if launch.has_begun and len(ranks := launch.ranks()) == 2:
            samples += _looked(run_dir, list(ranks.values()))
        time.sleep(min(1.0, steps / LOOKS))
    codes = launch.wait()
    require(not any(codes), f"it ended with {codes}:\n{launch.said()}")
    first = max(of_window, min(SETTLED, steps // 2))
    early, late = _window(samples, first, of_window), _window(samples, steps - of_window, of_window)
    seconds = [line["seconds"] for line in _lines(run_dir) if "loss" in line]
    require(len(seconds) == steps, f"metrics.jsonl has {len(seconds)} steps, not {steps}")
    times = [statistics.median(seconds[start : start + of_window]) for start in (first, steps - of_window)]
    parts = [range(start, start + of_window) for start in range(0, steps, of_window)]
    seen = [[sample.memory for sample in samples if sample.step in part] for part in parts]
    found = {
        "compared": [first, steps - of_window],
        "memory_mib": [round(early.memory / 2**20), round(late.memory / 2**20)],
        "memory_mib_meanwhile": [round(statistics.median(part) / 2**20) for part in seen if part],
        "open_files": [early.files, late.files],
        "threads": [early.threads, late.threads],
        "shared_mib": [round(early.shared / 2**20), round(late.shared / 2**20)],
        "step_seconds": [round(each, 4) for each in times],
        "checkpoints": len(checkpoint.paths(run_dir)),
        "metrics_bytes": (run_dir / "metrics.jsonl").stat().st_size,
        "wandb_bytes": sum(path.stat().st_size for path in (run_dir / "wandb").rglob("*") if path.is_file()),
    }
    require(not (more := grown(early, late, times, growth)), f"{' and '.join(more)} grew: {found}")
    require(found["checkpoints"] <= 3, f"checkpoints are not pruned: {found}")
    began = time.monotonic()
    page = workplace.launch(run_dir, 1, forked=not workplace.typed, task="report", answers="false")
    require(not any(page.wait()), f"there is no report:\n{page.said()}")
    found |= {"report_seconds": round(time.monotonic() - began, 1)}
    found |= {"report_bytes": (run_dir / "report.html").stat().st_size}
    require(found["report_bytes"] <= LONGEST_PAGE, f"the report is too large to be opened: {found}")
    launch.wait_for_none_left(30)
    shutil.rmtree(run_dir)
    return found


def grown(early: Sample, late: Sample, seconds: list[float], growth: float) -> list[str]:
    """What has grown by more than it may, from one sample to the other and in the `seconds` of a step then."""
    found = {
        "memory": late.memory > (1 + growth) * early.memory,
        "the time of a step": seconds[1] > (1 + growth) * seconds[0],
        "open files": late.files > early.files,
        "threads": late.threads > early.threads,
        "shared memory": late.shared > early.shared,
    }
    return [name for name, more in found.items() if more]


def _looked(run_dir: Path, pids: list[int]) -> list[Sample]:
    """What is seen now; nothing if the processes are gone."""
    try:
        trainers = [psutil.Process(pid) for pid in pids]
        beside = [child for trainer in trainers for child in trainer.children()]
        resident = [process.memory_info() for process in [*trainers, *beside]]
        return [
            Sample(
                last_step(run_dir),
                sum(memory.rss - memory.shared for memory in resident),
                sum(trainer.num_fds() for trainer in trainers),
                sum(trainer.num_threads() for trainer in trainers),
                sum(path.stat().st_size for path in SHARED.iterdir()),
            )
        ]
    except (psutil.Error, OSError):
        return []


def _window(samples: list[Sample], start: int, length: int) -> Sample:
    """The median of each number over so many steps from one on."""
    seen = [sample for sample in samples if start <= sample.step < start + length]
    require(seen, f"no sample of the {length} steps from {start} on; the run is too short to be looked at")
    middle = (statistics.median_high(getattr(sample, name) for sample in seen) for name in Sample.__slots__)
    return Sample(*(int(number) for number in middle))


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
