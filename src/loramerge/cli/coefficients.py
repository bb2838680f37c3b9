"""``loramerge coefficients``: what was learned, by block."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .run import table

if TYPE_CHECKING:
    from ..tensors import Array

BARS = " ▁▂▃▄▅▆▇█"
BINS = 24


def coefficients(
    file: Annotated[Path, typer.Argument(help="What 'zip --coefficients' wrote.")],
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw them too: .png, .svg or .pdf.")] = None,
) -> None:
    """Show learned coefficients: for every block and LoRA how they spread.

    Example: loramerge coefficients c.safetensors --plot c.svg
    """
    from ..coefficients import Coefficients
    from ..plots_coefficients import by_block, draw, span

    found = Coefficients.read(file)
    blocks = by_block(found)
    low, high = span(blocks)
    rows = [
        [
            name if i == 0 else "",
            lora,
            str(mine.size),
            f"{mine.mean():.3f}",
            f"{mine.std():.3f}",
            spread(mine, low, high),
        ]
        for name, values in blocks.items()
        for i, (lora, mine) in enumerate(zip(found.names, values, strict=True))
    ]
    print(table(["block", "file", "columns", "mean", "± std", f"from {low:.2f} to {high:.2f}"], rows))
    print("1 keeps a column of the LoRA as it is, 0 leaves it out.")
    if plot:
        print(f"→ {draw(found, plot)}")


def spread(values: "Array", low: float, high: float) -> str:
    """A histogram as a line of bars; what lies outside counts at the ends."""
    import numpy as np

    counts, _ = np.histogram(np.clip(values, low, high), BINS, (low, high))
    heights = np.ceil(counts / counts.max() * (len(BARS) - 1)).astype(int)
    return "".join(BARS[h] for h in heights)
