"""``loramerge compare``: what LoRAs share and where they fight."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError, counted
from .options import Arch, Base, Exclude, Pickle, Quiet, opened
from .output import Block, joined, more, print_json, progress, say, table
from .settings import command

if TYPE_CHECKING:
    from ..comparing import Alone, Comparison, Row

HEAD = ("cosine", "in", "out", "align", "conflict", "clash")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge compare``."""

    files: Annotated[list[str], typer.Argument(help="Two LoRAs or more, in any dialects.")]
    modules: Annotated[bool, typer.Option("--modules", help="By module instead of by block, most conflict first.")] = (
        False
    )
    most: Annotated[int, typer.Option("--most", min=0, help="Modules to print.")] = 20
    heatmap: Annotated[Path | None, typer.Option("--heatmap", help="Draw the blocks into a .png or .svg file.")] = None
    rows: Annotated[int, typer.Option("--rows", min=1, help="Random rows per module for the sign conflict.")] = 64
    exact: Annotated[bool, typer.Option("--exact", help="The sign conflict of all rows: slower.")] = False
    seed: Annotated[int, typer.Option("--seed", min=0, help="Chooses the rows.")] = 0
    json: Annotated[bool, typer.Option("--json", help="For programs: every module and block.")] = False
    base: Base = None
    exclude: Exclude = None
    architecture: Arch = None
    allow_pickle: Pickle = False
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Say what LoRAs share and where they fight, before they are merged.

    Example: loramerge compare person.safetensors jersey.safetensors --heatmap shared.png
    """
    from ..comparing.advising import advice
    from ..comparing.analysis import compare

    if len(given.files) < 2:
        raise OptionError("A comparison needs two LoRAs or more.")
    if given.heatmap:
        from ..comparing.plots import check_heatmap

        check_heatmap(given.heatmap)
    with opened(given.files, architecture=given.architecture, allow_pickle=given.allow_pickle) as loras:
        with progress("Comparing", given.quiet) as report:
            found = compare(
                loras,
                rows=None if given.exact else given.rows,
                seed=given.seed,
                exclude=given.exclude or (),
                base=given.base,
                progress=report,
            )
        notes = [f"note: {lora.name}: {note}" for lora in loras for note in lora.notes]
    if given.heatmap:
        from ..comparing.plots import save_heatmap

        save_heatmap(found, given.heatmap)
    if given.json:
        print_json(found.to_dict() | {"advice": advice(found)})
    elif not given.quiet:
        say(as_text(found, notes, given.most if given.modules else None))
        if given.heatmap:
            say("", f"→ {given.heatmap}")


def as_text(found: "Comparison", notes: Sequence[str], most: int | None) -> Block:
    """Return everything that is printed: ``most`` modules of each pair, or blocks for None."""
    from ..comparing.advising import advice

    names = [f"{letter} = {name}" for letter, name in zip(found.letters, found.names, strict=True)]
    tables = [_by_block(found, pair) if most is None else _by_module(found, pair, most) for pair in found.total.pairs]
    return joined(
        [
            *names,
            *notes,
            *(line for text in tables for line in ("", text)),
            "",
            *_legend(found),
            *_dense(found),
            *_left(found),
            "",
            advice(found),
        ]
    )


def _by_block(found: "Comparison", pair: tuple[int, int]) -> Block:
    rows = [[row.name, str(row.pairs[pair].modules), *_cells(row, pair)] for row in (found.total, *found.by_block())]
    return table(["block", "modules", *_head(found, pair)], rows)


def _by_module(found: "Comparison", pair: tuple[int, int], most: int) -> Block:
    both = sorted((row for row in found.rows if row.pairs[pair].modules), key=lambda row: -row.pairs[pair].conflict)
    rows = [[row.name, *_cells(row, pair)] for row in (found.total, *both[:most])]
    left = more(len(both) - most, "none with more conflict")
    return joined([table(["module", *_head(found, pair)], rows), *[left] * bool(left)])


def _head(found: "Comparison", pair: tuple[int, int]) -> list[str]:
    a, b = (found.letters[i] for i in pair)
    return [f"‖{a}‖", f"‖{b}‖", *HEAD, f"rank {a}", f"rank {b}", f"rank {a}+{b}"]


def _cells(row: "Row", pair: tuple[int, int]) -> list[str]:
    first, second, both = row.alone[pair[0]], row.alone[pair[1]], row.pairs[pair]
    measures = both.cosine, both.input_overlap, both.output_overlap, both.alignment, both.conflict, both.clash
    shared = [f"{value:z.2f}" if both.modules else "–" for value in measures]
    ranks = [_rank(first), _rank(second), f"{both.sum_effective_rank:.1f}" if both.modules else "–"]
    return [_norm(first), _norm(second), *shared, *ranks]


def _norm(alone: "Alone") -> str:
    return f"{alone.norm:.4g}" if alone.modules else "–"


def _rank(alone: "Alone") -> str:
    return f"{alone.effective_rank:.1f}" if alone.modules else "–"


def _legend(found: "Comparison") -> tuple[str, ...]:
    sample = "all rows" if found.conflict_rows is None else f"{found.conflict_rows} random rows of each module"
    return (
        "in, out: overlap of input and of output spaces.  align: |cos| of columns.  rank: effective rank.",
        f"conflict: share of opposite signs, 0.50 by chance; from {sample}.",
        "clash: the same space and another update in it, 0 to 1; 0.50 where spaces are one and cosines 0.",
    )


def _dense(found: "Comparison") -> list[str]:
    """Return a line per LoRA and kind of layer that was compared as dense matrices."""
    from ..comparing.pairs import SHARE

    lines = []
    for (i, kind, on_base), n in sorted(Counter((d.lora, d.kind, d.on_base) for d in found.dense).items()):
        where = f"{kind} on {found.base}" if on_base else kind
        lines.append(
            f"dense: {counted(n, 'module')} of {found.letters[i]} ({where}); their spaces hold {SHARE:.0%} of ‖ΔW‖²"
        )
    return lines


def _left(found: "Comparison") -> list[str]:
    """Return a line per LoRA and kind of layer that has no ΔW to compare."""
    counts = Counter((n.lora, n.kind, n.on_base) for n in found.not_compared)
    return [
        f"not compared: {counted(n, 'module')} of {found.letters[i]} ({kind}{'; --base compares them' if on_base else ''})"
        for (i, kind, on_base), n in sorted(counts.items())
    ]
