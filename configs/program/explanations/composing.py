"""What Hydra, OmegaConf and YAML raise while they compose → one sentence: field, value, remedy."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from configs.program.errors import one_line
from configs.program.explanations import names, recipes
from configs.program.explanations.program import Program

ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError)
"""All that they raise for a user's input."""


def explain(error: Exception, program: Program, directories: list[Path]) -> str:  # noqa: PLR0911 - one per kind
    """The sentence; `directories` are those in which groups are looked for."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else program.file
        return f"{where}: it can't be read ({error.problem}); write plain YAML there"
    if isinstance(error, UnicodeDecodeError | yaml.YAMLError):
        return f"{_unreadable(directories)}: it is not UTF-8 text ({one_line(error)}); write plain YAML there"
    causes = _causes(error)
    text = "\n".join(map(str, causes))
    for sentence in (_interpolation, _wrong_type, _null, _dictionary):
        if said := sentence(text):
            return said
    if said := _unknown(text, lambda name: names.unknown(name, program)):
        return said
    if said := _group(text, directories):
        return said
    first_lines = [one_line(cause) for cause in causes if str(cause).strip()]
    for merging in filter(None, (re.search(r"Error merging override ([^\s=]+=.*)", line) for line in first_lines)):
        setting = merging.group(1).strip()
        if "is not a ListConfig" in text:
            name, _, value = setting.partition("=")
            return f"{setting}: it takes a list; write '{name}=[{value}]'"
        return f"{setting}: the setting can't have that value; `python -m {program.name} --help` shows its default"
    if unread := [cause.override for cause in causes if isinstance(cause, OverrideParseException)]:
        return f"{unread[0]}: that can't be read; write field=value, and a list as 'field=[a,b]'"
    return f"{first_lines[0] if first_lines else type(error).__name__}; check it against configs/{program.file}.yaml"


def _causes(error: Exception) -> list[Exception]:
    found: list[Exception] = []
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def _full_key(text: str, otherwise: str) -> str:
    found = re.search(r"full_key: (.+)", text)
    return found.group(1).strip() if found else otherwise


def _interpolation(text: str) -> str | None:
    field = _full_key(text, "a setting")
    if variable := re.search(r"Environment variable '(.*?)' not found", text):
        name = variable.group(1)
        return f"{field}: the variable {name} is not set; set it, or write ${{oc.env:{name},VALUE}} to do without"
    if key := re.search(r"Interpolation key '(.*?)' not found", text):
        return f"{field}: there is no setting {key.group(1)}, which ${{{key.group(1)}}} names; name an existing one"
    return None


def _wrong_type(text: str) -> str | None:
    wrong = re.search(r"Value '(.*?)'(?: of type '\w+')? (?:could not be converted to|is not a valid) (\w+)", text)
    if wrong is None:
        return None
    value, kind = wrong.groups()
    start = f"{_full_key(text, 'a setting')}={value}: that is not of type {kind}"
    if kind == "Integer" and (whole := _whole(value)) is not None:
        return f"{start}; write {whole}"
    return f"{start}; give a value of that type"


def _whole(text: str) -> int | None:
    """The whole number that a text like 32.0 or 1e3 stands for."""
    try:
        return int(number) if (number := float(text)).is_integer() else None
    except ValueError:
        return None


def _null(text: str) -> str | None:
    null = re.search(r"(?:Incompatible value 'None' for field of type|field '[^']*' is not Optional).*", text)
    return (
        f"{_full_key(text[null.start() :], 'a setting')}=null: it can't be null; leave it out, or give a value"
        if null
        else None
    )


def _dictionary(text: str) -> str | None:
    found = re.search(r"An item is already at '([^']+)'", text)
    return f"{found[1]}: it takes names with their values; write '{found[1]}={{name: value}}'" if found else None


def _unknown(text: str, sentence: Callable[[str], str]) -> str | None:
    unknown = re.search(r"(?:Key|Could not override) '([^']+)'(?: not in| is not in|\.)", text)
    if unknown is None:
        return None
    asked = re.search(r"Could not override '([^']+)'", text)
    said = sentence(asked.group(1) if asked else _full_key(text, unknown.group(1)))
    file = re.search(r"In '([^']+)'", text)  # a file of settings, in which the name stands
    return f"{said} (it stands in {file.group(1)}.yaml)" if file and "/" in file.group(1) else said


def _group(text: str, directories: list[Path]) -> str | None:
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing is None:
        return None
    group, _, name = missing.group(1).rpartition("/")
    if options := recipes.choices(group, directories):
        return f"{group}={name}: there is no such choice; choose one of {', '.join(options)}"
    return f"{group or name}: there is no such group of settings; see configs/"


def _unreadable(directories: list[Path]) -> str:
    """The first YAML file that is not UTF-8."""
    for path in (path for directory in directories for path in sorted(directory.rglob("*.yaml"))):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.reader.ReaderError):
            return str(path)
        except (OSError, yaml.YAMLError):
            continue
    return f"a file of settings ({' '.join(sys.argv[1:2])})"
