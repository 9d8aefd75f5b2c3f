"""All that is read, as it is before anything is done to it."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inference.config import InferenceConfig

from .programs import ASKED, BATCH, EVALUATION, batch, evaluate, prepare, run_training

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
ROWS_OF_A_FILE = 24
QUESTIONS = {
    "winogrande": {"sentence": "The _ is wet.", "option1": "sea", "option2": "hill", "answer": "1"},
    "gsm8k": {"question": "How many?", "answer": "Two.\n#### 2"},
}
"""A row of each task that is scored."""


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
    run_training("model.path=in/base", "dataset=in/prepared", "run_dir=out/run")
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
    _evaluate()


def _interrupt(prompts: Path) -> None:
    """Leaves the journal of a batch that was killed after its first answer."""
    from inference.batch.journal import identity

    batch(input=str(prompts))
    answers = Path("out/answers.jsonl")
    asked = InferenceConfig(**{**ASKED, **BATCH, "input": str(prompts)})
    first = answers.read_text().splitlines()[0]
    answers.with_name("answers.jsonl.part").write_text(f"{json.dumps(identity(asked, prompts))}\n{first}\n")
    answers.unlink()


def _evaluate() -> None:
    """Leaves an evaluation to compare with, one beside the adapter, and the journal of one that was killed."""
    from inference.evaluation.answering import answer_all, plan_of
    from inference.evaluation.evaluate import identity
    from inference.evaluation.journal import open_journal
    from inference.evaluation.leaderboard.rows import read_task
    from inference.load import Loaded, find_base, load_base, load_tokenizer

    for folder, files in (("winogrande", ("validation", "train")), ("gsm8k", ("test", "train"))):
        Path("in/tasks", folder).mkdir(parents=True)
        for name, of_task in zip(files, (3, 6), strict=True):
            lines = (json.dumps(QUESTIONS[folder] | {"id": number}) + "\n" for number in range(of_task))
            Path("in/tasks", folder, f"{name}.jsonl").write_text("".join(lines))
    evaluate(output="in/before")
    evaluate(adapter="out/run/adapter", output="out/run/evaluation")
    asked = InferenceConfig(**{**ASKED, **EVALUATION})
    base = find_base(asked)
    questions = [question for name in asked.tasks for question in read_task(name, asked.data).questions]
    with open_journal(Path("out/evaluation/answers.part"), identity(asked, base)) as journal:
        loaded = Loaded(load_base(base, asked).eval(), load_tokenizer(base))
        plan = plan_of(questions, loaded.tokenizer, asked, SMALL["max_position_embeddings"])
        answer_all(loaded, asked, plan, journal, lambda _: None)


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
