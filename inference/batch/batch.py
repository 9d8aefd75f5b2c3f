"""The prompts of a file → one answer line each, in the order of the file; a killed run goes on from where it was.

{output}.part     while it runs: what the run is, then each answer as it comes. Only ever appended to.
{output}          when all prompts are answered: the lines sorted, errors among them

An answer line has `line` (of the input, from 1; for a list `row`, from 0), `id` (the row's, or null), `answer`,
`finish_reason`, `prompt_tokens` and `tokens`; the line of a row that can't be answered has `line` or `row`, `id` and
`error` (a reason code and a sentence).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.program.console import console
from configs.program.errors import UserError
from data.disk.nf4 import UNQUANTISED
from inference.batch.journal import finish, identity, open_journal
from inference.batch.rows import Prompt, read_prompts, read_rows
from inference.config import InferenceConfig
from inference.generate import Answer, Ending, context, generate_rows, sampling
from inference.load import Loaded, is_spread, load


def batch(config: InferenceConfig) -> dict[str, int]:
    """Answers every row of `input` to `output`; returns how many rows were answered, failed, and answered before.

    Raises:
        UserError: the input can't be read, the output exists, or the run that it would continue is a different one.
    """
    source, output = Path(str(config.input)), Path(str(config.output))
    rows = read_rows(source, config)
    if output.exists() and not config.overwrite:
        raise UserError(f"output={output}: it is there already; name another file, or give overwrite=true")
    if output.resolve() == source.resolve() or output.is_dir():
        raise UserError(f"output={output}: it is not a file that answers can be written to; name another")
    with open_journal(output.with_name(f"{output.name}.part"), identity(config, source)) as journal:
        loaded = load(config)
        prompts, errors = read_prompts(rows, loaded.tokenizer, config, context(loaded))
        units = plan(prompts, 1 if config.batching == "continuous" else config.batch_size)
        done = journal.keep([[prompt.line for prompt in unit] for unit in units])
        left = [unit for unit in units if unit[0].line not in done]
        answering = answer_continuously if config.batching == "continuous" else answer_padded
        if config.batching == "continuous" and (reason := why_padded(loaded, config)):
            console.print(f"batching=continuous: {reason}; padded batches are used", soft_wrap=True)
            # what an interrupted run has answered one by one is kept
            answering, left = answer_padded, plan([prompt for unit in left for prompt in unit], config.batch_size)
        with _progress(len(prompts), len(done)) as advance:
            for answers in answering(loaded, config, left):
                journal.append(answers)
                advance(len(answers))
        finish(output, [*journal.answers(), *errors])
        journal.path.unlink()
    summary = {"answered": len(prompts), "failed": len(errors), "from_before": len(done)}
    console.print(
        f"{output}: {len(prompts)} answers ({len(done)} of them from before), {len(errors)} unusable rows",
        soft_wrap=True,
    )
    return summary


# Answers


def plan(prompts: list[Prompt], size: int) -> list[list[Prompt]]:
    """Prompts of similar length together, the longest first, so that too little memory shows at once."""
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.line))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def why_padded(loaded: Loaded, config: InferenceConfig) -> str | None:
    """Why transformers' continuous batching can't do what is asked, or None."""
    if is_spread(loaded.model):
        return "the model is spread over several devices, which transformers' continuous batching doesn't know"
    # It would leave the penalty out with a warning, and says of min_p that it may not work.
    for name, value, nothing in (("repetition_penalty", config.repetition_penalty, 1), ("min_p", config.min_p, 0)):
        if value != nothing:
            return f"transformers' continuous batching doesn't know {name}"
    return None


def answer_padded(loaded: Loaded, config: InferenceConfig, units: list[list[Prompt]]) -> Iterator[list[dict[str, Any]]]:
    """Answers each unit as a batch, padded to its longest."""
    ending = Ending(loaded.tokenizer, config)
    for unit in units:
        # From the seed and the unit's first line alone, so that a continued run samples the same.
        answers = generate_rows(
            loaded, config, [prompt.ids for prompt in unit], ending, seed=config.seed + unit[0].line
        )
        yield [record(prompt, answer) for prompt, answer in zip(unit, answers, strict=True)]


def answer_continuously(
    loaded: Loaded, config: InferenceConfig, units: list[list[Prompt]]
) -> Iterator[list[dict[str, Any]]]:
    """Answers all in transformers' continuous batching, each as it ends."""
    from transformers import ContinuousBatchingConfig

    if not units:
        return
    ending = Ending(loaded.tokenizer, config)
    waiting = {str(unit[0].line): unit[0] for unit in units}
    longest = max(len(prompt.ids) for prompt in waiting.values())
    page = 64  # tokens; left alone, transformers takes all memory that is free for its cache
    together = min(config.batch_size, len(waiting))
    settings = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=together * -(-min(longest + config.max_new_tokens, context(loaded)) // page),
        max_batch_tokens=max(longest, 512),
        max_requests_per_batch=together,
        seed=config.seed,
        # None leaves it to transformers; experts in four bits go one after another, which no graph can hold.
        use_cuda_graph=None if config.weights == UNQUANTISED else False,
    )
    generation = sampling(config, config.max_new_tokens)
    with loaded.model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings
    ) as manager:
        for name, prompt in waiting.items():
            limit = min(config.max_new_tokens, context(loaded) - len(prompt.ids))
            manager.add_request(prompt.ids, request_id=name, max_new_tokens=limit)
        while waiting:
            output = manager.get_result(timeout=1)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped before all prompts were answered")
                continue
            if output.error is not None:
                raise RuntimeError(f"transformers' continuous batching failed: {output.error}")
            prompt = waiting.pop(output.request_id)
            yield [record(prompt, ending.answer(list(output.generated_tokens)))]


def record(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """The answer line of a prompt."""
    return {
        prompt.unit: prompt.line,
        "id": prompt.id,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(prompt.ids),
        "tokens": len(answer.ids),
    }


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("Answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total, completed=done)
        yield lambda count: progress.advance(bar, count)
