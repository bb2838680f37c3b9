"""Draw charts as SVG with matplotlib: bars with intervals, and grids of values."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from loramerge.scoring import Interval

WIDTH = 480
"""Width of a chart in points; the page scales it."""
BAR = 15
"""Height per bar in points."""
STYLE = (
    "default",
    {
        "font.size": 12,
        "text.parse_math": False,  # a label may hold dollars
        "svg.fonttype": "none",
        "svg.hashsalt": "loramerge",
        "axes.unicode_minus": False,
    },
)
COLOURS = ("#7f7f7f", "#0072b2", "#d55e00", "#56b4e9", "#009e73", "#b8860b", "#aa4499", "#332288")
"""Okabe and Ito's, for the most part: colour-blind readers tell them apart."""
SHADES = LinearSegmentedColormap.from_list("blues", ["#ecf3fa", "#084078"])


@dataclass(frozen=True)
class Series:
    """Bars of one colour, one per group."""

    label: str
    values: tuple[Interval, ...]
    colour: str


@style.context(STYLE)
def bars(groups: Sequence[str], series: Sequence[Series], *, colours: Sequence[str] = ()) -> str:
    """Draw horizontal bars, grouped, with whiskers for 95 % intervals.

    Args:
        groups: Names at the left.
        series: Each has one value per group; several get a legend.
        colours: One per group, instead of the series' own.
    """
    step = len(series) + 0.8
    legend = 21 * len(series) if len(series) > 1 else 0
    axes = _axes(legend + BAR * step * len(groups) + 34)
    drawn = []
    for j, one in enumerate(series):
        places = [step * i + j for i in range(len(groups))]
        means = [value.mean for value in one.values]
        drawn.append(axes.barh(places, means, 0.8, color=colours or one.colour))
        for place, value in zip(places, one.values, strict=True):
            end = max(0.0, value.mean)
            if value.low is not None and value.high is not None:
                axes.plot([value.low, value.high], [place, place], "#222", lw=1.2, marker="|", clip_on=False)
                end = max(end, value.high)
            text = f"{value.mean:.3f}"
            axes.annotate(text, (end, place), (6, 0), textcoords="offset points", size=10, va="center")
    axes.margins(x=0)
    axes.set_ylim(step * len(groups) - 0.9, -0.9)
    axes.set_yticks([step * i + (len(series) - 1) / 2 for i in range(len(groups))], groups)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="x", color="#ddd")
    axes.axvline(0, color="#555", lw=1)
    if legend:
        axes.figure.legend(drawn, [one.label for one in series], loc="outside upper left", frameon=False)
    return _svg(axes)


@style.context(STYLE)
def heat(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], *, down: str, across: str
) -> str:
    """Draw a grid of values, the higher the darker, each with its number.

    Args:
        rows: Names at the left.
        columns: Names above.
        values: By row, then by column.
        down: What the rows are.
        across: What the columns are.
    """
    flat = [value for row in values for value in row]
    shade = Normalize(min(flat), max(flat))
    axes = _axes(37 * len(rows) + 50)
    axes.pcolormesh(values, cmap=SHADES, norm=shade, edgecolors="white", linewidth=2)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = "white" if shade(value) > 0.55 else "black"
            axes.text(j + 0.5, i + 0.5, f"{value:.3f}", color=colour, ha="center", va="center")
    axes.invert_yaxis()
    axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(across, labelpad=7)
    axes.set_ylabel(down, rotation="horizontal", ha="right", va="center", labelpad=9)
    return _svg(axes)


@dataclass(frozen=True)
class Point:
    """A mark in a plane."""

    label: str
    across: Interval
    up: Interval


@style.context(STYLE)
def plane(points: Sequence[Point], *, across: str, up: str) -> str:
    """Draw numbered points, with whiskers for 95 % intervals and the names beside: less across is better, more up too.

    A line joins those of which no other is better in both.

    Args:
        points: In the order of their numbers.
        across: What the horizontal axis shows.
        up: What the vertical axis shows.
    """
    axes = _axes(max(300, 19 * len(points) + 60))
    best = sorted(front(points), key=lambda point: point.across.mean)
    axes.plot([p.across.mean for p in best], [p.up.mean for p in best], color=COLOURS[1], lw=1)
    for number, point in enumerate(points, 1):
        x, y = point.across, point.up
        colour = COLOURS[1] if point in best else COLOURS[0]
        if x.low is not None:
            axes.hlines(y.mean, x.low, x.high, color="#bbb", lw=0.8, zorder=0)
        if y.low is not None:
            axes.vlines(x.mean, y.low, y.high, color="#bbb", lw=0.8, zorder=0)
        axes.plot(x.mean, y.mean, "o", ms=13, color=colour, label=f"{number}  {point.label}")
        axes.annotate(str(number), (x.mean, y.mean), size=8, color="white", ha="center", va="center")
    axes.grid(color="#ddd")
    axes.set_xlabel(across, labelpad=7)
    axes.set_ylabel(up, labelpad=7)
    axes.figure.legend(loc="outside right center", frameon=False, handlelength=0, markerscale=0, fontsize=10)
    return _svg(axes)


def front(points: Sequence[Point]) -> list[Point]:
    """List the points of which no other has both less across and more up."""

    def beats(a: Point, b: Point) -> bool:
        better = a.across.mean <= b.across.mean and a.up.mean >= b.up.mean
        return better and (a.across.mean, a.up.mean) != (b.across.mean, b.up.mean)

    return [point for point in points if not any(beats(other, point) for other in points)]


def _axes(height: float) -> Axes:
    axes = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained").subplots()
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=7)
    axes.spines[:].set_visible(False)
    return axes


def _svg(axes: Axes) -> str:
    text = io.StringIO()
    axes.figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
