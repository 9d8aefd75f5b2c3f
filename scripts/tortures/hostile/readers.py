"""The files that the three programs read, and what is done with each: as the programs do it, without Hydra."""

import gzip
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.config import PrepareConfig
from data.disk.files import sha256
from inference.config import InferenceConfig

ROOT = Path(__file__).parents[3]
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
TRAINING = (
    *("hardware=cpu", "logging=quiet", "logging.wandb=off", "deepspeed=none", "max_steps=2", "global_batch=2"),
    *("save_every=1", "eval_every=0", "lora.rank=2", "model.attention=sdpa", "model.dtype=float32", "seed=0"),
)
ROWS_OF_A_FILE = 24
ASKED = {"base": "in/base", "prompt": "Hi", "device": "cpu", "dtype": "float32", "max_new_tokens": 3}
BATCH = {"task": "batch", "prompt": "", "batching": "padded", "output": "out/answers.jsonl"}


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


def build(directory: Path) -> None:
    """Makes all that is read, sound."""
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    from data.template import ChatTokenizer

    rows = [json.loads(line) for line in (ROOT / "data/sample/general.jsonl").read_text().splitlines()[:ROWS_OF_A_FILE]]
    _rows(directory / "in", rows)
    import torch

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SMALL))
    for name, size in (("base", "5GB"), ("sharded", "1MB")):
        model.save_pretrained(directory / "in" / name, max_shard_size=size)
        ChatTokenizer.load().save(directory / "in" / name)
    (directory / "in/base/README.md").write_text("---\nlicense: apache-2.0\ntags: [a, b]\n---\n# A base\n")
    (directory / "in/pieces").mkdir()
    shutil.copy(directory / "in/base/tokenizer.model", directory / "in/pieces")
    prepare(files=["in/rows/rows.jsonl"], output="out/prepared")
    shutil.copytree("out/prepared", "in/prepared")
    _train("model.path=in/base", "dataset=in/prepared", "run_dir=out/run")
    shutil.copytree("out/run/adapter", "in/adapter")
    torch.manual_seed(1)
    stock = get_peft_model(
        MixtralForCausalLM.from_pretrained(directory / "in/base", trust_remote_code=False),
        LoraConfig(r=2, target_modules="model.*(q|v)_proj", rank_pattern={"v_proj": 1}, init_lora_weights=False),
    )
    stock.save_pretrained(directory / "in/stock")
    tokens = {"tokens_per_expert": [[5, 7]]}
    (directory / "in/expert_load.json").write_text(json.dumps(tokens))
    _interrupt(Path("in/prompts/prompts.jsonl"))


def _interrupt(prompts: Path) -> None:
    """Leaves the journal of a batch that was killed after its first answer."""
    from inference.batch.journal import identity

    batch(input=str(prompts))
    answers = Path("out/answers.jsonl")
    asked = InferenceConfig(**{**ASKED, **BATCH, "input": str(prompts)})
    first = answers.read_text().splitlines()[0]
    answers.with_name("answers.jsonl.part").write_text(f"{json.dumps(identity(asked, prompts))}\n{first}\n")
    answers.unlink()


def _rows(top: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    prompts = [{"id": number, "prompt": row["instruction"]} for number, row in enumerate(rows[:3])]
    asked = "".join(json.dumps(prompt) + "\n" for prompt in prompts).encode()
    for folder in ("rows", "prompts", "csv", "arrow", "card"):
        (top / folder).mkdir(parents=True)
    for folder, content, table in (("rows", lines, rows), ("prompts", asked, prompts)):
        (top / f"{folder}/{folder}.jsonl").write_bytes(content)
        (top / f"{folder}/{folder}.json").write_text(json.dumps(table))
        (top / f"{folder}/{folder}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
        with pa.CompressedOutputStream(str(top / f"{folder}/{folder}.jsonl.zst"), "zstd") as file:
            file.write(content)
        pq.write_table(pa.Table.from_pylist(table), top / f"{folder}/{folder}.parquet")
        packed = gzip.compress((top / f"{folder}/{folder}.parquet").read_bytes(), mtime=0)
        (top / f"{folder}/{folder}.parquet.gz").write_bytes(packed)
    names = list(rows[0])
    cells = [",".join(json.dumps(str(row[name])).replace('\\"', '""') for name in names) for row in rows]
    (top / "csv/train.csv").write_text("\n".join([",".join(names), *cells]) + "\n")
    with pa.OSFile(str(top / "arrow/train.arrow"), "wb") as file:
        table = pa.Table.from_pylist([{**row, "parts": [{"a": [1, 2]}]} for row in rows])
        with pa.ipc.new_file(file, table.schema) as arrow:
            arrow.write_table(table)
    (top / "card/rows.jsonl").write_bytes(lines)
    (top / "card/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: rows.jsonl\n---\n")
    (top / "questions.jsonl").write_bytes(lines[:2000].rpartition(b"\n")[0] + b"\n")
    (top / "questions.txt").write_bytes(lines[:2000])
    (top / "prompt.txt").write_text("Name three colours.")


# What is done


def prepare(**settings: Any) -> None:
    """`python -m data`."""
    from data.run import run

    common = {"output": "out/made", "seq_len": 256, "workers": 1, "eval_fraction": 0.1}
    run(PrepareConfig(**{**common, **settings}))


def look(task: str) -> Callable[[], None]:
    """`python -m data task=preview` or `report`."""
    return lambda: prepare(task=task, output="out/prepared", rows=50)


def ask(**settings: Any) -> None:
    """`python -m inference`."""
    from inference.run import run

    run(InferenceConfig(**{**ASKED, **settings}))


def batch(**settings: Any) -> None:
    """`python -m inference task=batch`."""
    ask(**BATCH, **settings)


def merge(**settings: Any) -> None:
    """`python -m inference task=merge`."""
    ask(task="merge", prompt="", dtype="auto", output="out/merged", **{"adapter": "in/adapter", **settings})


def _train(*arguments: str) -> None:
    """`python -m train`."""
    from train.program import main

    sys.argv = ["python -m train", *TRAINING, *arguments]
    main()


def train(*arguments: str) -> Callable[[], None]:
    """`python -m train` with more arguments."""
    common = ("model.path=in/base", "dataset=in/prepared", "run_dir=out/new")
    return lambda: _train(*common, *arguments)


def resume() -> None:
    """`python -m train` for a run that was interrupted after its last step."""
    run = Path("out/run")
    (run / "receipt.json").unlink()
    shutil.rmtree(run / "adapter")
    train(f"run_dir={run}")()


def go_on() -> None:
    """What a run that goes on looks at before it is built: its newest checkpoint, or with it its receipt."""
    from configs.program.errors import UserError
    from train.saving.checkpoint import Checkpoint, DamagedError, paths

    shapes = json.loads(Path("in/shapes.json").read_text())
    try:
        found = Checkpoint(paths(Path("out/run"))[0])
        found.check({name: tuple(shape) for name, shape in shapes.items()})
    except DamagedError as error:
        raise UserError(f"checkpoint: {error}; restore it") from error


# Who reads what

ROWS = tuple(f"rows.{end}" for end in ("jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "parquet.gz"))
MADE = ("out/made/train/rows.arrow", "out/made/rejects.jsonl")
PREPARED = tuple(
    f"out/prepared/{name}" for name in ("manifest.json", "train/rows.arrow", "eval/rows.arrow", "rejects.jsonl")
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
        ("out/run/metrics.jsonl", *CHECKPOINT),
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
