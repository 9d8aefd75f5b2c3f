"""Generation against stock PEFT unmerged and plain transformers on a merged model: tokens/s, alone and in batches.

One process, the same weights and prompts, greedy, contenders in turn; each round's ratio is of the same minutes. The
base is a random Mixtral, which never ends a reply by itself, so that all generate the same number of tokens.

`batches` is another question: which way of batching answers prompts whose replies have the lengths of real ones.
Padded batches run until their longest reply has ended; continuous batching takes in the next prompt at once. Only
tokens of replies count.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NEW_TOKENS = {1: 24, 16: 12}
"""How many tokens are generated for each prompt, by the number of prompts at a time."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="how often each contender runs; medians are reported")
    parser.add_argument("--peft-rounds", type=int, default=2, help="how often PEFT runs, which takes long")
    parser.add_argument("--prompts", type=int, default=32, help="prompts for the comparison of batches; 0 for none")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves it alone. On a shared machine, 1")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes base, adapter and merged model, lets the contenders run, prints the tables."""
    import torch
    from transformers.utils import logging

    if options.threads:
        torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        contenders, prompts, targets = _prepare(Path(folder), options)
        figures: dict[str, Any] = {
            "sizes": {name: getattr(options, name) for name in ("hidden", "intermediate", "layers", "rank")},
            "device": str(contenders["ours"][0].device),
            "threads": torch.get_num_threads(),
        }
        for size, new_tokens in NEW_TOKENS.items():
            figures[f"streams_{size}"] = _streams(contenders, prompts[:size], new_tokens, options)
        if options.prompts:
            some = slice(options.prompts)
            rounds = max(1, options.rounds // 2)
            figures["batches"] = _batches(contenders["ours"][0], prompts[some], targets[some], rounds)
    return figures


def _prepare(top: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[list[int]], list[int]]:
    """Each contender's model and its way to generate; the prompts, and the lengths of their real replies."""
    import json

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, MixtralForCausalLM

    from benchmarks.merge import make
    from data.schema import Conversation, Message
    from data.template import ChatTokenizer
    from inference.config import InferenceConfig
    from inference.generate import Ending, generate_rows
    from inference.load import load
    from inference.merging.merge import merge

    sizes = {name: getattr(options, name) for name in ("hidden", "intermediate", "layers", "rank")}
    make(top, **sizes, shard="1GB")
    settings = InferenceConfig(
        adapter=str(top / "adapter"), base=str(top / "base"), output=str(top / "merged"), device=options.device
    )
    settings.verify = False
    merge(settings)
    loaded = load(settings)
    device = loaded.model.device

    def ours(model: Any, rows: list[list[int]], new_tokens: int) -> int:
        settings.max_new_tokens = new_tokens
        ending = Ending(loaded.tokenizer, settings)
        return sum(len(answer.ids) for answer in generate_rows(loaded, settings, rows, ending, seed=0))

    def stock(model: Any, rows: list[list[int]], new_tokens: int) -> int:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        how = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=mask, **how)
        return int(output[:, longest:].numel())

    base = MixtralForCausalLM.from_pretrained(top / "base", dtype=torch.bfloat16, trust_remote_code=False).to(device)
    unmerged = PeftModel.from_pretrained(base, str(top / "adapter")).eval()
    merged = (
        AutoModelForCausalLM.from_pretrained(top / "merged", dtype=torch.bfloat16, trust_remote_code=False)
        .to(device)
        .eval()
    )
    contenders = {
        "ours": (loaded.model, ours),
        "transformers, merged": (merged, stock),
        "PEFT, unmerged": (unmerged, stock),
    }
    chat = ChatTokenizer.load()
    sample = Path(__file__).parents[2] / "data" / "sample" / "general.jsonl"
    rows = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()][: max(16, options.prompts)]
    asked = [Conversation((Message("user", row["instruction"]), Message("assistant", row["output"]))) for row in rows]
    prompts = [chat.encode_prompt(conversation) for conversation in asked]
    replies = [len(chat.encode(conversation)) - len(ids) for conversation, ids in zip(asked, prompts, strict=True)]
    return contenders, prompts, replies


def _streams(contenders: dict[str, Any], rows: list[list[int]], new_tokens: int, options: Any) -> dict[str, Any]:
    """Tokens/s of each contender for these prompts at a time."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):  # the first round warms up
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody always follows the same one
            model, generate = contenders[name]
            if name.startswith("PEFT") and number > options.peft_rounds:
                continue
            started = time.perf_counter()
            tokens = generate(model, rows, new_tokens)
            if number:
                speeds[name].append(tokens / (time.perf_counter() - started))
    return _report(f"{len(rows)} at a time, {new_tokens} tokens each", speeds, "ours")


def _batches(model: Any, prompts: list[list[int]], targets: list[int], rounds: int) -> dict[str, Any]:
    """Useful tokens/s of padded batches and of continuous batching, 16 prompts at a time."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    size = 16
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    common = {"do_sample": False, "pad_token_id": 0, "eos_token_id": 2}

    def padded() -> None:
        for start in range(0, len(order), size):
            here = order[start : start + size]
            longest = max(len(prompts[index]) for index in here)
            ids = torch.tensor([[0] * (longest - len(prompts[index])) + prompts[index] for index in here])
            limit = max(targets[index] for index in here)
            with torch.inference_mode():
                mask = (ids != 0).long()
                how = GenerationConfig(max_new_tokens=limit, **common)
                model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=how)

    def continuous() -> None:
        needed = max(len(prompts[index]) + targets[index] for index in order)
        settings = ContinuousBatchingConfig(
            page_size=64, num_blocks=size * -(-needed // 64), max_batch_tokens=512, max_requests_per_batch=size
        )
        how = GenerationConfig(max_new_tokens=max(targets), **common)
        with model.continuous_batching_context_manager(
            generation_config=how, continuous_batching_config=settings
        ) as manager:
            for index in order:
                manager.add_request(prompts[index], request_id=str(index), max_new_tokens=targets[index])
            left = len(order)
            while left:
                left -= manager.get_result(timeout=5) is not None

    ways: dict[str, Callable[[], None]] = {"padded": padded, "continuous": continuous}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            speeds[name].append(sum(targets) / (time.perf_counter() - started))
    return _report(f"{len(prompts)} prompts with replies of real lengths, {size} at a time", speeds, "padded")


def _report(title: str, speeds: dict[str, list[float]], ours: str) -> dict[str, Any]:
    table = Table("", "tokens/s", f"{ours} is faster by", title=title)
    figures = {}
    for name, runs in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(speeds[ours], runs, strict=False))
        figures[name] = {"tokens_per_second": runs, "median": statistics.median(runs), f"{ours}_over_this": ratio}
        table.add_row(name, f"{statistics.median(runs):.1f}", f"{ratio:.2f}×")
    Console().print(table)
    sys.stdout.flush()
    return figures
