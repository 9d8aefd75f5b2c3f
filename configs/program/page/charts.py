"""Numbers → SVG in the page's own colours, drawn small enough for a phone and sharp on a desk.

A chart is 360 units wide and scales with its card. Colours are the page's variables, so light and dark come by
themselves; what a point says is its title, which browsers show under the pointer and read aloud.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 24
MOST_POINTS = 240
"""Points of a line; a longer run is drawn by means of as many parts, with the range of each behind them."""
COLOURS = ("var(--accent)", "var(--second)", "var(--third)")


@dataclass(frozen=True, slots=True)
class Line:
    """A series of points, in the order of x; values that are not finite leave a gap."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at an x."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class _Scale:
    """Values between `low` and `high` → positions between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def line_chart(lines: Sequence[Line], *, marks: Sequence[Mark] = (), label: str) -> Markup:
    """Lines over the same x, which is a step; marks are drawn as dashed verticals.

    Args:
        lines: at most three; nothing is drawn of one without finite values.
        marks: what happened.
        label: what the chart shows, for those who can't see it.
    """
    finite = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not finite:
        return Markup('<p class="soft">Nothing yet.</p>')
    ticks = nice_ticks(min(y for _, y in finite), max(y for _, y in finite))
    x = _Scale(min(x for x, _ in finite), max(x for x, _ in finite), LEFT, WIDTH - RIGHT)
    y = _Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_axes(x, y, ticks)]
    for mark in marks:
        if x.low <= mark.x <= x.high:
            parts.append(
                f'<line class="mark" x1="{x(mark.x)}" x2="{x(mark.x)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>{escape(mark.label)}</title></line>"
            )
    for line, colour in zip(lines, COLOURS, strict=False):
        parts.append(_line(line, x, y, colour))
    return _svg("".join(parts), HEIGHT, label)


def _line(line: Line, x: _Scale, y: _Scale, colour: str) -> str:
    size = max(1, math.ceil(len(line.points) / MOST_POINTS))
    middle: list[tuple[float, float] | None] = []
    band: list[tuple[float, float, float]] = []
    for start in range(0, len(line.points), size):
        part = [(px, py) for px, py in line.points[start : start + size] if math.isfinite(py)]
        if not part:
            middle.append(None)
            continue
        values = [py for _, py in part]
        middle.append((part[len(part) // 2][0], sum(values) / len(values)))
        band.append((part[len(part) // 2][0], min(values), max(values)))
    drawn = []
    if size > 1:
        upper = " ".join(f"{x(px)},{y(high)}" for px, _, high in band)
        lower = " ".join(f"{x(px)},{y(low)}" for px, low, _ in reversed(band))
        drawn.append(f'<polygon points="{upper} {lower}" fill="{colour}" opacity="0.2"/>')
    path, pen = "", "M"
    for point in middle:
        path += "" if point is None else f"{pen}{x(point[0])} {y(point[1])}"
        pen = "M" if point is None else "L"
    drawn.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>')
    radius = 2.5 if len(middle) <= 24 else 0
    for point in middle:
        if point is not None:
            title = f"{escape(line.name)}, step {point[0]:,g}: {point[1]:,.4g}"
            hidden = "" if radius else ' opacity="0"'
            drawn.append(
                f'<circle cx="{x(point[0])}" cy="{y(point[1])}" r="{radius or 5}" fill="{colour}"{hidden}>'
                f"<title>{title}</title></circle>"
            )
    return "".join(drawn)


def _axes(x: _Scale, y: _Scale, ticks: Sequence[float]) -> str:
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 3.5}" text-anchor="end">{short(tick)}</text>')
    for value, anchor in ((x.low, "start"), (x.high, "end")):
        parts.append(f'<text x="{x(value)}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:,g}</text>')
        if x.high == x.low:
            break
    return "".join(parts)


def heatmap(
    rows: Sequence[Sequence[float | None]],
    *,
    names: Sequence[str],
    label: str,
    columns: tuple[str, Sequence[int]] | None = None,
    highest: float | None = None,
    digits: int = 3,
) -> Markup:
    """A cell for each number, a row for each name; the darkest is the greatest number.

    Args:
        rows: of equal length; None for a cell that has no number.
        names: of the rows.
        label: what it shows, for those who can't see it.
        columns: what a column is called, and the number of each; unset, experts from 0.
        highest: the number of the darkest cell; unset, the greatest there is.
        digits: significant ones in a cell and its title.
    """
    if not rows or not rows[0]:
        return Markup('<p class="soft">Nothing yet.</p>')
    called, numbers = columns or ("expert", range(len(rows[0])))
    if highest is None:
        highest = max((value for row in rows for value in row if value is not None), default=0.0)
    height = 16 if len(rows) > 12 else 22
    left = 10 + 6.2 * max(map(len, names))
    width = (WIDTH - left - 4) / len(rows[0])
    parts = []
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = 2 + number * height
        parts.append(f'<text x="{left - 6}" y="{top + height / 2 + 3.5}" text-anchor="end">{escape(name)}</text>')
        for column, value in enumerate(row):
            share = 0 if value is None or highest <= 0 else min(1.0, max(0.0, value / highest))
            x = left + column * width
            said = "none" if value is None else f"{value:.{digits}g}"
            parts.append(
                f'<rect x="{x:.1f}" y="{top}" width="{width - 1:.1f}" height="{height - 1}" rx="2" '
                f'style="fill:color-mix(in oklab, var(--accent) {100 * share:.0f}%, var(--cell))">'
                f"<title>{escape(name)}, {called} {numbers[column]:,}: {said}</title></rect>"
            )
            if value is not None and width >= 30:
                tone = "onaccent" if share > 0.6 else "oncell"
                parts.append(
                    f'<text class="{tone}" x="{x + width / 2:.1f}" y="{top + height / 2 + 3.5}" '
                    f'text-anchor="middle">{said if len(said) <= 5 else short(round(value, 3))}</text>'
                )
    bottom = 2 + len(rows) * height
    # As many columns have their number below them as there is room for.
    apart = math.ceil((8 + 6.2 * max(len(f"{each:,}") for each in numbers)) / width)
    for column in range(0, len(rows[0]), apart):
        parts.append(
            f'<text x="{left + (column + 0.5) * width:.1f}" y="{bottom + 12}" text-anchor="middle">'
            f"{numbers[column]:,}</text>"
        )
    return _svg("".join(parts), bottom + 18, label)


def timeline(end: float, marks: Sequence[Mark], interruptions: Sequence[Mark], *, label: str) -> Markup:
    """The steps of a run from left to right: dots for `marks`, verticals for `interruptions`."""
    x = _Scale(0, max(end, 1), 12, WIDTH - 12)
    parts = [f'<line class="axis" x1="{x(0)}" x2="{x(end)}" y1="26" y2="26"/>']
    for mark in interruptions:
        title = f"<title>{escape(mark.label)}</title>"
        parts.append(f'<line class="stop" x1="{x(mark.x)}" x2="{x(mark.x)}" y1="8" y2="44">{title}</line>')
    for mark in marks:
        title = f"<title>{escape(mark.label)}</title>"
        parts.append(f'<circle cx="{x(mark.x)}" cy="26" r="5" fill="var(--accent)">{title}</circle>')
    parts.append(f'<text x="{x(0)}" y="60">0</text><text x="{x(end)}" y="60" text-anchor="end">{end:,g}</text>')
    return _svg("".join(parts), 66, label)


def intervals(
    rows: Sequence[tuple[str, Sequence[tuple[str, float, float]]]], *, low: float, high: float, label: str
) -> Markup:
    """Values with two errors to both sides, some for each name on one axis.

    Args:
        rows: `(name, ((series, value, error), …))`.
        low: the least that a value can be, at which an interval is cut.
        high: the most.
        label: what it shows, for those who can't see it.
    """
    ends = [
        min(high, max(low, value + sign * error))
        for _, values in rows
        for _, value, error in values
        for sign in (-2, 2)
    ]
    if not ends:
        return Markup('<p class="soft">Nothing yet.</p>')
    ticks = nice_ticks(min(ends), max(ends))
    left = 10 + 6.2 * max(len(name) for name, _ in rows)
    x = _Scale(ticks[0], ticks[-1], left, WIDTH - 10)
    parts, top = [], 8.0
    for name, values in rows:
        parts.append(f'<text x="{left - 6}" y="{top + 5 * len(values) + 1}" text-anchor="end">{escape(name)}</text>')
        for (series, value, error), colour in zip(values, COLOURS, strict=False):
            title = f"{escape(name)}, {escape(series)}: {value:.2f} ± {error:.2f}"
            ends_at = f'x1="{x(max(low, value - 2 * error))}" x2="{x(min(high, value + 2 * error))}"'
            height = f'y1="{top + 4}" y2="{top + 4}"'
            parts.append(
                f'<g><title>{title}</title><line {ends_at} {height} stroke="{colour}" stroke-width="2"/>'
                f'<circle cx="{x(value)}" cy="{top + 4}" r="3.5" fill="{colour}"/></g>'
            )
            top += 10
        top += 8
    for tick in ticks:
        parts.insert(0, f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="2" y2="{top}"/>')
        parts.append(f'<text x="{x(tick)}" y="{top + 12}" text-anchor="middle">{short(tick)}</text>')
    return _svg("".join(parts), top + 18, label)


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers, evenly apart, from at most `low` to at least `high`."""
    if high <= low:
        around = abs(low) * 0.1 or 1.0
        low, high = low - around, high + around
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number as an axis has it: 12k, 0.003."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _svg(content: str, height: float, label: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{content}</svg>"
    )
