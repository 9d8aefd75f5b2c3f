"""The stages in order; writes the prepared dataset and its manifest.

read → convert → encode → split → pack → write
"""

import importlib.metadata
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from configs import entry
from configs.errors import UserError
from data.config import AUTO, PrepareConfig
from data.conversion import detect_schema, to_conversation
from data.layout import MANIFEST, MANIFEST_KIND, ROW_SCHEMA, SPLITS, file_sizes, read_manifest
from data.overlong import split_turns, truncate
from data.packing import pack
from data.schema import IGNORE_INDEX, Conversation, PackedRow, TokenizedConversation
from data.sources import RawRow, Reject, Source, find_sources
from data.template import ChatTokenizer

ENCODE_BATCH = 1000
"""Conversations encoded in one call: enough to keep every core busy."""

PACKAGES = ("openhermes-mixtral", "tokenizers", "pyarrow")
"""Those whose version can change what is written."""

console = Console(stderr=True)


def main() -> None:
    """`python -m data`."""
    entry.run("data", "prepare", PrepareConfig, prepare)


@dataclass(slots=True)
class Encoded:
    """What the first stages made of the rows."""

    rows: list[int] = field(default_factory=list)
    """For each conversation the number of its row, counted over all sources from 0; a split row has several."""
    tokenized: list[TokenizedConversation] = field(default_factory=list)
    """The conversations, side by side with `rows`."""
    rejects: list[tuple[int, Reject]] = field(default_factory=list)
    """The other rows, by number."""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """What the manifest says of each source."""

    @property
    def kept(self) -> list[int]:
        """The numbers of the rows of which something was kept, ascending."""
        return sorted(set(self.rows))

    @property
    def rows_in(self) -> int:
        """Rows read."""
        return len(self.kept) + len(self.rejects)


def prepare(config: PrepareConfig) -> None:
    """Reads, renders, encodes, splits and packs the rows of `config`, and writes the prepared dataset.

    Where `output` already holds just that, nothing is done again.
    """
    config.check()
    output = Path(config.output)
    sources = find_sources(config)
    refuse_foreign(output, [source.name for source in sources])
    if is_prepared(output, request(config, [source.description for source in sources])):
        report(read_manifest(output), output)
        console.print(f"{output} is already prepared from these inputs with these settings; nothing was done")
        return
    tokenizer = ChatTokenizer.load(config.tokenizer)

    encoded = encode_rows(sources, config, tokenizer)
    refuse_too_many(encoded, config.max_reject_fraction)
    held_out = choose_eval(encoded.kept, config.eval_fraction, config.seed)
    splits = {
        "train": [i for i, row in enumerate(encoded.rows) if row not in held_out],
        "eval": [i for i, row in enumerate(encoded.rows) if row in held_out],
    }
    packed = {name: pack_rows(encoded, chosen, config) for name, chosen in splits.items()}

    manifest = {
        "kind": MANIFEST_KIND,
        **request(config, encoded.inputs),
        "tokenizer": {"source": config.tokenizer, "fingerprint": tokenizer.fingerprint},
        "rows": {
            "in": encoded.rows_in,
            "kept": len(encoded.kept),
            "rejected": len(encoded.rejects),
            "rejected_by_reason": dict(sorted(Counter(reject.reason for _, reject in encoded.rejects).items())),
        },
        **{name: {"conversations": len(splits[name]), **count(packed[name], config.seq_len)} for name in SPLITS},
        "seq_len": config.seq_len,
        "seed": config.seed,
    }
    write(output, packed, [reject for _, reject in encoded.rejects], manifest)
    report(manifest, output)


def request(config: PrepareConfig, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of the manifest that decides the rest: inputs, settings, versions."""
    return {
        "inputs": inputs,
        "config": asdict(config),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def is_prepared(output: Path, wanted: dict[str, Any]) -> bool:
    """Whether a whole prepared dataset is there that was made from the same inputs, settings and versions.

    The inputs' contents are compared by hash; a hub dataset counts as the same only at a named commit.
    """
    if not (output / MANIFEST).is_file():
        return False
    there = read_manifest(output)
    if not {*wanted, "files"} <= there.keys():  # written by an earlier version
        return False
    same_inputs = len(wanted["inputs"]) == len(there["inputs"]) and all(
        new.items() <= old.items() and ("dataset" not in new or re.fullmatch("[0-9a-f]{40}", new["revision"] or ""))
        for new, old in zip(wanted["inputs"], there["inputs"], strict=True)
    )
    same_settings = {**wanted["config"], "output": None} == {**there["config"], "output": None}
    same_versions = wanted["versions"] == there["versions"]
    return same_inputs and same_settings and same_versions and there["files"] == file_sizes(output)


# Stages


def encode_rows(sources: list[Source], config: PrepareConfig, tokenizer: ChatTokenizer) -> Encoded:
    """Reads, converts and encodes every row of every source."""
    encoded = Encoded()
    first = 0
    with _progress() as progress:
        task = progress.add_task("Encoding conversations", total=None)
        for source in sources:
            begin = first
            schema = config.schema
            for batch in _batches(source.rows(), ENCODE_BATCH):
                if schema == AUTO:
                    schema = _schema_of(batch, config.columns)
                _encode_batch(batch, first, schema, config, tokenizer=tokenizer, into=encoded)
                first += len(batch)
                progress.update(task, completed=first)
            encoded.inputs.append({**source.description, "schema": schema, "rows": first - begin})
        progress.update(task, total=first)
    encoded.rejects.sort(key=lambda numbered: numbered[0])
    assert encoded.rows_in == first
    return encoded


def _schema_of(batch: list[RawRow | Reject], columns: dict[str, str]) -> str:
    """The schema of a source's first rows. Where none fits, the plainest: its rejects say what is missing."""
    found = (detect_schema(row.value, columns) for row in batch if isinstance(row, RawRow))
    return next((schema for schema in found if schema is not None), "instruction")


def _encode_batch(
    batch: list[RawRow | Reject],
    first: int,
    schema: str,
    config: PrepareConfig,
    *,
    tokenizer: ChatTokenizer,
    into: Encoded,
) -> None:
    """Adds the rows of a batch, of which the first has the number `first`, to what was kept or rejected."""
    conversations: list[tuple[int, RawRow, Conversation]] = []
    for number, row in enumerate(batch, start=first):
        if isinstance(row, Reject):
            into.rejects.append((number, row))
            continue
        outcome = to_conversation(row, schema, columns=config.columns, keep_markers=config.markers == "keep")
        if isinstance(outcome, Reject):
            into.rejects.append((number, outcome))
        else:
            conversations.append((number, row, outcome))
    encoded = tokenizer.encode_batch([conversation for *_, conversation in conversations])
    for (number, row, conversation), tokenized in zip(conversations, encoded, strict=True):
        fitting = _fit(conversation, tokenized, config, tokenizer)
        for part in fitting:
            into.rows.append(number)
            into.tokenized.append(part)
        if not fitting:
            what = "the conversation" if config.overlong == "drop" else "no prompt fits: the conversation"
            detail = f"{what} has {len(tokenized)} tokens, and a row holds {config.seq_len}"
            into.rejects.append((number, Reject(row, "too_long", detail)))


def _fit(
    conversation: Conversation, tokenized: TokenizedConversation, config: PrepareConfig, tokenizer: ChatTokenizer
) -> list[TokenizedConversation]:
    """What is kept of a conversation: itself where it fits a row, else what the policy makes of it."""
    if len(tokenized) <= config.seq_len:
        return [tokenized]
    if config.overlong == "split_turns":
        return split_turns(conversation, tokenizer, config.seq_len)
    part = truncate(tokenized, config.seq_len) if config.overlong == "truncate" else None
    return [] if part is None else [part]


def refuse_too_many(encoded: Encoded, allowed: float) -> None:
    """Raises `UserError` where nothing is left, or where more than the allowed share was rejected."""
    rejects = [reject for _, reject in encoded.rejects]
    if encoded.rows_in == 0:
        raise UserError("files: they hold no rows; name files with at least one row")
    if encoded.rows and len(rejects) <= allowed * encoded.rows_in:
        return
    commonest = Counter(reject.reason for reject in rejects).most_common(3)
    reasons = ", ".join(f"{reason} {number}×" for reason, number in commonest)
    raise UserError(
        f"max_reject_fraction={allowed}: {len(rejects)} of {encoded.rows_in} rows can't be used ({reasons}; the first: "
        f"{rejects[0]}); mend the rows, or allow more where at least one can be used"
    )


def choose_eval(rows: list[int], fraction: float, seed: int) -> set[int]:
    """Which rows are held out, with all that was made of them: a seeded draw, at least one unless the fraction is 0.

    Raises:
        UserError: a single row can't be both trained on and held out.
    """
    if fraction == 0:
        return set()
    number = max(1, round(len(rows) * fraction))
    if number >= len(rows):
        raise UserError(
            f"eval_fraction={fraction}: it would hold out {number} of {len(rows)} rows and leave none to train on; "
            f"give more rows, or eval_fraction=0"
        )
    return set(random.Random(seed).sample(rows, number))


def pack_rows(encoded: Encoded, chosen: list[int], config: PrepareConfig) -> list[PackedRow]:
    """The chosen conversations in packed rows, in a seeded order so that equal lengths do not cluster by source."""
    order = random.Random(config.seed).sample(chosen, len(chosen))
    packed = []
    for plan in pack([len(encoded.tokenized[i]) for i in order], config.seq_len):
        members = [order[place] for place in plan]
        packed.append(
            PackedRow(
                ids=[token for i in members for token in encoded.tokenized[i].ids],
                labels=[label for i in members for label in encoded.tokenized[i].labels],
                lengths=[len(encoded.tokenized[i]) for i in members],
                rows=[encoded.rows[i] for i in members],
            )
        )
    return packed


def count(packed: list[PackedRow], seq_len: int) -> dict[str, Any]:
    """Rows, tokens, supervised tokens, and the share of token slots that hold a token."""
    tokens = sum(len(row.ids) for row in packed)
    supervised = sum(label != IGNORE_INDEX for row in packed for label in row.labels)
    efficiency = tokens / (len(packed) * seq_len) if packed else 0.0
    return {"packed_rows": len(packed), "tokens": tokens, "supervised_tokens": supervised, "efficiency": efficiency}


# Writing


def refuse_foreign(output: Path, files: list[str]) -> None:
    """Raises `UserError` rather than replace what is not a prepared dataset, or what the rows are read from."""
    place = output.resolve()
    if place.is_dir() and any(Path(path).resolve().is_relative_to(place) for path in [str(Path.cwd()), *files]):
        raise UserError(f"output={output}: it holds the working directory or an input; choose a directory of its own")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        read_manifest(output)
    except UserError as error:
        raise UserError(
            f"output={output}: something else is there, not a prepared dataset; choose another directory"
        ) from error


def write(output: Path, packed: dict[str, list[PackedRow]], rejects: list[Reject], manifest: dict[str, Any]) -> None:
    """Writes everything beside the target, then puts it in the place of what was there."""
    place = output.resolve()  # where a link points, so that the link stays
    temporary = place.parent / f".{place.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, rows in packed.items():
            (temporary / name).mkdir(parents=True)
            columns = {field: [getattr(row, field) for row in rows] for field in ROW_SCHEMA.names}
            table = pa.table(columns, schema=ROW_SCHEMA)
            path = str(temporary / name / "rows.arrow")
            with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, ROW_SCHEMA) as arrow:
                arrow.write_table(table, max_chunksize=1024)
        with (temporary / "rejects.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(reject.record(), ensure_ascii=False) + "\n" for reject in rejects)
        whole = {**manifest, "files": file_sizes(temporary)}
        (temporary / MANIFEST).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        older = place.parent / f".{place.name}.{os.getpid()}.old"
        if place.exists():
            place.rename(older)
        temporary.rename(place)
        shutil.rmtree(older, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output={output}: it can't be written ({reason}); choose a writable place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def report(manifest: dict[str, Any], output: Path) -> None:
    """The summary table."""
    rows = manifest["rows"]
    table = Table(title=f"Prepared {output}", title_justify="left")
    for heading in ("", "train", "eval"):
        table.add_column(heading, justify="left" if not heading else "right")
    labels = {
        "conversations": "conversations",
        "packed_rows": f"packed rows of {manifest['seq_len']} tokens",
        "tokens": "tokens",
        "supervised_tokens": "supervised tokens",
    }
    for key, label in labels.items():
        table.add_row(label, *(f"{manifest[split][key]:,}" for split in SPLITS))
    table.add_row("packing efficiency", *(f"{manifest[split]['efficiency']:.1%}" for split in SPLITS))
    reasons = ", ".join(f"{reason} {number}" for reason, number in rows["rejected_by_reason"].items()) or "none"
    console.print(table)
    console.print(f"{rows['in']:,} rows in = {rows['kept']:,} kept + {rows['rejected']:,} rejected ({reasons})")


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
        console=console,
        transient=True,  # the table that follows says it again, and an error stays one line
        disable=not console.is_terminal,
    )


def _batches(rows: Iterable[RawRow | Reject], size: int) -> Iterator[list[RawRow | Reject]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
