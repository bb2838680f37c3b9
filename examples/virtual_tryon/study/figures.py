"""Charts as SVG in a few lines of text, to stand inside a page: bars with intervals, and grids of values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from loramerge.scoring import Interval

WIDTH = 480
"""Units of a chart's width; it scales with the page."""
LETTER = 7.1
"""Units of a letter's width, about."""
BAR, GAP = 15, 12
COLOURS = ("#7f7f7f", "#0072b2", "#d55e00", "#56b4e9", "#009e73", "#b8860b", "#aa4499", "#332288")
"""Okabe and Ito's, for the most part: colour-blind readers tell them apart."""


@dataclass(frozen=True)
class Series:
    """Bars of one colour, one a group."""

    label: str
    values: tuple[Interval, ...]
    colour: str


def bars(groups: Sequence[str], series: Sequence[Series], *, title: str, colours: Sequence[str] = ()) -> str:
    """Horizontal bars, grouped, with whiskers for 95 % intervals.

    Args:
        groups: Names at the left.
        series: Each has a value for every group; several get a legend.
        title: What screen readers say.
        colours: Of the groups, in place of the one series' own.
    """
    left = 16 + LETTER * max(map(len, groups))
    axis = Axis.of([value for one in series for value in one.values], left)
    legend = 24 * len(series) if len(series) > 1 else 0
    step = BAR * len(series) + GAP
    height = legend + step * len(groups) + 34
    parts = [*_legend(series, left)] if legend else []
    bottom = legend + step * len(groups) + 4
    parts += axis.lines(legend, bottom)
    for i, group in enumerate(groups):
        top = legend + i * step + GAP / 2
        parts.append(_text(left - 8, top + BAR * len(series) / 2 + 4, group, "end"))
        for j, one in enumerate(series):
            colour = colours[i] if colours else one.colour
            parts += _bar(axis, one.values[i], top + j * BAR, colour)
    return _svg(height, title, parts)


def _bar(axis: "Axis", value: Interval, top: float, colour: str) -> list[str]:
    start, end = sorted((axis.x(0), axis.x(value.mean)))
    middle = top + BAR / 2 - 1
    parts = [
        f'<rect x="{start:.1f}" y="{top:.1f}" width="{max(end - start, 0.5):.1f}" height="{BAR - 3}" fill="{colour}"/>'
    ]
    right = end
    if value.low is not None and value.high is not None:
        low, high = axis.x(value.low), axis.x(value.high)
        right = max(right, high)
        parts.append(
            f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 3:.1f}v6M{high:.1f} {middle - 3:.1f}v6" '
            'stroke="#222" stroke-width="1.2" fill="none"/>'
        )
    return [*parts, _text(max(right, axis.x(0)) + 5, top + BAR - 4, f"{value.mean:.3f}", size=11)]


@dataclass(frozen=True)
class Axis:
    """From values to places."""

    low: float
    high: float
    left: float
    """Where it begins."""

    @classmethod
    def of(cls, values: Sequence[Interval], left: float) -> "Axis":
        ends = [0.0]
        for value in values:
            ends += [value.mean, *(end for end in (value.low, value.high) if end is not None)]
        return cls(min(ends), max(max(ends), min(ends) + 1e-6), left)

    def x(self, value: float) -> float:
        return self.left + (value - self.low) / (self.high - self.low) * (WIDTH - self.left - 48)

    def lines(self, top: float, bottom: float) -> list[str]:
        """A grid, and its numbers below."""
        parts = []
        for tick in ticks(self.low, self.high):
            x, strong = self.x(tick), abs(tick) < 1e-12
            parts.append(
                f'<path d="M{x:.1f} {top}V{bottom}" stroke="{"#555" if strong else "#ddd"}" stroke-width="1"/>'
            )
            parts.append(_text(x, bottom + 16, f"{tick:g}", "middle", size=11))
        return parts


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    title: str,
    down: str,
    across: str,
) -> str:
    """A grid of values, the higher the darker, each with its number.

    Args:
        rows: Names at the left.
        columns: Names above.
        values: By row, then by column.
        title: What screen readers say.
        down: What the rows are.
        across: What the columns are.
    """
    side, left, top = 62, 120, 46
    flat = [value for row in values for value in row]
    low, high = min(flat), max(flat)
    parts = [_text(left + side * len(columns) / 2, 14, across, "middle"), _text(4, top - 8, down)]
    parts += [_text(left + side * (j + 0.5), 36, name, "middle") for j, name in enumerate(columns)]
    for i, name in enumerate(rows):
        parts.append(_text(left - 10, top + side * (i + 0.5) * 0.6 + 5, name, "end"))
        for j, value in enumerate(values[i]):
            share = (value - low) / (high - low) if high > low else 0.5
            x, y = left + side * j, top + side * 0.6 * i
            parts.append(
                f'<rect x="{x}" y="{y:.1f}" width="{side - 2}" height="{side * 0.6 - 2:.1f}" fill="{_shade(share)}"/>'
            )
            colour = "#fff" if share > 0.55 else "#111"
            parts.append(_text(x + side / 2 - 1, y + side * 0.3 + 4, f"{value:.3f}", "middle", colour=colour))
    return _svg(top + side * 0.6 * len(rows) + 6, title, parts)


def _shade(share: float) -> str:
    """From near white to a dark blue."""
    light, dark = (236, 243, 250), (8, 64, 120)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(light, dark, strict=True))


def _legend(series: Sequence[Series], left: float) -> list[str]:
    parts = []
    for i, one in enumerate(series):
        parts.append(f'<rect x="{left:.1f}" y="{24 * i + 3}" width="14" height="14" fill="{one.colour}"/>')
        parts.append(_text(left + 22, 24 * i + 15, one.label))
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start", *, size: int = 13, colour: str = "#111") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
    )


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}" '
        f'font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )
