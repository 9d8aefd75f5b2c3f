"""python -m data against the bare tokenizers library and against TRL's preparation.

The same rows on the same cores in one run, each measurement in a process of its own, imports aside, the three in turn:

  ours   read, render, encode, mask, pack, write (data.prepare)
  floor  tokenizers' encode_batch of the same texts, rendered before: no masks, nothing written
  TRL    SFTTrainer's preparation: read, chat template, assistant-only masks, best-fit packing, Arrow cache

The rows are real ones that every party can use: those that ours keeps, as `messages`. Repeated rows flatter a cache of
words, which ours has, so the distinct rows are measured alone too.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.program.errors import UserError
from data.rows.columns import names_of
from data.rows.conversion import Converter
from data.rows.reading import RawRow, Reject, read_file
from data.schema import Conversation, Message
from data.template import ChatTokenizer

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data"
SEQ_LEN = 2048

console = Console()


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py data`."""
    parser.add_argument("--files", type=Path, nargs="+", help=f"rows in any schema (default: {REAL.name}/*.json)")
    parser.add_argument(
        "--rows", type=int, default=50_000, help="by repeating them; 0 for the distinct ones alone (%(default)s)"
    )
    parser.add_argument(
        "--growth", type=int, nargs="*", default=[10_000, 50_000, 200_000], help="ours alone, this many"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of ours and of TRL's")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the median counts")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prints the tables, returns the figures."""
    if options.side:  # one measurement, in a process of its own
        print(json.dumps(SIDES[options.side](options.directory, options.workers)))
        return {}
    files = options.files or sorted(REAL.glob("*.json"))
    if not files:
        raise UserError(f"--files: there is nothing in {REAL}; name files of rows")
    conversations = usable(files)
    figures: dict[str, Any] = {"files": [path.name for path in files], "seq_len": SEQ_LEN, "workers": options.workers}
    with tempfile.TemporaryDirectory() as scratch:
        for name, rows in (("distinct", len(conversations)), ("repeated", options.rows)):
            if rows == 0:
                continue
            directory = Path(scratch) / name
            figures[name] = compare(directory, conversations, rows, options)
        figures["growth"] = [grow(Path(scratch) / str(rows), conversations, rows, options) for rows in options.growth]
    show_growth(figures["growth"])
    return figures


def usable(files: list[Path]) -> list[Conversation]:
    """The conversations that fit a row, of all files."""
    tokenizer = ChatTokenizer.load()
    found = []
    for path in files:
        for chunk in read_file(str(path)):
            for row in chunk.rows():
                if isinstance(row, Reject):
                    continue
                names = names_of(row.value, {})
                outcome = None if names is None else Converter(names).convert(row)
                if isinstance(outcome, Conversation) and len(tokenizer.encode(outcome)) <= SEQ_LEN:
                    found.append(outcome)
    random.Random(0).shuffle(found)
    return found


def write(directory: Path, conversations: list[Conversation], rows: int) -> None:
    """rows.jsonl: the conversations over and over."""
    directory.mkdir(parents=True)
    lines = [
        json.dumps({"messages": [{"role": m.role, "content": m.content} for m in conversation.messages]}) + "\n"
        for conversation in conversations
    ]
    with (directory / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(lines[index % len(lines)] for index in range(rows))


def compare(
    directory: Path, conversations: list[Conversation], rows: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Ours, the floor and TRL in turn."""
    write(directory, conversations, rows)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side, found in runs.items():
            found.append(measure(side, directory, options.workers))
    seconds = {side: statistics.median(run["seconds"] for run in found) for side, found in runs.items()}
    tokens = runs["ours"][0]["tokens"]
    table = Table(title=f"{rows:,} rows, {tokens:,} tokens, {options.workers} processes", title_justify="left")
    for heading in ("", "seconds", "rows/s", "tokens/s", "of the floor's speed"):
        table.add_column(heading, justify="left" if not heading else "right")
    for side, taken in seconds.items():
        share = f"{seconds['floor'] / taken:.0%}"
        table.add_row(side, f"{taken:.2f}", f"{rows / taken:,.0f}", f"{tokens / taken:,.0f}", share)
    console.print(table)
    ratio = seconds["trl"] / seconds["ours"]
    packed = {side: runs[side][0]["packed_rows"] for side in ("ours", "trl")}
    console.print(
        f"ours is {ratio:.1f} times as fast as TRL; packed rows: ours {packed['ours']:,}, TRL {packed['trl']:,}\n"
    )
    return {
        "rows": rows,
        "tokens": tokens,
        "seconds": {side: [run["seconds"] for run in found] for side, found in runs.items()},
        "packed_rows": packed,
        "share_of_floor": seconds["floor"] / seconds["ours"],
        "times_trl": ratio,
    }


def grow(directory: Path, conversations: list[Conversation], rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Ours alone on that many rows."""
    write(directory, conversations, rows)
    runs = [measure("ours", directory, options.workers) for _ in range(options.repeats)]
    return {"rows": rows, "tokens": runs[0]["tokens"], "seconds": [run["seconds"] for run in runs]}


def show_growth(growth: list[dict[str, Any]]) -> None:
    """Seconds for each row, which stay the same if cost grows linearly."""
    table = Table(title="Growth", title_justify="left")
    for heading in ("rows", "seconds", "rows/s", "microseconds/row"):
        table.add_column(heading, justify="right")
    for figures in growth:
        rows, taken = figures["rows"], statistics.median(figures["seconds"])
        table.add_row(f"{rows:,}", f"{taken:.2f}", f"{rows / taken:,.0f}", f"{1e6 * taken / rows:.1f}")
    console.print(table)


def measure(side: str, directory: Path, workers: int) -> dict[str, Any]:
    """One measurement of one side."""
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "data", "--side", side]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        command += ["--directory", str(directory), "--workers", str(workers)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--side={side}: the measurement failed; {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


# Each of these is one side, in a process of its own


def ours(directory: Path, workers: int) -> dict[str, Any]:
    """What `python -m data` does."""
    from data.config import PrepareConfig
    from data.prepare import prepare
    from data.prepared.layout import read_manifest

    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        output = Path(scratch) / "out"
        config = PrepareConfig(
            files=[str(directory / "rows.jsonl")],
            output=str(output),
            seq_len=SEQ_LEN,
            eval_fraction=0,
            workers=workers,
        )
        started = time.perf_counter()
        prepare(config)
        seconds = time.perf_counter() - started
        train = read_manifest(output)["train"]
    return {"seconds": seconds, "tokens": train["tokens"], "packed_rows": train["packed_rows"]}


def stock_tokenizer() -> Any:
    """As in Mistral's tokenizer.json: the merges, a space before the text, control tokens that are matched in text."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(ChatTokenizer.load()._text.to_str())
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer


def floor(directory: Path, workers: int) -> dict[str, Any]:
    """tokenizers starts one thread for each core, whatever `workers` says."""
    chat, tokenizer = ChatTokenizer.load(), stock_tokenizer()
    texts = []
    for chunk in read_file(str(directory / "rows.jsonl")):
        for row in chunk.rows():
            assert isinstance(row, RawRow)
            texts.append(chat.render(Conversation(tuple(Message(**message) for message in row.value["messages"]))))
    started = time.perf_counter()
    for first in range(0, len(texts), 1000):
        tokenizer.encode_batch(texts[first : first + 1000], add_special_tokens=False)
    return {"seconds": time.perf_counter() - started, "packed_rows": None}


# The template with the marks by which transformers finds what the assistant says.
TRL_TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{{ '<s>[INST] ' }}"
    "{%- if loop.index0 == 1 and messages[0]['role'] == 'system' -%}"
    "{{ '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' }}{%- endif -%}"
    "{{ message['content'] + ' [/INST]' }}"
    "{%- elif message['role'] == 'assistant' -%}{% generation %}{{ ' ' + message['content'] + ' </s>' }}"
    "{% endgeneration %}{%- endif -%}{%- endfor -%}"
)


def trl(directory: Path, workers: int) -> dict[str, Any]:
    """What SFTTrainer does to a dataset before it trains; the model is as small as can be."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    control = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=stock_tokenizer(), chat_template=TRL_TEMPLATE, **control)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **shape))
    config = SFTConfig(
        output_dir=str(directory / "trl"),
        max_length=SEQ_LEN,
        packing=True,
        assistant_only_loss=True,
        dataset_num_proc=workers,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    spent = 0.0

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **settings: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            prepared = super()._prepare_dataset(*arguments, **settings)
            spent += time.perf_counter() - started
            return prepared

    started = time.perf_counter()
    rows = load_dataset("json", data_files=str(directory / "rows.jsonl"), split="train")
    loading = time.perf_counter() - started
    trainer = Timed(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    return {"seconds": loading + spent, "packed_rows": len(trainer.train_dataset)}


SIDES: dict[str, Callable[[Path, int], dict[str, Any]]] = {"ours": ours, "floor": floor, "trl": trl}
