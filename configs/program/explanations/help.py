"""`--help`: what a program does, commands to begin with, its groups, and every setting with its docstring."""

import ast
import inspect
import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from configs.program.explanations import recipes
from configs.program.explanations.program import Program

WIDEST = 120


def text(program: Program, composed: DictConfig) -> str:
    """The text; `composed` are the settings as they are with those that were given beside --help."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    file = OmegaConf.load(program.configs / f"{program.file}.yaml")
    lines = [str(file.hydra.help.header).rstrip(), ""]
    if groups := program.groups():
        lines += ["Groups, each a folder of configs/ with a file for each choice (* is taken by itself):", ""]
        lines += [_group(name, file.defaults, program.configs) for name in groups]
        lines.append("")
    lines += ["Settings, each with the value that it has:", ""]
    lines += _settings(program.schema, composed, width)
    lines += [f"`python -m {program.name} --cfg job`, with settings, prints all of them as YAML."]
    return "\n".join(lines)


def _group(name: str, defaults: Any, config_dir: Path) -> str:
    taken = next(item[name] for item in defaults if isinstance(item, DictConfig) and name in item)
    names = [f"{choice}*" if choice == taken else choice for choice in recipes.choices(name, [config_dir])]
    return f"  {name:<10} {', '.join(names)}"


def _settings(schema: type, composed: DictConfig, width: int, prefix: str = "") -> Iterator[str]:
    described = docstrings(schema)
    for field in fields(schema):
        value = composed._get_node(field.name)
        name = f"{prefix}{field.name}"
        if is_dataclass(field.type):
            assert isinstance(field.type, type)
            yield f"  {name}: {described[field.name]}"
            yield ""
            yield from _settings(field.type, composed[field.name], width, f"{name}.")
            continue
        yield f"  {name}={_shown(value)}"
        yield from textwrap.wrap(described[field.name], width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        yield ""


def _shown(value: Any) -> str:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value._value()
    if plain is None or isinstance(plain, bool):
        return {None: "null", True: "true", False: "false"}[plain]
    return "[" + ",".join(map(str, plain)) + "]" if isinstance(plain, list) else str(plain)


def docstrings(schema: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, in one line; it stands below the field in the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(schema)))
    body = tree.body[0].body  # type: ignore[attr-defined]  # a class
    return {
        before.target.id: " ".join(ast.literal_eval(after.value).split())
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


def stdout(text: str) -> None:
    """Prints it, also if the reader (`| head`) has seen enough."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stderr.close()
