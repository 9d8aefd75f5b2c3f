"""The stages in order; makes the prepared dataset and its manifest.

read → convert → encode → split → pack → write
"""

import math
import platform
import random
import shlex
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from configs.program.console import console
from configs.program.errors import UserError
from data.config import SHAPELESS, PrepareConfig
from data.disk.files import staging
from data.prepared.layout import LAYOUT, MANIFEST, MANIFEST_KIND, REJECTS, SPLITS, damage, read_manifest
from data.rows.reading import as_arguments
from data.rows.sources import Source, find_sources
from data.stages.contamination import describe_evaluations, load_evaluations
from data.stages.encoding import Pool, number_of_workers, pool
from data.stages.intake import CLEANED, Intake
from data.stages.packing import pack
from data.stages.splitting import choose_eval, repetitions
from data.stages.store import Index, conversation_store
from data.stages.writing import drop_kept_rejects, keep_rejects, publish, refuse_foreign, write_rows

PACKAGES = ("openhermes-mixtral", "tokenizers", "pyarrow", "datasketch", "xxhash", "regex")
"""Those whose version can change what is written; Python's can too, by the Unicode tables that tell what a word is."""

SOME = 5
"""Names that a sentence lists at most."""


def prepare(config: PrepareConfig) -> None:
    """Reads, renders, encodes, splits and packs the rows of `config`, and writes the prepared dataset.

    If `output` already holds just that, nothing is done again.
    """
    config.check()
    output = Path(config.output)
    sources = find_sources(config)
    refuse_foreign(output, [source.name for source in sources])
    kept_out = describe_evaluations(config.contamination)
    wanted = request(config, [source.description for source in sources], kept_out)
    if is_prepared(output, wanted):
        summarize(read_manifest(output), output)
        console.print(f"{output} is already prepared from these inputs with these settings; nothing was done")
        return
    sources = [source.fetched() for source in sources]  # now: what is prepared already needs no download
    workers = number_of_workers(config.workers, sum(source.bytes for source in sources))

    with (
        pool(config, load_evaluations(kept_out), workers) as encoders,
        staging(output, setting="output") as temporary,
        conversation_store(temporary / "encoded") as store,
    ):
        dataset = temporary / "dataset"
        dataset.mkdir()
        with (dataset / REJECTS).open("w", encoding="utf-8") as rejects:
            intake = Intake(config, store, rejects)
            take_in(sources, encoders, intake)
        refuse_too_many(intake, config.max_reject_fraction, dataset / REJECTS, output)
        refuse_unseen(intake, config.columns)
        index = store.index()
        repeats = repetitions(index)
        manifest = {
            "kind": MANIFEST_KIND,
            **wanted,
            "inputs": intake.inputs,
            "tokenizer": {"source": config.tokenizer, "fingerprint": encoders.encoder.tokenizer.fingerprint},
            "rows": {
                "in": intake.rows,
                "kept": intake.kept,
                "rejected": intake.rows - intake.kept,
                "rejected_by_reason": dict(sorted(intake.rejected.items())),
            },
            "repeated": len(repeats),
            "repaired": dict(sorted(intake.repaired.items())),
            "shortened": {name: intake.shortened[name] for name in ("rows", "turns_left_out", "replies_cut")},
        }
        for split, chosen in choose(index, repeats, intake, config).items():
            with console.status(f"Packing and writing {len(chosen):,} conversations ({split})"):
                plan = plan_rows(chosen, index, config)
                write_rows(dataset / split / "rows.arrow", plan, store, index)
            manifest[split] = count(plan, index, config)
        manifest |= {"seq_len": config.seq_len, "packing": config.packing, "seed": config.seed}
        intake.places.write(dataset)
        publish(dataset, output, manifest)
    drop_kept_rejects(output)
    summarize(manifest, output)


def request(config: PrepareConfig, inputs: list[dict[str, Any]], kept_out: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of the manifest that decides the rest: inputs, evaluation data, settings, versions."""
    return {
        "layout": LAYOUT,
        "inputs": inputs,
        "contamination": kept_out,
        "config": {name: value for name, value in asdict(config).items() if name not in SHAPELESS},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def is_prepared(output: Path, wanted: dict[str, Any]) -> bool:
    """Whether a whole prepared dataset is there that was made from the same inputs, settings and versions.

    Files are compared by hash, and what comes from a hub by its commit.
    """
    if not (output / MANIFEST).is_file():
        return False
    there = read_manifest(output)
    if damage(output, there) is not None:
        return False
    same_inputs = len(wanted["inputs"]) == len(there["inputs"]) and all(
        new.items() <= old.items() for new, old in zip(wanted["inputs"], there["inputs"], strict=True)
    )
    return same_inputs and all(wanted[key] == there[key] for key in wanted.keys() - {"inputs"})


# Stages


def take_in(sources: list[Source], encoders: Pool, intake: Intake) -> None:
    """Encodes every row of every source into the intake's store, or writes why not to its rejects."""
    with _progress() as progress:
        task = progress.add_task("Encoding conversations", total=None)
        for number, source in enumerate(sources, start=1):
            for rows in intake.read(source, encoders, is_last=number == len(sources)):
                progress.update(task, completed=rows)
    assert intake.rows == intake.kept + sum(intake.rejected.values())


def refuse_too_many(intake: Intake, allowed: float, rejects: Path, output: Path) -> None:
    """Raises `UserError` if nothing is left, or if more than the allowed share can't be used; keeps `rejects` then."""
    if intake.rows == 0:
        raise UserError("files: they hold no rows; name files with at least one row")
    if intake.kept and intake.unusable / intake.rows <= allowed:
        return
    kept = keep_rejects(rejects, output)
    if not intake.unusable:
        left_out = ", ".join(f"{reason} {number}×" for reason, number in intake.rejected.most_common())
        raise UserError(
            f"files: nothing is left of {intake.rows} rows ({left_out}); change weights, duplicates or "
            f"contamination{kept}"
        )
    unusable = Counter({reason: n for reason, n in intake.rejected.items() if reason not in CLEANED})
    reasons = ", ".join(f"{reason} {number}×" for reason, number in unusable.most_common(3))
    ways = [f"give {argument}" for argument in as_arguments(intake.helpful_settings)] + ["mend the rows"]
    if intake.kept:
        share = math.ceil(100 * intake.unusable / intake.rows) / 100
        ways.append(f"leave them out by max_reject_fraction={share}")
    raise UserError(
        f"max_reject_fraction={allowed}: {intake.unusable} of {intake.rows} rows can't be used ({reasons}; the first: "
        f"{intake.first_unusable}); {', or '.join(ways)}{kept}"
    )


def refuse_unseen(intake: Intake, columns: dict[str, str]) -> None:
    """Raises `UserError` if `columns` names something that no row has: an optional field would be lost in silence."""
    for field, name in columns.items():
        if name in intake.unseen:
            others = sorted({other for source in intake.inputs for other in source["unread_fields"]})
            there = f" (not read are {', '.join(others[:SOME])})" if others else ""
            raise UserError(f"columns.{field}={name}: no row has such a field{there}; correct the name, or drop it")


def choose(index: Index, repeats: dict[int, int], intake: Intake, config: PrepareConfig) -> dict[str, list[int]]:
    """The conversations of each split, by their positions in `index`, as often as they are trained on."""
    held_out = choose_eval(np.unique(index.rows).tolist(), repeats, config.eval_fraction, config.seed)
    conversations = list(enumerate(index.rows.tolist()))
    return {
        "train": [i for i, row in conversations if row not in held_out for _ in range(intake.copies[i])],
        "eval": [i for i, row in conversations if row in held_out],
    }


def plan_rows(chosen: list[int], index: Index, config: PrepareConfig) -> list[list[int]]:
    """The conversations of each packed row, in a seeded order so that equal lengths do not cluster by source."""
    order = random.Random(config.seed).sample(chosen, len(chosen))
    if not config.packing:
        return [[member] for member in order]
    return [[order[i] for i in row] for row in pack(index.lengths[order].tolist(), config.seq_len)]


def count(plan: list[list[int]], index: Index, config: PrepareConfig) -> dict[str, Any]:
    """Rows, tokens, supervised tokens, and of packed rows the share of token slots that hold a token."""
    members = list(chain.from_iterable(plan))
    tokens = int(index.lengths[members].sum())
    counts = {
        "conversations": len(members),
        "packed_rows": len(plan),
        "tokens": tokens,
        "supervised_tokens": int(index.supervised[members].sum()),
    }
    return {**counts, "efficiency": tokens / (len(plan) * config.seq_len) if plan and config.packing else None}


# What the user sees


def summarize(manifest: dict[str, Any], output: Path) -> None:
    """The summary table."""
    rows = manifest["rows"]
    table = Table(title=Text(f"Prepared {output}"), title_justify="left")
    for heading in ("", "train", "eval"):
        table.add_column(heading, justify="left" if not heading else "right")
    labels = {
        "conversations": "conversations",
        "packed_rows": f"packed rows of {manifest['seq_len']} tokens" if manifest["packing"] else "rows",
        "tokens": "tokens",
        "supervised_tokens": "supervised tokens",
    }
    for key, label in labels.items():
        table.add_row(label, *(f"{manifest[split][key]:,}" for split in SPLITS))
    efficiencies = [manifest[split]["efficiency"] for split in SPLITS]
    table.add_row("packing efficiency", *("–" if share is None else f"{share:.1%}" for share in efficiencies))
    reasons = ", ".join(f"{reason} {number}" for reason, number in rows["rejected_by_reason"].items()) or "none"
    console.print(table)
    where = f", listed in {output / REJECTS}" if rows["rejected"] else ""
    console.print(
        f"{rows['in']:,} rows in = {rows['kept']:,} kept + {rows['rejected']:,} rejected ({reasons}){where}",
        soft_wrap=True,
    )
    for source in manifest["inputs"]:
        if columns := source.get("columns"):
            (found,) = as_arguments({"columns": columns})
            console.print(f"{named(source)}: read as {source['schema']} rows, by looking: {found}", soft_wrap=True)
    if repaired := manifest.get("repaired"):
        console.print(f"Repaired rows: {', '.join(f'{name} {n:,}' for name, n in repaired.items())}")
    if repeated := manifest.get("repeated"):
        repeating = f"{repeated:,} of the kept rows repeat a conversation, which duplicates=drop leaves out"
        sides = "; equal ones are all trained on or all held out" if manifest["eval"]["conversations"] else ""
        console.print(repeating + sides, soft_wrap=True)
    if unread := unread_line(manifest["inputs"]):
        console.print(unread, soft_wrap=True)
    if (shortened := manifest["shortened"])["rows"]:
        console.print(
            f"{shortened['rows']:,} of the kept rows were longer than a row may be and lost "
            f"{shortened['turns_left_out']:,} turns; {shortened['replies_cut']:,} of their replies are cut"
        )
    dataset, run = shlex.quote(str(output)), shlex.quote(f"runs/{output.name}")
    train = f"deepspeed --no_local_rank --module train recipe=openhermes_mixtral_8x7b dataset={dataset} run_dir={run}"
    console.print(f"Look at it:  python -m data task=preview output={dataset}", soft_wrap=True)
    console.print(f"Train on it: {train}", soft_wrap=True)


def named(source: dict[str, Any]) -> str:
    """What the manifest calls a source."""
    return str(source.get("file") or source.get("dataset"))


def unread_line(inputs: list[dict[str, Any]]) -> str:
    """Which fields of which source were not read, and in how many rows; empty if there are none."""
    sources = []
    for source in inputs:
        fields = [f"{field} {rows:,}×" for field, rows in source["unread_fields"].items()]
        if source["harmless_fields"]:
            fields.append(f"describing the rows {', '.join(source['harmless_fields'])}")
        if fields:
            sources.append(f"{named(source)}: {', '.join(fields)}")
    more = f"; {len(sources) - SOME} more sources in {MANIFEST}" if len(sources) > SOME else ""
    return f"Fields that were not read: {'; '.join(sources[:SOME])}{more}" if sources else ""


class RowsPerSecond(ProgressColumn):
    """How fast it goes."""

    def render(self, task: Task) -> Text:
        """The mean over all the time so far: the last second alone says little."""
        return Text(f"{task.completed / task.elapsed:,.0f} rows/s" if task.elapsed else "", style="progress.data.speed")


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows"),
        RowsPerSecond(),
        TimeElapsedColumn(),
        console=console,
        transient=True,  # the table that follows says it again, and an error stays one line
        disable=not console.is_terminal,
    )
