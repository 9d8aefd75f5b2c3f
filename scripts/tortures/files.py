"""Damages the files that the programs read, in every way: each must be refused in a sentence, or do no harm.

Each try copies what one reader of a program needs, damages one file of it, and lets the program read it in a process of
its own with bounds on time and memory. It counts as harmless if what comes out is what comes out undamaged; as changed
if it is not, as that of a row in which a letter is another. The other kinds must not be: a traceback, a process that
hangs or fills the memory, one that a signal ends, files that are written outside of the output, and planted code that
was executed. Half of the files beside which a hash is kept get the hash of what they are damaged to.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.program.errors import UserError
from data.template import ChatTokenizer

from .harness.trials import common_arguments, generator
from .hostile.children import Child, Outcome
from .hostile.damages import damages_of
from .hostile.json_damages import EXECUTED
from .hostile.readers import READERS, Reader, made, seal
from .hostile.sound import build

KINDS = ("refused", "harmless", "changed", "traceback", "hang", "signal", "outside", "executed")
BAD = KINDS[3:]
IMPORTS = (
    *("data.prepare", "data.prepared.preview", "data.prepared.report", "data.rows.tables", "inference.run"),
    *("inference.generate", "inference.batch.batch", "inference.merging.merge", "train.program", "train.run"),
    *("train.plan", "peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion", "sentencepiece"),
    *("sentencepiece.sentencepiece_model_pb2", "transformers.models.mixtral.modeling_mixtral", "pyarrow.parquet"),
    *("datasets.data_files", "setuptools", "torch.utils.cpp_extension", "deepspeed.runtime.engine"),
    *("deepspeed.module_inject.auto_ep_layer", "networkx", "jinja2.ext", "rich.status", "encodings.utf_8_sig"),
    *(f"hydra._internal.core_plugins.{name}" for name in ("basic_launcher", "basic_sweeper", "bash_completion")),
)
"""What takes long to import, so that a try that is forked has it, as it has the vocabulary's merges."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torture.py files`."""
    parser.add_argument("--tries", type=int, default=5000, help="files that are damaged (5000)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first try, to repeat one (0)")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="programs that run at once (one a core)")
    common_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Damages, reads, prints, and returns what was found."""
    readers = [reader for reader in READERS if re.search(options.only, reader.name)]
    if not readers:
        raise UserError(f"--only={options.only}: no reader is called so; leave it out to see all of their names")
    os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "400", "WANDB_MODE": "disabled"}
    for name in IMPORTS:
        __import__(name)
    ChatTokenizer.load()
    gc.freeze()  # or the first collection in each try would touch, and so copy, all that was imported
    scratch = (options.scratch or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    torture = Torture(scratch, readers, options.seed)
    torture.prepare()
    for number in range(options.first, options.first + options.tries):
        torture.wait(below=options.at_once)
        torture.begin(number)
    torture.wait(below=1)
    figures = torture.report()
    if not figures["failed"] and not options.scratch:
        shutil.rmtree(scratch)
    else:
        print(f"The files are in {scratch}")
    return figures


class Torture:
    """Tries, and what became of them."""

    def __init__(self, scratch: Path, readers: list[Reader], seed: int):
        """In a directory of its own."""
        self._scratch, self._readers, self._seed = scratch, readers, seed
        self._sound = scratch / "sound" / "directory"
        self._running: list[Try] = []
        self._wanted: dict[str, dict[str, str]] = {}
        self._counts = {reader.name: Counter[str]() for reader in readers}
        self._seconds = dict.fromkeys(self._counts, 0.0)
        self._ways: Counter[str] = Counter()
        self._failed: list[str] = []

    def prepare(self) -> None:
        """Makes what is read."""
        if not self._sound.exists():
            self._sound.mkdir(parents=True)
            _finish(Child(lambda: build(Path.cwd()), self._sound), "what is to be read")
            shapes = _finish(Child(_shapes, self._sound), "the checkpoint")
            (self._sound / "in/shapes.json").write_text(json.dumps(shapes))

    def _undamaged(self, reader: Reader) -> dict[str, str]:
        """What a reader makes of what nothing was done to."""
        if reader.name not in self._wanted:
            directory = self._directory(reader, "undamaged")
            _finish(Child(reader.action, directory), reader.name)
            self._wanted[reader.name] = made(reader, directory)
            shutil.rmtree(directory.parent)
        return self._wanted[reader.name]

    def _directory(self, reader: Reader, name: str) -> Path:
        """A directory with a copy of what a reader needs, and a file elsewhere that nobody may change."""
        directory = self._scratch / name / "directory"
        shutil.rmtree(directory.parent, ignore_errors=True)
        (directory / "in").mkdir(parents=True)
        (directory / "out").mkdir()
        for needed in reader.needs:
            source, target = self._sound / needed, directory / needed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
        (directory / "outside").mkdir()
        (directory / "outside" / "victim").write_text('{"kept": true}\n')
        return directory

    def begin(self, number: int) -> None:
        """Damages a file, and lets it be read."""
        random = generator("files", self._seed, number)
        reader = random.choices(self._readers, [reader.weight for reader in self._readers])[0]
        directory = self._directory(reader, f"try-{number}")
        damaged = directory / random.choice(reader.files)
        ways = damages_of(damaged)
        way = random.choice(sorted(ways))
        with contextlib.chdir(directory):
            told = ways[way](damaged, random)
        sealed = random.random() < 0.5 and seal(damaged, directory)
        what = f"{damaged.relative_to(directory)}: {way}: {told}{', sealed' if sealed else ''}"
        self._ways[way] += 1
        self._running.append(Try(number, reader, what, directory))

    def wait(self, *, below: int) -> None:
        """Until fewer tries run than that."""
        while len(self._running) >= below:
            for one in list(self._running):
                if (outcome := one.child.poll()) is not None:
                    self._running.remove(one)
                    self._judge(one, outcome)
            time.sleep(0.005)

    def _judge(self, one: "Try", outcome: Outcome) -> None:
        kind = outcome.kind
        if kind == "accepted":
            kind = "harmless" if made(one.reader, one.directory) == self._undamaged(one.reader) else "changed"
        if one.before != _state(one.directory):
            kind = "outside"
        if any(one.directory.rglob(EXECUTED)):
            kind = "executed"
        self._counts[one.reader.name][kind] += 1
        self._seconds[one.reader.name] += outcome.seconds
        if kind in BAD:
            self._failed.append(f"try {one.number}, {one.reader.name}, {one.what}: {kind}: {outcome.said[-1500:]}")
            print(f"Failed (--seed {self._seed}): {self._failed[-1]}", flush=True)
        shutil.rmtree(one.directory.parent)

    def report(self) -> dict[str, Any]:
        """Prints the table; the figures."""
        table = Table("reader", "tries", *KINDS, "seconds", title="Damaged files, and seconds of a processor for each")
        rows = [
            {
                "reader": name,
                "tries": (tries := counts.total()),
                **{kind: counts[kind] for kind in KINDS},
                "seconds": round(self._seconds[name] / max(1, tries), 3),
            }
            for name, counts in self._counts.items()
        ]
        everything = {key: sum(row[key] for row in rows) for key in ("tries", *KINDS)}
        everything["seconds"] = round(sum(self._seconds.values()) / max(1, everything["tries"]), 3)
        for row in [*rows, {"reader": "all", **everything}]:
            table.add_row(*map(str, row.values()))
        Console(width=160).print(table)
        damages = dict(sorted(self._ways.items()))
        return {"seed": self._seed, **everything, "readers": rows, "damages": damages, "failed": self._failed}


class Try:
    """A program that reads a damaged file."""

    def __init__(self, number: int, reader: Reader, what: str, directory: Path):
        """Starts it."""
        self.number, self.reader, self.what, self.directory = number, reader, what, directory
        self.before = _state(directory)
        self.child = Child(reader.action, directory)


def _state(directory: Path) -> dict[str, tuple[int, int, int]]:
    """All that a try must leave as it is: names, kinds, sizes and times, without `out/`."""
    kept = (
        path for path in directory.rglob("*") if path.relative_to(directory).parts[0] != "out" and path.name != EXECUTED
    )
    states = {str(path.relative_to(directory)): path.lstat() for path in kept}
    return {name: (state.st_mode, state.st_size, state.st_mtime_ns) for name, state in states.items() if name != "in"}


def _finish(child: Child, what: str) -> Any:
    """What a child that nothing was done to returns."""
    while (outcome := child.poll()) is None:
        time.sleep(0.01)
    if outcome.kind != "accepted":
        raise RuntimeError(f"{what}, undamaged: {outcome.kind}: {outcome.said}")
    return outcome.result


def _shapes() -> dict[str, list[int]]:
    from .harness.outcome import stored_shapes

    return {name: list(shape) for name, shape in stored_shapes(Path("out/run/checkpoints/step-000002")).items()}
