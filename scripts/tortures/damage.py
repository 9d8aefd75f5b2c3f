"""Damages every file of the newest checkpoint, in every way: it must be noticed, and the one before be used.

Each file is truncated, emptied, deleted, and has one bit flipped at several random places; that is looked for by the
functions that a resuming run calls, in this process. Tensors are renamed, taken out, added, and given another shape or
dtype, with the manifest sealed again, so that only their names and shapes can tell. Then runs go on from checkpoints
that are damaged so, a launch for each file, and must end as the run that nothing happened to.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data.disk.files import file_hash
from train.saving import checkpoint
from train.saving.checkpoint import Checkpoint, DamagedError

from .harness.outcome import first_difference, stored_shapes
from .harness.trials import attempt, attempts, common_arguments, generator, report, require
from .harness.workplace import Workplace, opened

STOPPED = 13
"""The step after which the run is stopped whose checkpoints are damaged."""
Damage = Callable[[Path], str]
"""Damages a checkpoint; what the message must name."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `torture.py damage`."""
    parser.add_argument("--flips", type=int, default=20, help="bits that are flipped in each file, in turn (20)")
    common_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Damages, looks, resumes, prints, and returns what was found."""
    with opened(options) as workplace:
        stopped = workplace.interrupted("stopped-to-be-damaged", STOPPED, keep_last="3")
        newest = checkpoint.paths(stopped)[0]
        random = generator("damage", options.seed)
        everything = [*of_files(newest, options.flips, random), *of_tensors(newest)]
        trials = [
            attempt(f"{kind}: {what}", partial(noticed, newest, workplace.scratch / "damaged", damage))
            for kind, what, damage in everything
        ]
        kinds = {kind: [trial for trial in trials if trial["trial"].startswith(kind)] for kind, _, _ in everything}
        by_kind = [
            {
                "trial": kind,
                "checkpoints": len(of_kind),
                "noticed": sum(not trial["failed"] for trial in of_kind),
                "failed": "; ".join(f"{trial['trial']}: {trial['failed']}" for trial in of_kind if trial["failed"]),
            }
            for kind, of_kind in kinds.items()
        ]
        figures = {"seed": options.seed, "files": sorted(_names(newest))}
        figures["looked_at"] = report("Noticed", by_kind, options.seed)
        resumed = attempts(options, resume_each(workplace, stopped, everything, random))
        figures["resumed"] = report("Resumed from the one before", resumed, options.seed)
        figures["failed"] = figures["looked_at"]["failed"] + figures["resumed"]["failed"]
        workplace.keep = bool(figures["failed"])
    return figures


def of_files(newest: Path, flips: int, random: Random) -> Iterator[tuple[str, str, Damage]]:
    """Kind, file and damage, for every file of a checkpoint."""
    for name in _names(newest):
        size = (newest / name).stat().st_size
        for kind, left in (("cut in half", size // 2), ("one byte short", size - 1), ("empty", 0)):
            yield kind, name, partial(_cut, name=name, left=left)
        yield "one byte more", name, partial(_append, name=name)
        yield "deleted", name, partial(_delete, name=name)
        for _ in range(flips):
            bit = random.randrange(8 * size)
            yield "bit flipped", f"{name} bit {bit}", partial(_flip, name=name, bit=bit)


def of_tensors(newest: Path) -> Iterator[tuple[str, str, Damage]]:
    """Kind, tensor and damage, for a tensor of each of the files that training goes on from; sealed again."""

    def renamed(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[f"{name}.renamed"] = tensors.pop(name)

    def reshaped(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = tensors[name].flatten()

    def rounded(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = tensors[name].bfloat16()

    def added(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors["another"] = tensors[name].clone()

    edits: dict[str, Callable[[dict[str, torch.Tensor], str], object]] = {
        "tensor renamed": renamed,
        "tensor missing": lambda tensors, name: tensors.pop(name),
        "tensor reshaped": reshaped,
        "tensor of another dtype": rounded,
        "tensor added": added,
    }
    for kind, edit in edits.items():
        for state in checkpoint.STATE:
            file = f"{state}.safetensors"
            name = sorted(load_file(newest / file))[-1]
            told = "another" if kind == "tensor added" else name
            yield (
                kind,
                file,
                lambda directory, file=file, name=name, edit=edit, told=told: _edit(directory, file, name, edit, told),
            )


def noticed(newest: Path, copy: Path, damage: Damage) -> dict[str, Any]:
    """Damages a copy of a checkpoint, and requires that it is refused by the name of what was damaged."""
    shapes = stored_shapes(newest)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(newest, copy)
    named = damage(copy)
    try:
        Checkpoint(copy).check(shapes)
    except DamagedError as error:
        require(named in str(error), f"the message does not name {named}: {error}")
        return {"said": str(error)}
    require(False, "it was not noticed")
    return {}


def resume_each(
    workplace: Workplace, stopped: Path, everything: list[tuple[str, str, Damage]], random: Random
) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """A launch for each file and each kind of tensor damage, one with two damaged checkpoints, one with all damaged."""
    whole = workplace.reference(1)
    by_subject: dict[str, list[tuple[str, str, Damage]]] = {}
    for kind, what, damage in everything:
        subject = what.split(" bit ")[0] if not kind.startswith("tensor") else kind
        by_subject.setdefault(subject, []).append((kind, what, damage))
    chosen = [random.choice(ways) for ways in by_subject.values()]
    trials: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (f"{kind}: {what}", partial(resumed, workplace, stopped, whole, f"damaged-{number}", [damage]))
        for number, (kind, what, damage) in enumerate(chosen)
    ]
    ways = [damage for _, _, damage in random.sample(chosen, 2)]
    trials.append(("the newest two", partial(resumed, workplace, stopped, whole, "damaged-two", ways)))
    trials.append(("all", partial(refused, workplace, stopped, chosen[0][2])))
    return trials


def resumed(workplace: Workplace, stopped: Path, whole: Path, name: str, damages: list[Damage]) -> dict[str, Any]:
    """Damages the newest checkpoints of a copy, one each, and goes on with it to its end."""
    run = workplace.copy(stopped, name)
    there = checkpoint.paths(run)
    named = [damage(newest) for newest, damage in zip(there, damages, strict=False)]
    launch = workplace.finish(run, 1, keep_last="3")
    for newest, what in zip(there, named, strict=False):
        told = next((line for line in launch.said().splitlines() if str(newest) in line and "is damaged" in line), "")
        require(what in told, f"the log does not say that {what} of {newest.name} is damaged:\n{launch.said()}")
    before = checkpoint.step_of(there[len(damages)])
    require(launch.resumed_step == before, f"it went on after step {launch.resumed_step}, not {before}")
    difference = first_difference(run, whole)
    require(not difference, str(difference))
    shutil.rmtree(run)
    return {"newest": checkpoint.step_of(there[0]), "resumed_after": before}


def refused(workplace: Workplace, stopped: Path, damage: Damage) -> dict[str, Any]:
    """Damages all checkpoints of a copy: the run must not start over."""
    run = workplace.copy(stopped, "damaged-all")
    there = checkpoint.paths(run)
    require(len(there) >= 3, f"there are {len(there)} checkpoints")
    for newest in there:
        damage(newest)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    launch = workplace.launch(run, 1, keep_last="3")
    codes = launch.wait()
    require(codes == [2], f"it ended with {codes}:\n{launch.said()}")
    sentence = next((line for line in launch.said().splitlines() if "none of them is whole" in line), None)
    require(sentence, f"it does not say that no checkpoint is whole:\n{launch.said()}")
    require(before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}, f"{run} was changed")
    return {"newest": checkpoint.step_of(there[0]), "said": str(sentence).replace(str(run), "R")}


def seal(directory: Path, *names: str) -> None:
    """Renews the manifest of a checkpoint for files that have changed."""
    manifest = directory / checkpoint.MANIFEST
    files = json.loads(manifest.read_text())["files"]
    for name in names:
        files[name] = {"bytes": (directory / name).stat().st_size, "xxh3": file_hash(directory / name)}
    manifest.write_bytes(checkpoint._sealed({"files": files}))


def _names(newest: Path) -> list[str]:
    return sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())


def _cut(directory: Path, name: str, left: int) -> str:
    with (directory / name).open("r+b") as file:
        file.truncate(left)
    return name


def _append(directory: Path, name: str) -> str:
    with (directory / name).open("ab") as file:
        file.write(b" ")
    return name


def _delete(directory: Path, name: str) -> str:
    (directory / name).unlink()
    return name


def _flip(directory: Path, name: str, bit: int) -> str:
    content = bytearray((directory / name).read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (directory / name).write_bytes(content)
    return name


def _edit(
    directory: Path, file: str, name: str, edit: Callable[[dict[str, torch.Tensor], str], object], told: str
) -> str:
    tensors = load_file(directory / file)
    edit(tensors, name)
    save_file(tensors, directory / file)
    seal(directory, file)
    return told
