"""Any other task, by lm-evaluation-harness, over the scorer, the generator and the journal of the card's tasks.

The harness brings tasks, prompts and metrics; it is an extra (`pip install -e ".[eval]"`). Its own cache is left off,
because it gives one model the answers of another.
"""

import os
from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from configs.program.errors import UserError, one_line
from data.schema import Conversation, Message, Role
from data.template import BOS, EOS
from inference.config import SCORED, InferenceConfig
from inference.evaluation.journal import Journal
from inference.evaluation.scoring import log_likelihoods
from inference.evaluation.sequences import Scored, key_of, units_of
from inference.generate import Ending, context, generate_rows
from inference.load import Loaded

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

RESAMPLES = 1000
"""Draws of the bootstrap for metrics that are not a mean; a mean has a standard error of its own."""

Begin = Callable[[int], Callable[[int], None]]
"""Called with the number of requests; what it returns, with the number of those that were answered."""


class HarnessModel(TemplateLM):
    """A loaded model as lm-evaluation-harness asks for one."""

    def __init__(self, loaded: Loaded, config: InferenceConfig, journal: Journal, begin: Begin):
        super().__init__()
        self._loaded, self._config, self._journal, self._begin = loaded, config, journal, begin

    @property
    def eot_token_id(self) -> int:
        """`</s>`."""
        return EOS

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation without a context: `<s>`."""
        return BOS

    @property
    def tokenizer_name(self) -> str:
        """What requests are cached by."""
        return self._loaded.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, `<s>` before it if the settings say so; nothing in the text becomes a control token."""
        begins = add_special_tokens is not False and (self._config.chat or self._config.bos == "always")
        return [BOS] * begins + self._loaded.tokenizer.encode_text(string).tolist()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness records of the template."""
        return "llama-2" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation that ends with the user, without `<s>`, which `tok_encode` puts before it.

        It ends in the space that training has after `[/INST]`; the harness moves it to what follows.
        """
        messages = tuple(Message(cast(Role, turn["role"]), turn["content"]) for turn in chat_history)
        return self._loaded.tokenizer.render(Conversation(messages)).removeprefix("<s>") + " "

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = context(self._loaded)
        sequences = [
            [Scored(array("H", (before + ids)[-longest - 1 :]), min(len(ids), longest))] for _, before, ids in requests
        ]
        return [of_request[0] for of_request in self._scored(sequences)]

    def _scored(self, sequences: list[list[Scored]]) -> list[list[tuple[float, bool]]]:
        """The log-likelihood of each sequence, and whether it is the likeliest, for each request."""
        found: dict[int, list[tuple[float, bool]]] = {}
        advance = self._begin(len(sequences))
        for unit in units_of(sequences, self._config.max_tokens):
            if unit.key not in self._journal:
                scored = log_likelihoods(self._loaded.model, unit.packed)
                self._journal.append(unit.key, [[each.total, each.is_greedy] for each in scored])
            count = sum(len(sequences[number]) for number in unit.numbers)
            answers = iter(self._journal.answers(unit.key, tuple[float, bool], count))
            for number in unit.numbers:
                found[number] = [(total, greedy) for total, greedy in (next(answers) for _ in sequences[number])]
            advance(len(unit.numbers))
        return [found[number] for number in range(len(sequences))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the model's context."""
        sequences = []
        for request in requests:
            ids = self._loaded.tokenizer.encode_text(request.args[0]).tolist()
            windows = get_rolling_token_windows(ids, BOS, context(self._loaded), 1)
            pairs = map(make_disjoint_window, windows)
            sequences.append([Scored(array("H", before + after), len(after)) for before, after in pairs])
        return [sum(total for total, _ in of_text) for of_text in self._scored(sequences)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is generated for each request, up to the first of its stop strings."""
        texts: dict[int, str] = {}
        advance = self._begin(len(requests))
        for settings, numbers in _alike(request.args[1] for request in requests):
            prompts = [requests[number].args[0] for number in numbers]
            texts |= self._generated(prompts, numbers, dict(settings), advance)
        return [texts[number] for number in range(len(requests))]

    def _generated(
        self, prompts: list[str], numbers: list[int], settings: dict[str, Any], advance: Callable[[int], None]
    ) -> dict[int, str]:
        stops = settings.get("until") or []
        sampled = settings.get("do_sample", False) and settings.get("temperature", 1.0) > 0
        asked = replace(
            self._config,
            stop=[stops] if isinstance(stops, str) else [stop for stop in stops if stop],
            markers="keep",
            max_new_tokens=settings.get("max_gen_toks", 256),
            temperature=settings.get("temperature", 1.0) if sampled else 0.0,
            repetition_penalty=1.0,
        )
        most = context(self._loaded) - asked.max_new_tokens
        ids = [self.tok_encode(prompt)[-most:] for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda index: (-len(ids[index]), index))
        ending = Ending(self._loaded.tokenizer, asked)
        texts: dict[int, str] = {}
        for start in range(0, len(order), asked.batch_size):
            unit = order[start : start + asked.batch_size]
            key = f"{key_of(array('H', ids[index]) for index in unit)} {sorted(settings.items(), key=str)}"
            if key not in self._journal:
                answers = generate_rows(self._loaded, asked, [ids[index] for index in unit], ending, seed=asked.seed)
                self._journal.append(key, [answer.text for answer in answers])
            written = self._journal.answers(key, str, len(unit))
            texts |= {numbers[index]: text for index, text in zip(unit, written, strict=True)}
            advance(len(unit))
        return texts


def _alike(settings: Iterable[dict[str, Any]]) -> list[tuple[list[tuple[str, Any]], list[int]]]:
    """Which requests have the same settings."""
    groups: dict[str, tuple[list[tuple[str, Any]], list[int]]] = {}
    for number, given in enumerate(settings):
        groups.setdefault(str(sorted(given.items())), (list(given.items()), []))[1].append(number)
    return list(groups.values())


@cache
def _tasks() -> "TaskManager":
    """The harness's tasks: it looks through some ten thousand files for them, so once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_names(names: list[str]) -> None:
    """Raises `UserError` for a name that the harness doesn't know, before a model is loaded or asked."""
    known = _tasks()
    for name in names:
        if name not in known.task_index and not Path(name).is_file():
            alike = get_close_matches(name, [*SCORED, *known.all_tasks], n=1)
            remedy = f"did you mean {alike[0]}?" if alike else "`lm-eval ls tasks` lists those"
            raise UserError(f"tasks={name}: it is none of {', '.join(SCORED)}, and none of lm-eval's; {remedy}")


def score_others(
    names: list[Any], loaded: Loaded, config: InferenceConfig, journal: Journal, begin: Begin
) -> dict[str, dict[str, Any]]:
    """The metrics of other tasks by their names in the harness, or of its task objects.

    Returns:
        By task: `shots` and `questions`, None for a group, and `metrics` by name, each with `value` and
        `standard_error`, NaN or None if the harness has none.

    Raises:
        UserError: the harness has no such task, or its rows can't be had.
    """
    from lm_eval import simple_evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that has threads
    model = HarnessModel(loaded, config, journal, begin)
    try:
        results = simple_evaluate(
            model=model,
            tasks=names,
            task_manager=_tasks(),
            limit=config.limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            apply_chat_template=config.chat,
            fewshot_as_multiturn=False,
        )
    except (KeyError, ValueError, OSError, ImportError) as error:
        raise UserError(
            f"tasks=[{', '.join(map(str, names))}]: lm-eval can't score them ({one_line(error)}); `lm-eval ls tasks` "
            f"lists its tasks"
        ) from error
    asked = results["n-samples"]
    return {
        name: {
            "shots": results["n-shot"].get(name),
            "questions": asked[name]["effective"] if name in asked else None,
            "metrics": _metrics(values),
        }
        for name, values in results["results"].items()
    }


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness's `acc,none` and `acc_stderr,none` as one metric; a filter that is one is part of the name."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{how}")
        found[metric if how == "none" else f"{metric}, {how}"] = {
            "value": float(value),
            "standard_error": float(error) if isinstance(error, int | float) else None,
        }
    return found
