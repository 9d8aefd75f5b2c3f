"""The card's six tasks, scored: rows → questions → answers → tables and files."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from configs.program.console import console
from configs.program.errors import UserError
from configs.program.provenance import machine, provenance
from data.disk.adapter_directory import EVALUATION, SCORES, WEIGHTS
from data.disk.files import replace_file, sha256
from inference.config import InferenceConfig
from inference.evaluation.answering import Answered, answer_all, plan_of, record
from inference.evaluation.contamination import trained_on
from inference.evaluation.journal import Journal, open_journal
from inference.evaluation.leaderboard.rows import read_task
from inference.evaluation.leaderboard.tasks import TASKS
from inference.evaluation.results import (
    QUESTIONS,
    QUESTIONS_OF_BASE,
    compare,
    describe_prompts,
    grouped,
    overall,
    prompt_hash,
    published,
    read_earlier,
    score,
    without_nan,
)
from inference.evaluation.tables import show
from inference.generate import context
from inference.load import Base, Loaded, add_adapter, find_adapter, find_base, load_base, load_tokenizer

BASE = "base"
"""`compare=base`."""

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "sentencepiece", "numpy", "scipy", "xxhash")


def evaluate(config: InferenceConfig) -> dict[str, Any]:
    """Scores the tasks and writes the result to `output`; returns what `results.json` holds.

    Raises:
        UserError: rows or model can't be had, what is compared with is not comparable, or the output is taken.
    """
    output = output_of(config)
    if (output / SCORES).exists() and not config.overwrite:
        raise UserError(f"output={output}: it holds an evaluation; name another directory, or give overwrite=true")
    base = find_base(config)
    adapter = None if config.adapter is None else find_adapter(config, base)
    others = [name for name in config.tasks if name not in TASKS]
    if config.compare not in (None, BASE) and len(others) == len(config.tasks):
        raise UserError(
            f"compare={config.compare}: of lm-eval's tasks ({', '.join(others)}) no answers are kept to compare with; "
            f"give compare=base"
        )
    if others:
        from inference.evaluation.harness import check_names  # an extra

        check_names(others)
    rows = {name: read_task(name, config.data) for name in config.tasks if name in TASKS}
    questions = [question for name in rows for question in rows[name].questions[: config.limit]]
    earlier = read_earlier(Path(config.compare)) if config.compare not in (None, BASE) else None
    before = None
    if earlier is not None:
        earlier.check_format(config)
        before = earlier.scores(questions)
    tokenizer = load_tokenizer(base)
    clean = None
    if config.trained_on is not None:
        seen = trained_on(questions, Path(config.trained_on), tokenizer)
        clean = {id(question): not was for question, was in zip(questions, seen, strict=True)}
    with ExitStack() as stack:
        begin = stack.enter_context(_bars())
        bar = (
            begin("Evaluating", "questions", len(questions) * (2 if config.compare == BASE else 1))
            if questions
            else lambda _: None
        )
        journal = stack.enter_context(open_journal(output / "answers.part", identity(config, base)))
        journals = [journal]
        loaded = Loaded(load_base(base, config).eval(), tokenizer)
        started = time.perf_counter()
        plan = plan_of(questions, tokenizer, config, context(loaded))
        if config.compare == BASE:  # first, because folding the adapter changes the base's weights
            alone = identity(replace(config, adapter=None), base)
            journals.append(stack.enter_context(open_journal(output / "answers_of_base.part", alone)))
            of_base = answer_all(loaded, config, plan, journals[-1], bar)
            metrics_of_base = _others(
                others, loaded, config, journals[-1], partial(begin, "The base, by lm-eval", "requests")
            )
            before = {name: grouped(_of(name, of_base)) for name in rows}
        if adapter is not None:
            loaded = replace(loaded, model=add_adapter(loaded.model, adapter, config).eval())
        answered = answer_all(loaded, config, plan, journal, bar)
        metrics = _others(others, loaded, config, journal, partial(begin, "By lm-eval", "requests"))
        result = {
            "model": described(config, base),
            "settings": {name: getattr(config, name) for name in SETTINGS} | {"dtype": str(loaded.model.dtype)},
            "prompts": {name: describe_prompts(name, rows[name]) | {"source": rows[name].source} for name in rows},
            **(measured := scores(answered, clean)),
            "published": published(measured["tasks"]),
            "compared_with": config.compare,
            "comparison": None if before is None else compare(before, {n: grouped(_of(n, answered)) for n in rows}),
            "before": None if config.compare != BASE else scores(of_base, clean) | {"others": metrics_of_base},
            "others": metrics,
            "seconds": time.perf_counter() - started,
            "device": str(loaded.model.device),
            **provenance(PACKAGES),
            "machine": machine(),
        }
        write(output / QUESTIONS, answered)
        if config.compare == BASE:
            write(output / QUESTIONS_OF_BASE, of_base)
        replace_file(output / SCORES, [json.dumps(without_nan(result), indent=1).encode() + b"\n"])
        for each in journals:
            each.path.unlink()
    show(result)
    console.print(f"{output}: {SCORES}, and a line for each question in {QUESTIONS}", soft_wrap=True)
    return result


def output_of(config: InferenceConfig) -> Path:
    """Where the result goes: `evaluation` beside the adapter, unless `output` says otherwise."""
    if config.output:
        return Path(config.output)
    beside = None if config.adapter is None else Path(config.adapter)
    return Path(EVALUATION) if beside is None or not beside.is_dir() else beside.parent / EVALUATION


def _others(
    names: list[str],
    loaded: Loaded,
    config: InferenceConfig,
    journal: Journal,
    begin: Callable[[int], Callable[[int], None]],
) -> dict[str, dict[str, Any]]:
    if not names:
        return {}
    from inference.evaluation.harness import score_others  # an extra

    return score_others(names, loaded, config, journal, begin)


def described(config: InferenceConfig, base: Base) -> dict[str, Any]:
    """Which model it is: the base's weights, and the adapter's."""
    weights = base.adapter / WEIGHTS if config.adapter is not None and base.adapter is not None else None
    return {
        "base": base.source,
        "revision": base.revision,
        "fingerprint": base.weights.fingerprint,
        "adapter": config.adapter,
        "adapter_sha256": None if weights is None else sha256(weights),
    }


SETTINGS = ("bos", "chat", "weights", "fold", "dtype", "device", "max_tokens", "batch_size", "seed", "limit")
"""What decides the numbers beside the model and the questions."""


def identity(config: InferenceConfig, base: Base) -> dict[str, Any]:
    """What a continued run must have in common with the one that began; the questions have hashes of their own."""
    model = described(config, base)
    kept = {name: model[name] for name in ("fingerprint", "adapter_sha256")}
    return kept | {name: getattr(config, name) for name in SETTINGS if name != "limit"}


def scores(answered: list[Answered], clean: dict[int, bool] | None) -> dict[str, Any]:
    """The scores of the tasks, and their average if all six are there."""
    tasks = {name: score(_of(name, answered), clean) for name in dict.fromkeys(a.question.task for a in answered)}
    return {"tasks": tasks, "average": overall(tasks)}


def _of(name: str, answered: list[Answered]) -> list[Answered]:
    return [each for each in answered if each.question.task == name]


def write(path: Path, answered: list[Answered]) -> None:
    """A line for each question."""
    lines = (json.dumps(record(each, prompt_hash(each.question)), ensure_ascii=False) + "\n" for each in answered)
    replace_file(path, (line.encode() for line in lines))


class Speed(ProgressColumn):
    """Questions a second, as far as it goes."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text("" if task.speed is None else f"{task.speed:.1f} {task.fields['unit']}/s")


@contextmanager
def _bars() -> Iterator[Callable[[str, str, int], Callable[[int], None]]]:
    """A function that begins a bar with its name, what it counts and how many, and returns what moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def begin(what: str, unit: str, total: int) -> Callable[[int], None]:
            bar = progress.add_task(what, total=total, unit=unit)
            return lambda count: progress.advance(bar, count)

        yield begin
