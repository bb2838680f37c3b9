"""``loramerge sweep``: a grid as it is typed, and the table of its merges."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, counted, size
from .options import Changed, Pickle, Processes, Quiet, method_of, rank_of
from .output import as_typed, is_number, progress, resumable, say, table
from .settings import command

if TYPE_CHECKING:
    from ..merging import Recipe, Row
    from ..merging.methods import Method
    from ..merging.sweeping import Score


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge sweep``."""

    recipe: Annotated[str, typer.Argument(help="What all merges have in common: recipe.toml.")]
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory for the merges and their table.")]
    settings: Annotated[
        list[str],
        typer.Option(
            "--set", "-s", help="NAME=VALUE,VALUE,…: method, rank, max_error, an option …; weights as 0.7/0.5,l2."
        ),
    ]
    score: Annotated[
        str | None, typer.Option("--score", help="package.module:function that returns your own figures of a LoRA.")
    ] = None
    sort: Annotated[str | None, typer.Option("--sort", help="Column to sort by; -COLUMN for falling.")] = None
    allow_changed: Changed = False
    allow_pickle: Pickle = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the names of the merges and write nothing.")] = False
    workers: Processes = 1
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Merge a recipe with every combination of settings, and compare what comes out.

    What is there already is kept: an interrupted sweep goes on where it stopped.

    Example: loramerge sweep recipe.toml --set method=ties,dare --set density=0.1,0.3 -o out/
    """
    from ..merging.grid import points
    from ..merging.ledger import ordered
    from ..merging.recipe import Recipe
    from ..merging.sweeping import sweep

    recipe = Recipe.read(given.recipe)
    grid = read_grid(recipe, given.settings)
    todo = points(recipe, grid)
    if not given.quiet:
        for note in _notes(recipe, grid, len(todo)):
            say(note)
    if given.dry_run:
        say(*(point.name for point in todo))
        return
    scored = load_score(given.score) if given.score else None
    with resumable("what was merged"), progress("Sweeping", given.quiet) as report:
        rows = sweep(
            recipe,
            grid,
            given.output,
            score=scored,
            allow_changed=given.allow_changed,
            allow_pickle=given.allow_pickle,
            workers=given.workers,
            progress=report,
        )
    rows = ordered(rows, given.sort) if given.sort else rows
    if not given.quiet:
        say(shown(rows))
        reused = sum(row.reused for row in rows)
        there = f", {reused} of them there already" if reused else ""
        say(f"→ {given.output}: {counted(len(rows), 'merge')}{there}, sweep.csv, sweep.json")
    failed = [(row.name, row.failed) for row in rows if row.failed]
    for name, reason in failed:
        say(f"error: {name}: {as_typed(reason)}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def read_grid(recipe: "Recipe", given: Sequence[str]) -> dict[str, list[Any]]:
    """Read the grid from NAME=VALUE,VALUE,…

    Raises:
        OptionError: An item has no name or no value, or a name stands twice.
    """
    texts: dict[str, list[str]] = {}
    for item in given:
        name, equals, values = item.partition("=")
        if not equals or not name or name in texts:
            raise OptionError(f"Can't read the setting {item!r}: wanted NAME=VALUE,VALUE,…, each name once.")
        texts[name] = [text.strip() for text in _split(values)]
    methods = [method_of(text) for text in texts["method"]] if "method" in texts else [recipe.method]
    found = {name: [_value(name, text, methods) for text in values] for name, values in texts.items()}
    return found | ({"method": methods} if "method" in texts else {})


def _split(text: str) -> list[str]:
    """Split values at their commas, but not at those between the numbers of ``lbw:1,0,…``."""
    found: list[str] = []
    for piece in text.split(","):
        inside = found and found[-1].rpartition("/")[2].strip().startswith("lbw:")
        if inside and is_number(piece.partition("/")[0].strip()):
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return found


def _value(name: str, text: str, methods: "Sequence[Method | str]") -> Any:
    from ..merging.grid import SETTINGS
    from ..merging.methods import find
    from ..merging.rules import RULES
    from ..merging.weights import parse

    if name == "rank":
        return rank_of(text)
    if name == "weights":
        return (
            text
            if text in RULES or text.endswith(".safetensors")
            else tuple(parse(weight) for weight in text.split("/"))
        )
    if name in SETTINGS:
        return text
    options = [method.options[name] for method in map(find, methods) if name in method.options]
    return options[0].parse(text) if options else text


def load_score(text: str) -> "Score":
    """Import the function that ``package.module:function`` names; the module may be in the working directory.

    Raises:
        OptionError: There is none.
    """
    from ..registry import from_here, referenced

    with from_here():
        found = referenced(text, "score")
    if not callable(found):
        raise OptionError(
            f"The score {text!r} is a {type(found).__name__}, wanted a function: package.module:function."
        )
    return found  # type: ignore[no-any-return]


def _notes(recipe: "Recipe", grid: dict[str, list[Any]], count: int) -> list[str]:
    from ..merging.grid import left_out

    notes = [f"note: {name} is left out for {', '.join(m)}" for name, m in left_out(recipe, grid).items()]
    asked = 1
    for values in grid.values():
        asked *= len(values)
    return (
        [*notes, f"note: {asked} combinations, of which {count} differ: each is merged once"]
        if asked > count
        else notes
    )


def shown(rows: "Sequence[Row]") -> str:
    """Return the table of a sweep for people."""
    own = ("size", "rank_min", "rank_max", "error")
    others = list(dict.fromkeys(c for row in rows for c in row.figures if c not in own))
    cells = [
        [
            row.name,
            size(row.figures["size"] or 0) if row.figures else "failed",
            _rank(row),
            *(_cell(row[c]) for c in ("error", *others)),
        ]
        for row in rows
    ]
    return table(["merge", "size", "rank", "error", *others], cells)


def _rank(row: "Row") -> str:
    low, high = row["rank_min"], row["rank_max"]
    if low is None:
        return "–"
    return f"{low}" if low == high else f"{low}-{high}"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
