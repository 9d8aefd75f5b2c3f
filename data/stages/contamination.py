"""Evaluation data that must not be trained on: rows that share thirteen words in a row with it.

The measure of the GPT-3 paper (Brown et al. 2020, appendix C): words in lower case, without punctuation. Letters are
compared as Unicode's NFKC_Casefold has them, so that neither accents typed as two characters nor full-width letters
hide a word. What has fewer than thirteen words can't be found out by it.

Scripts without spaces show no words. Their units follow Unicode's default word boundaries (UAX #29), by which each
ideograph and each kana is a word. A kana, which spells a syllable, counts as 0.6 of one. Thai, Lao, Khmer and Burmese,
which the annex leaves to dictionaries, are compared letter by letter, and a letter counts as 0.4. So what is compared
are 13 Chinese characters, 33 Thai ones, or some 18 of Japanese: eight to ten words, at mean lengths of 1.66, 4.1 and
1.70 characters (weighted by the frequencies of jieba, the Thai National Corpus in PyThaiNLP, and wordfreq). Eight is
the least that the paper compares, and questions are shorter in these scripts.
"""

import glob
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import Any

import numpy as np
import regex
import xxhash

from configs.program.errors import UserError, one_line
from data.disk import hub
from data.disk.files import sha256
from data.disk.formats import sizes
from data.disk.formats.regular import UnreadableError, read_at_most, size_of
from data.rows.containers import opened, plain_name
from data.rows.reading import RawRow
from data.rows.repository import DataFile, Wanted, fetched, kind_of
from data.rows.sources import files_of
from data.schema import Conversation
from data.stages.leaderboard import HUB_TASKS

GRAM = 13
"""Words of a sequence that must not be shared."""

WORD, KANA, LETTER = 5, 3, 2
"""What a word or an ideograph counts, what a kana, and what a letter of a script that only dictionaries divide."""

ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
UNDIVIDED = r"\p{Line_Break=Complex_Context}"
UNIT = regex.compile(
    rf"[{ALONE}]|[{UNDIVIDED}&&[\p{{L}}\p{{M}}]]|[[\p{{L}}\p{{M}}\p{{N}}]--[{ALONE}{UNDIVIDED}]]+", regex.V1
)
"""An ideograph or kana, a letter of a script that only dictionaries divide, or a word."""
UNIT_OF_ASCII = re.compile(r"[a-z0-9]+")
"""The same for a text in ASCII, several times faster."""
IS_KANA, IS_LETTER = regex.compile(r"[\p{Hiragana}\p{Katakana}ー]"), regex.compile(UNDIVIDED)
STANDS_ALONE = regex.compile(rf"[{ALONE}{UNDIVIDED}]")
IGNORABLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
"""Soft hyphens, joiners and spaces of no width."""

FACTOR = 0x9E3779B97F4A7C15
INVERSE = pow(FACTOR, -1, 1 << 64)
"""An odd factor makes the position of a word count; its powers wrap at 64 bits."""


@dataclass(frozen=True, slots=True)
class Evaluations:
    """All thirteen-word sequences of the evaluation data, as sorted hashes.

    64 bits each: among ten million sequences here and a billion in the rows, the chance of an accidental match is one
    in two thousand.
    """

    grams: np.ndarray
    """[n] uint64, ascending."""

    def shared_with(self, conversation: Conversation) -> str | None:
        """The first sequence of words that a conversation shares with them, or None."""
        for message in conversation.messages:
            units = units_of(message.content)
            grams, ends = grams_of(units)
            positions = np.searchsorted(self.grams, grams)
            hits = np.flatnonzero(self.grams[np.minimum(positions, len(self.grams) - 1)] == grams)
            if len(hits):
                return spelled(units[hits[0] : ends[hits[0]]])
        return None


def units_of(text: str) -> list[str]:
    """Its words, and one by one the characters of scripts without spaces; folded."""
    if text.isascii():
        return UNIT_OF_ASCII.findall(text.lower())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return UNIT.findall(IGNORABLE.sub("", folded))


def spelled(units: list[str]) -> str:
    """The units as a text."""
    return " ".join("".join(unit if STANDS_ALONE.match(unit) else f" {unit} " for unit in units).split())


def grams_of(units: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Each sequence that counts as thirteen words: its hash [n] uint64, and where it ends [n]; the i-th begins at i."""
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(unit.encode()) for unit in units), np.uint64, len(units))
    counts = [WORD if len(unit) > 1 or unit.isascii() else _count(unit) for unit in units]
    reached = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    ends = np.searchsorted(reached, reached + GRAM * WORD)
    ends = ends[ends <= len(units)]
    powers = np.cumprod(np.full(len(units), FACTOR, np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes * powers)])
    shifted = np.cumprod(np.full(len(ends), INVERSE, np.uint64))
    return (sums[ends] - sums[: len(ends)]) * shifted, ends


def _count(character: str) -> int:
    return KANA if IS_KANA.match(character) else LETTER if IS_LETTER.match(character) else WORD


def describe_evaluations(names: list[str]) -> list[dict[str, Any]]:
    """What the manifest says of the named files and tasks: the same if their contents are.

    Raises:
        UserError: a file can't be read, or a task's commit can't be had.
    """
    descriptions: list[dict[str, Any]] = []
    for name in names:
        if name in HUB_TASKS:
            dataset = HUB_TASKS[name].dataset
            descriptions.append({"task": name, "dataset": dataset, "commit": _hub_of(name, None).commit})
        elif not glob.has_magic(name) and not Path(name).exists():
            raise UserError(
                f"contamination={name}: there is no such file, relative to {Path.cwd()}, and no such task; name a "
                f"file, or one of {', '.join(HUB_TASKS)}"
            )
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
    for known in descriptions:
        texts = _texts_of_task(known["task"], known["commit"]) if "task" in known else _texts_of_file(known["file"])
        grams.append(_grams_of(texts))
        if not len(grams[-1]):
            raise UserError(
                f"contamination={known.get('task') or known['file']}: nothing in it is {GRAM} words long, so nothing "
                f"would be found; name a file with whole questions, or one of {', '.join(HUB_TASKS)}"
            )
    return Evaluations(np.unique(np.concatenate(grams))) if grams else None


def _grams_of(texts: Iterable[str]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *(grams_of(units_of(text))[0] for text in texts)]))


def _texts_of_file(name: str) -> Iterator[str]:
    """Every text in a file of JSON or of rows, or the paragraphs of any other."""
    named = f"contamination={name}"
    try:
        if kind_of(name) is None:
            yield from _content(name).split("\n\n")
        elif plain_name(name).suffix.lower() == ".json" and (whole := _parsed(_content(name))) is not None:
            yield from _texts_in(whole)
        else:
            for chunk in DataFile(name, name).chunks("", named):
                for row in chunk.rows():
                    if not isinstance(row, RawRow):
                        raise UserError(f"{named}: {row.unit} {row.number}: {row.detail}; mend it, or take it out")
                    yield from _texts_in(row.value)
    except (ValueError, OSError, EOFError, LZMAError, RecursionError) as error:
        raise UserError(
            f"{named}: it can't be read ({one_line(error)}); give a file that `files` takes, any JSON, or UTF-8 text"
        ) from error


def _content(name: str) -> str:
    """A file's text, unpacked."""
    try:
        file, _ = opened(name)
    except UserError as error:  # what it is can't be read by anyone
        raise UserError(str(error).replace("files=", "contamination=", 1)) from error
    with file:
        content = read_at_most(file, sizes.EVALUATION + 1)
    if len(content) > sizes.EVALUATION:
        raise UnreadableError(f"it is larger than {size_of(sizes.EVALUATION)}")
    return content.decode("utf-8-sig")


def _parsed(content: str) -> Any:
    """JSON that is one value; None if it is lines of JSON, or none."""
    try:
        return json.loads(content)
    except ValueError:
        return None


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)


def _hub_of(name: str, commit: str | None) -> hub.Repository:
    """Where the hub keeps a task, at this commit or else at the current one."""
    return hub.find("dataset", HUB_TASKS[name].dataset, commit, f"contamination={name}")


def _texts_of_task(name: str, commit: str) -> Iterator[str]:
    task, named = HUB_TASKS[name], f"contamination={name}"
    wanted = Wanted(
        config=task.config,
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
