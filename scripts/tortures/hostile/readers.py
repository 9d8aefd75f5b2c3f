"""The files that the three programs read, who reads each, and what must come of it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.disk.files import sha256

from .programs import ask, batch, card, evaluate, go_on, look, merge, prepare, resume, train


@dataclass(frozen=True, slots=True)
class Reader:
    """What a program does with files of one kind."""

    name: str
    files: tuple[str, ...]
    """What is damaged, one in each try: in `in/`, which must not change, or in `out/`."""
    action: Callable[[], object]
    needs: tuple[str, ...]
    """What is copied to a try's directory, of what `build` made."""
    makes: tuple[str, ...] = ()
    """The files whose bytes are compared with those of the undamaged run."""
    prints: bool = True
    """Whether what is printed is compared too."""
    weight: int = 10
    """How often it is drawn."""


# Who reads what

ROWS = tuple(f"rows.{end}" for end in ("jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "parquet.gz"))
MADE = ("out/made/train/rows.arrow", "out/made/rejects.jsonl")
PREPARED = tuple(
    f"out/prepared/{name}"
    for name in ("manifest.json", "train/rows.arrow", "eval/rows.arrow", "rejects.jsonl", "places.arrow")
)
BASE = tuple(
    f"in/base/{name}" for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json")
)
SHARDED = ("in/sharded/model.safetensors.index.json", "in/sharded/model-00001-of-00003.safetensors")
ADAPTER = tuple(f"in/adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "receipt.json"))
STOCK = ("in/stock/adapter_config.json", "in/stock/adapter_model.safetensors")
MERGED = ("out/merged/model.safetensors",)
CHECKPOINT = tuple(
    f"out/run/checkpoints/step-000002/{name}"
    for name in ("manifest.json", "trainer.json", "master.safetensors", "exp_avg.safetensors")
)
RUN = tuple(
    f"out/run/{name}"
    for name in ("metrics.jsonl", "receipt.json", "launches.jsonl", "config.yaml", "evaluation/results.json")
)


def _of_rows(name: str) -> Reader:
    action = lambda: prepare(files=[f"in/rows/{name}"])  # noqa: E731
    return Reader(f"data: {name}", (f"in/rows/{name}",), action, ("in/rows",), MADE, prints=False)


def _of_a_folder(folder: str, *files: str) -> Reader:
    action = lambda: prepare(dataset=f"in/{folder}")  # noqa: E731
    return Reader(f"data: dataset {folder}", files, action, (f"in/{folder}",), MADE, prints=False, weight=15)


def _of_a_tokenizer(folder: str, name: str) -> Reader:
    action = lambda: prepare(files=["in/rows/rows.jsonl"], tokenizer=f"in/{folder}")  # noqa: E731
    files = (f"in/{folder}/{name}",)
    return Reader(f"data: {name}", files, action, ("in/rows", f"in/{folder}"), MADE, prints=False, weight=5)


def _of_prompts(name: str) -> Reader:
    action = lambda: batch(input=f"in/prompts/{name}")  # noqa: E731
    files = (f"in/prompts/{name}",)
    return Reader(f"batch: {name}", files, action, ("in/prompts", "in/base"), ("out/answers.jsonl",), weight=4)


READERS = (
    *map(_of_rows, ROWS),
    _of_a_folder("csv", "in/csv/train.csv"),
    _of_a_folder("arrow", "in/arrow/train.arrow"),
    _of_a_folder("card", "in/card/README.md"),
    _of_a_tokenizer("base", "tokenizer.json"),
    _of_a_tokenizer("pieces", "tokenizer.model"),
    Reader(
        "data: contamination",
        ("in/questions.jsonl", "in/questions.txt"),
        lambda: prepare(
            files=["in/rows/rows.json"], contamination=["in/questions.jsonl", "in/questions.txt"], max_reject_fraction=1
        ),
        ("in/rows", "in/questions.jsonl", "in/questions.txt"),
        MADE,
        prints=False,
        weight=5,
    ),
    Reader(
        "data: what is there",
        PREPARED,
        lambda: prepare(files=["in/rows/rows.jsonl"], output="out/prepared"),
        ("in/rows", "out/prepared"),
        ("out/prepared/train/rows.arrow",),
        prints=False,
    ),
    Reader("preview", PREPARED, look("preview"), ("out/prepared",), weight=25),
    Reader("report", PREPARED, look("report"), ("out/prepared",), ("out/prepared-report.html",), weight=25),
    Reader("generate: base", BASE, ask, ("in/base",), weight=40),
    Reader("generate: several files", SHARDED, lambda: ask(base="in/sharded"), ("in/sharded",), weight=15),
    Reader("generate: adapter", ADAPTER, lambda: ask(adapter="in/adapter"), ("in/base", "in/adapter"), weight=25),
    Reader("generate: PEFT's adapter", STOCK, lambda: ask(adapter="in/stock"), ("in/base", "in/stock"), weight=15),
    Reader(
        "generate: unfolded", STOCK, lambda: ask(adapter="in/stock", fold=False), ("in/base", "in/stock"), weight=15
    ),
    Reader(
        "merge: base", (*BASE, "in/base/README.md"), merge, ("in/base", "in/adapter"), MERGED, prints=False, weight=12
    ),
    Reader(
        "merge: adapter",
        (*ADAPTER, "in/adapter/train_config.yaml"),
        merge,
        ("in/base", "in/adapter"),
        MERGED,
        prints=False,
        weight=10,
    ),
    *(_of_prompts(f"prompts.{end}") for end in ("jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet")),
    Reader(
        "batch: journal",
        ("out/answers.jsonl.part",),
        lambda: batch(input="in/prompts/prompts.jsonl"),
        ("in/prompts", "in/base", "out/answers.jsonl.part"),
        ("out/answers.jsonl",),
        prints=False,
        weight=8,
    ),
    Reader(
        "prompt_file",
        ("in/prompt.txt",),
        lambda: ask(prompt="", prompt_file="in/prompt.txt"),
        ("in/base", "in/prompt.txt"),
        weight=4,
    ),
    Reader(
        "evaluate: rows",
        ("in/tasks/winogrande/validation.jsonl", "in/tasks/winogrande/train.jsonl", "in/tasks/gsm8k/test.jsonl"),
        lambda: evaluate(output="out/evaluation"),
        ("in/base", "in/tasks"),
        ("out/evaluation/questions.jsonl",),
        prints=False,
        weight=4,
    ),
    Reader(
        "evaluate: journal",
        ("out/evaluation/answers.part",),
        lambda: evaluate(output="out/evaluation"),
        ("in/base", "in/tasks", "out/evaluation"),
        ("out/evaluation/questions.jsonl",),
        prints=False,
        weight=6,
    ),
    Reader(
        "evaluate: compare",
        ("in/before/results.json", "in/before/questions.jsonl"),
        lambda: evaluate(output="out/evaluation", compare="in/before"),
        ("in/base", "in/tasks", "in/before"),
        ("out/evaluation/questions.jsonl",),
        prints=False,
        weight=6,
    ),
    Reader(
        "card",
        (*BASE[:1], *RUN, "out/run/adapter/receipt.json", "out/run/adapter/train_config.yaml"),
        card,
        ("in/base", "in/prepared", "out/run"),
        ("out/card.md",),
        prints=False,
        weight=6,
    ),
    Reader(
        "report of a run",
        RUN,
        train("task=report", "run_dir=out/run", "answers=false"),
        ("in/base", "in/prepared", "out/run"),
        ("out/run/report.html",),
        prints=False,
        weight=15,
    ),
    Reader("checkpoint", CHECKPOINT, go_on, ("out/run", "in/shapes.json"), weight=30),
    Reader("plan", ("in/base/config.json",), train("dry_run=true"), ("in/base", "in/prepared"), weight=8),
    Reader(
        "plan: load",
        ("in/expert_load.json",),
        train("dry_run=true", "lora=by_load", "lora.load=in/expert_load.json", "lora.budget=100000"),
        ("in/base", "in/prepared", "in/expert_load.json"),
        weight=4,
    ),
    Reader(
        "train: base",
        BASE,
        train(),
        ("in/base", "in/prepared"),
        ("out/new/adapter/adapter_model.safetensors",),
        prints=False,
        weight=4,
    ),
    Reader(
        "train: dataset",
        tuple(name.replace("out/", "in/") for name in PREPARED[:3]),
        train(),
        ("in/base", "in/prepared"),
        ("out/new/adapter/adapter_model.safetensors",),
        prints=False,
        weight=6,
    ),
    Reader(
        "train: lora.start",
        ADAPTER[:2],
        train("lora.start=in/adapter"),
        ("in/base", "in/prepared", "in/adapter"),
        ("out/new/adapter/adapter_model.safetensors",),
        prints=False,
        weight=3,
    ),
    Reader(
        "train: run directory",
        ("out/run/receipt.json",),
        train("run_dir=out/run"),
        ("in/base", "in/prepared", "out/run"),
        prints=False,
        weight=3,
    ),
    Reader(
        "train: goes on",
        ("out/run/metrics.jsonl", "out/run/launches.jsonl", *CHECKPOINT),
        resume,
        ("in/base", "in/prepared", "out/run"),
        ("out/run/adapter/adapter_model.safetensors",),
        prints=False,
        weight=4,
    ),
)


def seal(damaged: Path, directory: Path) -> bool:
    """Renews the hash that is kept of a damaged file, as whoever meant harm would; returns whether one is kept."""
    for folder in damaged.relative_to(directory).parents:
        manifest = directory / folder / "manifest.json"
        if not manifest.is_file() or damaged == manifest or not damaged.is_file() or damaged.is_symlink():
            continue
        name = str(damaged.relative_to(directory / folder))
        held = json.loads(manifest.read_text())
        if "digest" in held:
            from scripts.tortures.damage import seal as seal_checkpoint

            seal_checkpoint(directory / folder, name)
        else:
            held["files"][name] = {"bytes": damaged.stat().st_size, "sha256": sha256(damaged)}
            manifest.write_text(json.dumps(held))
        return True
    return False


def made(reader: Reader, directory: Path) -> dict[str, str]:
    """The hashes of what a try made, and of what it printed."""
    found = {name: sha256(directory / name) for name in reader.makes if (directory / name).is_file()}
    printed = directory.with_name(f"{directory.name}.out")
    return found | ({"stdout": hashlib.sha256(printed.read_bytes()).hexdigest()} if reader.prints else {})
