"""Scoring the card's tasks against lm-evaluation-harness's own model: questions/s and memory.

One process, the same random Mixtral, the same questions with the same prompts, taking turns. Both give log-likelihoods
from a softmax in float32; the largest difference between them is printed, and the command fails if it is above 1e-3.
GSM8K is left out: there both only wait for the generator.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TASKS = ("arc", "hellaswag", "mmlu", "truthfulqa", "winogrande")
LARGEST_DIFFERENCE = 1e-3


def arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--data", help="a directory with the tasks' rows, as task=evaluate takes it; else the hub's")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--questions", type=int, default=20, help="of each task")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1792)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=4096, help="that one forward of ours reads")
    parser.add_argument("--batch-size", type=int, default=8, help="of the harness")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs; medians are reported")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Lets both score the same questions in turn, and prints a table for each task."""
    from lm_eval.api.instance import Instance

    from inference.evaluation.leaderboard.rows import read_task

    contenders = _contenders(options)
    figures: dict[str, Any] = {
        "sizes": {name: getattr(options, name) for name in ("hidden", "intermediate", "layers")},
        "dtype": options.dtype,
        "device": options.device,
        "questions": options.questions,
        "tasks": {},
        "failed": [],
    }
    for name in options.tasks:
        questions = read_task(name, options.data).questions[: options.questions]
        requests = [
            Instance("loglikelihood", {}, pair, 0)
            for question in questions
            for pair in zip(question.contexts, question.choices, strict=True)
        ]
        figures["tasks"][name] = _measure(contenders, questions, requests, options.rounds)
        difference = figures["tasks"][name]["largest_difference"]
        if options.dtype == "float32" and difference > LARGEST_DIFFERENCE:
            figures["failed"].append(f"{name}: log-likelihoods differ by {difference:.2e}")
    _show(figures)
    return figures


def _contenders(options: argparse.Namespace) -> dict[str, Any]:
    """For each contender a function of questions and requests that gives all log-likelihoods, and the model."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    from data.template import ChatTokenizer
    from inference.config import InferenceConfig
    from inference.evaluation.answering import answer_all, plan_of
    from inference.evaluation.journal import open_journal
    from inference.generate import context
    from inference.load import Loaded

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        max_position_embeddings=32_768,
        initializer_range=0.05,
    )
    model = MixtralForCausalLM(config).to(getattr(torch, options.dtype)).to(options.device).eval()
    tokenizer = ChatTokenizer.load()
    loaded = Loaded(model, tokenizer)
    settings = InferenceConfig(task="evaluate", base="base", bos="never", max_tokens=options.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        stock = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    harness = HFLM(
        pretrained=model,
        tokenizer=stock,
        batch_size=options.batch_size,
        max_length=4096,
        softmax_dtype="float32",
        add_bos_token=False,
    )

    def ours(questions: list[Any], _: list[Any]) -> list[float]:
        with tempfile.TemporaryDirectory() as top, open_journal(Path(top) / "journal", {}) as journal:
            plan = plan_of(questions, tokenizer, settings, context(loaded))
            answers = answer_all(loaded, settings, plan, journal, lambda _: None)
        return [total for answered in answers for total in answered.log_likelihoods]

    def theirs(_: list[Any], requests: list[Any]) -> list[float]:
        return [total for total, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    return {"ours": (ours, model), "lm-eval": (theirs, model)}


def _measure(contenders: dict[str, Any], questions: list[Any], requests: list[Any], rounds: int) -> dict[str, Any]:
    from benchmarks.harness.trainers import Memory

    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        names = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in names:
            score, model = contenders[name]
            gc.collect()
            peak = Memory(model, model.device.type)
            started = time.perf_counter()
            found[name] = score(questions, requests)
            speeds[name].append(len(questions) / (time.perf_counter() - started))
            memory[name].append(peak.peak_mib())
    return {
        "questions_per_second": speeds,
        "speedup": statistics.median(a / b for a, b in zip(speeds["ours"], speeds["lm-eval"], strict=True)),
        "memory_above_model_mib": {name: statistics.median(values) for name, values in memory.items()},
        "largest_difference": max(abs(a - b) for a, b in zip(found["ours"], found["lm-eval"], strict=True)),
    }


def _show(figures: dict[str, Any]) -> None:
    columns = ("task", "ours, questions/s", "lm-eval", "faster by", "memory, MiB", "lm-eval", "difference")
    table = Table(*columns, title=f"{figures['questions']} questions of each task")
    for name, task in figures["tasks"].items():
        speeds, memory = task["questions_per_second"], task["memory_above_model_mib"]
        table.add_row(
            name,
            *(f"{statistics.median(speeds[who]):.2f}" for who in ("ours", "lm-eval")),
            f"{task['speedup']:.2f}×",
            *(f"{memory[who]:,.0f}" for who in ("ours", "lm-eval")),
            f"{task['largest_difference']:.1e}",
        )
    Console().print(table)
    for sentence in figures["failed"]:
        print(f"failed: {sentence}")
    sys.stdout.flush()
