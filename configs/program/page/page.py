"""A template and its values → a page of HTML."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: Path, **values: Any) -> str:
    """The page of a template, which extends `page.html.j2`.

    Whatever is filled in is escaped, so that nothing that rows or answers say becomes a tag; a value that is missing is
    an error. No request leaves the page: its policy forbids everything but its own styles.
    """
    return _environment(template.parent).get_template(template.name).render(**values)


@cache
def _environment(folder: Path) -> Environment:
    """What makes pages of a folder's templates; it keeps what it has read of them."""
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "brief": brief}
    return environment


def number(value: float) -> str:
    """A whole number with separators."""
    return f"{value:,}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share; a dash if there is none."""
    return "–" if value is None else f"{value:.{digits}%}"


def brief(value: object, digits: int = 4) -> str:
    """A number to a few significant digits; a dash if there is none, and anything else as it is."""
    if value is None:
        return "–"
    return f"{value:,.{digits}g}" if isinstance(value, float) else str(value)
