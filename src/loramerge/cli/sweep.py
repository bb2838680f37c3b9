"""``loramerge sweep``: a grid as it is typed, and the table of its merges."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..errors import OptionError, size
from ..merging.grid import SETTINGS, left_out, points
from ..merging.ledger import Row, ordered
from ..merging.methods import Method, find
from ..merging.recipe import Recipe
from ..merging.sweeping import Score, sweep
from ..merging.weights import parse
from ..registry import from_here, referenced
from .options import method_of, rank_of
from .output import progress, table


def sweep_by(
    file: str,
    given: Sequence[str],
    output: Path,
    *,
    score: str | None,
    sort: str | None,
    dry_run: bool,
    allow_changed: bool,
    allow_pickle: bool,
    workers: int,
    quiet: bool,
) -> None:
    """Run a grid of a recipe, and print the table."""
    recipe = Recipe.read(file)
    grid = read_grid(recipe, given)
    todo = points(recipe, grid)
    if not quiet:
        for note in _notes(recipe, grid, len(todo)):
            print(note)
    if dry_run:
        print("\n".join(point.name for point in todo))
        return
    scored = load_score(score) if score else None
    with progress("Sweeping", quiet) as report:
        rows = sweep(
            recipe,
            grid,
            output,
            score=scored,
            allow_changed=allow_changed,
            allow_pickle=allow_pickle,
            workers=workers,
            progress=report,
        )
    rows = ordered(rows, sort) if sort else rows
    if not quiet:
        print(shown(rows))
        reused = sum(row.reused for row in rows)
        there = f", {reused} of them there already" if reused else ""
        print(f"→ {output}: {len(rows)} merges{there}, sweep.csv, sweep.json")
    failed = [row for row in rows if row.failed]
    for row in failed:
        print(f"error: {row.name}: {row.failed}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def read_grid(recipe: Recipe, given: Sequence[str]) -> dict[str, list[Any]]:
    """The grid from NAME=VALUE,VALUE,…

    Raises:
        OptionError: An item has no name or no value, or a name stands twice.
    """
    texts: dict[str, list[str]] = {}
    for item in given:
        name, equals, values = item.partition("=")
        if not equals or not name or name in texts:
            raise OptionError(f"Can't read the setting {item!r}: wanted NAME=VALUE,VALUE,…, each name once.")
        texts[name] = [text.strip() for text in values.split(",")]
    methods = [method_of(text) for text in texts["method"]] if "method" in texts else [recipe.method]
    found = {name: [_value(name, text, methods) for text in values] for name, values in texts.items()}
    return found | ({"method": methods} if "method" in texts else {})


def _value(name: str, text: str, methods: Sequence[Method | str]) -> Any:
    if name == "rank":
        return rank_of(text)
    if name == "weights":
        return text if text in ("l2", "uniform") else tuple(parse(weight) for weight in text.split("/"))
    if name in SETTINGS:
        return text
    options = [method.options[name] for method in map(find, methods) if name in method.options]
    return options[0].parse(text) if options else text


def load_score(text: str) -> Score:
    """The function that ``package.module:function`` names; modules beside where one stands are found.

    Raises:
        OptionError: There is none.
    """
    with from_here():
        found = referenced(text, "score")
    if not callable(found):
        raise OptionError(
            f"The score {text!r} is a {type(found).__name__}, wanted a function: package.module:function."
        )
    return found  # type: ignore[no-any-return]


def _notes(recipe: Recipe, grid: dict[str, list[Any]], count: int) -> list[str]:
    notes = [f"note: {name} is left out for {', '.join(m)}" for name, m in left_out(recipe, grid).items()]
    asked = 1
    for values in grid.values():
        asked *= len(values)
    return (
        [*notes, f"note: {asked} combinations, of which {count} differ: each is merged once"]
        if asked > count
        else notes
    )


def shown(rows: Sequence[Row]) -> str:
    """The table of a sweep for people."""
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


def _rank(row: Row) -> str:
    low, high = row["rank_min"], row["rank_max"]
    if low is None:
        return "–"
    return f"{low}" if low == high else f"{low}-{high}"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
