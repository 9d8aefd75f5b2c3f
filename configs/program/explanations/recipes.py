"""The YAML files that a command line chooses, a user's own among them: what is wrong with one, by file."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from configs.program.errors import UserError, one_line

PACKAGE = re.compile(r"#\s*@package\s+\S")
"""The comment by which Hydra knows which settings a file is about."""
SYNTAX = re.compile(r"(?P<override>override +|optional +)?(?P<root>/)?(?P<group>[\w/]+)(?:@.*)?")
"""A key of a defaults list."""


class Choice(NamedTuple):
    """`group=name` of a command line or of a defaults list."""

    group: str
    name: str


def check(chosen: Iterable[Choice], directories: list[Path], groups: dict[str, bool]) -> None:
    """Looks into the files that are chosen, and into those that these choose.

    Args:
        chosen: on the command line.
        directories: where files are looked for, the first one first.
        groups: of the program → whether a group has settings of its own, which `recipe` has not.

    Raises:
        UserError: a file can't be what its place asks for.
    """
    waiting, seen = list(chosen), set()
    while waiting:
        choice = waiting.pop()
        path = _find(choice, directories)
        if path is not None and path not in seen:
            seen.add(path)
            waiting += _check_file(path, choice.group, groups)


def choices(group: str, directories: list[Path]) -> list[str]:
    """The names that can be chosen."""
    return sorted({path.stem for directory in directories for path in (directory / group).glob("*.yaml")})


def _find(choice: Choice, directories: list[Path]) -> Path | None:
    name = choice.name.removesuffix(".yaml")
    found = (directory / choice.group / f"{name}.yaml" for directory in directories)
    return next((path for path in found if path.is_file()), None)


def _check_file(path: Path, group: str, groups: dict[str, bool]) -> list[Choice]:
    """The choices that the file makes."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: it is not UTF-8 text ({one_line(error)}); write plain YAML there") from error
    except OSError as error:
        raise UserError(f"{path}: it can't be read ({error.strerror or error}); make it readable") from error
    try:
        node = yaml.compose(text)
    except yaml.YAMLError:
        return []  # reported with line and reason when it is composed
    has_package = any(PACKAGE.match(line) for line in _first_comments(text))
    if node is None and not has_package:
        raise UserError(f"{path}: it holds no settings; write them as name: value, or leave it out")
    if node is not None and not isinstance(node, yaml.MappingNode):
        what = "a list" if isinstance(node, yaml.SequenceNode) else "one value"
        raise UserError(f"{path}: it holds {what}; write settings as name: value")
    if not has_package and not groups.get(group, True):
        raise UserError(f"{path}: its first line must be `# @package _global_`, by which it can set anything")
    return list(_defaults(path, group, groups, node)) if node is not None else []


def _first_comments(text: str) -> Iterator[str]:
    for line in map(str.strip, text.splitlines()):
        if line and not line.startswith("#"):
            return
        yield line


def _defaults(path: Path, group: str, groups: dict[str, bool], node: yaml.MappingNode) -> Iterator[Choice]:
    listed = next((value for key, value in node.value if key.value == "defaults"), None)
    for item in listed.value if isinstance(listed, yaml.SequenceNode) else ():
        if isinstance(item, yaml.ScalarNode) and item.value != "_self_":
            yield Choice(group, item.value)
        for key, value in item.value if isinstance(item, yaml.MappingNode) else ():
            read = SYNTAX.fullmatch(str(key.value))
            if read is None:
                continue
            if read["group"] in groups and not (read["root"] and (read["override"] or "").startswith("override")):
                why = "which is one choice too many" if read["root"] else f"which would be a folder in {group}/"
                raise UserError(
                    f"{path}: its defaults say `{key.value}`, {why}; write `override /{read['group']}: {value.value}`"
                )
            if isinstance(value, yaml.ScalarNode):
                yield Choice(read["group"] if read["root"] else f"{group}/{read['group']}", value.value)
