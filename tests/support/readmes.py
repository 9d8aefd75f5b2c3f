"""How the tests read a README: its commands, settings and paths, and what is wrong with them."""

import contextlib
import functools
import io
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from configs.program import entry
from configs.program.jobs import Job
from data.config import PrepareConfig
from inference.config import InferenceConfig
from train.config.train import TrainConfig

FOLDERS = ("configs", "data", "train", "inference", "scripts", "tests")
"""Where READMEs are; runs, prepared datasets and merged models have some of their own."""


def checked(jobs: list[Job[TrainConfig]]) -> int:
    """Checks the jobs of a sweep in place of running them."""
    for job in jobs:
        job.config.check()
    assert len({job.config.run_dir for job in jobs}) == len(jobs) > 1
    return 0


PROGRAMS: dict[str, tuple[str, type, dict[str, Any]]] = {
    "data": ("prepare", PrepareConfig, {}),
    "train": ("train", TrainConfig, {"sweep": checked}),
    "inference": ("inference", InferenceConfig, {"texts": ("prompt", "system")}),
}
"""What each program hands to `entry.run`, except what it does: importing that takes longer than all tests here."""

SOURCES = (".py", ".sh", ".sbatch", ".toml")
"""Endings of names that are files of the project wherever they stand; YAML and JSON may be a user's."""
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|deepspeed|sbatch|transformers|vllm|pip|source|\./\S+)(?: |$)")
SETTING = re.compile(r"'?([a-z][\w.]*)=")
QUOTED = re.compile(r"""'[^']*'|"[^"]*\"""")
EXPANDED = re.compile(r"[\[\]{}*?~#$&;()<>|!]")
"""What bash or zsh expands or takes for its own, unless it is quoted."""


def readmes(root: Path) -> list[Path]:
    """Every README, and CONTRIBUTING.md."""
    found = (path for folder in FOLDERS for path in sorted((root / folder).rglob("README.md")))
    return [root / "README.md", root / "CONTRIBUTING.md", *found]


def split(text: str) -> tuple[list[str], str]:
    """The lines of code blocks, indented or fenced, and the text around them; a command that goes on is one line."""
    code, prose = [], []
    fenced, may_begin = False, True
    for line in text.replace("\\\n", " ").splitlines():
        indented = line.startswith("    ") and may_begin
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or indented:
            code.append(" ".join(line.split()))
        else:
            prose.append(line)
        may_begin = indented or not line.strip()  # an indented line right after text goes on with it
    return code, "\n".join(prose)


def spans(text: str) -> list[str]:
    """What stands between backticks, in the text around code blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", split(text)[1])]


def commands(text: str) -> list[str]:
    """What a reader may paste into a shell; a command with … in it is none."""
    return [code for code in (*split(text)[0], *spans(text)) if COMMAND.match(code) and "…" not in code]


def unquoted(code: str) -> str | None:
    """The first character that a shell would expand, or None."""
    found = EXPANDED.search(QUOTED.sub("", code))
    return found.group() if found else None


def settings_of(schema: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of a dataclass's fields, and of those in its groups."""
    for field in fields(schema):
        yield f"{prefix}{field.name}"
        if is_dataclass(field.type):
            yield from settings_of(field.type, f"{prefix}{field.name}.")


def unknown_settings(text: str) -> list[str]:
    """The settings between backticks that no program has: what stands before an equals sign or belongs to a group."""
    known = {"data", "recipe"} | {name for _, schema, _ in PROGRAMS.values() for name in settings_of(schema)}
    groups = {name.split(".")[0] for name in known if "." in name}
    named = []
    for span in spans(text):
        if setting := SETTING.match(span):
            named.append(setting.group(1))
        elif re.fullmatch(r"[a-z]+\.[a-z_]+", span) and span.split(".")[0] in groups:
            named.append(span)
    return [name for name in named if name not in known]


def links(text: str) -> list[str]:
    """The targets of links and pictures within the project."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", split(text)[1]) if "://" not in target]


def headings(path: Path) -> set[str]:
    """The anchors of a Markdown file, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing(readme: Path, root: Path) -> list[str]:
    """What a README names of the tree that is not there: targets of links, their anchors, paths between backticks."""
    text = readme.read_text(encoding="utf-8")
    wrong = []
    for target in links(text):
        name, _, anchor = target.partition("#")
        path = readme.parent / name if name else readme
        if not path.exists() or (anchor and anchor not in headings(path)):
            wrong.append(target)
    for span in spans(text):
        if not re.fullmatch(r"[\w./-]+", span) or span.startswith("__"):
            continue
        ours = span.removeprefix("./").split("/")[0] in FOLDERS and "/" in span
        if (ours or span.endswith(SOURCES)) and not ((readme.parent / span).exists() or (root / span).exists()):
            wrong.append(span)
    return wrong


def rooms_left_out(root: Path) -> list[str]:
    """Folders of code that no README above them links to."""
    left_out = []
    for folder in FOLDERS[:-1]:
        for room in sorted(path.parent for path in (root / folder).glob("*/**/__init__.py")):
            above = [parent / "README.md" for parent in room.parents if parent.is_relative_to(root / folder)]
            linked = {
                (readme.parent / target.partition("#")[0]).resolve()
                for readme in above
                if readme.is_file()
                for target in links(readme.read_text(encoding="utf-8"))
            }
            if not linked & {room.resolve(), (room / "README.md").resolve()}:
                left_out.append(str(room.relative_to(root)))
    return left_out


def door_plate(room: Path) -> tuple[set[str], set[str]]:
    """The files and rooms that the docstring of a room's `__init__.py` lists, and those that it has to list.

    It may list a program's `__main__.py` and folders without code as well.
    """
    listed = set()
    for line in (room / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            listed |= {name for name in line.strip().split("  ")[0].split(", ") if re.fullmatch(r"\w+(\.py|/)", name)}
    there = {path.name for path in room.glob("*.py")} - {"__init__.py", "__main__.py"}
    there |= {f"{path.parent.name}/" for path in room.glob("*/__init__.py")}
    return {name for name in listed if name in there or not (room / name).exists()}, there


@functools.cache
def refusal(program: str, *arguments: str) -> str | None:
    """What a program says of settings that it refuses, or None; it reads them as ever and then only checks them."""
    config_name, schema, further = PROGRAMS[program]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patched:
        for module in (sys, threading):  # set by the program; put back
            patched.setattr(module, "excepthook", module.excepthook)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patched.delenv(name, raising=False)
        patched.setenv("HYDRA_FULL_ERROR", "")  # set by the program; put back
        patched.setattr(sys, "argv", [f"python -m {program}", *arguments])
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                entry.run(program, config_name, schema, lambda config: config.check(), **further)
        except SystemExit as stop:
            return said.getvalue() if stop.code else None
        finally:
            GlobalHydra.instance().clear()
    return None


def problem(command: str, root: Path) -> str | None:
    """What is wrong with a command, or None."""
    if character := unquoted(command):
        return f"a shell would expand {character}"
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    scripts = [word for word in words if re.match(r"(\./)?scripts/", word)]
    if gone := [script for script in scripts if not (root / script).is_file()]:
        return f"there is no {gone[0]}"
    if scripts and words[0] == "python":
        return problem_of_subcommand(root / words[1], words[2:])
    if scripts and "launch" in scripts[0]:
        wrong = problem_of_launcher(root / scripts[0], words)
        return wrong or problem_of_settings("train", [word for word in words if "=" in word])
    if at := next((at for at, word in enumerate(words, 1) if word in ("-m", "--module")), None):
        return problem_of_settings(words[at], words[at + 1 :])
    return None


def problem_of_subcommand(script: Path, words: list[str]) -> str | None:
    """The same for `python scripts/benchmark.py step`: the names are those of the modules in benchmarks/."""
    known = {path.stem for path in script.parent.glob(f"{script.stem}s/*.py")} - {"__init__"}
    name = words[0] if words else "--help"
    return None if name in known or name.startswith("-") else f"{script.name} has no subcommand {name}"


def problem_of_launcher(script: Path, words: list[str]) -> str | None:
    """The same for a launcher's own options."""
    known = script.read_text(encoding="utf-8")
    unknown = [word for word in words if word.startswith("--") and word not in known]
    return f"{script.name} has no option {unknown[0]}" if unknown else None


def problem_of_settings(program: str, arguments: list[str]) -> str | None:
    """The same for the settings of a program; one that is only named needs none."""
    if program not in PROGRAMS:
        return f"there is no program {program}"
    return refusal(program, *arguments) if arguments else None
