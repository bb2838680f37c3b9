"""``loramerge compare``: what LoRAs share and where they fight."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..comparing.advising import advice
from ..comparing.analysis import Comparison, Row, compare
from ..comparing.measures import Alone
from ..comparing.pairs import SHARE
from ..errors import OptionError
from ..files.reading import open
from .output import progress, table

HEAD = ("cosine", "in", "out", "align", "conflict", "clash")


def show(
    files: Sequence[str],
    *,
    rows: int | None,
    seed: int,
    modules: bool,
    most: int,
    as_json: bool,
    heatmap: Path | None,
    base: Path | None,
    exclude: Sequence[str],
    architecture: str | None,
    pickle: bool,
    quiet: bool,
) -> None:
    """Compare files and print what was found."""
    if len(files) < 2:
        raise OptionError("A comparison needs two LoRAs or more.")
    if heatmap:
        from ..comparing.plots import check_heatmap

        check_heatmap(heatmap)
    loras = [open(file, architecture=architecture, allow_pickle=pickle) for file in files]
    with progress("Comparing", quiet) as report:
        found = compare(loras, rows=rows, seed=seed, exclude=exclude, base=base, progress=report)
    notes = [f"note: {lora.name}: {note}" for lora in loras for note in lora.notes]
    for lora in loras:
        lora.close()
    if heatmap:
        from ..comparing.plots import save_heatmap

        save_heatmap(found, heatmap)
    if as_json:
        print(json.dumps(found.to_dict() | {"advice": advice(found)}, indent=2))
    elif not quiet:
        print(_report(found, notes, most if modules else None))
        if heatmap:
            print(f"\n→ {heatmap}")


def _report(found: Comparison, notes: Sequence[str], most: int | None) -> str:
    """Everything that is printed; ``most`` modules of each pair, or blocks for None."""
    names = [f"{letter} = {name}" for letter, name in zip(found.letters, found.names, strict=True)]
    tables = [_by_block(found, pair) if most is None else _by_module(found, pair, most) for pair in found.total.pairs]
    return "\n".join(
        [
            *names,
            *notes,
            *(f"\n{text}" for text in tables),
            "",
            _legend(found),
            *_dense(found),
            *_left(found),
            "",
            advice(found),
        ]
    )


def _by_block(found: Comparison, pair: tuple[int, int]) -> str:
    rows = [[row.name, str(row.pairs[pair].modules), *_cells(row, pair)] for row in (found.total, *found.by_block())]
    return table(["block", "modules", *_head(found, pair)], rows)


def _by_module(found: Comparison, pair: tuple[int, int], most: int) -> str:
    both = sorted((row for row in found.rows if row.pairs[pair].modules), key=lambda row: -row.pairs[pair].conflict)
    rows = [[row.name, *_cells(row, pair)] for row in (found.total, *both[:most])]
    left = len(both) - most
    more = f"\n… and {left} more, none with more conflict" if left > 0 else ""
    return table(["module", *_head(found, pair)], rows) + more


def _head(found: Comparison, pair: tuple[int, int]) -> list[str]:
    a, b = (found.letters[i] for i in pair)
    return [f"‖{a}‖", f"‖{b}‖", *HEAD, f"rank {a}", f"rank {b}", f"rank {a}+{b}"]


def _cells(row: Row, pair: tuple[int, int]) -> list[str]:
    first, second, both = row.alone[pair[0]], row.alone[pair[1]], row.pairs[pair]
    measures = both.cosine, both.input_overlap, both.output_overlap, both.alignment, both.conflict, both.clash
    shared = [f"{value:z.2f}" if both.modules else "–" for value in measures]
    ranks = [_rank(first), _rank(second), f"{both.sum_effective_rank:.1f}" if both.modules else "–"]
    return [_norm(first), _norm(second), *shared, *ranks]


def _norm(alone: Alone) -> str:
    return f"{alone.norm:.4g}" if alone.modules else "–"


def _rank(alone: Alone) -> str:
    return f"{alone.effective_rank:.1f}" if alone.modules else "–"


def _legend(found: Comparison) -> str:
    sample = "all rows" if found.conflict_rows is None else f"{found.conflict_rows} random rows of each module"
    return (
        "in, out: overlap of input and of output spaces.  align: |cos| of columns.  rank: effective rank.\n"
        f"conflict: share of opposite signs, 0.50 by chance; from {sample}.\n"
        "clash: the same space and another update in it, 0 to 1; 0.50 where spaces are one and cosines 0."
    )


def _dense(found: Comparison) -> list[str]:
    """How many layers of which kinds were compared as dense matrices."""
    lines = []
    for (i, kind, on_base), n in sorted(Counter((d.lora, d.kind, d.on_base) for d in found.dense).items()):
        where = f"{kind} on {found.base}" if on_base else kind
        lines.append(f"dense: {n} modules of {found.letters[i]} ({where}); their spaces hold {SHARE:.0%} of ‖ΔW‖²")
    return lines


def _left(found: Comparison) -> list[str]:
    """How many layers of which kinds have no ΔW to compare."""
    counts = Counter((n.lora, n.kind, n.on_base) for n in found.not_compared)
    return [
        f"not compared: {n} modules of {found.letters[i]} ({kind}{'; --base compares them' if on_base else ''})"
        for (i, kind, on_base), n in sorted(counts.items())
    ]
