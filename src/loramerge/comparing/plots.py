"""Pictures of a comparison, drawn with matplotlib (the extra ``plots``)."""

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import FileError, OptionError, need
from ..files.storage.paths import path_of
from ..files.storage.texts import visible
from ..files.storage.writer import write_bytes
from .analysis import Comparison, Row
from .measures import Pair

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key: TypeAlias = tuple[int, int]
"""The numbers of the two LoRAs of a pair."""

FORMATS = (".png", ".svg")

SHARES = {
    "input overlap": "input_overlap",
    "output overlap": "output_overlap",
    "alignment": "alignment",
    "sign conflict": "conflict",
}
"""Measures of a `Pair` in [0, 1], in the order in which they are drawn."""

LEGIBLE = 30
"""With more columns than this, cells are drawn without numbers."""


def check_heatmap(path: Path) -> None:
    """Refuse, before anything is computed, a heat map that can't be drawn.

    Raises:
        OptionError: The name doesn't end in .png or .svg.
        FileError: The folder doesn't exist.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"Can't draw {path}: a heat map is a {' or '.join(FORMATS)} file.")
    check_drawable(path, "A heat map")


def save_heatmap(comparison: Comparison, path: str | Path) -> Path:
    """Draw a comparison by block into a file.

    Args:
        comparison: Of two LoRAs or more.
        path: A .png or .svg file.

    Raises:
        OptionError: The name doesn't end in .png or .svg.
        FileError: It can't be written.
        MissingExtraError: matplotlib is not installed.
    """
    path = path_of(path)
    check_heatmap(path)
    return save_figure(heatmap(comparison), path, dpi=120)


def save_figure(figure: "Figure", path: Path, dpi: int) -> Path:
    """Write a picture, in the format that its name ends in: whole, or not at all.

    Raises:
        FileError: It can't be written.
    """
    write_bytes(path, drawn(figure, path.suffix[1:].lower(), dpi))
    return path


def drawn(figure: "Figure", kind: str, dpi: int) -> bytes:
    """Return a picture as the bytes of a file of a kind: ``png``, ``svg`` or ``pdf``."""
    data = io.BytesIO()
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with as_it_is():
        figure.savefig(data, format=kind, dpi=dpi, metadata=undated)
    return data.getvalue()


def heatmap(comparison: Comparison) -> "Figure":
    """Draw cosines above, overlaps, alignment and sign conflict below: one row per measure and pair, one column per block."""
    with as_it_is():
        return _heatmap(comparison)


@contextmanager
def as_it_is() -> Iterator[None]:
    """Take text as it is: no TeX in it, and no warning for letters that the font lacks; SVGs have no random names."""
    import matplotlib

    settings = {"text.parse_math": False, "text.usetex": False, "svg.hashsalt": "loramerge"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing|Matplotlib currently does not support", UserWarning)
        yield


def _heatmap(comparison: Comparison) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = (comparison.total, *comparison.by_block())
    cosines = _lines(comparison, {"cosine": "cosine"})
    others = _lines(comparison, SHARES)
    heights = [len(cosines) + 0.4, len(others)]  # room for the colour bar's numbers
    figure = Figure(figsize=(3.5 + 0.42 * max(len(columns), 10), 2.2 + 0.36 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    signed, shares = figure.subplots(2, 1, height_ratios=heights, sharex=True)
    _panel(figure, signed, columns, cosines, ("RdBu_r", -1.0, "cosine"))
    _panel(figure, shares, columns, others, ("viridis", 0.0, "share"))
    shares.set_ylabel("measure" if len(cosines) == 1 else "measure and pair")
    shares.set_xticks(range(len(columns)), [visible(_label(row)) for row in columns], rotation=90)
    shares.set_xlabel("block (grey: not in both)")
    names = ", ".join(f"{letter} = {name}" for letter, name in zip(comparison.letters, comparison.names, strict=True))
    figure.suptitle(f"What the LoRAs share, by block\n{visible(names)}")
    return figure


def _lines(comparison: Comparison, measures: Mapping[str, str]) -> list[tuple[str, str, Key]]:
    """Return label, measure and pair of each row; the label names the pair if there are several."""
    pairs = list(comparison.total.pairs)
    names = {(i, j): f" {comparison.letters[i]}, {comparison.letters[j]}" if len(pairs) > 1 else "" for i, j in pairs}
    return [(f"{label}{names[pair]}", measure, pair) for label, measure in measures.items() for pair in pairs]


def _label(row: Row) -> str:
    """Return a column's label: the block's name in a denoiser; a text encoder is one block."""
    if not row.block:
        return row.name
    if row.block == "-":
        return f"{row.component}, other"
    return row.block if row.component in ("unet", "transformer") else row.component


def _panel(
    figure: "Figure",
    axes: "Axes",
    columns: Sequence[Row],
    lines: Sequence[tuple[str, str, Key]],
    style: tuple[str, float, str],
) -> None:
    """Draw a heat map with its own colour bar; each line is a label, a measure and a pair."""
    import numpy as np

    colours, low, unit = style
    cells = np.array([[_value(row.pairs[pair], measure) for row in columns] for _, measure, pair in lines])
    image = axes.imshow(np.ma.masked_invalid(cells), cmap=colours, vmin=low, vmax=1.0, aspect="auto")
    axes.set_facecolor("lightgrey")
    axes.axvline(0.5, color="white", linewidth=3)
    axes.set_yticks(range(len(lines)), [label for label, _, _ in lines])
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label=unit, pad=0.01)
    if len(columns) <= LEGIBLE:
        _write_values(axes, cells, low)


def _write_values(axes: "Axes", cells: "np.ndarray[Any, Any]", low: float) -> None:
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            if not math.isnan(value):
                dark = abs(value) > 0.6 if low < 0 else value < 0.6
                colour = "white" if dark else "black"
                axes.text(x, y, f"{value:z.2f}", ha="center", va="center", fontsize=7, color=colour)


def _value(pair: Pair, measure: str) -> float:
    return float(getattr(pair, measure)) if pair.modules else math.nan


def check_drawable(path: Path, what: str) -> None:
    """Refuse a picture that can't be drawn.

    Args:
        path: The file to draw into.
        what: The picture's name in the message, such as ``"A heat map"``.

    Raises:
        FileError: The folder doesn't exist.
        MissingExtraError: matplotlib is not installed.
    """
    if not path.parent.is_dir():
        raise FileError(f"Can't write {path}: there is no directory {path.parent}.")
    need(what, "matplotlib")
