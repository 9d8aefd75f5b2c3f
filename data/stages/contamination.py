"""Evaluation data that must not be trained on: rows that share thirteen words in a row with it.

The measure of the GPT-3 paper (Brown et al. 2020, appendix C): words in lower case, without punctuation. What has fewer
than thirteen words can't be found out by it.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from configs.program.errors import UserError, one_line
from data.disk import hub
from data.disk.files import sha256
from data.rows.reading import RawRow
from data.rows.repository import Wanted, fetched
from data.rows.sources import files_of
from data.schema import Conversation

GRAM = 13
"""Words of a sequence that must not be shared."""

WORD = re.compile(r"\w+")

# Odd factors make the position of a word count; their products wrap at 64 bits.
FACTORS = np.array([pow(0x9E3779B97F4A7C15, position, 1 << 64) for position in range(1, GRAM + 1)], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Task:
    """Where the hub keeps a task of the Open LLM Leaderboard, and the columns with its texts."""

    dataset: str
    name: str | None
    split: str
    columns: tuple[str, ...]


# The splits that the leaderboard scores, as in lm-evaluation-harness.
TASKS = {
    "arc": Task("allenai/ai2_arc", "ARC-Challenge", "test", ("question",)),
    "hellaswag": Task("Rowan/hellaswag", None, "validation", ("ctx", "endings")),
    "mmlu": Task("cais/mmlu", "all", "test", ("question", "choices")),
    "truthfulqa": Task("truthfulqa/truthful_qa", "generation", "validation", ("question", "best_answer")),
    "winogrande": Task("allenai/winogrande", "winogrande_xl", "validation", ("sentence",)),
    "gsm8k": Task("openai/gsm8k", "main", "test", ("question", "answer")),
}


@dataclass(frozen=True, slots=True)
class Evaluations:
    """All thirteen-word sequences of the evaluation data, as sorted hashes.

    64 bits each: among ten million sequences here and a billion in the rows, an accidental match is a matter of one in
    two thousand.
    """

    grams: np.ndarray
    """[n] uint64, ascending."""

    def shared_with(self, conversation: Conversation) -> str | None:
        """The first sequence of words that a conversation shares with them, or None."""
        for message in conversation.messages:
            words = words_of(message.content)
            grams = grams_of(words)
            positions = np.searchsorted(self.grams, grams)
            hits = np.flatnonzero(self.grams[np.minimum(positions, len(self.grams) - 1)] == grams)
            if len(hits):
                return " ".join(words[hits[0] : hits[0] + GRAM])
        return None


def words_of(text: str) -> list[str]:
    """Its words in lower case."""
    return WORD.findall(text.lower())


def grams_of(words: list[str]) -> np.ndarray:
    """[max(0, words - 12)] uint64: the hash of each sequence of thirteen words."""
    if len(words) < GRAM:
        return np.empty(0, np.uint64)
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words), np.uint64, len(words))
    return (np.lib.stride_tricks.sliding_window_view(hashes, GRAM) * FACTORS).sum(axis=1, dtype=np.uint64)


def describe_evaluations(names: list[str]) -> list[dict[str, Any]]:
    """What the manifest says of the named files and tasks: the same if their contents are.

    Raises:
        UserError: a file can't be read, or a task's commit can't be had.
    """
    descriptions: list[dict[str, Any]] = []
    for name in names:
        if name in TASKS:
            dataset = TASKS[name].dataset
            descriptions.append({"task": name, "dataset": dataset, "commit": _hub_of(name, None).commit})
        else:
            files = files_of("contamination", name)
            descriptions += [{"file": file, "sha256": sha256(Path(file))} for file in files]
    return descriptions


def load_evaluations(descriptions: list[dict[str, Any]]) -> Evaluations | None:
    """The sequences of the described files and tasks; None if there are none.

    Raises:
        UserError: one can't be read or had, or nothing in it is thirteen words long.
    """
    grams = []
    for told in descriptions:
        texts = _texts_of_task(told["task"], told["commit"]) if "task" in told else _texts_of_file(told["file"])
        grams.append(_grams_of(texts))
        if not len(grams[-1]):
            raise UserError(
                f"contamination={told.get('task') or told['file']}: nothing in it is {GRAM} words long, so nothing "
                f"would be found; name a file with whole questions, or one of {', '.join(TASKS)}"
            )
    return Evaluations(np.unique(np.concatenate(grams))) if grams else None


def _grams_of(texts: Iterable[str]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *(grams_of(words_of(text)) for text in texts)]))


def _texts_of_file(name: str) -> Iterator[str]:
    """Every text in a JSON or JSONL file, or the paragraphs of any other."""
    try:
        content = Path(name).read_text(encoding="utf-8")
        kind = Path(name).suffix.lower()
        if kind in (".json", ".jsonl"):
            for part in content.split("\n") if kind == ".jsonl" else [content]:
                if part.strip():
                    yield from _texts_in(json.loads(part))
        else:
            yield from content.split("\n\n")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"contamination={name}: it can't be read ({one_line(error)}); give JSON (.json, .jsonl) or UTF-8 text"
        ) from error


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)


def _hub_of(name: str, commit: str | None) -> hub.Repository:
    """Where the hub keeps a task, at this commit or else at the one of now."""
    return hub.find("dataset", TASKS[name].dataset, commit, f"contamination={name}")


def _texts_of_task(name: str, commit: str) -> Iterator[str]:
    task, named = TASKS[name], f"contamination={name}"
    wanted = Wanted(
        config=task.name,
        split=task.split,
        named=named,
        config_setting=f"{named}, config",
        split_setting=f"{named}, split",
    )
    for file in fetched(_hub_of(name, commit), wanted):
        for chunk in file.chunks(task.dataset, named):
            for row in chunk.rows():
                if not isinstance(row, RawRow) or not isinstance(row.value, dict):
                    raise UserError(f"{named}: {file.name} has a row that can't be read; name a file of your own")
                for column in task.columns:
                    if column not in row.value:
                        raise UserError(f"{named}: {file.name} has no field {column}; name a file of your own")
                    yield from _texts_in(row.value[column])
