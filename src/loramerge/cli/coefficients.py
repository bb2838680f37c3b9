"""``loramerge coefficients``: the learned coefficients by block."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Arch, opened
from .output import Block, joined, say, table
from .settings import command

if TYPE_CHECKING:
    from ..merging.coefficients import Coefficients
    from ..tensors import Array

BARS = " ▁▂▃▄▅▆▇█"
BINS = 24


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge coefficients``."""

    file: Annotated[Path, typer.Argument(help="What 'zip --coefficients' wrote.")]
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw them too: .png, .svg or .pdf.")] = None
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="The LoRAs that were merged, one per option, in order: adds a table of overlaps."),
    ] = None
    architecture: Arch = None


@command
def run(given: Options) -> None:
    """Show learned coefficients: for every block and LoRA how they spread.

    Example: loramerge coefficients c.safetensors --plot c.svg --lora person.safetensors --lora jersey.safetensors
    """
    import numpy as np

    from ..learned.plots import by_block, check_plot, draw, outside, span
    from ..merging.coefficients import Coefficients

    if given.plot:
        check_plot(given.plot)
    found = Coefficients.read(given.file)
    blocks = by_block(found)
    low, high = span(blocks)
    rows = [
        [
            name if i == 0 else "",
            lora,
            str(mine.size),
            *(f"{value:.3f}" for value in np.quantile(mine, [0.25, 0.5, 0.75])),
            spread(mine, low, high),
        ]
        for name, values in blocks.items()
        for i, (lora, mine) in enumerate(zip(found.names, values, strict=True))
    ]
    say(table(["block", "file", "columns", "25 %", "median", "75 %", f"from {low:.2f} to {high:.2f}"], rows))
    say("1 keeps a column of the LoRA as it is, 0 leaves it out; one that hardly acts may have any.")
    say(f"{outside(blocks, low, high)}.")
    if given.lora:
        say("", _overlaps(found, given.lora, given.architecture))
    if given.plot:
        say(f"→ {draw(found, given.plot)}")


def _overlaps(found: "Coefficients", files: list[str], architecture: str | None) -> Block:
    """Return a table of the LoRAs' overlap by block, before and after."""
    from ..files.architectures.blocks import block, position
    from ..learned.interference import overlaps

    with opened(files, architecture=architecture) as loras:

        def group(module: str) -> str:
            return f"{module.partition('.')[0]} {block(module, loras[0].architecture)}"

        by_block = sorted(overlaps(loras, found, group).items(), key=lambda item: position(*item[0].split(" ")))
    rows = [[name, f"{before:.3f}", f"{after:.3f}"] for name, (before, after) in by_block]
    legend = "Overlap of columns: 1 where the LoRAs act along one line on the same inputs, 0 where they don't meet."
    return joined([table(["block", "before", "after"], rows), legend])


def spread(values: "Array", low: float, high: float) -> str:
    """Return a histogram as a line of bars, without the values outside the range."""
    import numpy as np

    counts, _ = np.histogram(values, BINS, (low, high))
    heights = np.ceil(counts / max(1, counts.max()) * (len(BARS) - 1)).astype(int)
    return "".join(BARS[h] for h in heights)
