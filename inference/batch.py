"""Many prompts of a file → one answer line each, in the order of the file; a killed run goes on where it was.

{output}.part     while it runs: what the run is, then each answer as it comes. Only ever appended to.
{output}          when all is answered: the lines sorted, errors among them

An answer line has `line` (of the input, from 1; of a list `row`, from 0), `id` (the row's, or null), `answer`,
`finish_reason`, `prompt_tokens` and `tokens`; the line of a row that can't be answered has `line` or `row`, `id` and
`error` (a reason code and a sentence).
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.errors import UserError
from data.sources import sha256
from data.writing import sync
from inference.adapter import WEIGHTS
from inference.config import InferenceConfig
from inference.generate import Answer, Ending, context, generate_rows, sampling
from inference.load import Loaded, is_spread, load
from inference.rows import Prompt, encoded, read_prompts, read_rows

SETTINGS = (
    *("adapter", "base", "revision", "fold", "dtype", "system", "markers", "max_new_tokens", "stop"),
    *("temperature", "top_p", "top_k", "seed", "batch_size", "batching"),
)
"""What a run must have in common with the one that it continues."""

FIRST_BYTES = b'{"input": "'
"""How every journal begins."""

console = Console(stderr=True, markup=False, highlight=False, emoji=False)


def batch(config: InferenceConfig) -> dict[str, int]:
    """Answers every row of `input` to `output`; returns how many rows were answered, failed, and taken from before.

    Raises:
        UserError: the input can't be read, the output is there, or the run that it would continue was another.
    """
    source, output = Path(str(config.input)), Path(str(config.output))
    rows = read_rows(source, config)
    if output.exists() and not config.overwrite:
        raise UserError(f"output={output}: it is there already; name another file, or give overwrite=true")
    if output.resolve() == source.resolve() or output.is_dir():
        raise UserError(f"output={output}: that is no file to write answers to; name another")
    with _journal(output.with_name(f"{output.name}.part"), _identity(config, source)) as journal:
        loaded = load(config)
        prompts, errors = read_prompts(rows, loaded.tokenizer, config, context(loaded))
        units = plan(prompts, 1 if config.batching == "continuous" else config.batch_size)
        done = journal.keep([[prompt.line for prompt in unit] for unit in units])
        left = [unit for unit in units if unit[0].line not in done]
        answering = answer_continuously if config.batching == "continuous" else answer_padded
        if config.batching == "continuous" and is_spread(loaded.model):
            console.print(
                "batching=continuous: the model is spread over several devices, for which transformers has padded "
                "batches alone; they are used",
                soft_wrap=True,
            )
            # what an interrupted run has answered one by one stays
            answering, left = answer_padded, plan([prompt for unit in left for prompt in unit], config.batch_size)
        with _progress(len(prompts), len(done)) as advance:
            for answers in answering(loaded, config, left):
                journal.append(answers)
                advance(len(answers))
        _finish(output, [*journal.answers(), *errors])
        journal.path.unlink()
    summary = {"answered": len(prompts), "failed": len(errors), "from_before": len(done)}
    console.print(
        f"{output}: {len(prompts)} answers ({len(done)} of them from before), {len(errors)} unusable rows",
        soft_wrap=True,
    )
    return summary


# Answers


def plan(prompts: list[Prompt], size: int) -> list[list[Prompt]]:
    """Prompts of like length together, the longest first, so that too little memory shows at once."""
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.line))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def answer_padded(loaded: Loaded, config: InferenceConfig, units: list[list[Prompt]]) -> Iterator[list[dict[str, Any]]]:
    """Answers each unit as a batch, padded to its longest."""
    ending = Ending(loaded.tokenizer, config)
    for unit in units:
        # From the seed and the unit's place alone, so that a run which is continued samples the same.
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


# Files


class Journal:
    """`{output}.part`: a first line that says what the run is, then whole units of answers."""

    def __init__(self, path: Path, descriptor: int, offset: int):
        self.path = path
        self._descriptor = descriptor
        self._start = offset

    def keep(self, units: list[list[int]]) -> set[int]:
        """Drops what a kill left of a unit that was not whole; the lines that are answered."""
        place, wanted = self._start, {unit[0]: unit for unit in units}
        content = self.path.read_bytes()
        done: set[int] = set()
        while place < len(content):
            whole: list[int] = []
            unit: list[int] = []
            end = place
            while not whole or len(whole) < len(unit):
                newline = content.find(b"\n", end)
                if newline < 0:
                    break
                whole.append(_line_of(content[end:newline]))
                unit = wanted.get(whole[0], [])
                end = newline + 1
            if whole != unit or not unit:
                break
            done |= set(whole)
            place = end
        os.ftruncate(self._descriptor, place)
        return done

    def append(self, answers: list[dict[str, Any]]) -> None:
        """Adds a unit, in one write, and waits until the disk has it."""
        view = memoryview(b"".join(map(encoded, answers)))
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.fsync(self._descriptor)

    def answers(self) -> list[dict[str, Any]]:
        """All answers so far."""
        return [json.loads(line) for line in self.path.read_bytes()[self._start :].splitlines()]


@contextmanager
def _journal(path: Path, identity: dict[str, Any]) -> Iterator[Journal]:
    """The journal of this run, begun or continued; held by one process at a time.

    Raises:
        UserError: it can't be written, another process writes it, or it belongs to another run.
    """
    descriptor = _locked(path)
    try:
        if not _begins_as_ours(path.read_bytes()):
            raise UserError(
                f"output: {path} is there, and no batch wrote it; move it elsewhere, or name another output"
            )
        head, _, answers = path.read_bytes().partition(b"\n")
        before = json.loads(head) if answers else identity
        for field, value in identity.items():
            if before.get(field) != value:
                raise UserError(
                    f"{field}={value}: the run that {path} belongs to had {field}={before.get(field)}; "
                    f"give the same again, or remove the file to start over"
                )
        if not answers:
            os.ftruncate(descriptor, 0)
            head = json.dumps(identity).encode()
            os.write(descriptor, head + b"\n")
        yield Journal(path, descriptor, len(head) + 1)
    finally:
        content = path.read_bytes() if path.exists() else b"-"
        if _begins_as_ours(content) and content.count(b"\n") < 2:  # nothing was answered: nothing to go on from
            path.unlink()
        os.close(descriptor)


def _begins_as_ours(content: bytes) -> bool:
    """Whether that is how a journal begins; nothing, and a head that was torn, are beginnings too."""
    return content[: len(FIRST_BYTES)] == FIRST_BYTES[: len(content)]


def _line_of(answer: bytes) -> int:
    """The line that an answer is to; -1, which no row has, where a torn write or a damaged disk left something else."""
    try:
        return _place(json.loads(answer))
    except (ValueError, TypeError, KeyError):
        return -1


def _place(answer: dict[str, Any]) -> int:
    """The line, or the row, that an answer is to."""
    return int(answer["line"] if "line" in answer else answer["row"])


def _locked(path: Path) -> int:
    """A descriptor of the journal, for this process alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise UserError(f"output={path}: it can't be written ({error.strerror}); name a writable place") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"output={path}: another process is writing it; wait for it, or name another") from error
    return descriptor


def _identity(config: InferenceConfig, source: Path) -> dict[str, Any]:
    """What tells this run from another: the input's and the adapter's bytes, and all that decides the answers."""
    weights = Path(str(config.adapter)) / WEIGHTS
    return {
        "input": sha256(source),
        "adapter_weights": sha256(weights) if weights.is_file() else None,
        **{name: getattr(config, name) for name in SETTINGS},
    }


def _finish(output: Path, answers: list[dict[str, Any]]) -> None:
    """Writes all lines in the input's order, and lets them appear at once."""
    temporary = output.with_name(f".{output.name}.tmp")
    with temporary.open("wb") as file:
        for answer in sorted(answers, key=_place):
            file.write(encoded(answer))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(output)
    sync(output.parent)


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("Answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total, completed=done)
        yield lambda count: progress.advance(bar, count)
