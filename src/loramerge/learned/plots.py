"""Learned coefficients as a picture: a histogram of every LoRA in every block."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..comparing.plots import as_it_is, check_drawable, save_figure
from ..errors import OptionError
from ..files.architectures.blocks import block, position
from ..files.storage.texts import visible
from ..merging.coefficients import Coefficients
from ..tensors import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def by_block(coefficients: Coefficients) -> dict[str, Array]:
    """Join the coefficients of each block into one array ``(N, columns)``, by component and block."""
    import numpy as np

    found: dict[tuple[str, str], list[Array]] = {}
    for module, tensor in coefficients.columns.items():
        found.setdefault((module.partition(".")[0], block(module)), []).append(tensor.read())
    ordered = sorted(found.items(), key=lambda item: position(*item[0]))
    return {" ".join(names): np.concatenate(arrays, 1) for names, arrays in ordered}


def check_plot(path: Path) -> None:
    """Refuse a picture that can't be drawn, before anything is shown.

    Raises:
        FileError: The folder doesn't exist.
        MissingExtraError: matplotlib is not installed.
        OptionError: The path doesn't end in .png, .svg or .pdf.
    """
    if path.suffix not in SUFFIXES:
        raise OptionError(f"Can't draw to {path}: wanted a path that ends in {', '.join(SUFFIXES)}.")
    check_drawable(path, "Drawing")


def draw(coefficients: Coefficients, path: Path) -> Path:
    """Write the picture.

    Args:
        coefficients: The learned coefficients.
        path: Ends in .png, .svg or .pdf.

    Raises:
        FileError: The path can't be written.
        MissingExtraError: matplotlib is not installed.
        OptionError: The path doesn't end in .png, .svg or .pdf.
    """
    check_plot(path)
    with as_it_is():
        return save_figure(_histograms(coefficients), path, dpi=150)


def _histograms(coefficients: Coefficients) -> "Figure":
    import numpy as np
    from matplotlib.figure import Figure

    blocks = by_block(coefficients)
    low, high = span(blocks)
    edges = np.linspace(low, high, 61)
    figure = Figure(figsize=(6.5, 0.8 * len(blocks) + 1.2), layout="constrained")
    grid = figure.subplots(len(blocks), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(grid, blocks.items(), strict=True):
        drawn = [axes.hist(mine, edges, histtype="stepfilled", alpha=0.5)[2][0] for mine in values]
        axes.set_yticks([])
        axes.set_ylabel(visible(name), rotation=0, ha="right", va="center")
        axes.spines[["top", "left", "right"]].set_visible(False)
    texts = grid[0].legend(drawn, range(len(drawn)), frameon=False, loc="upper left").get_texts()
    for text, lora in zip(texts, coefficients.names, strict=True):
        text.set_text(visible(lora))  # matplotlib leaves out a label that begins with an underscore
    grid[-1].set_xlabel(f"coefficient of a column\n{outside(blocks, low, high)}")
    return figure


def span(blocks: dict[str, Array]) -> tuple[float, float]:
    """Return the range that holds most coefficients, by Tukey's fences, and 0 and 1.

    A few lie far outside: if a column hardly acts, its coefficient may have any value after learning.
    """
    import numpy as np

    lower, upper = np.quantile(_whole(blocks), [0.25, 0.75])
    reach = 1.5 * (upper - lower)
    return min(0.0, float(lower - reach)), max(1.0, float(upper + reach))


def outside(blocks: dict[str, Array], low: float, high: float) -> str:
    """Say how many coefficients a picture of this span leaves out."""
    whole = _whole(blocks)
    count = int(((whole < low) | (whole > high)).sum())
    extent = f", from {whole.min():.3g} to {whole.max():.3g}" if count else ""
    return f"{count} of {whole.size} coefficients lie outside the picture{extent}"


def _whole(blocks: dict[str, Array]) -> Array:
    import numpy as np

    return np.concatenate([values.ravel() for values in blocks.values()]).astype(np.float64)
